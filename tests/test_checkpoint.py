"""From a name to a proven folder: everything travels, what was not proven is said, and a failure leaves nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, SameProcess, edit_json, edit_weights, names, write_gguf, write_remote
from families import tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from world import TEMPLATE, byte_tokenizer, write_model

from layerscalpel import checkpoint
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.cli import main
from layerscalpel.cut import cut_model
from layerscalpel.decoder import load_decoder, num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.history import cut_history, parent_of
from layerscalpel.origin import Origin, peek
from layerscalpel.probe import find_layers
from layerscalpel.proof import LogitsProof, prove_twin
from layerscalpel.segment import Segment
from layerscalpel.shards import read_weights

SEGMENT = Segment(2, 5, 8)
slow = partial(pytest.param, marks=pytest.mark.slow)


PROVEN: dict[tuple[Any, ...], LogitsProof] = {}
ASK = SameProcess.ask


def proven_once(witness: Any, twin: PreTrainedModel, segment: Segment, **settings: Any) -> LogitsProof:
    """Return the proof of a twin's cut; that of a twin alike is the same, unless what proves it was changed."""
    if type(witness) is not SameProcess or SameProcess.ask is not ASK:
        return prove_twin(witness, twin, segment, **settings)
    config = twin.config.to_dict() | {"_name_or_path": "wherever its parent lies"}
    asked = (type(twin), json.dumps(config, sort_keys=True), segment, *settings.items())
    if asked not in PROVEN:
        PROVEN[asked] = prove_twin(witness, twin, segment, **settings)
    return PROVEN[asked]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The fresh process takes seconds and has tests of its own; what it finds of a twin is asked once."""
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    monkeypatch.setattr(checkpoint, "prove_twin", proven_once)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A folder with a parent and its cut `out`, read by tests and changed by none."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Witness", SameProcess)
        cut(written(folder), folder / "out")
    return folder


def written(folder: Path, family: str = "llama", **changes: object) -> Path:
    """Save a tiny model of a family without a tokenizer."""
    return save_decoder(tiny(family, **changes), None, folder / "parent")


def cut(source: Path, out: Path, segment: Segment = SEGMENT, **settings: Any) -> dict[str, Any]:
    return cut_checkpoint(peek(str(source), allow_quantised=True), segment, out, **settings)


def logits_of(folder: Path, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def expected_logits(family: str) -> torch.Tensor:
    with torch.no_grad():
        return cut_model(find_layers(tiny(family)), SEGMENT)[0](tokens(), use_cache=False).logits


def refused(tmp_path: Path, said: str, *given: Any, **settings: Any) -> None:
    """Assert that a cut is refused with one line, and that nothing is left of it."""
    before = names(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        cut(*(given or (tmp_path / "parent", tmp_path / "out")), **settings)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", slow("qwen2_moe")])
def test_a_cut_is_proven_in_all_parts_where_it_fits_in_memory(family, tmp_path):
    found = cut(written(tmp_path, family), tmp_path / "out")
    assert found["proof"]["kind"] == "fresh process"
    for part in ("logits", "twin"):
        assert found["proof"][part]["logits_equal"]
        assert found["proof"][part]["generation_equal"]
    assert found["proof"]["tensors"]["num_tensors"] == len(read_weights(tmp_path / "out").tensors)
    assert found["proof"]["left_out"] == {}
    assert torch.equal(logits_of(tmp_path / "out"), expected_logits(family))
    assert found["parameters"] == num_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert found["bytes"] == read_weights(tmp_path / "out").num_bytes()
    assert "num_hidden_layers" in found["config_changes"] or "n_layer" in found["config_changes"]
    assert json.loads(json.dumps(found, allow_nan=False))["proof"]["logits"]["tokens"] == [2, 24]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_moe", slow("llama"), slow("lfm2")])
def test_a_cut_is_proven_in_three_parts_with_its_weights_on_disk(family, tmp_path):
    found = cut(written(tmp_path, family), tmp_path / "out", proof="parts")
    assert found["proof"]["kind"] == "three parts"
    assert found["proof"]["logits"]["loaded"] == "fresh process, weights on disk"
    assert found["proof"]["logits"]["logits_equal"]
    assert found["proof"]["logits"]["tokens"] == (1, 8)
    assert found["proof"]["logits"]["generation_equal"] is None
    assert found["proof"]["twin"]["generation_equal"]
    assert found["proof"]["tensors"]["num_bytes"] == read_weights(tmp_path / "out").num_bytes()
    assert found["proof"]["left_out"] == {}
    assert torch.equal(logits_of(tmp_path / "out"), expected_logits(family))


def test_half_precision_stays_and_is_proven_in_float32(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "parent", dtype="bfloat16")
    found = cut(tmp_path / "parent", tmp_path / "out", device="cpu")
    assert found["proof"]["logits"]["dtype"] == "float32"
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").tensors.values()} == {"BF16"}
    assert found["bytes"] == read_weights(tmp_path / "out").num_bytes() == 2 * found["parameters"]


def test_shards_stay_shards(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    found = cut(tmp_path / "parent", tmp_path / "out")
    assert found["proof"]["logits"]["logits_equal"]
    assert len(read_weights(tmp_path / "out").metadata) > 1


def test_everything_travels_with_the_checkpoint(tmp_path):
    source = write_model(tmp_path / "parent")
    GenerationConfig(temperature=0.7, top_p=0.5, do_sample=True, eos_token_id=[2, 5]).save_pretrained(source)
    (source / "LICENSE").write_text("free", encoding="utf-8")
    cut(source, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert after("dusk").input_ids == before("dusk").input_ids
    assert after.get_vocab() == before.get_vocab() == byte_tokenizer().get_vocab()
    assert after.chat_template == TEMPLATE
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.temperature, generation.top_p, generation.eos_token_id) == (0.7, 0.5, [2, 5])
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "free"
    assert names(tmp_path / "out") == sorted({*names(source), "layerscalpel.json"})


def test_a_checkpoint_without_a_tokenizer_is_cut(plain):
    assert not [name for name in names(plain / "out") if "token" in name]
    assert load_decoder(str(plain / "out")).tokenizer is None


def test_a_loaded_parent_is_not_loaded_again(tmp_path, monkeypatch):
    parent = load_decoder(str(written(tmp_path)))
    monkeypatch.setattr(checkpoint, "load_origin", lambda *_, **__: pytest.fail("the parent was loaded twice"))
    assert cut(tmp_path / "parent", tmp_path / "out", parent=parent)["proof"]["logits"]["logits_equal"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    written(tmp_path)
    (tmp_path / "out").mkdir()
    cut(tmp_path / "parent", tmp_path / "out")
    refused(tmp_path, "out already holds files, or is a link - choose another or remove it")


def test_cutting_twice_keeps_the_chain_back_to_the_first_parent(tmp_path):
    source = written(tmp_path)
    cut(source, tmp_path / "once")
    cut(tmp_path / "once", tmp_path / "twice", Segment(0, 1, 5))
    history = json.loads((tmp_path / "twice" / "layerscalpel.json").read_text(encoding="utf-8"))
    first = {"parent": "../parent", "segment": [2, 5], "num_layers": 8}
    assert history == {"parent": "../once", "segment": [0, 1], "num_layers": 5, "before": first}
    assert json.loads((tmp_path / "once" / "layerscalpel.json").read_text(encoding="utf-8")) == first


def test_a_parent_is_named_as_it_can_be_found_again(tmp_path, monkeypatch):
    hub = Origin("org/model", "hub", "org/model", 8, None, "float32", pickled=True)
    demo = Origin("demo", "gguf", "/somewhere/demo.gguf", 8, None, "bfloat16")
    assert cut_history(hub, SEGMENT, tmp_path)["parent"] == "org/model"
    assert cut_history(demo, SEGMENT, tmp_path)["parent"] == "demo"
    source = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    cut(Path("parent"), tmp_path / "deep" / "out")
    assert parent_of(tmp_path / "deep" / "out") == (str(source), "2:5")
    (tmp_path / "deep").rename(tmp_path / "moved")
    assert parent_of(tmp_path / "moved" / "out") == (str(source), "2:5")
    with pytest.raises(UserError, match=r"was not cut by scalpel"):
        parent_of(source)


def test_no_path_of_this_machine_is_written(plain):
    assert names(plain / "out")
    for path in (plain / "out").iterdir():
        assert str(plain).encode() not in path.read_bytes(), path.name


def test_weights_under_another_name_are_refused(tmp_path):
    source = written(tmp_path)
    edit_json(source / "config.json", transformers_weights="other.safetensors")
    refused(tmp_path, r"transformers_weights.* name that file model\.safetensors")


def test_an_adapter_is_refused(tmp_path):
    (written(tmp_path) / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(tmp_path, "holds an adapter .* merge it")


def test_generation_settings_of_an_old_config_travel(tmp_path):
    source = written(tmp_path)
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", do_sample=True, top_p=0.9, temperature=0.7)
    cut(source, tmp_path / "out")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(place).generation_config for place in (source, tmp_path / "out")
    )
    assert (ours.do_sample, ours.top_p, ours.temperature) == (theirs.do_sample, theirs.top_p, theirs.temperature)
    assert ours.top_p == 0.9


def test_odd_generation_settings_of_the_parent_do_not_fail_the_proof(tmp_path):
    source = written(tmp_path)
    edit_json(source / "generation_config.json", repetition_penalty=1.5, num_beams=2)
    assert cut(source, tmp_path / "out")["proof"]["logits"]["generation_equal"]


def test_a_card_that_fails_leaves_nothing(tmp_path):
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    source = written(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cut_checkpoint(peek(str(source)), SEGMENT, tmp_path / "out", device="cpu", proof="none", card=fail)
    assert names(tmp_path) == ["parent", *(f"parent/{name}" for name in names(source))]


@pytest.mark.parametrize("out", [".", "link", "x" * 300, "q/.."])
def test_a_folder_that_cannot_be_made_is_refused_at_once(out, tmp_path, monkeypatch, capsys):
    written(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if out == "." else tmp_path)
    monkeypatch.setattr(checkpoint, "plan_cut", lambda *_: pytest.fail("work began"))
    assert main(["cut", str(tmp_path / "parent"), "--segment", "2:5", "--out", out, "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_damaged_history_is_refused(content, tmp_path):
    (written(tmp_path) / "layerscalpel.json").write_text(content, encoding="utf-8")
    refused(tmp_path, r"layerscalpel\.json is damaged")


# ---------------------------------------------------------------------------------------------- what is left out


def test_without_time_the_logits_are_left_out_and_that_is_said(tmp_path):
    proof = cut(written(tmp_path), tmp_path / "out", proof="parts", minutes=0)["proof"]
    assert proof["logits"] is None
    assert proof["twin"]["logits_equal"]
    assert proof["tensors"]["num_tensors"]
    (reason,) = proof["left_out"].items()
    assert reason[0] == "logits"
    assert "reading both checkpoints would take about" in reason[1]
    assert proof["kind"] == "two parts"


def test_a_model_larger_than_the_memory_is_proven_in_parts(tmp_path, monkeypatch):
    needed = 4 * num_parameters(tiny("llama"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _device: needed)
    assert cut(written(tmp_path), tmp_path / "out")["proof"]["kind"] == "three parts"
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _device: needed / 0.9 + 1)
    assert cut(tmp_path / "parent", tmp_path / "again")["proof"]["kind"] == "fresh process"


def test_a_tensor_larger_than_the_memory_leaves_the_logits_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _device: 1000)
    proof = cut(written(tmp_path), tmp_path / "out")["proof"]
    assert (proof["kind"], proof["logits"]) == ("two parts", None)
    assert "to load its largest tensor takes 0.0 GiB" in proof["left_out"]["logits"]


def no_twin(_config: object) -> None:
    raise UserError("a tiny twin cannot be built: a reason")


def test_a_model_without_a_twin_is_proven_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "twin_model", no_twin)
    proof = cut(written(tmp_path), tmp_path / "out")["proof"]
    assert proof["logits"]["logits_equal"]
    assert (proof["twin"], proof["left_out"]) == (None, {"twin": "a tiny twin cannot be built: a reason"})


@pytest.mark.parametrize("settings", [{"proof": "parts"}, {"proof": "auto"}])
def test_a_model_too_large_and_without_a_twin_is_refused(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(checkpoint, "twin_model", no_twin)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _device: 1000)
    written(tmp_path)
    refused(
        tmp_path, "is too large to be compared in memory, and a tiny twin cannot be built: a reason - use", **settings
    )


def test_no_proof_is_told_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr(SameProcess, "ask", lambda *_: pytest.fail("something was proven"))
    found = cut(written(tmp_path), tmp_path / "out", proof="none")
    assert found["proof"] is None
    assert torch.equal(logits_of(tmp_path / "out"), expected_logits("llama"))


@pytest.mark.parametrize("kind", ["gguf", "pickle"])
def test_what_is_no_safetensors_is_cut_in_memory(kind, tmp_path):
    model = tiny("llama", num_hidden_layers=6, rms_norm_eps=2**-20)
    if kind == "gguf":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        write_gguf(tmp_path / "parent.gguf", model)
        origin = peek(str(tmp_path / "parent.gguf"))
    else:
        folder = save_decoder(model, byte_tokenizer(), tmp_path / "parent")
        torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
        (folder / SINGLE).unlink()
        origin = peek(str(folder), allow_pickle=True)
    segment = Segment(2, 4, 6)
    proof = cut_checkpoint(origin, segment, tmp_path / "out", device="cpu")["proof"]
    assert proof["logits"]["logits_equal"]
    assert proof["twin"]["logits_equal"]
    assert proof["left_out"].keys() == {"tensors"}
    with torch.no_grad():
        expected = cut_model(find_layers(model), segment)[0](tokens(), use_cache=False).logits
    assert torch.equal(logits_of(tmp_path / "out"), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="too large to be compared in memory, and the parent's numbers were converted"):
        cut_checkpoint(origin, segment, tmp_path / "parts", device="cpu", proof="parts")
    assert not (tmp_path / "parts").exists()


# ---------------------------------------------------------------------------------------------- what fails


class WrongAt(SameProcess):
    """Finds one parameter too many at the n-th question; 0 is the twin's, 1 the checkpoint's."""

    asked, wrong_at = 0, 0

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        answer = super().ask(task)
        WrongAt.asked += 1
        return answer | ({"parameters": 7} if WrongAt.asked == self.wrong_at else {})


@pytest.mark.parametrize(
    ("wrong_at", "what"), [(1, "a tiny twin of this LlamaForCausalLM"), (2, r"the checkpoint .*out")]
)
def test_a_failed_proof_leaves_nothing(wrong_at, what, tmp_path, monkeypatch):
    monkeypatch.setattr(WrongAt, "asked", 0)
    monkeypatch.setattr(WrongAt, "wrong_at", wrong_at)
    monkeypatch.setattr(checkpoint, "Witness", WrongAt)
    written(tmp_path)
    refused(tmp_path, rf"{what}.* failed its proof: 7 parameters where")
    assert WrongAt.asked == wrong_at


def test_a_copy_that_went_wrong_leaves_nothing(tmp_path, monkeypatch):
    plain = checkpoint.cut_folder

    def spoiled(*given: Any) -> Any:
        copy, renamed = plain(*given)
        stored = load_file(copy.folder / SINGLE)
        stored["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
        save_file(stored, copy.folder / SINGLE, metadata={"format": "pt"})
        return read_weights(copy.folder), renamed

    monkeypatch.setattr(checkpoint, "cut_folder", spoiled)
    written(tmp_path)
    refused(tmp_path, r"1 tensors of .* are not those of the parent \(model\.layers\.3\.mlp\.up_proj\.weight\)")


OTHER_CONFIGS = [
    ({"num_hidden_layers": 6}, r"the files hold model\.layers\.6 beyond the 6 layers"),
    ({"num_hidden_layers": 9}, r"model .* lacks 9 tensors of the right shape \(model\.layers\.8\.\w+"),
    ({"intermediate_size": 64}, r"model .* lacks 24 tensors of the right shape \(model\.layers\.0\.mlp\.down_proj"),
    ({"vocab_size": 101}, r"model .* lacks 2 tensors of the right shape \(lm_head\.weight, model\.embed_tokens"),
]


@pytest.mark.parametrize(
    ("changes", "said", "proof"),
    [
        (slow if i % 2 == (proof == "auto") else pytest.param)(*other, proof)
        for i, other in enumerate(OTHER_CONFIGS)
        for proof in ("auto", "none")
    ],
)
def test_files_of_another_config_are_refused(changes, said, proof, tmp_path):
    edit_json(written(tmp_path) / "config.json", **changes)
    segment = Segment(2, 4, changes.get("num_hidden_layers", 8))
    refused(tmp_path, said, tmp_path / "parent", tmp_path / "out", segment, proof=proof)


SETTINGS = [{}, {"proof": "parts", "minutes": 0}, {"proof": "none"}]


def with_settings(cases: list[tuple]) -> list:
    """Combine every case with all settings; the default tier has each case, and each of the settings, at least once."""
    return [
        (pytest.param if j == i % len(SETTINGS) else slow)(*case, settings)
        for i, case in enumerate(cases)
        for j, settings in enumerate(SETTINGS)
    ]


@pytest.mark.parametrize(("shape", "settings"), with_settings([((32, 24, 2),), ((48, 32),), ((1536,),), ((16, 48),)]))
def test_a_tensor_of_another_shape_is_refused(shape, settings, tmp_path):
    """Whatever the proof: transformers would fill in random numbers."""
    name, count = "model.layers.6.mlp.down_proj.weight", torch.Size(shape).numel()
    edit_weights(written(tmp_path), lambda stored: stored.update({name: stored[name].flatten()[:count].view(shape)}))
    refused(tmp_path, rf"model .* lacks 1 tensors of the right shape \({name}\) - fetch it again", **settings)


@pytest.mark.parametrize(
    ("family", "name", "said", "settings"),
    with_settings(
        [
            (
                "llama",
                "model.layers.6.mlp.up_proj.weight",
                r"lacks 1 tensors of the right shape \(model\.layers\.6\.mlp",
            ),
            ("gemma3_text", "model.norm.weight", r"lacks 1 tensors of the right shape \(model\.norm\.weight\)"),
            ("qwen3_moe", "model.layers.6.mlp.experts.2.up_proj.weight", "cannot be loaded: its tensors cannot be put"),
        ]
    ),
)
def test_a_tensor_that_is_not_there_is_refused(family, name, said, settings, tmp_path):
    edit_weights(written(tmp_path, family), lambda stored: stored.pop(name))
    refused(tmp_path, said, **settings)


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1000}))
    refused(
        tmp_path, r"no space left for the checkpoint in .* GiB needed, 0\.0 free - free some or choose another --out"
    )


# ---------------------------------------------------------------------------------------------- quantised


def quantised(tmp_path: Path, **settings: object) -> Path:
    """Write a checkpoint of packed bytes in the layers, and a config that lists modules by their layer."""
    folder = written(tmp_path)
    stored = load_file(folder / SINGLE)
    for i in range(8):
        stored[f"model.layers.{i}.mlp.up_proj.weight"] = torch.full((768,), i, dtype=torch.uint8)
        stored[f"model.layers.{i}.mlp.up_proj.scale"] = torch.full((2,), float(i))
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    listed = ["model.layers.3.mlp.gate_proj", "model.layers.6.mlp.gate_proj", "lm_head"]
    edit_json(folder / "config.json", quantization_config={"modules_to_not_convert": listed, **settings})
    return folder


def test_a_quantised_checkpoint_is_cut_with_its_names(tmp_path):
    found = cut(quantised(tmp_path, quant_method="gptq", bits=4), tmp_path / "out", proof="none")
    stored = load_file(tmp_path / "out" / SINGLE)
    assert [int(stored[f"model.layers.{i}.mlp.up_proj.weight"][0]) for i in range(5)] == [0, 1, 5, 6, 7]
    assert [int(stored[f"model.layers.{i}.mlp.up_proj.scale"][0]) for i in range(5)] == [0, 1, 5, 6, 7]
    stated = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stated["modules_to_not_convert"] == ["model.layers.3.mlp.gate_proj", "lm_head"]
    assert found["bytes"] == read_weights(tmp_path / "out").num_bytes()


def test_a_quantised_checkpoint_that_cannot_be_loaded_here_is_not_proven(tmp_path):
    quantised(tmp_path, quant_method="gptq", bits=4)
    refused(
        tmp_path, r"is quantised \(gptq\) and cannot be loaded here to prove its cut: .* - install that, or --no-verif"
    )


# ---------------------------------------------------------------------------------------------- code that comes along


def touches(marker: Path) -> str:
    return f"open({str(marker)!r}, 'a').close()"


@pytest.mark.parametrize("command", [["inspect"], ["cut", "--segment", "2:5", "--out", "out"], ["run", "--out", "out"]])
def test_code_of_a_checkpoint_is_not_run_without_permission(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_remote(tmp_path / "parent", touches(tmp_path / "marker"))
    capsys.readouterr()
    assert main([command[0], str(tmp_path / "parent"), *command[1:]]) == 2
    said = capsys.readouterr().err
    assert "comes with code of its own, which is not run without permission" in said
    assert "--trust-remote-code" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()


def test_code_of_a_checkpoint_is_run_with_permission_and_travels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_remote(tmp_path / "parent", touches(tmp_path / "marker"))
    assert main(["cut", "parent", "--segment", "2:5", "--out", "out", "--trust-remote-code", "--quiet"]) == 0
    assert (tmp_path / "marker").exists()
    assert "proven (fresh process)" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"
    assert torch.equal(logits_of(tmp_path / "out", trust_remote_code=True), expected_logits("llama"))


def test_code_beside_a_known_family_is_not_run_and_not_needed(tmp_path):
    write_remote(tmp_path / "parent", touches(tmp_path / "marker"))
    edit_json(tmp_path / "parent" / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert cut(tmp_path / "parent", tmp_path / "out")["proof"]["logits"]["logits_equal"]
    assert not (tmp_path / "marker").exists()


def test_code_that_needs_what_is_not_installed_is_refused_with_one_line(tmp_path):
    write_remote(tmp_path / "parent", "import no_such_package_here")
    with pytest.raises(UserError, match=r"model .* cannot be read: .*no_such_package_here") as caught:
        peek(str(tmp_path / "parent"), trust_remote_code=True)
    assert "\n" not in str(caught.value)

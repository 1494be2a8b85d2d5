"""Quantising in the product: the best attempt is kept and proven, the run goes on with it, mistakes are told early."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess, edit_weights
from families import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import write_model, write_recipe, write_texts

from layerscalpel import beside, checkpoint, measuring, quantproof, rtn
from layerscalpel.card import model_card
from layerscalpel.cli import main
from layerscalpel.config import build_config
from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import STAGES, fingerprints
from layerscalpel.footprint import folder_bytes
from layerscalpel.quantize import BACKENDS, FEWEST_TOKENS, quantize_checkpoint
from layerscalpel.quantizing import split
from layerscalpel.quantproof import check_tensors
from layerscalpel.quantwords import byte_rows, quantize_warnings
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings

pytest.importorskip("compressed_tensors", reason="it stores what is quantised (extra quant)")
RTN = QuantizeSettings(method="rtn")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


def blocks(num: int, length: int = 16, seed: int = 0) -> TokenBlocks:
    ids = torch.randint(3, 250, (num, length), generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "random", num, {})


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, without_drawings) -> None:
    """One test takes a fresh process; the others are about something else."""
    monkeypatch.setattr(quantproof, "Witness", SameProcess)
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint whose widths groups divide, texts and a recipe."""
    folder = tmp_path_factory.mktemp("quantize")
    write_model(folder / "model", **WIDE)
    short = {
        "benchmark__enabled": False,
        "evaluate__long_blocks": 0,
        "search__method": "last",
        "data__block_tokens": 16,
    }
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"), **short)
    return folder


def scalpel(wide: Path, *arguments: str) -> int:
    return main([*arguments, "--quiet"])


def run(wide: Path, out: str, *more: str) -> int:
    shared = ["--recipe", str(wide / "recipe.yaml"), "--out", str(wide / out), "--no-verify", *more]
    return scalpel(wide, "run", str(wide / "model"), *shared)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(wide: Path) -> Path:
    """A run that quantises, with every row beside; read by many tests and changed by none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantproof, "Witness", SameProcess)
        patch.setattr(checkpoint, "Witness", SameProcess)
        patch.setattr("layerscalpel.report._figures", lambda results: {})
        rows = ["--set", "quantize.beside=parent_same,parent4,healed8,quantized_first"]
        assert run(wide, "finished", "--quantize", "rtn:4", *rows) == 0
    return wide / "finished"


def test_results_have_the_agreed_form(finished: Path) -> None:
    results = results_of(finished)
    found = results["quantize"]
    assert {"method", "bits", "group_size", "symmetric", "converted", "left", "modules", "bytes", "proof"} <= set(found)
    assert (found["method"], found["bits"], found["group_size"], found["of"]) == ("rtn", 4, 64, "heal")
    assert found["converted"] + sum(found["left"].values()) == found["modules"]
    assert set(found["kl_to_source_nats"]) == {"value", "se", "n"}
    assert set(found["folder_bytes"]) == {"parent", "cut", "heal"}
    healed, quantized = (results["evaluate"][name] for name in ("healed", "quantized"))
    assert set(healed) == set(quantized)
    assert set(results["evaluate"]["beside"]) == {
        "parent_same",
        "healed8",
        "quantized_first",
    }  # parent4 would be the first
    for row in results["evaluate"]["beside"].values():
        assert {"how", "bits", "bytes", "kl_nats", "ppl", "ppl_ratio", "converted", "left"} <= set(row)


def test_bytes_are_those_of_the_whole_folder(finished: Path) -> None:
    results = results_of(finished)
    (finished / "quantize" / "model" / "README.md").unlink()  # the card is written after
    assert folder_bytes(finished / "quantize" / "model") == results["quantize"]["bytes"]
    assert folder_bytes(finished / "cut" / "model") == results["quantize"]["folder_bytes"]["cut"]
    rows = {row["model"]: row for row in byte_rows(results)}
    assert rows["parent"]["share"] == 1
    assert rows["quantized"]["bytes"] < rows["healed8"]["bytes"] < rows["healed"]["bytes"] < rows["parent"]["bytes"]
    assert rows["quantized"]["bytes"] < rows["parent"]["bytes"]


def test_the_result_is_a_checkpoint_as_any(finished: Path) -> None:
    folder = finished / "quantize" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder)("old mill").input_ids
    text = (finished / "README.md").read_text(encoding="utf-8")
    assert "pip install compressed-tensors" in text
    assert "14 of 21 modules with weights are quantised" in text
    assert "nothing removed" in text


def test_what_was_made_beside_is_removed(finished: Path) -> None:
    assert not (finished / "evaluate" / "beside").exists()
    assert (finished / "evaluate" / "beside-quantized_first.blocks.json.gz").exists()


def test_modules_are_listed_with_their_reasons(finished: Path) -> None:
    modules = json.loads((finished / "quantize" / "modules.json").read_text(encoding="utf-8"))
    assert len(modules) == results_of(finished)["quantize"]["modules"]
    assert modules["model.layers.0.mlp.up_proj"] == "4 bits"
    assert modules["model.embed_tokens"] == "embeddings"


def test_first_is_the_parent_quantised_and_then_cut(finished: Path) -> None:
    row = results_of(finished)["evaluate"]["beside"]["quantized_first"]
    assert row["converted"] == 4 * 7  # in the parent, before the cut
    assert row["bytes"] < results_of(finished)["evaluate"]["beside"]["parent_same"]["bytes"]


def test_a_finished_run_with_rows_shows_them(finished: Path, wide: Path, capsys) -> None:
    assert scalpel(wide, "compare", str(finished)) == 0
    said = capsys.readouterr().out
    assert "quantized" in said
    assert "rtn, 4 bits" in said


def test_a_run_directory_goes_on_with_quantising_and_can_redo_it(finished: Path, wide: Path, capsys) -> None:
    steps = wide / "steps"
    shutil.copytree(finished, steps)
    healed = load_file(steps / "heal" / "model" / "model.safetensors")
    first = results_of(steps)["quantize"]
    assert main(["quantize", str(steps), "--quantize", "rtn:8", "--group-size", "16"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"to be done again: evaluate, report - scalpel report {steps}" in said
    second = results_of(steps)["quantize"]
    assert (second["bits"], second["group_size"]) == (8, 16)
    assert second["kl_to_source_nats"]["value"] < first["kl_to_source_nats"]["value"]
    assert "evaluate" not in results_of(steps)  # it measured another model
    after = load_file(steps / "heal" / "model" / "model.safetensors")
    assert all(torch.equal(healed[name], after[name]) for name in healed)
    assert scalpel(wide, "quantize", str(steps), "--quantize", "none") == 2
    assert "would quantise nothing - allowed: gptq, rtn" in capsys.readouterr().err
    assert results_of(steps)["quantize"] == second
    assert scalpel(wide, "report", str(steps)) == 0
    assert "evaluate" in results_of(steps)
    assert (steps / "README.md").exists()


def test_what_was_interrupted_is_made_again(wide: Path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layerscalpel.quantize.prove_loading", stop)
        assert run(wide, "broken", "--quantize", "rtn", "--until", "quantize") == 130
    assert not (wide / "broken" / "quantize" / "model").exists()
    assert not list((wide / "broken" / "quantize").glob(".*"))
    seen = json.loads((wide / "broken" / "cut" / "done.json").read_text(encoding="utf-8"))
    assert run(wide, "broken", "--quantize", "rtn", "--until", "quantize") == 0
    assert results_of(wide / "broken")["quantize"]["bits"] == 4
    assert seen == json.loads((wide / "broken" / "cut" / "done.json").read_text(encoding="utf-8"))


def test_a_row_that_was_made_and_not_measured_is_taken_as_it_is(finished: Path, wide: Path, monkeypatch) -> None:
    again, flags = wide / "again", ["--set", "quantize.beside=healed8"]
    shutil.copytree(finished, again)
    look = measuring._Examining.look

    def stop(self, name: str, *given: object, **more: object) -> dict:
        if name == "beside-healed8":
            raise KeyboardInterrupt
        return look(self, name, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(measuring._Examining, "look", stop)
        assert scalpel(wide, "evaluate", str(again), *flags) == 130
    assert set(results_of(again)["evaluate"]["beside"]) > {"healed8"}  # as it was
    with monkeypatch.context() as patch:
        patch.setattr(beside, "quantize_checkpoint", None)
        assert scalpel(wide, "evaluate", str(again), *flags, "--set", "quantize.keep_beside=true") == 0
    assert set(results_of(again)["evaluate"]["beside"]) == {"healed8"}
    assert (again / "evaluate" / "beside" / "healed8" / "model" / "config.json").exists()


def test_what_is_made_to_compare_asks_for_no_new_quantising() -> None:
    bare, more = (build_config([{"model.name": "x"} | given]) for given in ({}, {"quantize.beside": "parent4"}))
    before, after = fingerprints(bare), fingerprints(more)
    assert [stage for stage in before if before[stage] != after[stage]] == ["evaluate", "report"]


def test_without_a_method_nothing_is_quantised(wide: Path) -> None:
    assert run(wide, "none", "--until", "quantize", "--set", "heal.method=none") == 0
    assert "quantize" not in results_of(wide / "none")
    assert STAGES["quantize"] == ("quantize",)


def test_one_model_is_quantised_without_a_run(wide: Path, capsys) -> None:
    out = wide / "alone"
    assert scalpel(wide, "quantize", str(wide / "model"), "--quantize", "rtn:8", "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)["quantize"]
    assert (found["bits"], found["converted"]) == (8, 28)
    assert found["bytes"] == folder_bytes(out)  # with the card
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# model, quantised by Layer Scalpel" in card
    assert f"model, quantised: {100 * (1 - found['bytes'] / found['source_bytes']):.3g} % fewer bytes." in card
    assert str(wide) not in card
    assert f"| {found['source_bytes'] / 1e6:,.1f} |" in card  # the whole folder, as the other row
    assert "quantization" in card.split("---")[1]
    assert "layer-pruning" not in card
    assert AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert scalpel(wide, "quantize", str(wide / "model"), "--quantize", "rtn", "--out", str(out)) == 2
    assert "already holds files" in capsys.readouterr().err


def test_mistakes_of_one_model_are_told_before_weights_are_loaded(wide: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("layerscalpel.alone.load_decoder", None)
    monkeypatch.setattr("layerscalpel.alone.quantize_checkpoint", None)
    monkeypatch.setitem(BACKENDS, "gptq", replace(BACKENDS["gptq"], needs=lambda settings: None))
    model, table = wide / "model", tmp_path / "table"
    tiny("opt", vocab_size=260).save_pretrained(table)
    (tmp_path / "file").touch()
    fresh = str(tmp_path / "out")
    needs = f"needs a run, scalpel quantize MODEL removes nothing - leave it out, or scalpel run {model} --segment"
    for source, out, flags, said in (
        (
            table,
            fresh,
            ["--quantize", "gptq:4"],
            "256 tokens are longer than the model's context of 128 - lower data.b",
        ),
        (model, fresh, ["--segment", "1:2"], f"target.segment {needs}"),
        (model, fresh, ["--set", "quantize.seam_bits=8"], f"quantize.seam_bits {needs}"),
        (model, fresh, ["--set", "quantize.beside=parent4"], f"quantize.beside {needs}"),
        (model, fresh, ["--quantize", "none"], "would quantise nothing - allowed: gptq, rtn"),
        (model, str(model / "small"), [], "lies inside the model's own folder"),
        (
            model,
            str(tmp_path / "file" / "x"),
            [],
            f"--out {tmp_path / 'file' / 'x'} lies in {tmp_path / 'file'}, which",
        ),
    ):
        assert scalpel(wide, "quantize", str(source), "--out", out, *flags) == 2
        assert said in capsys.readouterr().err


def test_the_source_is_measured_before_anything_is_written(wide: Path, tmp_path) -> None:
    shutil.copytree(wide / "model", tmp_path / "model")
    before = folder_bytes(tmp_path / "model")
    found = quantize_checkpoint(tmp_path / "model", tmp_path / "model" / "small", None, None, RTN)
    assert found.source_bytes == before < folder_bytes(tmp_path / "model")


def test_a_fresh_process_proves_the_folder(wide: Path, tmp_path, monkeypatch, fresh) -> None:
    class Living:
        def __enter__(self):
            return fresh

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(quantproof, "Witness", Living)
    found = quantize_checkpoint(wide / "model", tmp_path / "out", None, blocks(3), RTN)
    assert [(proof.dtype, proof.logits_equal) for proof in found.proofs] == [("float32", True), ("bfloat16", True)]
    assert found.proofs[0].generation_equal is True
    assert found.proofs[0].tolerance == 0
    assert found.num_bytes == folder_bytes(tmp_path / "out")
    assert not found.runs_packed


def noisy_write(source: Path, out: Path, tokens_NT: torch.Tensor, scheme: Scheme) -> None:
    """Stand in for a method that learns: the farther its damping from 0.05, the worse."""
    copy = out.with_name(f"{out.name}-noisy")
    shutil.copytree(source, copy)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in scheme.converted:
            weight = tensors[f"{name}.weight"]
            weight += abs(scheme.damping - 0.05) * torch.randn(weight.shape)

    edit_weights(copy, spoil)
    rtn.write(copy, out, tokens_NT, scheme)
    shutil.rmtree(copy)
    WRITTEN.append((scheme.damping, tokens_NT))


WRITTEN: list[tuple[float, torch.Tensor]] = []


@pytest.fixture
def learning(monkeypatch) -> QuantizeSettings:
    """Settings of a method that reads text and is there."""
    WRITTEN.clear()
    monkeypatch.setitem(BACKENDS, "gptq", replace(BACKENDS["gptq"], write=noisy_write, needs=lambda settings: None))
    return QuantizeSettings(method="gptq", damping=(0.2, 0.05, 0.1), num_blocks=6)


def test_the_damping_nearest_to_the_source_is_kept(wide: Path, tmp_path, learning) -> None:
    text = blocks(8, FEWEST_TOKENS // 6 + 1)
    found = quantize_checkpoint(wide / "model", tmp_path / "out", text, blocks(4, seed=1), learning)
    assert [one.damping for one in found.tried] == [0.2, 0.05, 0.1] == [damping for damping, _ in WRITTEN]
    kls = {one.damping: one.kl_nats.value for one in found.tried if one.kl_nats}
    assert found.scheme.damping == 0.05 == min(kls, key=kls.__getitem__)
    assert found.to_dict()["damping"] == 0.05
    assert len(found.to_dict()["tried"]) == 3
    assert all(torch.equal(tokens, text.tokens[:6]) for _, tokens in WRITTEN)  # in their order
    quantize_checkpoint(wide / "model", tmp_path / "one", text, blocks(4, seed=1), replace(learning, damping=(0.05,)))
    kept, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert all(torch.equal(kept[name], alone[name]) for name in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


def test_without_held_out_text_the_first_damping_is_taken(wide: Path, tmp_path, learning) -> None:
    found = quantize_checkpoint(wide / "model", tmp_path / "out", blocks(8, 500), None, learning)
    assert [damping for damping, _ in WRITTEN] == [0.2]
    assert found.kl_nats is None


def test_too_little_text_is_refused_before_anything_is_written(wide: Path, tmp_path, learning) -> None:
    with pytest.raises(UserError, match=r"96 tokens of calibration text are too few for gptq - allowed: 2,048 or more"):
        quantize_checkpoint(wide / "model", tmp_path / "out", blocks(8), blocks(4), learning)
    assert list(tmp_path.iterdir()) == []


def test_the_judging_text_is_none_that_calibrates() -> None:
    text = blocks(9)
    calibrates, judges = split(text, None, 64)
    assert torch.equal(torch.cat([calibrates.tokens, judges.tokens]), text.tokens)
    assert (len(calibrates), len(judges)) == (7, 2)
    validation = blocks(5, seed=3)
    assert split(text, validation, 4)[0] is text
    assert torch.equal(split(text, validation, 4)[1].tokens, validation.tokens[:4])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t["model.norm.weight"].add_(1), r"1 have other bytes than before \(model\.norm\.weight\)"),
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 tensors that stay"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight_packed"), r"1 differ \(model\.layers\.1\.mlp\.up_proj"),
        (
            lambda t: t.update({n: torch.cat([t[n], t[n]], 1) for n in ["model.layers.1.mlp.up_proj.weight_packed"]}),
            r"does not hold model\.layers\.1\.mlp\.up_proj in 4 bits",
        ),
    ],
)
def test_a_back_end_that_writes_something_else_is_found_out(wide: Path, tmp_path, spoil, said: str) -> None:
    scheme = Scheme.of(wide / "model", RTN)
    rtn.write(wide / "model", tmp_path / "out", torch.zeros(0, 1), scheme)
    edit_weights(tmp_path / "out", spoil)
    with pytest.raises(UserError, match=said):
        check_tensors(wide / "model", tmp_path / "out", scheme)


def test_a_folder_that_loads_as_something_else_is_removed(wide: Path, tmp_path, monkeypatch) -> None:
    class Lying(SameProcess):
        def ask(self, task: dict) -> dict:
            return super().ask(task) | {"logits_equal": False, "max_difference": 1.0}

    monkeypatch.setattr(quantproof, "Witness", Lying)
    with pytest.raises(UserError, match=r"failed its proof: logits that differ by 1"):
        quantize_checkpoint(wide / "model", tmp_path / "out", None, None, RTN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantize", "gptq:"], "--quantize gptq: lacks its bits after the colon - allowed: gptq:4, or gptq alone"),
        (["--quantize", "rtn:5"], "quantize.bits=5 is unknown - allowed: 3, 4, 8"),
        (["--quantize", "rtn:four"], "quantize.bits=four is unknown - allowed: 3, 4, 8"),
        (["--quantize", "gtpq:4"], "quantize.method=gtpq is unknown - did you mean 'gptq'?"),
        (
            ["--quantize", "rtn", "--group-size", "128"],
            "groups of 128 do not divide the input of model.layers.0.self_attn",
        ),
        (["--set", "quantize.beside=parent8"], "quantize.beside compares with a quantised model - add --quantize gptq"),
        (["--quantize", "rtn", "--offload", "cpu", "--set", "quantize.beside=parent4"], "needs the parent in memory"),
    ],
)
def test_mistakes_are_told_before_weights_are_loaded(wide: Path, capsys, monkeypatch, flags: list, said: str) -> None:
    monkeypatch.setattr("layerscalpel.workbench.load_decoder", None)
    assert run(wide, "never", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (wide / "never").exists()


def test_too_little_text_is_told_before_weights_are_loaded(wide: Path, capsys, monkeypatch, learning) -> None:
    monkeypatch.setattr("layerscalpel.workbench.load_decoder", None)
    assert run(wide, "never", "--quantize", "gptq") == 2
    assert "64 tokens of calibration text are too few for gptq" in capsys.readouterr().err  # 4 blocks of 16


@pytest.mark.parametrize(("blocks", "named", "other"), [(2, "quantize", "search"), (64, "search", "quantize")])
def test_too_little_text_names_the_setting_that_binds(
    wide: Path, capsys, monkeypatch, learning, blocks: int, named: str, other: str
) -> None:
    monkeypatch.setattr("layerscalpel.workbench.load_decoder", None)
    assert run(wide, "never", "--quantize", "gptq", "--set", f"quantize.num_blocks={blocks}") == 2
    said = capsys.readouterr().err
    assert f"raise {named}.num_blocks, or take --quantize rtn" in said
    assert f"{other}.num_blocks" not in said


def test_a_draft_that_does_not_load_is_told_by_kind_and_removed(wide: Path, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("'OwnLinear' object has no attribute 'weight'")

    monkeypatch.setattr(quantproof, "load_any", fail)
    said = r"transformers does not load LlamaForCausalLM with packed layers: AttributeError: 'OwnLinear' object has no"
    with pytest.raises(UserError, match=said):
        quantize_checkpoint(wide / "model", tmp_path / "out", None, None, RTN)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_its_extra(wide: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("layerscalpel.workbench.load_decoder", None)
    monkeypatch.setattr("importlib.util.find_spec", _without("compressed_tensors", "llmcompressor"))
    assert run(wide, "never", "--quantize", "rtn") == 2
    assert "pip install layerscalpel[quant]" in capsys.readouterr().err
    assert run(wide, "never", "--quantize", "gptq") == 2
    assert "pip install layerscalpel[quant]" in capsys.readouterr().err


def _without(*missing: str):
    import importlib.util

    find = importlib.util.find_spec
    return lambda name, *more: None if name in missing else find(name, *more)


def test_a_quantised_model_is_not_quantised_again(finished: Path, wide: Path, capsys) -> None:
    model = str(finished / "quantize" / "model")
    flags = ["--quantize", "rtn", "--out", str(wide / "twice")]
    recipe = ["--recipe", str(wide / "recipe.yaml")]
    for command in (["run", model, *recipe, "--segment", "1:2", *flags], ["quantize", model, *flags]):
        assert scalpel(wide, *command) == 2
        assert "is already quantised (compressed-tensors), so it cannot be quantised again" in capsys.readouterr().err


def test_a_skipped_kind_of_layer_is_listed_with_its_count(tmp_path, capsys) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "model")
    out = ["--quantize", "rtn", "--out", str(tmp_path / "out")]
    assert main(["quantize", str(tmp_path / "model"), *out]) == 2
    assert "no linear layer that could be quantised: 32 x no linear layer (Conv1D)" in capsys.readouterr().err


def test_a_model_that_another_beats_is_warned_of(finished: Path) -> None:
    results = results_of(finished)
    results["evaluate"]["beside"]["parent_same"] |= {"bytes": 1, "kl_nats": {"value": 0.0, "se": 0.0, "n": 9}}
    assert byte_rows(results)[-1]["model"] == "parent_same"  # the smallest stands last
    assert any("nearer to the parent: parent_same" in text for text in quantize_warnings(results))
    assert "nearer to the parent: parent_same" in model_card(results, {}, {"layerscalpel": "1", "transformers": "5"})

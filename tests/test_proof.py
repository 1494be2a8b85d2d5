"""A proof finds every kind of damage, says what it left out, and the fresh process outlives what is in it."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import SINGLE, SameProcess, edit_json, edit_weights
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from layerscalpel.cut import cut_folder, cut_model
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.origin import skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.proof import Expected, expect, prove_logits, prove_tensors, prove_twin
from layerscalpel.quiet import quiet_transformers
from layerscalpel.segment import Segment
from layerscalpel.shards import Weights, read_weights

slow = partial(pytest.param, marks=pytest.mark.slow)
SEGMENT = Segment(2, 5, 8)
SAME = SameProcess()
PLAIN = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "bloom", "opt", "gemma2"]
TYPED = ["olmo3", "cohere2", "exaone4", "gpt_oss", "gpt_neo", "llama4_text"]
RULED = ["smollm3", "lfm2", "bamba", "qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe"]


@functools.cache
def decoder_of(family: str) -> Decoder:
    return find_layers(tiny(family))


@functools.cache
def expected_of(family: str, segment: Segment = SEGMENT) -> Expected:
    return expect(decoder_of(family), segment)


def save_cut(folder: Path, family: str, segment: Segment = SEGMENT) -> Path:
    """Write the sound cut of a family."""
    return save_decoder(cut_model(decoder_of(family), segment)[0], None, folder / "m")


def refuse(folder: Path, expected: Expected, said: str) -> None:
    with pytest.raises(UserError, match=rf"the checkpoint .*m failed its proof: .*{said}.* - do not use it"):
        prove_logits(SAME, folder, expected, generate=False)


# ---------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "family", [(pytest.param if i % 2 else slow)(family) for i, family in enumerate(PLAIN + TYPED + RULED)]
)
def test_a_cut_passes_its_proof(family, tmp_path):
    """The default tier loads and compares the others in test_cut.py."""
    found = prove_logits(SAME, save_cut(tmp_path, family), expected_of(family))
    assert found.logits_equal
    assert found.generation_equal
    assert (found.max_difference, found.tolerance) == (0.0, 0.0)
    assert (found.tokens, found.dtype, found.device) == ((2, 24), "float32", "cpu")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen2_moe", "deepseek_v3"])
def test_as_many_parameters_are_expected_as_a_cut_has(family):
    assert expected_of(family).parameters == num_parameters(cut_model(decoder_of(family), SEGMENT)[0])
    assert expected_of(family).tied == (family in ("gemma3_text", "gpt2"))


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [(2, 6, 1), (3, 4, 0), (0, 7, 1)],
    ids=["shared with a layer that stays", "shared among those removed", "shared among those that stay"],
)
def test_shared_parameters_go_with_the_last_layer_that_has_them(first, second, stays):
    model = tiny("llama")
    model.model.layers[second].mlp = model.model.layers[first].mlp
    mlp, layer = num_parameters(model.model.layers[0].mlp), num_parameters(model.model.layers[0])
    outside = (
        num_parameters(model.model.embed_tokens) + num_parameters(model.model.norm) + num_parameters(model.lm_head)
    )
    kept_alone = 5 - (first not in (2, 3, 4)) - (second not in (2, 3, 4))
    expected = outside + 5 * (layer - mlp) + (kept_alone + stays) * mlp
    assert expect(find_layers(model), SEGMENT).parameters == expected


def test_a_rounded_checkpoint_is_proven_within_a_tolerance(tmp_path):
    decoder = find_layers(tiny("llama").to(torch.bfloat16))
    save_decoder(cut_model(decoder, SEGMENT)[0], None, tmp_path / "m")
    expected = expect(decoder, SEGMENT)
    found = prove_logits(SAME, tmp_path / "m", expected)
    assert found.dtype == "bfloat16"
    assert 0 < found.tolerance < 0.5
    assert found.max_difference <= found.tolerance
    add(tmp_path / "m", "model.norm.weight", 50.0)
    refuse(tmp_path / "m", expected, "logits that differ by")


def test_a_shorter_text_without_generation_is_told_as_such(tmp_path):
    found = prove_logits(
        SAME, save_cut(tmp_path, "llama"), expect(decoder_of("llama"), SEGMENT, length=8), generate=False
    )
    assert found.logits_equal
    assert found.generation_equal is None
    assert found.tokens == (1, 8)


# ---------------------------------------------------------------------------------------------- what fails


def add(folder: Path, name: str, amount: float) -> None:
    """Change one number of a checkpoint."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        stored[name].view(-1)[0] += amount

    edit_weights(folder, change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_json(folder / "config.json", layer_types=["full_attention"] * 5),
        lambda folder: edit_json(folder / "config.json", sliding_window=7),
        lambda folder: edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-4),
        lambda folder: edit_json(folder / "config.json", hidden_act="gelu"),
        lambda folder: tie(folder),
        lambda folder: add(folder, "model.layers.4.mlp.down_proj.weight", 1e-3),
        lambda folder: add(folder, "lm_head.weight", 1e-3),
        lambda folder: add(folder, "model.norm.weight", float("nan")),
        lambda folder: edit_weights(folder, swap_layers),
        lambda folder: edit_weights(folder, lambda stored: stored.pop("model.layers.1.mlp.up_proj.weight")),
    ],
    ids=["types", "window", "rope", "eps", "act", "tied", "weight", "head", "nan", "swapped", "missing"],
)
def test_damage_fails_the_proof(damage, tmp_path):
    folder = save_cut(tmp_path, "qwen2")
    damage(folder)
    refuse(folder, expected_of("qwen2"), "logits that differ by .* where 0 is allowed")


def tie(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit_weights(folder, lambda stored: stored.pop("lm_head.weight"))


def swap_layers(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if ".layers.1." in name]:
        other = name.replace(".1.", ".2.")
        stored[name], stored[other] = stored[other], stored[name]


def test_another_segment_fails_the_proof(tmp_path):
    refuse(save_cut(tmp_path, "llama"), expected_of("llama", Segment(3, 6, 8)), "logits that differ by")


def test_a_head_that_came_apart_fails_the_proof_though_its_logits_are_equal(tmp_path):
    folder = save_cut(tmp_path, "gemma3_text")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    edit_weights(folder, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))
    with pytest.raises(UserError, match="tied embeddings that came apart, or were joined") as caught:
        prove_logits(SAME, folder, expected_of("gemma3_text"))
    assert "parameters where" in str(caught.value)
    assert "logits that differ" not in str(caught.value)


class Doctored(SameProcess):
    """Answers as a fresh process would that found something wrong."""

    def __init__(self, **wrong: object) -> None:
        self.wrong = wrong

    def ask(self, task: dict) -> dict:
        return super().ask(task) | self.wrong


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"logits_equal": False}, "logits that differ by 0 where 0 is allowed"),
        ({"max_difference": 1e-9}, "logits that differ by 1e-09 where 0 is allowed"),
        ({"max_difference": float("nan")}, "logits that differ by nan where 0 is allowed"),
        ({"generation_equal": False}, "other tokens with a cache than without"),
        ({"parameters": 7}, r"7 parameters where [\d,]+ must stay"),
        ({"tied": True}, "tied embeddings that came apart, or were joined"),
        ({"config_equal": False}, "a config that its own class does not give back"),
        ({"tied": True, "config_equal": False}, "tied embeddings .*; a config that its own class does not give back"),
    ],
)
def test_each_thing_that_is_compared_can_fail_the_proof(wrong, said, tmp_path):
    with pytest.raises(UserError, match=rf"failed its proof: {said} - do not use it"):
        prove_logits(Doctored(**wrong), save_cut(tmp_path, "llama"), expected_of("llama"))


# ---------------------------------------------------------------------------------------------- the traps


def naively(folder: Path, num_layers: int, *, slices: bool) -> None:
    """Do to a cut config what a hurried hand does: lower the count, and shorten the lists from the front at most."""
    before = AutoConfig.from_pretrained(folder.parent / "parent").to_dict()
    lists = {name: value[:num_layers] for name, value in before.items() if isinstance(value, list) and len(value) == 8}
    count = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in before)
    values = before | (lists if slices else {}) | {count: num_layers, "torch_dtype": None, "dtype": "float32"}
    if slices and "attention_types" in values:
        values["attention_types"] = [[values["attention_layers"], 1]]
    edit_json(folder / "config.json", **{name: values[name] for name in before if values[name] is not None})


def cut_both_ways(tmp_path: Path, family: str, segment: Segment, *, slices: bool) -> Path:
    """Cut a family's files, prove the result, and then spoil its config alone."""
    with quiet_transformers():
        decoder_of(family).model.save_pretrained(tmp_path / "parent")
    plan = plan_cut(skeleton(decoder_of(family).model.config), segment)
    cut_folder(read_weights(tmp_path / "parent"), plan, tmp_path / "m")
    assert prove_logits(SAME, tmp_path / "m", expected_of(family, segment), generate=False).logits_equal
    naively(tmp_path / "m", len(segment.kept()), slices=slices)
    return tmp_path / "m"


LAYER_TYPES = ["qwen2", "gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "gpt_oss"]


ALWAYS_TYPED = ["qwen2", "gemma3_text", "gpt_oss"]
"""Of those with layer types: the default tier's."""


def typed(*more: object) -> list:
    return [(pytest.param if family in ALWAYS_TYPED else slow)(family, *more) for family in LAYER_TYPES]


@pytest.mark.parametrize("family", [*typed(), "smollm3", "llama4_text", "lfm2"])
def test_the_count_alone_is_not_enough(family, tmp_path):
    folder = cut_both_ways(tmp_path, family, SEGMENT, slices=False)
    with pytest.raises(UserError, match=r"does not load in a fresh process|failed its proof"):
        prove_logits(SAME, folder, expected_of(family), generate=False)


@pytest.mark.parametrize(
    ("family", "bounds"),
    [
        *typed((2, 5)),
        ("smollm3", (2, 5)),
        ("llama4_text", (2, 5)),
        ("gpt_neo", (1, 2)),
        ("lfm2", (3, 5)),
        ("bamba", (0, 1)),
        ("qwen3_moe", (1, 3)),
        ("qwen2_moe", (2, 5)),
        ("deepseek_v3", (1, 2)),
        slow("glm4_moe", (0, 3)),
        ("jamba", (0, 2)),
        ("recurrent_gemma", (0, 1)),
        slow("minicpm3", (6, 8)),
    ],
)
def test_shortening_the_lists_from_the_front_is_not_enough(family, bounds, tmp_path):
    segment = Segment(*bounds, 8)
    folder = cut_both_ways(tmp_path, family, segment, slices=True)
    with pytest.raises(UserError, match=r"failed its proof: logits that differ|does not load in a fresh process"):
        prove_logits(SAME, folder, expected_of(family, segment), generate=False)


@pytest.mark.parametrize("family", ["llama", slow("gpt2"), slow("qwen3"), "bloom"])
def test_where_there_is_no_trap_the_count_is_enough(family, tmp_path):
    """So the tests above fail for what they name."""
    folder = cut_both_ways(tmp_path, family, SEGMENT, slices=True)
    assert prove_logits(SAME, folder, expected_of(family), generate=False).logits_equal


# ---------------------------------------------------------------------------------------------- tensors


def cut_files(tmp_path: Path, family: str, **changes: object) -> tuple[Weights, Weights, dict[str, str]]:
    """Return the weights of a checkpoint and of its cut in two shards or more, and their names."""
    with quiet_transformers():
        tiny(family, **changes).save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    source = read_weights(tmp_path / "parent")
    copy, renamed = cut_folder(
        source, plan_cut(skeleton(AutoConfig.from_pretrained(tmp_path / "parent")), SEGMENT), tmp_path / "m"
    )
    return source, copy, renamed


def one_file(copy: Weights, changed: dict[str, torch.Tensor]) -> Weights:
    """Write the copy anew as one file with some tensors changed (None leaves one out)."""
    stored = {}
    for shard in sorted(copy.metadata):
        stored |= load_file(copy.folder / shard)
    stored = {name: tensor for name, tensor in (stored | changed).items() if tensor is not None}
    save_file(stored, copy.folder / SINGLE, metadata={"format": "pt"})
    return read_weights(copy.folder)


def test_kept_tensors_are_proven_whatever_file_they_lie_in(tmp_path):
    source, copy, renamed = cut_files(tmp_path, "llama")
    found = prove_tensors(source, copy, renamed)
    assert found.num_tensors == len(renamed) == len(copy.tensors)
    assert found.num_bytes == copy.num_bytes()
    assert prove_tensors(source, one_file(copy, {}), renamed) == found
    assert len(found.sha256) == 64


def one_flipped_bit(tensor: torch.Tensor) -> torch.Tensor:
    flipped = tensor.clone()
    flipped.view(torch.int32).view(-1)[-1] ^= 1
    return flipped


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_flipped_bit, r"1 tensors of .*m are not those of the parent \(model\.layers\.3\.mlp\.up_proj\.weight\)"),
        (lambda tensor: tensor.bfloat16(), "1 tensors of .*m are not those of the parent"),
        (lambda tensor: tensor.view(32, 48), "1 tensors of .*m are not those of the parent"),
        (lambda tensor: None, "does not hold the tensors that stay"),
    ],
    ids=["bit", "format", "shape", "missing"],
)
def test_a_tensor_that_is_not_the_parents_is_found(change, said, tmp_path):
    source, copy, renamed = cut_files(tmp_path, "llama")
    name = "model.layers.3.mlp.up_proj.weight"
    tensor = load_file(copy.tensors[name].file)[name]
    with pytest.raises(UserError, match=f"{said}.* - do not use it"):
        prove_tensors(source, one_file(copy, {name: change(tensor)}), renamed)


def test_a_tensor_too_many_is_found(tmp_path):
    source, copy, renamed = cut_files(tmp_path, "llama")
    with pytest.raises(UserError, match="does not hold the tensors that stay - do not use it"):
        prove_tensors(source, one_file(copy, {"extra": torch.zeros(2)}), renamed)


def test_an_expert_that_no_token_of_the_proof_reaches_is_compared_too(tmp_path):
    """Logits alone would pass it: 48 tokens do not reach all of 64 experts."""
    source, copy, renamed = cut_files(tmp_path, "qwen3_moe", num_experts=64, num_experts_per_tok=1)
    parent = find_layers(tiny("qwen3_moe", num_experts=64, num_experts_per_tok=1))
    expected = expect(parent, SEGMENT)
    assert prove_logits(SAME, tmp_path / "m", expected).logits_equal
    name = next(
        name
        for name in map("model.layers.3.mlp.experts.{}.down_proj.weight".format, range(64))
        if unseen(copy, name, expected)
    )
    with pytest.raises(UserError, match=rf"1 tensors of .*m are not those of the parent \({name}\)"):
        prove_tensors(source, read_weights(tmp_path / "m"), renamed)


def unseen(copy: Weights, name: str, expected: Expected) -> bool:
    """Spoil one tensor of the sound copy, and only it; tell whether the logits stay."""
    tensor = load_file(copy.tensors[name].file)[name]
    for index in copy.folder.glob("*.index.json"):
        index.unlink()
    one_file(copy, {name: tensor + 1})
    try:
        return prove_logits(SAME, copy.folder, expected).logits_equal
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize(("family", "bounds"), [("gemma3_text", (2, 5)), ("bamba", (2, 5)), slow("qwen2_moe", (2, 5))])
def test_a_twin_is_proven_through_its_files(family, bounds):
    found = prove_twin(SAME, tiny(family), Segment(*bounds, 8))
    assert found.logits_equal
    assert found.generation_equal


@pytest.mark.parametrize("family", ["lfm2", "bamba"])
def test_a_hybrid_that_keeps_no_attention_is_refused(family):
    """Its cache would not know how long it is."""
    with pytest.raises(UserError, match=r"a tiny twin of this \w+ does not load in .* layers 1\.\.5 .* cannot be cut"):
        prove_twin(SAME, tiny(family), Segment(1, 6, 8))


def test_a_rule_that_shows_in_the_logits_alone_is_refused(monkeypatch):
    """In the fresh process, too, every layer has its number; so layers that compute with it must not be cut."""
    inner = LlamaMLP.forward

    def by_number(self: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        return inner(self, hidden) * (1 + self.layer_idx)

    def number(self: LlamaForCausalLM, config: object) -> None:
        init(self, config)
        for i, layer in enumerate(self.model.layers):
            layer.mlp.layer_idx = i

    init = LlamaForCausalLM.__init__
    monkeypatch.setattr(LlamaForCausalLM, "__init__", number)
    monkeypatch.setattr(LlamaMLP, "forward", by_number)
    said = r"a tiny twin of this LlamaForCausalLM failed its proof: logits that .* - layers 2\.\.4 .* cannot be cut"
    with pytest.raises(UserError, match=said):
        prove_twin(SAME, tiny("llama"), SEGMENT)
    assert prove_twin(SAME, tiny("llama"), Segment(6, 8, 8)).logits_equal  # no number changes


def test_a_twin_that_cannot_be_cut_is_refused_as_the_model_would_be():
    with pytest.raises(UserError, match="a per-layer rule of JambaForCausalLM would shift"):
        prove_twin(SAME, tiny("jamba"), Segment(2, 4, 8))

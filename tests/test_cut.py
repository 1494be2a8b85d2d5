"""A cut model computes what the parent computes without the segment, or is refused by name; a proof finds damage."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import COMMON, SLIDING, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel

from layerscalpel import witness
from layerscalpel.cut import cut_config, cut_model, prove
from layerscalpel.decoder import load_decoder, num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, bypass, find_layers
from layerscalpel.segment import Segment

PLAIN = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "bloom", "opt", "gemma2"]
RULED = ["smollm3", "lfm2", "qwen3_moe", "deepseek_v3"]
BOUNDS = [(0, 2), (2, 5), (6, 8)]
cases = pytest.mark.parametrize(
    ("family", "bounds"),
    [
        *[(family, bounds) for family in PLAIN + RULED for bounds in BOUNDS],
        *[("llama", bounds) for bounds in [(0, 1), (3, 4), (7, 8), (2, 6), (0, 6), (2, 8)]],
    ],
)


@functools.cache
def decoder_of(family: str) -> Decoder:
    return find_layers(tiny(family))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def without(decoder: Decoder, segment: Segment) -> torch.Tensor:
    with bypass(decoder, segment):
        return logits(decoder.model)


@functools.cache
def cut_of(family: str, start: int, stop: int) -> PreTrainedModel:
    return cut_model(decoder_of(family), Segment(start, stop, 8))[0]


# ---------------------------------------------------------------------------------------------- what stays


@cases
def test_a_cut_computes_what_the_parent_does_without_the_segment(family, bounds):
    decoder, segment = decoder_of(family), Segment(*bounds, 8)
    before, config = logits(decoder.model), decoder.model.config.to_dict()
    stored = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert not torch.equal(logits(cut), before)
    removed = sum(num_parameters(decoder.layers[i]) for i in range(*bounds))
    assert num_parameters(cut) == num_parameters(decoder.model) - removed
    assert not cut.training
    # the parent is untouched
    assert torch.equal(logits(decoder.model), before)
    assert decoder.model.config.to_dict() == config
    assert all(torch.equal(tensor, stored[name]) for name, tensor in decoder.model.state_dict().items())


@pytest.mark.parametrize("family", PLAIN + RULED)
def test_a_cut_shares_every_tensor_with_its_parent(family):
    decoder, cut = decoder_of(family), cut_of(family, 2, 5)
    layers = cut.get_submodule(decoder.path)
    for new, old in enumerate(Segment(2, 5, 8).kept()):
        pairs = zip(layers[new].parameters(), decoder.layers[old].parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
    theirs = {tensor.data_ptr() for tensor in decoder.model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in cut.state_dict().values()} <= theirs


@pytest.mark.parametrize("family", PLAIN + RULED)
def test_a_cut_saves_loads_and_generates(family, tmp_path):
    """With a cache, too: every layer must know its new number."""
    cut = cut_of(family, 2, 5)
    loaded = load_decoder(str(save_decoder(cut, None, tmp_path / "m"))).model
    assert torch.equal(logits(loaded), logits(cut))
    mask = torch.ones_like(tokens())
    settings = {"attention_mask": mask, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    for model in (cut, loaded):
        cached, uncached = (model.generate(tokens(), use_cache=flag, **settings) for flag in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2"])
def test_layers_get_their_new_numbers(family):
    cut = cut_of(family, 2, 5)
    for i, layer in enumerate(cut.get_submodule(decoder_of(family).path)):
        numbers = [m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None]
        assert numbers
        assert set(numbers) == {i}


def test_a_cut_can_be_cut_again():
    once = find_layers(cut_of("qwen2", 2, 5))
    twice, _ = cut_model(once, Segment(1, 3, 5))
    assert torch.equal(logits(twice), without(once, Segment(1, 3, 5)))
    kinds = decoder_of("qwen2").model.config.layer_types
    assert twice.config.layer_types == [kinds[i] for i in (0, 6, 7)]


def test_tied_weights_stay_tied():
    for family in ("gemma3_text", "gpt2"):
        cut = cut_of(family, 2, 5)
        assert cut.get_input_embeddings().weight is cut.get_output_embeddings().weight


def test_generation_settings_are_copied():
    decoder = find_layers(tiny("llama"))
    decoder.model.generation_config.repetition_penalty = 1.25
    cut, _ = cut_model(decoder, Segment(2, 5, 8))
    assert cut.generation_config.repetition_penalty == 1.25
    assert cut.generation_config is not decoder.model.generation_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cut(dtype):
    decoder, segment = find_layers(tiny("llama").to(dtype)), Segment(2, 5, 8)
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert next(cut.parameters()).dtype == dtype


def test_the_text_part_of_a_larger_model_is_cut(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=COMMON | SLIDING | {"head_dim": 8, "sliding_window": 6},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    decoder, segment = find_layers(AutoModelForCausalLM.from_config(config).float().eval()), Segment(2, 5, 8)
    assert decoder.path == "model.language_model.layers"
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert cut.config.text_config.num_hidden_layers == 5
    assert cut.config.vision_config.num_hidden_layers == 2
    loaded = load_decoder(str(save_decoder(cut, None, tmp_path / "m"))).model
    assert torch.equal(logits(loaded), logits(cut))


# ---------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("family", "bounds", "expected"),
    [
        ("llama", (2, 5), {"num_hidden_layers": 5}),
        ("gpt2", (2, 5), {"n_layer": 5}),
        ("qwen2", (0, 1), {"layer_types": ["s", "f", "s", "s", "s", "f", "s"], "max_window_layers": 1}),
        ("qwen2", (2, 3), {"layer_types": ["s", "s", "s", "s", "s", "f", "s"], "max_window_layers": 2}),
        ("gemma3_text", (5, 8), {"layer_types": ["s", "s", "f", "s", "s"]}),
        ("smollm3", (2, 4), {"no_rope_layers": [1, 1, 1, 0, 1, 1]}),
        ("lfm2", (2, 4), {"full_attn_idxs": [3]}),
        ("qwen3_moe", (0, 2), {"mlp_only_layers": [1]}),
        ("deepseek_v3", (1, 6), {"first_k_dense_replace": 1}),
        ("deepseek_v3", (4, 6), {"first_k_dense_replace": 3}),
    ],
)
def test_every_trace_in_the_config_is_cut(family, bounds, expected):
    config, traces = cut_config(decoder_of(family).model.config, Segment(*bounds, 8))
    long = {"s": "sliding_attention", "f": "full_attention"}
    for name, value in expected.items():
        want = [long.get(item, item) for item in value] if isinstance(value, list) else value
        assert getattr(config, name) == want
    changed = {name for name in expected if getattr(decoder_of(family).model.config, name) != getattr(config, name)}
    assert changed <= traces.keys()


def test_traces_say_what_changed():
    _, traces = cut_model(decoder_of("qwen2"), Segment(0, 2, 8))
    assert traces == {
        "num_hidden_layers": "8 -> 6",
        "max_window_layers": "2 -> 0",
        "layer_types": "8 items -> 6 items",
    }


def test_nothing_else_in_the_config_changes():
    before, after = decoder_of("qwen2").model.config, cut_of("qwen2", 2, 5).config
    changed = {name for name, value in before.to_dict().items() if after.to_dict().get(name) != value}
    assert changed - {"architectures", "dtype"} == {"num_hidden_layers", "layer_types"}
    assert after._attn_implementation == before._attn_implementation


# ---------------------------------------------------------------------------------------------- refusals


def test_a_rule_by_layer_number_is_refused_by_name():
    decoder = find_layers(tiny("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UserError, match=r"layer 5 would change as layer 2: attn\.scaling goes from .* choose another"):
        cut_model(decoder, Segment(2, 5, 8))
    cut, _ = cut_model(decoder, Segment(6, 8, 8))  # no number changes
    assert torch.equal(logits(cut), without(decoder, Segment(6, 8, 8)))


def test_a_period_whose_phase_would_shift_is_refused_by_name():
    decoder = decoder_of("qwen2_moe")  # experts in every second layer
    with pytest.raises(
        UserError, match=r"tensor model\.layers\.5\.mlp\.\S+ is missing .* a per-layer rule of Qwen2Moe"
    ):
        cut_model(decoder, Segment(2, 5, 8))
    cut, _ = cut_model(decoder, Segment(2, 4, 8))  # a whole period
    assert torch.equal(logits(cut), without(decoder, Segment(2, 4, 8)))


def test_a_rule_that_shows_in_the_logits_alone_is_refused():
    decoder = find_layers(tiny("llama"))
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda _m, _a, output, i=i: output * (1 + 0.1 * i))
    with pytest.raises(
        UserError, match=r"computes other logits than the parent without layers 2\.\.4 \(segment \[2, 5"
    ):
        cut_model(decoder, Segment(2, 5, 8))


def test_shared_keys_and_values_are_refused():
    with pytest.raises(UserError, match="layers of Gemma3nForCausalLM read the keys and values of other layers"):
        find_layers(tiny("gemma3n_text"))


def test_hidden_states_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"pass on hidden states of shape \(4, 1, 5, 32\), not \[B, T, D\]"):
        find_layers(tiny("gemma3n_text", num_kv_shared_layers=0))


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, IndexError])
def test_a_model_that_refuses_the_cut_config_is_told(monkeypatch, error):
    decoder = find_layers(tiny("llama"))

    def fail(_self: object, _config: object) -> None:
        raise error("a rule\nof its own")

    monkeypatch.setattr(type(decoder.model), "__init__", fail)
    with pytest.raises(UserError, match=r"LlamaForCausalLM refuses the cut config: .*a rule.*of its own"):
        cut_model(decoder, Segment(2, 5, 8))


def test_a_config_that_refuses_its_cut_is_told(monkeypatch):
    config = tiny("llama").config

    def fail(_self: object, **_values: object) -> None:
        raise ValueError("a rule\nof its own")

    monkeypatch.setattr(type(config), "__init__", fail)
    with pytest.raises(UserError, match="LlamaConfig refuses the cut config: a rule of its own - this segment cannot"):
        cut_config(config, Segment(2, 5, 8))


# ---------------------------------------------------------------------------------------------- the proof


def in_this_process(command: list[str], **_settings: object) -> SimpleNamespace:
    """Be the fresh process without its five seconds."""
    return SimpleNamespace(returncode=0, stderr="", stdout=json.dumps(witness.main(json.loads(command[-1]))))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder: Path, name: str, amount: float) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored[name].view(-1)[0] += amount
    save_file(stored, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", PLAIN + RULED)
def test_a_cut_passes_its_proof(family, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    save_decoder(cut_of(family, 2, 5), None, tmp_path / "m")
    proof = prove(tmp_path / "m", decoder_of(family), Segment(2, 5, 8))
    assert proof.logits_equal
    assert proof.generation_equal
    assert (proof.max_difference, proof.tolerance) == (0.0, 0.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_config(folder, layer_types=["full_attention"] * 5),
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        lambda folder: edit_config(folder, rms_norm_eps=1e-4),
        lambda folder: edit_weight(folder, "model.layers.4.mlp.down_proj.weight", 1e-3),
        lambda folder: edit_weight(folder, "model.norm.weight", float("nan")),
    ],
    ids=["layer_types", "rope", "eps", "weight", "nan"],
)
def test_damage_fails_the_proof(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    save_decoder(cut_of("qwen2", 2, 5), None, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(
        UserError, match=r"the checkpoint .*m failed its proof: .*'logits_equal': False.* do not use it"
    ):
        prove(tmp_path / "m", decoder_of("qwen2"), Segment(2, 5, 8))


def test_another_segment_fails_the_proof(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    save_decoder(cut_of("llama", 2, 5), None, tmp_path / "m")
    with pytest.raises(UserError, match="failed its proof"):
        prove(tmp_path / "m", decoder_of("llama"), Segment(3, 6, 8))


def test_a_rounded_checkpoint_is_proven_within_a_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    decoder, segment = find_layers(tiny("llama").to(torch.bfloat16)), Segment(2, 5, 8)
    save_decoder(cut_model(decoder, segment)[0], None, tmp_path / "m")
    proof = prove(tmp_path / "m", decoder, segment)
    assert proof.dtype == "bfloat16"
    assert 0 < proof.tolerance < 0.5
    assert proof.max_difference <= proof.tolerance
    edit_weight(tmp_path / "m", "model.norm.weight", 50.0)
    with pytest.raises(UserError, match="failed its proof"):
        prove(tmp_path / "m", decoder, segment)


def test_a_fresh_process_proves_a_cut(tmp_path):
    save_decoder(cut_of("gemma3_text", 2, 5), None, tmp_path / "m")
    proof = prove(tmp_path / "m", decoder_of("gemma3_text"), Segment(2, 5, 8))
    assert proof.kind == "fresh process"
    assert proof.logits_equal
    assert proof.generation_equal


def test_a_checkpoint_that_does_not_load_fails_with_its_reason(tmp_path):
    save_decoder(cut_of("llama", 2, 5), None, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"does not load in a fresh process: OSError: .*model\.safetensors.* do not use"
    ):
        prove(tmp_path / "m", decoder_of("llama"), Segment(2, 5, 8))

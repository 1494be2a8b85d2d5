"""Rounding to nearest: what transformers reads back is, bit for bit, what a plain reference computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import write_model

from layerscalpel import rtn
from layerscalpel.errors import UserError
from layerscalpel.quantproof import check_tensors
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings
from layerscalpel.shards import digest, read_weights

pytest.importorskip("compressed_tensors", reason="it stores what is quantised (extra quant)")
SETTINGS = QuantizeSettings(method="rtn")
NO_TEXT = torch.zeros((0, 1), dtype=torch.long)
TOKENS = torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rtn") / "model"
    return write_model(folder, hidden_size=64, intermediate_size=128, num_hidden_layers=6)


def written(source: Path, out: Path, **changes: object) -> Scheme:
    scheme = Scheme.of(source, replace(SETTINGS, **changes), [2])
    rtn.write(source, out, NO_TEXT, scheme)
    check_tensors(source, out, scheme)
    return scheme


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits  # and its weights are unpacked
    return model, logits


def reference(weight_RC: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Round each group of each row alone, in loops that nothing of the package is in."""
    rounded, (low, high) = weight_RC.clone(), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for row in rounded:
        for begin in range(0, len(row), group):
            part = row[begin : begin + group]
            least, most = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
            least, most = torch.tensor(least), torch.tensor(most)
            if symmetric:
                step, zero = torch.maximum(-least, most) / ((high - low) / 2), torch.tensor(0.0)
            else:
                step = (most - least) / (high - low)
                zero = (low - least / step).clamp(low, high).round()
            part.copy_((torch.clamp((part / step + zero).round(), low, high) - zero) * step)
    return rounded


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 32, True), (4, 64, False), (8, 64, True), (8, 16, False), (3, 32, True), (3, 16, False)],
)
def test_what_is_read_back_equals_a_plain_reference(source, tmp_path, bits, group_size, symmetric) -> None:
    scheme = written(source, tmp_path / "out", bits=bits, group_size=group_size, symmetric=symmetric)
    model, _ = loaded(tmp_path / "out")
    before = load_file(source / "model.safetensors")
    assert len(scheme.converted) == 6 * 7
    for name in scheme.converted[::5]:
        expected = reference(before[f"{name}.weight"], bits, group_size, symmetric)
        assert torch.equal(model.get_submodule(name).weight, expected), name


def distance(source: Path, out: Path, **changes: object) -> float:
    written(source, out, **changes)
    return (loaded(out)[1] - loaded(source)[1]).square().mean().sqrt().item()


def test_more_bits_and_smaller_groups_come_closer(source, tmp_path) -> None:
    by_bits = [distance(source, tmp_path / f"b{bits}", bits=bits) for bits in (3, 4, 8)]
    assert by_bits[0] > 1.5 * by_bits[1] > 12 * by_bits[2]
    by_group = [distance(source, tmp_path / f"g{size}", group_size=size) for size in (64, 16)]
    assert by_group[0] > by_group[1]


def test_a_zero_of_its_own_helps_where_weights_lie_on_one_side(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "plain", hidden_size=64, intermediate_size=128))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.abs_()
    model.save_pretrained(tmp_path / "model")
    name = "model.layers.3.mlp.up_proj"
    errors = []
    for symmetric in (True, False):
        written(tmp_path / "model", tmp_path / str(symmetric), symmetric=symmetric)
        rounded = loaded(tmp_path / str(symmetric))[0].get_submodule(name).weight
        errors.append((rounded - model.get_submodule(name).weight).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_what_stays_has_the_bytes_of_the_source(source, tmp_path) -> None:
    scheme = written(source, tmp_path / "out", seam_bits=16)
    before, after = read_weights(source).tensors, read_weights(tmp_path / "out").tensors
    kept = [name for name in before if name.removesuffix(".weight") not in scheme.converted]
    assert {f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2)} <= set(kept)
    assert all(digest(before[name]) == digest(after[name]) for name in kept)
    assert len(after) == len(kept) + 3 * len(scheme.converted)


def test_wider_layers_are_read_in_their_own_bits(source, tmp_path) -> None:
    written(source, tmp_path / "out", seam_bits=8, group_size=32)
    model, _ = loaded(tmp_path / "out")
    before = load_file(source / "model.safetensors")
    for i, bits in ((0, 4), (1, 8), (2, 8), (3, 4)):
        name = f"model.layers.{i}.mlp.down_proj"
        assert torch.equal(model.get_submodule(name).weight, reference(before[f"{name}.weight"], bits, 32, True)), name


def test_both_number_formats_load_and_a_cache_changes_nothing(source, tmp_path) -> None:
    written(source, tmp_path / "out")
    model, logits = loaded(tmp_path / "out")
    same = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(model.generate(TOKENS, use_cache=True, **same), model.generate(TOKENS, use_cache=False, **same))
    half, rough = loaded(tmp_path / "out", torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (rough.float() - logits).abs().max() < 0.05 * logits.abs().max()


def test_the_folder_is_a_whole_checkpoint(source, tmp_path) -> None:
    written(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("old mill").input_ids
    settings = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert settings["ignore"] == ["lm_head"]
    assert not list((tmp_path / "out").glob("*.bin"))


def test_sharded_checkpoints_stay_sharded(source, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    written(tmp_path / "model", tmp_path / "out")
    written(source, tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(loaded(tmp_path / "out")[1], loaded(tmp_path / "whole")[1])


def test_bf16_scales_are_rounded_before_the_weights(source, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    written(tmp_path / "model", tmp_path / "out", bits=8)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    scale = stored[f"{name}.weight_scale"]
    assert scale.dtype == torch.bfloat16
    before = load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"].float()
    steps = scale.float().repeat_interleave(64, dim=1)
    error = (loaded(tmp_path / "out")[0].get_submodule(name).weight - before).abs()
    inside = before.abs() < 127 * steps  # beyond it the grid ends
    assert (error <= 0.5001 * steps)[inside].all()


def test_zeros_of_their_own_do_not_go_with_two_numbers_of_bits() -> None:
    with pytest.raises(UserError, match=r"quantize\.symmetric=false cannot go with quantize\.seam_bits=8 - allowed"):
        rtn.needs(replace(SETTINGS, symmetric=False, seam_bits=8))


def test_a_missing_library_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs compressed-tensors - pip install layerscalpel\[quant\]"):
        rtn.needs(SETTINGS)


def test_a_layer_that_is_stored_under_another_name_is_refused(source, tmp_path) -> None:
    scheme = Scheme.of(source, SETTINGS)
    with pytest.raises(UserError, match=r"1 linear layers of .* are not stored under their own names \(elsewhere"):
        rtn.write(source, tmp_path / "out", NO_TEXT, replace(scheme, converted=(*scheme.converted, "elsewhere")))

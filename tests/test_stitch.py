"""The stitch is the least-squares map, folding it is inserting it, and it is kept only where it helps."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny, tokens
from planted import mean_kl, random_blocks, silence
from torch import Tensor

from layerscalpel import stitch
from layerscalpel.cut import cut_model
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import StitchSettings
from layerscalpel.stitch import Grams, accumulate, fold, last_projection, ridge_change, stitch_model

SEGMENT = Segment(3, 5, 8)
LINEAR = StitchSettings("linear")
FOLDABLE = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "bloom": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "gpt_neox": "mlp.dense_4h_to_h",
    "qwen2": "mlp.down_proj",
}


def cut_apart(parent: Any, segment: Segment = SEGMENT) -> Decoder:
    """Return the parent without the segment, sharing no tensor with it."""
    return find_layers(copy.deepcopy(cut_model(find_layers(parent), segment)[0]))


def random_rows(count: int = 200, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (projected, given, wanted) [M, D] in float64."""
    generator = torch.Generator().manual_seed(seed)
    projected, noise, given = torch.randn(3, count, width, dtype=torch.float64, generator=generator)
    planted = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return projected, given, given + projected @ planted + 0.3 * noise


def grams_of(projected: Tensor, given: Tensor, wanted: Tensor) -> Grams:
    grams = Grams(*torch.zeros(2, projected.shape[1], projected.shape[1], dtype=torch.float64))
    for rows in zip(projected.split(64), given.split(64), wanted.split(64), strict=True):
        grams.add(*rows)
    return grams


def test_change_equals_weighted_least_squares() -> None:
    projected, given, wanted = random_rows()
    root = (1 / wanted.norm(dim=-1, keepdim=True)).sqrt()
    naive = np.linalg.lstsq((root * projected).numpy(), (root * (wanted - given)).numpy(), rcond=None)[0]
    change = ridge_change(grams_of(projected, given, wanted), ridge=0.0)
    torch.testing.assert_close(change, torch.from_numpy(naive), rtol=1e-8, atol=1e-10)


def test_change_recovers_a_planted_map() -> None:
    projected, given, _ = random_rows()
    planted = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    change = ridge_change(grams_of(projected, given, given + projected @ planted), ridge=0.0)
    torch.testing.assert_close(change, planted, rtol=1e-8, atol=1e-8)


def test_ridge_draws_to_the_identity() -> None:
    grams = grams_of(*random_rows())
    norms = [ridge_change(grams, ridge).norm().item() for ridge in (0.0, 0.1, 1.0, 10.0, 1e9)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_grams_are_those_of_the_stated_hidden_states(family: str) -> None:
    model, ids, seen = tiny(family), tokens(5), []
    decoder = find_layers(model)
    last_projection(decoder, 2).register_forward_hook(lambda _m, _a, output: seen.append(output))
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    naive = grams_of(*(rows.double().flatten(0, 1) for rows in (seen[-1], states[3], states[5])))
    grams = accumulate(decoder, SEGMENT, ids, batch_size=2)
    assert grams.num_tokens == 80
    torch.testing.assert_close(grams.inner_DD, naive.inner_DD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grams.outer_DD, naive.outer_DD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FOLDABLE)
def test_folding_equals_inserting_the_map(family: str) -> None:
    model, ids = tiny(family), tokens(2)
    projection = model.get_submodule(f"{find_layers(model).path}.2.{FOLDABLE[family]}")
    change = 0.2 * torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = model(ids, use_cache=False).logits
    handle = projection.register_forward_hook(lambda _m, _a, output: output + output @ change.float())
    inserted = model(ids, use_cache=False).logits
    handle.remove()
    fold(projection, change)
    folded = model(ids, use_cache=False).logits
    assert (inserted - plain).abs().max() > 1e-2
    torch.testing.assert_close(folded, inserted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FOLDABLE)
@pytest.mark.parametrize("layer", [0, 7])
def test_last_projection_is_found(family: str, layer: int) -> None:
    decoder = find_layers(tiny(family))
    assert last_projection(decoder, layer) is decoder.layers[layer].get_submodule(FOLDABLE[family])
    assert not any(module._forward_hooks for module in decoder.model.modules())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_family_without_a_plain_last_projection_is_refused_by_name(family: str) -> None:
    parent = tiny(family)
    segment = Segment(4, 8, 8) if family.startswith("gemma") else SEGMENT
    student, name = cut_apart(parent, segment), type(find_layers(parent).layers[0]).__name__
    before = copy.deepcopy(student.model.state_dict())
    with pytest.raises(UserError, match=rf"{name} adds straight.* - use --set stitch\.method=none"):
        stitch_model(student, find_layers(parent), segment, random_blocks(8), LINEAR)
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


def test_segment_at_the_first_layer_is_refused() -> None:
    parent, segment = tiny("llama"), Segment(0, 2, 8)
    with pytest.raises(UserError, match=r"starts at layer 0 - use --set stitch\.method=none"):
        stitch_model(cut_apart(parent, segment), find_layers(parent), segment, random_blocks(8), LINEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ridge", [1e-9, 0.01, 1.0])
def test_stitch_is_never_worse_than_none_on_its_held_out_blocks(family: str, ridge: float) -> None:
    parent, blocks = tiny(family), random_blocks(8)
    student = cut_apart(parent)
    plain, chosen = copy.deepcopy(student.model), blocks.tokens[-2:]
    found = stitch_model(student, find_layers(parent), SEGMENT, blocks, StitchSettings("linear", ridge))
    wanted = parent(chosen).logits
    none, now = (mean_kl(wanted, model(chosen).logits).mean().item() for model in (plain, student.model))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["kl_nats"]["none"]["value"] == pytest.approx(none, rel=1e-4)
    assert found["kl_nats"][found["method"]]["value"] == pytest.approx(now, rel=1e-4)
    assert now <= none


def test_stitch_that_does_not_help_leaves_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny("gpt2")
    student = cut_apart(parent)
    before = copy.deepcopy(student.model.state_dict())
    harm = 9 * torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(stitch, "ridge_change", lambda _grams, _ridge: harm)
    found = stitch_model(student, find_layers(parent), SEGMENT, random_blocks(8), LINEAR)
    assert found["method"] == "none"
    assert found["kl_nats"]["linear"]["value"] > found["kl_nats"]["none"]["value"]
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


def test_segment_that_computes_a_fixed_linear_map_is_repaired() -> None:
    parent, segment = tiny("llama"), Segment(1, 3, 8)
    decoder = find_layers(parent)
    with torch.no_grad():  # the stream at the seam is what layer 0's last projection adds, and nearly nothing else
        decoder.layers[0].mlp.down_proj.weight.mul_(1000)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    for layer in decoder.layers[1:3]:
        layer.forward = lambda hidden, *_args, **_kwargs: hidden @ turn
    student = cut_apart(parent, segment)
    found = stitch_model(student, decoder, segment, random_blocks(16), StitchSettings("linear", 1e-6))
    assert found["method"] == "linear"
    assert found["kl_nats"]["none"]["value"] > 0.3
    assert found["kl_nats"]["linear"]["value"] < 0.02 * found["kl_nats"]["none"]["value"]


def test_parent_is_left_as_it_was() -> None:
    parent = tiny("llama")
    before = copy.deepcopy(parent.state_dict())
    stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), LINEAR)
    assert all(torch.equal(value, before[key]) for key, value in parent.state_dict().items())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_blocks_to_fit_and_to_choose_are_a_user_error(count: int) -> None:
    parent = tiny("llama")
    with pytest.raises(UserError, match="calibration blocks"):
        stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(count), LINEAR)


def test_layer_that_adds_nothing_has_nothing_to_fold_in() -> None:
    parent = tiny("llama")
    silence(find_layers(parent).layers[2])
    found = stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), LINEAR)
    assert found["method"] == "none"
    assert found["kl_nats"]["linear"] == found["kl_nats"]["none"]


def test_fewer_tokens_than_dimensions_take_the_smallest_map() -> None:
    projected, given, wanted = random_rows(count=4)
    root = (1 / wanted.norm(dim=-1, keepdim=True)).sqrt()
    naive = np.linalg.lstsq((root * projected).numpy(), (root * (wanted - given)).numpy(), rcond=None)[0]
    change = ridge_change(grams_of(projected, given, wanted), ridge=0.0)
    torch.testing.assert_close(change, torch.from_numpy(naive), rtol=1e-6, atol=1e-8)

"""Cosines are those of the hidden states that Hugging Face itself reports, and identity layers turn nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from families import tiny, tokens
from planted import silence

from layerscalpel.errors import UserError
from layerscalpel.probe import find_layers
from layerscalpel.similarity import boundary_cosines

ANGLE_ROUNDING = 3e-4
"""arccos near 1 takes the root of a float32 cosine's last bit: sqrt(2 * 2e-7) / pi."""


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_cosines_equal_those_of_the_models_own_hidden_states(family: str) -> None:
    model, ids = tiny(family), tokens(3)
    with torch.no_grad():
        stated = model(ids, output_hidden_states=True, use_cache=False).hidden_states[:8]  # the ninth is normed
    similarity = boundary_cosines(find_layers(model), ids, batch_size=2)
    for i, one in enumerate(stated):
        for j, other in enumerate(stated):
            cosine_NT = F.cosine_similarity(one.double(), other.double(), dim=-1)
            torch.testing.assert_close(similarity.mean_NBB[:, i, j], cosine_NT.mean(1), rtol=0, atol=1e-5)
            torch.testing.assert_close(similarity.last_NBB[:, i, j], cosine_NT[:, -1], rtol=0, atol=1e-5)


def test_last_boundary_is_the_last_layers_output() -> None:
    model, ids = tiny("llama"), tokens(2)
    model.model.norm.forward = lambda hidden: hidden  # so that the ninth stated hidden state is not normed
    with torch.no_grad():
        first, *_, last = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    similarity = boundary_cosines(find_layers(model), ids)
    naive = F.cosine_similarity(first.double(), last.double(), dim=-1).mean(1)
    torch.testing.assert_close(similarity.mean_NBB[:, 0, 8], naive, rtol=0, atol=1e-5)


def test_cosines_do_not_depend_on_the_batch_size() -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(5)
    one, all_at_once = (boundary_cosines(decoder, ids, batch_size=size).mean_NBB for size in (1, 5))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom", "opt"])
def test_identity_layers_have_no_angle_and_no_influence(family: str) -> None:
    decoder = find_layers(tiny(family))
    for i in (2, 3):
        silence(decoder.layers[i])
    similarity = boundary_cosines(decoder, tokens(3))
    angles = [similarity.angular_distance(start, 2).value for start in range(7)]
    influences = [similarity.block_influence(i).value for i in range(8)]
    assert angles[2] == pytest.approx(0, abs=ANGLE_ROUNDING)
    assert min(angle for start, angle in enumerate(angles) if start != 2) > 10 * ANGLE_ROUNDING
    assert influences[2:4] == pytest.approx([0, 0], abs=1e-6)
    assert min(influences[:2] + influences[4:]) > 1e-4


def test_opposite_ends_are_one_apart() -> None:
    decoder, ids = find_layers(tiny("gpt2")), tokens(2)
    for i in (2, 3):
        silence(decoder.layers[i])
    decoder.layers[3].forward = lambda hidden, *_args, **_kwargs: -hidden
    assert boundary_cosines(decoder, ids).angular_distance(3, 1).value == pytest.approx(1, abs=ANGLE_ROUNDING)
    assert boundary_cosines(decoder, ids).block_influence(3).value == pytest.approx(2, abs=1e-6)


def test_heat_map_is_symmetric_with_ones_on_the_diagonal() -> None:
    heat = torch.tensor(boundary_cosines(find_layers(tiny("llama")), tokens(3)).heat_map())
    assert heat.shape == (9, 9)
    torch.testing.assert_close(heat, heat.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(heat.diagonal(), torch.ones(9), rtol=0, atol=1e-6)
    assert heat.abs().max() <= 1 + 1e-6


def test_errors_are_those_of_the_blocks() -> None:
    similarity = boundary_cosines(find_layers(tiny("llama")), tokens(6))
    angles = torch.arccos(similarity.last_NBB[:, 1, 4]) / math.pi
    measured = similarity.angular_distance(1, 3)
    assert (measured.value, measured.se) == pytest.approx((angles.mean().item(), angles.std().item() / math.sqrt(6)))
    assert measured.n == 6


@pytest.mark.parametrize("broken", [0, 7])
def test_nan_weights_are_refused_by_the_layer_that_has_them(broken: int) -> None:
    decoder = find_layers(tiny("llama"))
    decoder.layers[broken].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=f"layer {broken}'s output is not finite"):
        boundary_cosines(decoder, tokens(2))

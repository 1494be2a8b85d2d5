"""Counts are read exactly, shared parameters are not promised away, and no smaller cut would have done."""

from __future__ import annotations

import pytest
from families import tiny

from layerscalpel.cut import cut_model
from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.sizes import layer_parameters, parse_count, windows_within

UNEQUAL = [50, 30, 10, 10, 40, 10]
"""Parameters of six layers; 200 with the 50 outside of them."""


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("90M", 90_000_000),
        ("6.7B", 6_700_000_000),
        ("500K", 500_000),
        ("0.5k", 500),
        (" 1e9 ", 10**9),
        ("1.35e+8", 135_000_000),
        ("123456789", 123_456_789),
        ("0.000000001B", 1),
    ],
)
def test_counts_are_read_exactly(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "M", "90T", "-90M", "0", "0M", "1.5", "90 M B", "1e", "1e-3", "nan", "९०", "9" * 19]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"no number of parameters - allowed: digits with K, M or B"):
        parse_count(text)


@pytest.mark.parametrize("family", ["llama", "gpt2", "glm4_moe"])
def test_a_window_takes_along_what_its_layers_hold(family: str) -> None:
    model = tiny(family)
    decoder = find_layers(model)
    sizes = layer_parameters(decoder)
    cut, _ = cut_model(decoder, Segment(2, 5, 8))
    assert num_parameters(cut) == num_parameters(model) - sum(sizes[2:5])
    assert (len(set(sizes)) > 1) == (family == "glm4_moe")  # its first layers are dense


def test_parameters_that_are_held_elsewhere_too_stay() -> None:
    model = tiny("llama")
    whole = layer_parameters(find_layers(model))
    layers = model.model.layers
    layers[6].mlp = layers[1].mlp
    layers[2].input_layernorm.weight = model.model.norm.weight
    layers[3].self_attn.k_proj.weight = layers[3].self_attn.v_proj.weight  # within one layer: it goes, counted once
    lost = {1: 3 * 32 * 48, 6: 3 * 32 * 48, 2: 32, 3: 16 * 32}
    assert layer_parameters(find_layers(model)) == [size - lost.get(i, 0) for i, size in enumerate(whole)]


@pytest.mark.parametrize("target", range(100, 200, 5))
def test_windows_are_all_of_the_smallest_length_that_does(target: int) -> None:
    def fitting(num_removed: int) -> list[int]:
        windows = {s: sum(UNEQUAL[s : s + num_removed]) for s in range(7 - num_removed)}
        return [start for start, size in windows.items() if 200 - size <= target]

    num_removed, starts = windows_within(200, UNEQUAL, target)
    assert starts == fitting(num_removed)
    assert starts
    assert not any(fitting(fewer) for fewer in range(1, num_removed))


def test_equal_layers_leave_every_window() -> None:
    assert windows_within(100, [10] * 8, 75) == (3, [0, 1, 2, 3, 4, 5])
    assert windows_within(100, [10] * 8, 70) == (3, [0, 1, 2, 3, 4, 5])  # at most: the target itself will do


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(UserError, match=r"comes to 99 parameters - allowed: --target-params 100 or more"):
        windows_within(200, UNEQUAL, 99)  # the first four layers hold 100
    assert windows_within(200, UNEQUAL, 100) == (4, [0])


def test_a_model_of_two_layers_has_none_to_remove() -> None:
    with pytest.raises(UserError, match=r"--target-params 20 or more"):
        windows_within(20, [10, 10], 15)


def test_a_parent_that_fits_is_not_cut() -> None:
    with pytest.raises(UserError, match=r"already has 200 parameters, no more than the 200 asked for - nothing to rem"):
        windows_within(200, UNEQUAL, 200)

"""All windows in one parent forward score what one forward per window would score."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import tiny, tokens
from planted import mean_kl, silence, without
from torch import Tensor

from layerscalpel import exact, hooks, losses
from layerscalpel.errors import UserError
from layerscalpel.exact import WindowScores, score_windows
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers

FAMILIES = ("llama", "gemma3_text", "gpt2", "bloom", "opt")
ROUNDING = 1e-5
"""Nats; float32 sums in another order."""


@torch.no_grad()
def naive_scores(decoder: Decoder, ids: Tensor, num_removed: int) -> Tensor:
    """Return the KL [W, N] from one full forward per window."""
    parent, rows = decoder.model(ids, use_cache=False).logits, []
    for start in range(len(decoder) - num_removed + 1):
        with without(decoder.layers, start, start + num_removed):
            rows.append(mean_kl(parent, decoder.model(ids, use_cache=False).logits))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_removed", [1, 3, 7])
def test_scores_equal_one_forward_per_window(family: str, num_removed: int) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(3)
    scores, naive = score_windows(decoder, ids, num_removed=num_removed), naive_scores(decoder, ids, num_removed)
    assert scores.starts == tuple(range(9 - num_removed))
    assert naive.min() > 100 * ROUNDING  # every window matters, so equality says something
    torch.testing.assert_close(scores.kl_WN, naive, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_batch_size(family: str) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(5)
    one, all_at_once = (score_windows(decoder, ids, num_removed=2, batch_size=size).kl_WN for size in (1, 5))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["gemma3_text", "bloom"])
@pytest.mark.parametrize("stacked", [1, 70])
def test_scores_do_not_depend_on_how_streams_are_stacked(
    family: str, stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(2)
    whole = score_windows(decoder, ids, num_removed=2).kl_WN
    monkeypatch.setitem(hooks.STACKED_TOKENS, "cpu", stacked)
    torch.testing.assert_close(score_windows(decoder, ids, num_removed=2).kl_WN, whole, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("starts", [[0], [6], [5, 2], [4, 1, 4]])
def test_scores_do_not_depend_on_which_windows_are_asked(starts: list[int]) -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(2)
    whole, some = (score_windows(decoder, ids, num_removed=2, starts=asked) for asked in (None, starts))
    assert some.starts == tuple(sorted(set(starts)))
    for start in starts:
        expected = whole.kl_WN[whole.starts.index(start)]
        torch.testing.assert_close(some.kl_WN[some.starts.index(start)], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_removed", [1, 3, 7])
def test_layer_passes_are_as_many_as_the_formula_says(
    family: str, num_removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, num_blocks = find_layers(tiny(family)), 3
    kind, rows = type(decoder.layers[0]), []
    inner = kind.forward

    def counting(self: object, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        rows.append(len(hidden_states))
        return inner(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    score_windows(decoder, tokens(num_blocks), num_removed=num_removed, batch_size=2)
    left = len(decoder) - num_removed
    assert sum(rows) == num_blocks * (left * (left + 1) // 2 + len(decoder))


def test_logits_of_all_windows_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids, sizes = find_layers(tiny("llama")), tokens(2, length=24), []
    inner, bound = exact.head_logits, 2 * 5 * 97  # two blocks, five tokens

    def watched(decoder: Decoder, hidden: Tensor) -> Tensor:
        logits = inner(decoder, hidden)
        sizes.append(logits.numel())
        return logits

    whole = score_windows(decoder, ids, num_removed=2).kl_WN
    monkeypatch.setattr(exact, "head_logits", watched)
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * bound)
    chunked = score_windows(decoder, ids, num_removed=2).kl_WN
    assert max(sizes) == bound
    torch.testing.assert_close(chunked, whole, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_identity_costs_nothing_and_ranks_first(family: str) -> None:
    model = tiny(family)
    decoder = find_layers(model)
    for i in (4, 5):
        silence(decoder.layers[i])
    scores = score_windows(decoder, tokens(2), num_removed=2)
    assert scores.best() == 4
    assert scores.mean(4).value == pytest.approx(0, abs=1e-9)
    assert all(scores.mean(start).value > 1e-3 for start in scores.starts if start != 4)


def test_best_takes_the_smaller_start_of_equals() -> None:
    assert WindowScores((0, 1, 2), 2, torch.tensor([[3.0], [1.0], [1.0]]), 8).best() == 1


def test_margin_is_paired_over_blocks() -> None:
    base = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    scores = WindowScores((2, 3), 1, torch.stack([base, base + torch.tensor([0.1, 0.2, 0.3])]), 8)
    margin = scores.margin(2, 3)
    assert margin.value == pytest.approx(0.2)
    assert margin.se == pytest.approx(0.1 / math.sqrt(3))  # the blocks' own spread, 4, is gone
    assert scores.margin(3, 2).value == pytest.approx(-0.2)
    assert margin.n == 24


def test_mean_and_error_are_those_of_the_blocks() -> None:
    scores = score_windows(find_layers(tiny("llama")), tokens(6), num_removed=2)
    measured, row = scores.mean(3), scores.kl_WN[3]
    assert (measured.value, measured.n) == (pytest.approx(row.mean().item()), 6 * 16)
    assert measured.se == pytest.approx(row.std().item() / math.sqrt(6))


@pytest.mark.parametrize("broken", [0, 3, 7])
def test_nan_weights_are_refused_by_the_layer_that_has_them(broken: int) -> None:
    model = tiny("llama")
    decoder = find_layers(model)
    decoder.layers[broken].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=f"layer {broken}'s output is not finite"):
        score_windows(decoder, tokens(2), num_removed=2)


def test_nan_embedding_is_refused_by_name() -> None:
    model = tiny("llama")
    model.get_input_embeddings().weight.data[:] = math.inf
    with pytest.raises(UserError, match="the embedding is not finite"):
        score_windows(find_layers(model), tokens(2), num_removed=2)


def test_one_block_has_no_error_and_its_json_no_nan() -> None:
    scores = score_windows(find_layers(tiny("llama")), tokens(1), num_removed=2)
    found = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert found["3"] == {"kl_nats": scores.mean(3).value, "se": None, "num_blocks": 1}
    assert json.loads(json.dumps(scores.margin(3, 4).to_dict(), allow_nan=False))["se"] is None


def test_parent_is_left_as_it_was() -> None:
    model = tiny("bloom")
    decoder, ids = find_layers(model), tokens(2)
    before, state = model(ids, use_cache=False).logits, {k: v.clone() for k, v in model.state_dict().items()}
    score_windows(decoder, ids, num_removed=3)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks or "forward" in vars(layer) for layer in decoder.layers)


def test_window_without_which_the_model_overflows_is_refused_by_name() -> None:
    decoder = find_layers(tiny("llama"))
    for i, scale in {3: 1e30, 4: 1e-30, 5: 1e10, 6: 1e-10}.items():
        decoder.layers[i].forward = lambda hidden, *_args, scale=scale, **_kwargs: hidden * scale
    with pytest.raises(UserError, match=r"without layer 4 \(segment \[4, 5\).* is not finite"):
        score_windows(decoder, tokens(2), num_removed=1)
    assert score_windows(decoder, tokens(2), num_removed=1, starts=[0, 7]).best() in (0, 7)

"""Candidates of any shape are advanced beside the parent as if each had a forward of its own, and no state twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterator, MutableMapping

import pytest
import torch
from families import tiny, tokens
from healing import by_tier
from planted import naive_scores
from torch import Tensor

from layerscalpel import hooks
from layerscalpel.exact import score
from layerscalpel.probe import find_layers
from layerscalpel.streams import Removal, Streams, window

FAMILIES = ("llama", "bloom", "gemma3_text", "gpt2")
DEPTH = 8
ROUNDING = 1e-5
"""Nats; float32 sums in another order."""
WINDOWS = [window(start, n) for n in range(1, DEPTH) for start in range(DEPTH - n + 1)]
"""All of all lengths that leave a layer."""
NESTED: list[Removal] = [(2,), (2, 5), (2, 5, 6), (2, 6), (2, 3), (0,), (0, 7), (7,), (0, 1, 2), (6, 7)]
"""Histories that begin alike and part later; first and last layers."""
PAIRS: list[Removal] = [(0, 1, 4), (0, 1, 5, 6), (1, 3), (1, 2, 4, 5), (2, 7), (0, 7), (0, 2, 3, 4, 5, 6, 7)]


def subsets(count: int, seed: int) -> list[Removal]:
    """Return random sets of layers."""
    draw = random.Random(seed)
    return [tuple(sorted(draw.sample(range(DEPTH), draw.randint(1, DEPTH - 1)))) for _ in range(count)]


class Watched(MutableMapping[Hashable, Tensor]):
    """A store that notices tensors that were changed in place while they lay in it, and how many lay in it at most."""

    def __init__(self) -> None:
        self.held: dict[Hashable, tuple[Tensor, int]] = {}
        self.most = 0

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self.held[key] = tensor, tensor._version
        self.most = max(self.most, len(self.held))

    def __getitem__(self, key: Hashable) -> Tensor:
        tensor, version = self.held[key]
        assert tensor._version == version
        return tensor

    def __delitem__(self, key: Hashable) -> None:
        assert self[key] is self.held.pop(key)[0]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@pytest.mark.parametrize("family", by_tier(FAMILIES, everyday=["bloom", "gemma3_text"]))
def test_removals_of_any_shape_score_as_one_forward_each(family: str) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(2)
    removals = [*WINDOWS, *NESTED, *PAIRS, *subsets(20, seed=1)]
    random.Random(0).shuffle(removals)
    scores, naive = score(decoder, ids, removals), naive_scores(decoder, ids, removals)
    assert naive.min() > 100 * ROUNDING  # every removal matters, so equality says something
    torch.testing.assert_close(scores, naive, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("removal", [*PAIRS, (3,), (7,), (0,)])
def test_a_removal_scores_alone_what_it_scores_in_company(removal: Removal) -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(2)
    alone, company = score(decoder, ids, [removal]), score(decoder, ids, [removal, *WINDOWS, *NESTED])
    torch.testing.assert_close(company[:1], alone, rtol=0, atol=ROUNDING)


def test_a_state_that_one_candidate_keeps_and_another_skips_serves_both() -> None:
    decoder, ids, store = find_layers(tiny("llama")), tokens(2), Watched()
    family: list[Removal] = [(3,), (3, 5), (3, 5, 6), (3, 4), (3, 6), (3, 7)]
    together = score(decoder, ids, family, store=store)
    torch.testing.assert_close(together, naive_scores(decoder, ids, family), rtol=0, atol=ROUNDING)
    assert len({tuple(row.tolist()) for row in together}) == len(family)
    assert not store


def test_a_removal_asked_twice_is_answered_twice() -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(2)
    scores = score(decoder, ids, [(2, 3), (5,), (2, 3)])
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])


@pytest.mark.parametrize(
    ("removals", "expected"),
    [
        ([(7,)], 0),
        ([(0,)], 7),
        ([(3,)], 4),
        ([(2, 5)], 2 + 2),
        ([(2,), (2, 5)], 5 + 2),  # as one until layer 5
        ([(2, 3), (2, 4)], 4 + 1 + 3),  # (2) keeps layer 3 for the second
        ([(2,), (2, 3), (3,)], 5 + 4 + 4),
        ([(2,), (2,)], 5),
        ([window(start, 3) for start in range(6)], 5 * 6 // 2),
        ([window(start, 1) for start in range(8)], 7 * 8 // 2),
        ([(0, 1, 2, 3, 4, 5, 6, 7)], 0),
    ],
)
def test_layer_passes_as_counted_by_hand(removals: list[Removal], expected: int, monkeypatch) -> None:
    assert passes(removals, "llama", 1, monkeypatch) == expected + DEPTH


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_passes_once_for_each_different_history(family: str, monkeypatch) -> None:
    removals = [*WINDOWS, *NESTED, *PAIRS, *subsets(20, seed=2)]
    masks = ["".join("-" if i in removal else "+" for i in range(DEPTH)) for removal in removals]
    begun = {mask[: i + 1] for mask in masks for i in range(DEPTH) if mask[i] == "+" and "-" in mask[:i]}
    assert passes(removals, family, 3, monkeypatch) == 3 * (len(begun) + DEPTH)


def passes(removals: list[Removal], family: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many blocks went through layers while the removals were scored."""
    decoder, rows = find_layers(tiny(family)), []
    kind = type(decoder.layers[0])
    inner = kind.forward

    def counting(self: object, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        rows.append(len(hidden_states))
        return inner(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    score(decoder, tokens(num_blocks), removals, batch_size=2)
    return sum(rows)


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_states_are_those_of_the_layers_kept(at_once: int, seed: int, monkeypatch) -> None:
    """Layer i adds 2 ** i, so a final state tells which layers it went through."""
    monkeypatch.setitem(hooks.STACKED_TOKENS, "cpu", at_once)
    removals, store = [*NESTED, *subsets(12, seed)], Watched()
    streams = Streams(removals, DEPTH, store=store, name="batch")
    hidden = torch.zeros(2, 4, 3, dtype=torch.float64)
    for i in range(DEPTH):
        streams.visit(i, hidden, lambda stacked, i=i: stacked + 2**i)
        begun = {tuple(j for j in removal if j <= i) for removal in removals} - {()}
        assert set(store) == {("batch", history) for history in begun}  # what nobody needs any more is gone
        hidden = hidden + 2**i
    streams.visit(DEPTH, hidden, lambda _: pytest.fail("there is no layer to step through"))
    for removal in removals:
        assert streams.final(removal).shape == hidden.shape
        assert set(streams.final(removal).flatten().tolist()) == {sum(2**i for i in range(DEPTH) if i not in removal)}
    streams.forget()
    assert not store


def test_batches_of_one_store_do_not_meet() -> None:
    store: dict[Hashable, Tensor] = {}
    first, second = (Streams([(0,)], 2, store=store, name=name) for name in (0, 1))
    for streams, value in ((first, 3.0), (second, 5.0)):
        for i in range(2):
            streams.visit(i, torch.full((1, 2, 2), value), lambda stacked: stacked + 1)
    assert (first.final((0,)).unique().item(), second.final((0,)).unique().item()) == (4.0, 6.0)
    first.forget()
    assert list(store) == [(1, (0,))]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_in_the_store(family: str) -> None:
    store = Watched()
    score(find_layers(tiny(family)), tokens(3), [*NESTED, *PAIRS], batch_size=2, store=store)
    assert store.most >= len({*NESTED, *PAIRS})
    assert not store


def test_windows_of_all_lengths_cost_what_the_longest_first_layers_share() -> None:
    """A window of n layers has the history of every shorter one that starts where it starts."""
    kept = Streams(WINDOWS, DEPTH).kept
    expected = [{window(s, n) for n in range(1, DEPTH) for s in range(DEPTH) if s + n <= i} for i in range(DEPTH)]
    assert [set(histories) for histories in kept[:DEPTH]] == expected
    assert all(len(histories) == len(set(histories)) for histories in kept)
    assert sum(map(len, kept)) == sum(
        1 for s, stop in itertools.combinations(range(DEPTH), 2) for _ in range(DEPTH - stop)
    )

"""Layer by layer gives the very numbers that block by block gives, and takes each layer once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator

import pytest
import torch
from families import FAMILIES, RULES, tiny, tokens
from healing import by_tier
from planted import naive_scores, one_by_one
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.evaluate import final_hidden
from layerscalpel.exact import score
from layerscalpel.hooks import Step, Visit
from layerscalpel.layers import Decoder
from layerscalpel.passes import nobody, pass_blocks
from layerscalpel.probe import find_layers
from layerscalpel.similarity import boundary_cosines
from layerscalpel.streams import Removal, window
from layerscalpel.twin import twin_model

REFUSED = {"gemma3n_text": "read the keys and values of other layers"}
"""Layers whose arguments are made by earlier ones, which a layer alone would not get."""
REMOVALS: list[Removal] = [*(window(start, 2) for start in range(7)), (1, 4), (0,), (7,)]
ALL = [*FAMILIES, *RULES]
ALIKE = ("mistral", "qwen3", "phi3", "olmo2", "olmo3", "cohere2", "exaone4", "gpt_neox", "qwen2_moe", "glm4_moe")
"""Families whose layers are given what those of another one here are given; for the slow tier."""


@pytest.mark.parametrize(
    "family",
    by_tier(
        [family for family in ALL if family not in REFUSED],
        everyday=[family for family in ALL if family not in (*REFUSED, *ALIKE)],
    ),
)
def test_layer_by_layer_equals_block_by_block(family: str) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(3)
    apart = one_by_one(decoder)
    hidden = final_hidden(decoder, ids, batch_size=2)
    assert torch.equal(final_hidden(apart, ids, batch_size=2), hidden)
    assert hidden.std() > 1e-3
    scores = score(decoder, ids, REMOVALS, batch_size=2)
    assert torch.equal(score(apart, ids, REMOVALS, batch_size=2), scores)
    assert scores.min() > 1e-7  # a family divides its logits by a lot
    whole, parted = (boundary_cosines(item, ids, batch_size=2) for item in (decoder, apart))
    assert torch.equal(whole.mean_NBB, parted.mean_NBB)
    assert torch.equal(whole.last_NBB, parted.last_NBB)


@pytest.mark.parametrize("family", REFUSED)
def test_layers_that_need_earlier_ones_are_refused_by_name(family: str) -> None:
    with pytest.raises(UserError, match=REFUSED[family]):
        find_layers(tiny(family))


INDEXERS = {"num_hidden_layers": 8, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 5}
SHARED, OWN = ["full", "full", "shared", "shared"] * 2, ["full"] * 8
READS_EARLIER = "read what layers before them found, beside the hidden states - it can be cut at a given segment"
ENTANGLED: dict[str, tuple[dict, str]] = {
    "glm_moe_dsa": (INDEXERS | {"indexer_types": SHARED}, READS_EARLIER),  # a shared choice of tokens
    "zaya": ({"num_hidden_layers": 8}, READS_EARLIER),  # the router's hidden states
    "rwkv": ({"num_hidden_layers": 8, "rescale_every": 3}, "get hidden states that the model changes between them"),
    "cpmant": ({"num_hidden_layers": 6}, "see other positions than the tokens have"),  # a prompt before the text
    "xlnet": ({"n_layer": 6}, "see other positions than the tokens have"),  # [T, B, D]
}
"""Where a stream beside the parent would get what is the parent's: its score would not be the cut model's."""


def twin(family: str, **settings: object) -> PreTrainedModel:
    return twin_model(AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize("family", ENTANGLED)
def test_layers_that_hang_together_otherwise_are_refused_by_name(family: str) -> None:
    settings, said = ENTANGLED[family]
    model = twin(family, **settings)
    known = find_layers(model)
    for decoder in (known, one_by_one(known), find_layers(model, like=known)):
        with pytest.raises(UserError, match=f"layers of {type(model).__name__} {said}"):
            score(decoder, tokens(2), [(1,)])
        with pytest.raises(UserError, match=said):
            final_hidden(decoder, tokens(2), batch_size=2)


def test_what_a_layer_is_given_and_does_not_read_is_no_reason() -> None:
    decoder, ids = find_layers(twin("glm_moe_dsa", **INDEXERS, indexer_types=OWN)), tokens(3)
    assert decoder.returns[0] == (tuple, 2)  # every layer's choice of tokens is handed to the next
    scores = score(decoder, ids, REMOVALS, batch_size=2)
    torch.testing.assert_close(scores, naive_scores(decoder, ids, REMOVALS), rtol=0, atol=1e-5)
    torch.testing.assert_close(score(one_by_one(decoder), ids, REMOVALS, batch_size=2), scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bloom", "jamba"])
def test_the_final_states_are_the_models_own(family: str) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(3)
    caught: list[Tensor] = []
    handle = decoder.layers[-1].register_forward_hook(
        lambda _m, _a, out: caught.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        decoder.model(ids, use_cache=False)
    handle.remove()
    for way in (decoder, one_by_one(decoder)):
        assert torch.equal(final_hidden(way, ids, batch_size=3), caught[0])


def walked(decoder: Decoder, num_blocks: int) -> tuple[list[tuple[int, int, Tensor]], list[int], list[Tensor]]:
    """Return the visits (batch, layer, hidden states), the batches yielded and the final states."""
    seen: list[tuple[int, int, Tensor]] = []

    def visit_of(number: int) -> Visit:
        def visit(i: int, hidden_BTD: Tensor, step: Step) -> None:
            seen.append((number, i, hidden_BTD.clone()))
            if i == len(decoder):
                with pytest.raises(AssertionError, match="no layer after the last boundary"):
                    step(hidden_BTD)

        return visit

    passed = list(pass_blocks(decoder, tokens(num_blocks).split(2), visit_of))
    return seen, [number for number, _ in passed], [hidden for _, hidden in passed]


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3_text"])
def test_visitors_see_every_boundary_either_way(family: str) -> None:
    decoder, turns = find_layers(tiny(family)), []
    whole, parted = walked(decoder, 5), walked(one_by_one(decoder, turns), 5)
    assert whole[1] == parted[1] == [0, 1, 2]
    for seen, _, final in (whole, parted):
        for number in range(3):
            own = [(i, hidden) for batch, i, hidden in seen if batch == number]
            assert [i for i, _ in own] == list(range(9))  # each layer and boundary L, in order, once
            assert torch.equal(own[-1][1], final[number])
    there = {(number, i): hidden for number, i, hidden in whole[0]}
    assert all(torch.equal(there[number, i], hidden) for number, i, hidden in parted[0])
    assert turns == list(range(8))
    assert [i for _, i, _ in parted[0]] == [i for i in range(9) for _ in range(3)]  # all batches through a layer


def test_a_pass_takes_each_layer_once_and_no_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, turns, rows = find_layers(tiny("llama")), [], []
    kind = type(decoder.layers[0])
    inner, number_of = kind.forward, {id(layer): i for i, layer in enumerate(decoder.layers)}

    def noting(self: object, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        assert turns[-1] == number_of[id(self)]  # the others' weights would not be there
        rows.append(number_of[id(self)])
        return inner(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", noting)
    list(pass_blocks(one_by_one(decoder, turns), tokens(5).split(2)))
    assert turns == list(range(8))
    assert rows == [i for i in range(8) for _ in range(3)]
    turns.clear()
    score(one_by_one(decoder, turns), tokens(5), REMOVALS, batch_size=2)
    assert turns == list(range(8))  # one pass for all candidates and all batches


def test_an_absent_layers_weights_are_not_read() -> None:
    decoder, ids = find_layers(tiny("gemma3_text")), tokens(3)
    expected = score(decoder, ids, REMOVALS, batch_size=2)
    weights = [[parameter.data for parameter in layer.parameters()] for layer in decoder.layers]

    def show(i: int, is_there: bool) -> None:
        for parameter, data in zip(decoder.layers[i].parameters(), weights[i], strict=True):
            parameter.data = data if is_there else torch.full_like(data, torch.nan)

    def resident() -> Iterator[int]:
        for i in range(len(decoder)):
            show(i, True)
            yield i
            show(i, False)

    for i in range(len(decoder)):
        show(i, False)
    assert torch.equal(score(dataclasses.replace(decoder, resident=resident), ids, REMOVALS, batch_size=2), expected)


def test_hidden_states_wait_in_the_store_and_leave_it() -> None:
    decoder, ids, kept = find_layers(tiny("llama")), tokens(5), []

    class Noting(dict[Hashable, Tensor]):
        def __setitem__(self, key: Hashable, value: Tensor) -> None:
            kept.append(key)
            super().__setitem__(key, value)

    store = Noting()
    list(pass_blocks(one_by_one(decoder), ids.split(2), store=store))
    assert {*kept} == {("parent", number) for number in range(3)}
    assert not store
    score(one_by_one(decoder), ids, REMOVALS, batch_size=2, store=store)
    assert {(number, removal) for number in range(3) for removal in REMOVALS} <= {*kept}
    assert not store


@pytest.mark.parametrize("way", [lambda decoder: decoder, one_by_one])
def test_a_pass_over_nothing_yields_nothing(way) -> None:
    assert list(pass_blocks(way(find_layers(tiny("llama"))), [])) == []


@pytest.mark.parametrize("way", [lambda decoder: decoder, one_by_one])
def test_no_gradients_and_nothing_left_on_the_model(way) -> None:
    decoder = find_layers(tiny("bloom"))
    _, hidden = next(iter(pass_blocks(way(decoder), [tokens(2)], nobody)))
    assert not hidden.requires_grad
    with contextlib.suppress(ZeroDivisionError):
        list(pass_blocks(way(decoder), [tokens(2)], lambda _number: lambda *_: 1 // 0))
    assert not any(layer._forward_hooks or "forward" in vars(layer) for layer in decoder.layers)

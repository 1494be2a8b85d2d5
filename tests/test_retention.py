"""Retentions are what they are by definition, their errors cover, and who guesses is unmasked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.items import TaskResult
from layerscalpel.paired import drawn_means
from layerscalpel.retention import Retentions, compare_children, retentions


def task(right: Tensor, name: str = "piqa", chance: float | None = 0.5, **changes: object) -> TaskResult:
    ids = tuple(f"{i:06}" for i in range(len(right)))
    given = TaskResult(name, "acc", chance, {"acc": right.double()}, higher_is_better=True, ids=ids)
    return replace(given, **changes)


def answers(num_items: int, share: float, seed: int = 0) -> Tensor:
    return (torch.rand(num_items, generator=torch.Generator().manual_seed(seed)) < share).double()


def pair(num_items: int, parent: float, keeps: float, gains: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return right answers of a parent, and of a child that keeps a share of them and gains one of the others."""
    own = answers(num_items, parent, seed)
    return own, torch.where(own > 0, answers(num_items, keeps, seed + 10_000), answers(num_items, gains, seed + 20_000))


def fold(result: TaskResult, order: Tensor) -> TaskResult:
    ids = tuple(result.ids[i] for i in order.tolist())
    return replace(result, ids=ids, values={name: row[order] for name, row in result.values.items()})


def test_identical_models_keep_exactly_everything_without_error():
    own = {"piqa": task(answers(500, 0.7)), "arc": task(answers(300, 0.4, 1), "arc", 0.25)}
    found = retentions(own, own)
    assert found.plain is not None
    assert found.adjusted is not None
    assert (found.plain.value, found.plain.se, found.plain.n) == (1.0, 0.0, 800)
    assert (found.adjusted.value, found.adjusted.se, found.adjusted.n) == (1.0, 0.0, 800)


def test_one_item_leaves_the_error_unknown():
    one, many = task(torch.ones(1), "arc", 0.0), task(answers(100, 0.7))
    alone = retentions({"arc": one}, {"arc": one}).to_dict()
    assert alone["plain_fraction"] == {"value": 1.0, "se": None, "n": 1}
    both = retentions({"arc": one, "piqa": many}, {"arc": one, "piqa": many}).to_dict()
    assert both["plain_fraction"] == {"value": 1.0, "se": None, "n": 101}
    assert both["by_task"]["piqa"]["plain_fraction"]["se"] == 0
    found, _ = compare_children({"arc": one}, {"arc": one}, {"arc": task(torch.zeros(1), "arc")})
    assert found is not None
    assert found.to_dict() == {"value": 1.0, "se": None, "p_value": 1.0, "n": 1}


def test_values_are_those_of_the_definition():
    right, kept = pair(1000, 0.7, 0.9, 0.2, 0)
    other, less = pair(400, 0.5, 0.8, 0.1, 1)
    parent = {"piqa": task(right), "arc": task(other, "arc", 0.25)}
    found = retentions(parent, {"piqa": task(kept), "arc": task(less, "arc", 0.25)})
    ratios = [kept.mean() / right.mean(), less.mean() / other.mean()]
    adjusted = [(kept.mean() - 0.5) / (right.mean() - 0.5), (less.mean() - 0.25) / (other.mean() - 0.25)]
    assert found.plain is not None
    assert found.adjusted is not None
    assert found.plain.value == pytest.approx(sum(ratios).item() / 2)
    assert found.adjusted.value == pytest.approx(sum(adjusted).item() / 2)
    assert found.tasks["arc"].adjusted is not None
    assert found.tasks["arc"].adjusted.value == pytest.approx(adjusted[1].item())


def test_the_order_of_items_changes_nothing():
    right, kept = pair(700, 0.7, 0.9, 0.2, 0)
    parent, child = task(right), task(kept)
    found = retentions({"piqa": parent}, {"piqa": child}).to_dict()
    for seed in range(3):
        orders = [torch.randperm(700, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 5)]
        shuffled = retentions({"piqa": fold(parent, orders[0])}, {"piqa": fold(child, orders[1])}).to_dict()
        assert shuffled == found
    assert retentions({"piqa": parent}, {"piqa": child}, seed=1).to_dict() != found


def test_other_tasks_do_not_change_what_is_drawn_of_one():
    right, kept = pair(700, 0.7, 0.9, 0.2, 0)
    alone = retentions({"piqa": task(right)}, {"piqa": task(kept)})
    others = {"arc": task(answers(90, 0.6), "arc", 0.25)}
    both = retentions({"piqa": task(right)} | others, {"piqa": task(kept)} | others)
    assert both.tasks["piqa"] == alone.tasks["piqa"]


@pytest.mark.parametrize("shares", [(0.75, 0.9, 0.3), (0.62, 0.8, 0.4), (0.6, 1.0, 0.0)])
def test_errors_cover_the_truth(shares):
    """The truth lies within two standard errors in 95.4 of 100 runs, within one in 68.3."""
    own, keeps, gains = shares
    truth = (own * keeps + (1 - own) * gains - 0.5) / (own - 0.5)
    within = np.zeros(2)
    for seed in range(200):
        right, kept = pair(1000, own, keeps, gains, seed)
        found = retentions({"piqa": task(right)}, {"piqa": task(kept)}).adjusted
        assert found is not None
        if found.se == 0:
            assert found.value == truth
        off = abs(found.value - truth) / (found.se or 1)
        within += (off <= 1, off <= 2)
    if shares[1:] != (1.0, 0.0):
        assert 0.60 <= within[0] / 200 <= 0.77
        assert within[1] / 200 >= 0.91


def test_the_error_is_that_of_the_paired_difference():
    right, kept = pair(4000, 0.8, 0.97, 0.05, 3)
    found = retentions({"piqa": task(right)}, {"piqa": task(kept)}).tasks["piqa"].plain
    assert found is not None
    residual_I = kept - found.value * right
    assert found.se == pytest.approx((residual_I.std() / right.mean() / 4000**0.5).item(), rel=0.06)
    alone = (right.std() / right.mean() / 4000**0.5).item()
    assert found.se < alone / 2


def test_a_child_that_always_says_yes_is_unmasked():
    """The majority of BoolQ is yes: 62 %. A parent that has 41 % there seems to be surpassed."""
    yes = answers(3000, 0.62)
    majority = yes.mean().item()
    good, bad = pair(1000, 0.75, 0.7, 0.5, 5)
    weak, strong = task(answers(3000, 0.41, 8), "boolq", majority), task(answers(3000, 0.8, 9), "boolq", majority)
    child = {"boolq": task(yes, "boolq", majority), "piqa": task(bad)}
    found = retentions({"boolq": weak, "piqa": task(good)}, child)
    assert found.plain is not None
    assert found.adjusted is not None
    assert found.plain.value > 1
    assert found.adjusted.value < 0.8
    assert found.tasks["boolq"].adjusted is None
    assert found.to_dict()["by_task"]["boolq"]["at_chance"]
    counted = retentions({"boolq": strong}, child | {"boolq": child["boolq"]}).tasks["boolq"].adjusted
    assert counted is not None
    assert counted.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("share", "chance", "num_items", "counts"),
    [
        (0.54, 0.5, 1000, False),
        (0.56, 0.5, 1000, True),
        (0.29, 0.25, 1000, False),
        (0.3, 0.25, 1000, True),
        (1.0, 0.5, 4, False),
        (1.0, 0.5, 100, True),
        (0.9, None, 1000, False),
        (0.02, 0.0, 1000, True),
    ],
)
def test_tasks_count_by_the_parent_alone(share, chance, num_items, counts):
    right = torch.zeros(num_items)
    right[: round(share * num_items)] = 1
    for child in (torch.zeros(num_items), right, 1 - right):
        found = retentions({"piqa": task(right, chance=chance)}, {"piqa": task(child, chance=chance)})
        assert (found.tasks["piqa"].adjusted is not None) == counts
        assert (found.adjusted is not None) == counts


def test_draws_without_a_denominator_are_borne():
    """Of 20 items a few draws have a parent at chance."""
    right, child = torch.ones(12), torch.ones(12)
    right[:1], child[:5] = 0, 0
    found = retentions({"piqa": task(right, chance=0.5)}, {"piqa": task(child, chance=0.5)}).adjusted
    assert found is not None
    assert 0 < found.se < 1
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_what_has_no_retention_is_named():
    right = answers(100, 0.8)
    ppl = task(right, "wikitext", None, metric="word_perplexity", higher_is_better=False)
    whole = task(right, "gen", None, metric="bleu")
    found = retentions(
        {"piqa": task(right), "wikitext": ppl, "gen": whole}, {"wikitext": ppl, "arc": ppl, "gen": whole}
    )
    assert found.left_out == {
        "piqa": "not measured on all models",
        "wikitext": "less word_perplexity is better",
        "gen": "bleu has no value an item",
        "arc": "not measured on all models",
    }
    assert found == Retentions(None, None, {}, found.left_out)
    none = retentions({"piqa": task(torch.zeros(50), chance=0.0)}, {"piqa": task(right[:50], chance=0.0)})
    assert none.plain is None
    assert json.dumps(none.to_dict(), allow_nan=False)


def test_models_that_were_asked_other_things_are_refused():
    right = answers(100, 0.8)
    with pytest.raises(UserError, match=r"different items of piqa \(100 and 99\).*--limit"):
        retentions({"piqa": task(right)}, {"piqa": task(right[:99])})
    with pytest.raises(UserError, match="judged by acc for one model and by f1 for another"):
        retentions({"piqa": task(right)}, {"piqa": task(right, metric="f1", values={"f1": right})})


# ---------------------------------------------------------------------------------------------- two children


def test_a_child_against_itself_differs_by_nothing():
    right, kept = pair(500, 0.7, 0.9, 0.2, 0)
    for found in compare_children({"piqa": task(right)}, {"piqa": task(kept)}, {"piqa": task(kept)}):
        assert found is not None
        assert (found.value, found.se, found.p_value, found.n) == (0.0, 0.0, 1.0, 500)


def test_two_children_differ_by_their_retentions_and_the_other_way_round():
    right, first = pair(2000, 0.75, 0.9, 0.3, 0)
    second = torch.where(answers(2000, 0.02, 77) > 0, 1 - first, first)
    parent, one, other = ({"piqa": task(row)} for row in (right, first, second))
    plain, adjusted = compare_children(parent, one, other)
    swapped, _ = compare_children(parent, other, one)
    kept = [retentions(parent, child).adjusted for child in (one, other)]
    assert adjusted is not None
    assert plain is not None
    assert swapped is not None
    assert kept[0] is not None
    assert kept[1] is not None
    assert adjusted.value == pytest.approx(kept[0].value - kept[1].value)
    assert adjusted.se < kept[0].se / 2  # they answer most items alike
    assert (swapped.value, swapped.p_value) == (-plain.value, pytest.approx(plain.p_value, abs=0.05))


def test_p_values_are_uniform_for_equal_children_and_small_for_others():
    low = 0
    for seed in range(150):
        right, first = pair(400, 0.8, 0.85, 0.3, seed)
        second = torch.where(right > 0, answers(400, 0.85, seed + 31_000), answers(400, 0.3, seed + 32_000))
        plain, _ = compare_children({"piqa": task(right)}, {"piqa": task(first)}, {"piqa": task(second)})
        assert plain is not None
        low += plain.p_value < 0.1
    assert 4 <= low <= 28
    worse = torch.where(answers(400, 0.2, 5) > 0, torch.zeros(400), first)
    plain, _ = compare_children({"piqa": task(right)}, {"piqa": task(first)}, {"piqa": task(worse)})
    assert plain is not None
    assert plain.p_value < 0.001


def test_draws_of_any_numbers_have_their_mean_and_spread():
    values = [answers(300, 0.5, seed) * 3 + torch.linspace(0, 1, 300) for seed in (0, 1)]
    means = drawn_means(values, seed=[3])
    for k, values_I in enumerate(values):
        assert means[0, k] == pytest.approx(values_I.mean().item())
        assert means[1:, k].mean() == pytest.approx(values_I.mean().item(), rel=0.01)
        assert means[1:, k].std() == pytest.approx((values_I.std() / 300**0.5).item(), rel=0.06)

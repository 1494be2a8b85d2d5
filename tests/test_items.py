"""Per-item results: what is written is read, figures follow from items, a group counts every item the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from layerscalpel.errors import UserError
from layerscalpel.items import TaskResult, figure, items_file, load_items, pooled, primary_metric, save_items


def result(name: str = "piqa", right: tuple[int, ...] = (1, 0, 1, 1), chance: float | None = 0.5) -> TaskResult:
    values = torch.tensor(right, dtype=torch.float64)
    return TaskResult(
        name=name,
        metric="acc",
        chance=chance,
        values={"acc": values},
        higher_is_better=True,
        ids=tuple(f"{name}{i}" for i in range(len(right))),
        figures={"acc": figure("acc", values).to_dict()},
        facts={"batch_size": 4, "cut_short": 1, "labels": None},
    )


def test_what_is_saved_is_loaded(tmp_path) -> None:
    pages = replace(
        result("pages", chance=None),
        metric="word_perplexity",
        values={"word_perplexity": torch.tensor([1 / 3, 0.1, 2, 1e-9], dtype=torch.float64)},
        weights={"word_perplexity": torch.tensor([3, 5, 7, 9], dtype=torch.float64)},
        higher_is_better=False,
    )
    given = {"piqa": result(), "pages": pages}
    save_items(tmp_path / "items", "healed", given)
    found = load_items(tmp_path / "items", "healed")
    assert list(found) == list(given)
    for name, own in given.items():
        for part in ("values", "weights"):
            assert getattr(found[name], part).keys() == getattr(own, part).keys()
            assert all(torch.equal(getattr(found[name], part)[k], v) for k, v in getattr(own, part).items())
        assert replace(found[name], values={}, weights={}) == replace(own, values={}, weights={})
    assert [path.name for path in (tmp_path / "items").iterdir()] == ["healed.items.json.gz"]


def test_the_same_results_make_the_same_bytes(tmp_path) -> None:
    first, second = (save_items(tmp_path / name, "cut", {"piqa": result()}) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"no gzip", None])
def test_a_damaged_or_missing_file_is_one_line(tmp_path, damage) -> None:
    if damage is not None:
        items_file(tmp_path, "cut").write_bytes(damage)
    with pytest.raises(UserError, match=r"cut\.items\.json\.gz cannot be read"):
        load_items(tmp_path, "cut")


def test_the_error_of_a_share_is_that_of_its_mean() -> None:
    right = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1], dtype=torch.float64)
    found = figure("acc", right)
    assert (found.value, found.n) == (right.mean().item(), 8)
    assert found.se == pytest.approx(right.std().item() / math.sqrt(8), rel=1e-12)


def test_a_perplexity_is_the_exponential_of_its_weighted_mean() -> None:
    nats, words = torch.tensor([2.0, 3.0]).double(), torch.tensor([30.0, 10.0]).double()
    found = figure("word_perplexity", nats, words)
    assert found.value == pytest.approx(math.exp(2.25), rel=1e-12)
    assert found.n == 2
    assert figure("bits_per_byte", nats, words).value == pytest.approx(2.25, rel=1e-12)


def test_the_metric_that_stands_for_a_task() -> None:
    assert primary_metric({"acc": 1, "acc_norm": 1}) == "acc_norm"
    assert primary_metric({"f1": 1, "acc": 1}) == "acc"
    assert primary_metric({"word_perplexity": 1, "byte_perplexity": 1}) == "word_perplexity"


def test_a_group_counts_every_item_the_same() -> None:
    one, other = result("one", (1, 1, 1, 0), 0.25), result("other", (0, 0), 0.5)
    both = pooled("both", [one, other])
    assert both.ids == one.ids + other.ids
    assert both.values["acc"].tolist() == [1, 1, 1, 0, 0, 0]
    assert both.figures["acc"]["value"] == pytest.approx(0.5)
    assert both.chance == pytest.approx((4 * 0.25 + 2 * 0.5) / 6)
    assert both.facts["cut_short"] == 2


def test_chance_of_a_group_with_the_same_answers_is_that_of_one_answer_throughout() -> None:
    parts = [
        replace(result("one"), chance=0.75, facts={"choices": ["no", "yes"], "labels": {"0": 3, "1": 1}}),
        replace(result("other"), chance=0.75, facts={"choices": ["no", "yes"], "labels": {"0": 1, "1": 3}}),
    ]
    assert pooled("both", parts).chance == 0.5  # neither answer is right more often over both
    parts[1] = replace(parts[1], facts=parts[1].facts | {"choices": ["false", "true"]})
    both = pooled("both", parts)
    assert both.chance == 0.75  # the second answer of one is not that of the other
    assert (both.facts["choices"], both.facts["labels"]) == (None, None)


def test_a_perplexity_of_a_group_weighs_words() -> None:
    nats = {"word_perplexity": torch.tensor([1.0, 2.0]).double(), "acc": torch.tensor([1.0, 0.0]).double()}
    weights = [torch.tensor(words).double() for words in ((1.0, 1.0), (10.0, 30.0))]
    parts = [
        replace(result(name, (1, 0)), values=nats, weights={"word_perplexity": words})
        for name, words in zip(("short", "long"), weights, strict=True)
    ]
    both = pooled("both", parts)
    assert both.figures["word_perplexity"]["value"] == pytest.approx(math.exp((1 + 2 + 10 + 60) / 42), rel=1e-12)
    assert both.figures["acc"]["value"] == 0.5
    assert both.weights["word_perplexity"].tolist() == [1, 1, 10, 30]


def test_a_perplexity_that_is_no_number_is_one_line() -> None:
    for nats in (1900.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"the word_perplexity is exp of .* nats, no finite number: the model is"):
            figure("word_perplexity", torch.tensor([nats, 1.0]).double())


def test_a_group_without_a_shared_metric_is_refused() -> None:
    other = replace(result("other"), values={"f1": torch.ones(4).double()})
    with pytest.raises(UserError, match="share no metric"):
        pooled("both", [result(), other])

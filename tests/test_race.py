"""The race keeps the best candidate as often as it says, drops the others early, and compares like with like."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from itertools import product
from statistics import NormalDist

import pytest
import torch
from healing import by_tier
from torch import Tensor

from layerscalpel import race as module
from layerscalpel.errors import UserError
from layerscalpel.race import RaceResult, Score, race
from layerscalpel.student import student_quantile

RACES, CANDIDATES = 2000, 25


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shown(kl_CN: Tensor, asked: list[tuple[slice, list[int]]] | None = None) -> Score:
    """Return a score that looks its answers up and writes down what it was asked."""

    def score(blocks: slice, candidates: list[int]) -> Tensor:
        if asked is not None:
            asked.append((blocks, candidates))
        return kl_CN[candidates, blocks]

    return score


def run(kl_CN: Tensor, confidence: float = 0.99, **settings) -> RaceResult:
    """Race all rows in one group."""
    return race(shown(kl_CN), ["all"] * len(kl_CN), kl_CN.shape[1], confidence=confidence, **settings)


def staircase(num_candidates: int, num_blocks: int, step: float, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Return scores with means 1, 1 + step, 1 + 2 step, ... and block effects that all share."""
    means = 1 + step * torch.arange(num_candidates, dtype=torch.float64).unsqueeze(1)
    return means + randn(1, num_blocks, seed=seed) + noise * randn(num_candidates, num_blocks, seed=seed + 1)


def skewed(num_blocks: int, *, farthest: float, noise: float, kin: int, seed: int) -> Tensor:
    """Return 2,000 races: expected KL 1 for the first candidate, and up to 1 + farthest for its 24 rivals.

    A hard block is hard for all. Each candidate's own part is log-normal, larger on a hard block, and partly shared
    with the `kin` candidates beside it, as windows that overlap do.
    """
    steps = torch.linspace(0, farthest, CANDIDATES, dtype=torch.float64).view(1, -1, 1)
    block = (0.4 * randn(RACES, 1, num_blocks, seed=seed) - 0.08).exp()
    own = randn(RACES, CANDIDATES + kin, num_blocks, seed=seed + 1).unfold(1, kin + 1, 1).mean(-1) * math.sqrt(kin + 1)
    return (1 + steps) * block * (noise * own - noise**2 / 2).exp()


def normal(num_blocks: int, seed: int) -> Tensor:
    """Return 2,000 races of equals with normal noise: the case the bound is made for, where it is tightest."""
    return 9 + randn(RACES, 1, num_blocks, seed=seed) + 0.5 * randn(RACES, CANDIDATES, num_blocks, seed=seed + 1)


WORLDS: dict[str, Callable[[], Tensor]] = {
    "skewed near ties": lambda: skewed(16, farthest=0.005, noise=0.5, kin=0, seed=1),
    "skewed relatives": lambda: skewed(64, farthest=0.3, noise=0.2, kin=4, seed=3),
    "normal ties": lambda: normal(16, seed=5),
}
WRONG_BOUNDS: dict[str, Callable[[float, int], float]] = {  # for two looks
    "no union, z": lambda level, df: NormalDist().inv_cdf(1 - level * 2 * (CANDIDATES - 1)),
    "no union": lambda level, df: student_quantile(level * 2 * (CANDIDATES - 1), df),
    "z": lambda level, df: NormalDist().inv_cdf(1 - level),
}


@functools.cache
def scores_of(world: str) -> Tensor:
    """Return the scores of all candidates of a world, which the races only read."""
    return WORLDS[world]().flatten(0, 1)


def error_rate(world: str, confidence: float) -> float:
    """Return how often the best candidate was dropped in 2,000 races, run beside each other as groups."""
    kl_CN = scores_of(world)
    result = race(shown(kl_CN), [c // CANDIDATES for c in range(len(kl_CN))], kl_CN.shape[1], confidence=confidence)
    return sum(c % CANDIDATES == 0 for c in result.dropped) / RACES


def allowed(confidence: float) -> float:
    """Return the stated error rate and three of its standard errors in 2,000 races."""
    return 1 - confidence + 3 * math.sqrt((1 - confidence) * confidence / RACES)


@pytest.mark.parametrize(
    ("world", "confidence"),
    by_tier(
        product(WORLDS, [0.9, 0.99]),
        everyday=[("skewed near ties", 0.99), ("skewed relatives", 0.9), ("normal ties", 0.9), ("normal ties", 0.99)],
    ),
)
def test_the_best_is_dropped_no_oftener_than_stated(world: str, confidence: float) -> None:
    assert error_rate(world, confidence) <= allowed(confidence)


@pytest.mark.parametrize(
    ("wrong", "confidence"),
    by_tier(
        [("no union, z", 0.9), ("no union, z", 0.99), ("no union", 0.99), ("z", 0.99)],
        everyday=[("no union, z", 0.9), ("no union", 0.99), ("z", 0.99)],
    ),
)
def test_a_wrong_bound_is_noticed(wrong: str, confidence: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "student_quantile", WRONG_BOUNDS[wrong])
    assert error_rate("normal ties", confidence) > 3 * allowed(confidence)


@pytest.mark.parametrize(
    ("level", "df", "expected"),  # from 40 digits
    [
        (0.025, 10, 2.228138851986275),
        (0.05, 7, 1.894578605090007),
        (0.01, 7, 2.997951566868528),
        (0.005, 1, 63.65674116287158),
        (0.001, 7, 4.785289628638334),
        (0.0001, 7, 7.063432828157514),
        (1e-6, 15, 7.464384940096372),
        (1e-9, 63, 6.999812320475072),
        (0.01, 1023, 2.329998579631411),
        (0.3, 4, 0.5686490630497054),
        (0.4, 3, 0.2766706623326899),
    ],
)
def test_quantiles_equal_the_table(level: float, df: int, expected: float) -> None:
    assert student_quantile(level, df) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("level", [0.49, 0.3, 0.01, 1e-5, 1e-9])
def test_quantiles_equal_their_closed_forms(level: float) -> None:
    assert student_quantile(level, 1) == pytest.approx(1 / math.tan(math.pi * level), rel=1e-9)
    assert student_quantile(level, 2) == pytest.approx((1 - 2 * level) / math.sqrt(2 * level * (1 - level)), rel=1e-9)
    assert student_quantile(level, 10_000) == pytest.approx(NormalDist().inv_cdf(1 - level), rel=1e-2)


def test_the_bound_is_never_negative() -> None:
    assert student_quantile(0.5, 7) == student_quantile(0.99, 7) == 0
    assert run(staircase(2, 8, 0.0), 0.01).left("all")  # the leader stays


def naive(kl_CN: Tensor, confidence: float, sound: Callable[[int], str | None]) -> tuple[set[int], set[int], set[int]]:
    """Return (left, dropped, refused) of one group, difference by difference, every score known before."""
    looks = [n for n in (8, 16, 32, 64) if n < kl_CN.shape[1]] + [kl_CN.shape[1]]
    level = (1 - confidence) / ((len(kl_CN) - 1) * len(looks))
    left, dropped, refused = set(range(len(kl_CN))), set(), set()
    for seen in looks:
        means = kl_CN[:, :seen].mean(1).tolist()
        leads = True
        for rival in sorted(left, key=lambda c: (means[c], c)):
            if rival not in left:
                continue
            differences = {c: kl_CN[c, :seen] - kl_CN[rival, :seen] for c in left}
            errors = {c: difference.std() / math.sqrt(seen) for c, difference in differences.items()}
            t = student_quantile(level, seen - 1) if seen >= 8 else math.inf
            beaten = {c for c in left if differences[c].mean() > t * errors[c]}
            if (leads or beaten) and sound(rival):
                refused.add(rival)
                left.remove(rival)
                continue
            leads = False
            dropped |= beaten
            left -= beaten
        if len(left) < 2:
            break
    return left, dropped, refused


@pytest.mark.parametrize("seed", range(12))
def test_the_race_equals_a_naive_one_on_all_scores(seed: int) -> None:
    kl_CN = staircase(9, (5, 8, 40, 64)[seed % 4], 0.01, seed=2 * seed)
    kl_CN = kl_CN[torch.randperm(9, generator=torch.Generator().manual_seed(seed))]

    def sound(candidate: int) -> str | None:
        return "no" if (candidate + seed) % 3 == 0 else None

    result, expected = run(kl_CN, 0.9, sound=sound), naive(kl_CN, 0.9, sound)
    assert (set(result.left("all")), result.dropped, set(result.refused)) == expected
    for c in range(9):
        assert torch.equal(result.kl_CN[c, : result.num_blocks(c)], kl_CN[c, : result.num_blocks(c)])
        looks = result.looks or (kl_CN.shape[1],)  # with fewer than 8 blocks nothing can be dropped
        assert result.num_blocks(c) in looks
        assert c not in result.left("all") or result.num_blocks(c) == looks[-1]


def test_the_order_of_candidates_does_not_matter() -> None:
    kl_CN = staircase(12, 50, 0.02)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    plain, mixed = run(kl_CN), run(kl_CN[order])
    assert 1 < len(plain.left("all")) < 12
    assert {order[c] for c in mixed.left("all")} == set(plain.left("all"))
    assert {order[c] for c in mixed.dropped} == plain.dropped
    assert torch.equal(mixed.kl_CN.nan_to_num(-1), plain.kl_CN[order].nan_to_num(-1))


def test_what_is_far_behind_is_dropped_at_the_first_look() -> None:
    asked: list[tuple[slice, list[int]]] = []
    kl_CN = staircase(25, 64, 0.5)
    kl_CN[20] = kl_CN[0] + 0.02 * randn(64, seed=9) + 0.012  # needs a longer look
    result = race(shown(kl_CN, asked), ["all"] * 25, 64, confidence=0.99)
    assert asked[:2] == [(slice(0, 8), list(range(25))), (slice(8, 16), [0, 20])]
    assert sum(len(candidates) * (blocks.stop - blocks.start) for blocks, candidates in asked) < 0.2 * 25 * 64
    assert result.winner("all") == 0
    assert result.num_blocks(1) == 8
    assert result.kl_CN[1, 8:].isnan().all()


def test_hard_blocks_hide_nothing() -> None:
    kl_CN = 1000 * randn(1, 64, seed=0).exp() + torch.tensor([[0.0], [0.01]]) + 0.003 * randn(2, 64, seed=1)
    result = run(kl_CN)
    assert result.left("all") == [0]
    assert result.looks[-1] < 64
    shuffled = torch.stack([kl_CN[0], kl_CN[1, torch.randperm(64, generator=torch.Generator().manual_seed(0))]])
    assert run(shuffled).left("all") == [0, 1]  # the same scores, not paired


def test_one_that_is_beside_a_candidate_drops_what_the_leader_cannot() -> None:
    noise = randn(2, 8, seed=4)
    leader, kin = 1 + noise[0], 1.1 + noise[1] - noise[1].mean() + noise[0].mean()
    kl_CN = torch.stack([leader, kin, kin + 0.05 + 1e-3 * randn(8, seed=5)])
    assert run(kl_CN[[0, 2]]).dropped == set()
    assert run(kl_CN).dropped == {2}


def test_groups_race_apart() -> None:
    first, second = staircase(6, 64, 0.5), 7 + staircase(5, 64, 0.002, seed=5)
    rows = torch.cat([first, second])
    order = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5]
    names = ["a" if c < 6 else "b" for c in order]
    asked: list[tuple[slice, list[int]]] = []
    result = race(shown(rows[order], asked), names, 64, confidence=0.9)
    for name, alone in (("a", run(first, 0.9)), ("b", run(second, 0.9))):
        members = [c for c in range(11) if names[c] == name]
        assert [members.index(c) for c in result.left(name)] == alone.left("all")
        assert torch.equal(result.kl_CN[members].nan_to_num(-1), alone.kl_CN.nan_to_num(-1))
    assert {names[c] for c in asked[0][1]} == {"a", "b"}
    assert {names[c] for c in asked[1][1]} == {"b"}  # the other is decided
    assert all(candidates == sorted(candidates) for _, candidates in asked)
    assert result.looks == (8, 16, 32, 64)


@pytest.mark.parametrize("confidence", [0.0, 0.99])
def test_a_group_of_one_wins(confidence: float) -> None:
    result = run(staircase(1, 20, 0.1), confidence)
    assert result.winner("all") == 0
    assert result.margin("all") is None
    assert result.num_blocks(0) == (8 if confidence else 20)
    assert result.to_dict("all", [13])["left"] == [13]


def test_without_confidence_everything_is_scored_at_once() -> None:
    asked: list[tuple[slice, list[int]]] = []
    kl_CN = staircase(5, 64, 0.5)
    result = race(
        shown(kl_CN, asked), ["a", "a", "a", "b", "b"], 64, confidence=0, sound=lambda c: "no" * (c == 0) or None
    )
    assert asked == [(slice(0, 64), [0, 1, 2, 3, 4])]
    assert torch.equal(result.kl_CN, kl_CN)
    assert (result.left("a"), result.left("b"), result.looks, result.dropped) == ([1, 2], [3, 4], (), frozenset())
    assert (result.winner("a"), result.refused) == (1, {0: "no"})


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 8])
def test_few_blocks_drop_nobody(num_blocks: int) -> None:
    asked: list[tuple[slice, list[int]]] = []
    kl_CN = staircase(4, num_blocks, 5.0)
    result = race(shown(kl_CN, asked), ["all"] * 4, num_blocks, confidence=0.9)
    assert asked == [(slice(0, num_blocks), [0, 1, 2, 3])]
    assert result.winner("all") == 0
    assert result.looks == ((8,) if num_blocks == 8 else ())
    assert len(result.left("all")) == (1 if num_blocks == 8 else 4)


@pytest.mark.parametrize(
    ("first", "num_blocks", "expected"),
    [(8, 64, (8, 16, 32, 64)), (8, 50, (8, 16, 32, 50)), (10, 21, (10, 20, 21)), (1, 8, (2, 4, 8))],
)
def test_looks_double(first: int, num_blocks: int, expected: tuple[int, ...]) -> None:
    asked: list[tuple[slice, list[int]]] = []
    same = torch.ones(2, num_blocks, dtype=torch.float64)
    result = race(shown(same, asked), [0, 0], num_blocks, confidence=0.9, first_blocks=first)
    assert result.looks == expected == tuple(blocks.stop for blocks, _ in asked)


@pytest.mark.parametrize("num_candidates", [2, 3, 17, 60])
@pytest.mark.parametrize("num_blocks", [8, 9, 37, 64])
def test_equals_stay_and_the_first_of_them_wins(num_candidates: int, num_blocks: int) -> None:
    kl_CN = staircase(1, num_blocks, 0.0, seed=num_blocks).repeat(num_candidates, 1)
    kl_CN[0] += 5  # worse by the same amount everywhere: no standard error, dropped at the first look
    result = run(kl_CN, 0.9)
    assert result.left("all") == list(range(1, num_candidates))
    assert result.winner("all") == 1
    assert result.num_blocks(0) == 8


def test_an_unsound_leader_drops_nobody() -> None:
    kl_CN = staircase(6, 64, 0.5)
    asked: list[int] = []

    def sound(candidate: int) -> str | None:
        asked.append(candidate)
        return f"{candidate} cannot be cut" if candidate in (0, 2, 4) else None

    result = run(kl_CN, sound=sound)
    assert (result.winner("all"), result.left("all")) == (1, [1])
    assert asked == [0, 1]  # the others never led
    assert result.refused == {0: "0 cannot be cut"}
    assert torch.equal(result.kl_CN[0, :8], kl_CN[0, :8])
    margin = result.margin("all")
    assert margin is not None
    assert margin.rival == 2  # not the refused one, although it is better


def test_soundness_is_asked_once() -> None:
    asked: list[int] = []
    result = run(staircase(3, 64, 0.0), sound=asked.append)
    assert len(result.looks) == 4
    assert len(asked) == len(set(asked)) < 4


def test_no_sound_candidate_is_the_users_error() -> None:
    kl_CN = staircase(4, 64, 0.5)
    result = race(shown(kl_CN), ["a", "b", "a", "b"], 64, confidence=0.9, sound=lambda c: f"{c} no" if c % 2 else None)
    assert result.winner("a") == 0
    assert result.left("b") == []
    with pytest.raises(UserError, match=r"^1 no$"):
        result.winner("b")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_are_finite(bad: float) -> None:
    kl_CN = staircase(3, 16, 0.0)
    kl_CN[1, 12] = bad
    with pytest.raises(AssertionError, match="not finite"):
        run(kl_CN)


def test_scores_have_the_shape_and_type_that_was_asked_for() -> None:
    with pytest.raises(AssertionError, match=r"returned \[1, 8\]"):
        race(lambda blocks, candidates: torch.ones(1, 8, dtype=torch.float64), [0, 0], 8, confidence=0.9)
    with pytest.raises(AssertionError, match="float32"):
        run(staircase(2, 8, 0.1).float())


def test_the_margin_is_paired_and_of_the_closest_rival() -> None:
    kl_CN = staircase(3, 64, 0.5)[[2, 0, 1]]
    result = run(kl_CN)
    margin = result.margin("all")
    assert margin is not None
    assert (result.winner("all"), margin.rival, margin.difference.n) == (1, 2, 8)
    difference = (kl_CN[2] - kl_CN[1])[:8]
    assert margin.difference.value == pytest.approx(difference.mean().item(), rel=1e-12)
    assert margin.standard_errors == pytest.approx((difference.mean() / difference.std() * math.sqrt(8)).item())


def test_results_are_plain_values() -> None:
    found = json.loads(json.dumps(run(staircase(3, 64, 0.5)).to_dict("all", [11, 12, 13]), allow_nan=False))
    assert found["margin"]["rival"] == 12
    assert set(found["margin"]["difference_kl_nats"]) == {"value", "se", "n"}
    assert found["margin"]["standard_errors"] > 5
    del found["margin"]
    assert found == {"confidence": 0.99, "first_blocks": 8, "num_blocks": 8, "left": [11]}
    equal = run(torch.ones(2, 20, dtype=torch.float64)).to_dict("all", ["a", "b"])
    assert json.loads(json.dumps(equal, allow_nan=False))["margin"]["standard_errors"] is None
    assert (equal["left"], equal["num_blocks"]) == (["a", "b"], 20)

"""A bootstrap over items for several models at once: what is drawn of one is drawn of all.

An item that is hard for one model is hard for the others, so differences and ratios of models vary less than models do.
Items on which all models do alike are interchangeable, so what is drawn is how many there are of each kind: their order
cannot matter, and a draw costs as much as there are kinds, few where answers are right or wrong.

Dimensions: I items, K models, U kinds of items, S draws, R = 1 + S rows: the measured value, and that of each draw.

    means_RK = drawn_means([parent_I, child_I], seed=(0, 7))
    spread_of(ratio_above(means_RK[:, 0], means_RK[:, 1], 0.25), num_items=1000)  # Measured(0.83, se=0.02, n=1000)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layerscalpel.losses import Measured

Floats = NDArray[np.float64]
DRAWS = 4000
ONE_SIGMA = 0.682689
"""Share of a normal variable within one standard deviation."""
AT_ONCE = 1 << 22
"""Numbers drawn at once."""
FAR = 1e9
"""Stands for a ratio over 0."""


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of another, on the same items."""

    value: float
    se: float
    p_value: float
    """Of the paired bootstrap, two-sided: twice the share of draws that lie on the other side of 0, or on it."""
    n: int
    """Items."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json; the error of a single item is unknown, null."""
        return {**vars(self), "se": None if math.isnan(self.se) else self.se}


def drawn_means(models: Sequence[Tensor], *, seed: Sequence[int]) -> Floats:
    """Return the mean over items of every model [R, K], as measured and of each draw.

    A single item has no spread to draw from: its draws are NaN, and so is each error that rests on them.

    Args:
        models: one value an item [I] of each model, the items in one order.
        seed: names the draws.
    """
    items_IK = np.stack([values_I.double().numpy() for values_I in models], axis=1)
    kinds_UK, counts_U = np.unique(items_IK, axis=0, return_counts=True)
    num_items, random = len(items_IK), np.random.default_rng(list(seed))
    most = max(1, AT_ONCE // len(counts_U))
    counts = [counts_U[None]]
    means = []
    for low in range(0, DRAWS, most):
        counts.append(random.multinomial(num_items, counts_U / num_items, size=min(most, DRAWS - low)))
        drawn_RU = np.concatenate(counts)
        # model by model, so that equal models have means equal to the last bit
        means.append(np.stack([drawn_RU @ np.ascontiguousarray(kind_U) for kind_U in kinds_UK.T], axis=1))
        counts = []
    means_RK = np.concatenate(means) / num_items
    if num_items < 2:
        means_RK[1:] = np.nan
    return means_RK


def ratio_above(parent_R: Floats, child_R: Floats, floor: float) -> Floats:
    """Return (child - floor) / (parent - floor), exactly 1 where both are the same."""
    with np.errstate(divide="ignore", invalid="ignore"):
        more_R = np.where(child_R == parent_R, 0.0, (child_R - parent_R) / (parent_R - floor))
    return 1 + more_R.clip(-FAR, FAR)


def spread_of(figure_R: Floats, num_items: int) -> Measured:
    """Return a figure as measured, with its standard error from the draws.

    A ratio has draws far out where its denominator comes near 0. So the error is half the width of the middle 68.3 % of
    the draws: the standard deviation of a normal variable, and bounded.
    """
    return Measured(float(figure_R[0]), _half_width(figure_R[1:]), num_items)


def difference_of(first_R: Floats, second_R: Floats, num_items: int) -> Difference:
    """Return the first figure less the second, with its error and p-value."""
    less_R = first_R - second_R
    drawn_S = less_R[1:]
    beyond = min((~(drawn_S > 0)).sum(), (~(drawn_S < 0)).sum())  # NaN is on neither side
    p_value = min(1.0, 2 * float(1 + beyond) / (1 + len(drawn_S)))
    return Difference(float(less_R[0]), _half_width(drawn_S), p_value, num_items)


def _half_width(drawn_S: Floats) -> float:
    low, high = np.quantile(drawn_S, [(1 - ONE_SIGMA) / 2, (1 + ONE_SIGMA) / 2])
    return float(high - low) / 2

"""Quantiles of Student's t, which torch does not have: bisection on the incomplete beta function.

student_quantile(0.01, df=7)  # 2.998
two_errors(4)  # 2.87, of an error that was found from five values
"""

from __future__ import annotations

import math
from functools import cache

FRACTION_TERMS = 200
"""Of the continued fraction; enough for every digit of a float up to 10,000 blocks."""

TWO_ERRORS = 0.02275
"""How often chance alone gives more than two standard errors where there are many values; with few it takes more."""


def two_errors(df: int) -> float:
    """Return how many standard errors are as sure as two of many values, where the error has df degrees of freedom."""
    return student_quantile(TWO_ERRORS, df) if df else math.inf


@cache
def student_quantile(level: float, df: int) -> float:
    """Return the value that Student's t with df degrees of freedom exceeds with probability `level`, 0 if over 1/2."""
    if level >= 0.5:
        return 0.0  # a bound below zero would drop the leader
    low, high = 0.0, 1.0
    while _tail(high, df) > level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _tail(middle, df) > level else (low, middle)
    return high


def _tail(t: float, df: int) -> float:
    """Return P(T > t) for t > 0."""
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function by its continued fraction, from the end (DLMF 8.17.22)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this point only
        return 1 - _incomplete_beta(b, a, 1 - x)
    value = 1.0
    for k in range(FRACTION_TERMS, 0, -1):
        m = k // 2
        step = -(a + m) * (a + b + m) / (a + 2 * m + 1) if k % 2 else m * (b - m) / (a + 2 * m - 1)
        value = 1 + step / (a + 2 * m) * x / value
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * value)

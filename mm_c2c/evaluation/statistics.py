"""Means with bootstrap intervals, and the paired test between two arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]
"""`(items,)`: which items an arm answered right."""


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """One arm against another on the same items.

    Attributes:
        difference: of the accuracies, with its interval.
        only_first: items that only the first answered right.
        only_second: items that only the second answered right.
        p_value: McNemar's exact test, two-sided.
    """

    difference: Interval
    only_first: int
    only_second: int
    p_value: float


def draw_resamples(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """`(resamples, count)` indices with replacement: one draw for all arms keeps them paired."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], draws: NDArray[np.int64]
) -> Interval:
    """A statistic and its percentile bootstrap.

    Args:
        statistic: of rows of indices, `(n, count)` to `(n,)`.
        draws: from `draw_resamples`.
    """
    whole = float(statistic(np.arange(draws.shape[1])[None])[0])
    drawn = statistic(draws)
    # A quotient has no value in a draw whose divisor is 0.
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(whole, math.nan, math.nan)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(whole, float(low), float(high))


def accuracy(hits: Hits | NDArray[np.float64], draws: NDArray[np.int64]) -> Interval:
    """Share of items answered right; an item may be right in part, from 0 to 1."""
    return interval(lambda rows: hits[rows].mean(1), draws)


def retention(fused: Hits, floor: Hits, source: Hits, draws: NDArray[np.int64]) -> Interval:
    """(fused - floor) / (source - floor): what of the source's lead over the floor arrives."""

    def share(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        low = floor[rows].mean(1)
        lead = source[rows].mean(1) - low
        lead[lead == 0] = math.nan
        return (fused[rows].mean(1) - low) / lead

    return interval(share, draws)


def compare(first: Hits, second: Hits, draws: NDArray[np.int64]) -> Paired:
    """Two arms on the same items."""
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    gap = first.astype(np.float64) - second
    return Paired(
        interval(lambda rows: gap[rows].mean(1), draws),
        only_first,
        only_second,
        mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of so lopsided a split, were either side as likely (McNemar, 1947)."""
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


def hits_of(values: Sequence[bool]) -> Hits:
    """Plain booleans as an array."""
    return np.array(values, dtype=np.bool_)

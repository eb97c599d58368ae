"""Means with bootstrap intervals, and the paired test between two arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]
"""`(items,)`: which items an arm answered right."""

_Z = 1.959964  # the standard normal distribution's 97.5 % quantile


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
        p_value: two-sided, of McNemar's exact test; of `sign_flip` where items come in clusters.
    """

    difference: Interval
    only_first: int
    only_second: int
    p_value: float


def draw_resamples(
    count: int, resamples: int, seed: int, clusters: Iterable[object] | None = None
) -> NDArray[np.float64]:
    """How often each item stands in each resample: one draw for all arms keeps them paired.

    Args:
        count: of items.
        resamples: of the bootstrap.
        seed: of the draws.
        clusters: for each item, what it was sampled with, such as its episode: whole clusters are
            drawn, since their items are no independent samples. None draws items.

    Returns:
        `(resamples, count)`.
    """
    rng = np.random.default_rng(seed)
    if clusters is None:
        return _count_draws(rng.integers(0, count, (resamples, count)), count)
    owners = number_clusters(clusters)
    groups = int(owners.max()) + 1
    return _count_draws(rng.integers(0, groups, (resamples, groups)), groups)[:, owners]


def _count_draws(rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """How often each of `count` stands in each row."""
    return np.stack([np.bincount(row, minlength=count) for row in rows]).astype(np.float64)


def number_clusters(clusters: Iterable[object]) -> NDArray[np.int64]:
    """Each item's cluster by its number, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters])


def interval(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], draws: NDArray[np.float64]
) -> Interval:
    """A statistic and its percentile bootstrap.

    Args:
        statistic: of rows of weights of the items, `(n, count)` to `(n,)`.
        draws: from `draw_resamples`.
    """
    whole = float(statistic(np.ones((1, draws.shape[1])))[0])
    drawn = statistic(draws)
    # A quotient has no value in a draw whose divisor is 0.
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(whole, math.nan, math.nan)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(whole, float(low), float(high))


def mean(values: Hits | NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of an item, for each row of weights; NaN where they are all 0."""
    total = weights.sum(1)
    found: NDArray[np.float64] = weights @ values / np.where(total == 0, math.nan, total)
    return found


def accuracy(hits: Hits | NDArray[np.float64], draws: NDArray[np.float64]) -> Interval:
    """Share of items answered right; an item may be right in part, from 0 to 1."""
    return interval(lambda weights: mean(hits, weights), draws)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent trials (Wilson's score interval, 1927)."""
    share, slack = hits / count, _Z * _Z / count
    centre = (share + slack / 2) / (1 + slack)
    half = _Z * math.sqrt(share * (1 - share) / count + slack / (4 * count)) / (1 + slack)
    return max(0.0, centre - half), min(1.0, centre + half)


def retention(fused: Hits, floor: Hits, source: Hits, draws: NDArray[np.float64]) -> Interval:
    """(fused - floor) / (source - floor): what of the source's lead over the floor arrives."""

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        low = mean(floor, weights)
        lead = mean(source, weights) - low
        lead[lead == 0] = math.nan
        return (mean(fused, weights) - low) / lead

    return interval(share, draws)


def compare(
    first: Hits,
    second: Hits,
    draws: NDArray[np.float64],
    clusters: Iterable[object] | None = None,
) -> Paired:
    """Two arms on the same items; `draws` and `clusters` as in `draw_resamples`."""
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    gap = first.astype(np.float64) - second
    return Paired(
        accuracy(gap, draws),
        only_first,
        only_second,
        mcnemar(only_first, only_second) if clusters is None else sign_flip(gap, clusters),
    )


def sign_flip(gap: NDArray[np.float64], clusters: Iterable[object], flips: int = 10_000) -> float:
    """Two-sided p of so large a sum, were either sign as likely for each whole cluster.

    By random flips, their seed fixed; the observed signs count as one of them, so that p is never 0.

    Args:
        gap: `(items,)`: one arm's score less the other's.
        clusters: for each item.
        flips: how many.
    """
    sums = np.bincount(number_clusters(clusters), weights=gap)
    signs = np.random.default_rng(0).integers(0, 2, (flips, len(sums))) * 2 - 1
    as_large = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    return float((as_large.sum() + 1) / (flips + 1))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of so lopsided a split, were either side as likely (McNemar, 1947)."""
    count = only_first + only_second
    tail = ways = 1
    for k in range(min(only_first, only_second)):
        ways = ways * (count - k) // (k + 1)  # `math.comb(count, k + 1)`
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def auroc(
    scores: NDArray[np.float64],
    positive: Hits,
    weights: NDArray[np.float64],
    strata: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Chance that a positive scores above a negative, equal scores counting half.

    The area under the ROC curve is the Mann-Whitney statistic (Hanley and McNeil, 1982).

    Args:
        scores: `(items,)`.
        positive: `(items,)`.
        weights: `(n, items)`, such as `draw_resamples` gives.
        strata: `(items,)`; only items of the same stratum are compared. None compares all.

    Returns:
        `(n,)`; NaN where no positive meets a negative.
    """
    groups = np.zeros(len(scores)) if strata is None else strata
    above, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        members = members[np.argsort(scores[members], kind="stable")]
        starts = np.flatnonzero(np.diff(scores[members], prepend=-math.inf))  # of distinct scores
        hits = np.add.reduceat(weights[:, members] * positive[members], starts, axis=1)
        misses = np.add.reduceat(weights[:, members] * ~positive[members], starts, axis=1)
        below = misses.cumsum(1) - misses / 2
        above += (hits * below).sum(1)
        pairs += hits.sum(1) * misses.sum(1)
    found: NDArray[np.float64] = above / np.where(pairs == 0, math.nan, pairs)
    return found


def hits_of(values: Sequence[bool]) -> Hits:
    """Plain booleans as an array."""
    return np.array(values, dtype=np.bool_)

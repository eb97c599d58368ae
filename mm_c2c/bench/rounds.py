"""Timed rounds: what is compared takes turns, and each round gives one ratio.

Whatever slows the machine then slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm


class Ratio(NamedTuple):
    """How many times as long one takes as the other: the median of the rounds, and their range."""

    median: float
    low: float
    high: float


def ratio(taken: Sequence[float], against: Sequence[float]) -> Ratio:
    """Of times of the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(taken, against, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, label: str, *, progress: bool
) -> dict[str, list[float]]:
    """Milliseconds of each, in turn; a first round only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc=label, disable=not progress):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken

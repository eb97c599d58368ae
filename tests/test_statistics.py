"""Intervals and paired tests, beside plain counts."""

import itertools
import math

import numpy as np
import pytest

from mm_c2c.evaluation.statistics import (
    accuracy,
    compare,
    draw_resamples,
    hits_of,
    mcnemar,
    retention,
)


def test_mcnemar_counts_every_way_to_split() -> None:
    for count in range(1, 9):
        flips = [sum(flip) for flip in itertools.product((0, 1), repeat=count)]
        for first in range(count + 1):
            lopsided = abs(2 * first - count)
            expected = sum(abs(2 * heads - count) >= lopsided for heads in flips) / len(flips)
            assert mcnemar(first, count - first) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 2000) == pytest.approx(0.0)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        found = accuracy(rng.random(300) < 0.3, draw_resamples(300, 400, trial))
        assert found.low <= found.value <= found.high
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 199


def test_a_paired_difference_is_narrower_than_two_apart() -> None:
    rng = np.random.default_rng(0)
    second = rng.random(400) < 0.5
    first = second | (rng.random(400) < 0.1)
    draws = draw_resamples(400, 1000, 0)
    paired = compare(first, second, draws)
    assert paired.only_second == 0
    assert paired.only_first == int((first & ~second).sum())
    assert paired.difference.value == pytest.approx(first.mean() - second.mean())
    assert paired.difference.high - paired.difference.low < (
        accuracy(first, draws).high - accuracy(first, draws).low
    )
    assert paired.p_value < 0.001
    swapped = compare(second, first, draws)
    assert swapped.difference.value == pytest.approx(-paired.difference.value)
    assert swapped.p_value == paired.p_value


@pytest.mark.parametrize(("fused", "kept"), [(0, 0.0), (1, 1 / 3), (3, 1.0)])
def test_retention_is_the_share_of_what_the_source_adds(fused: int, kept: float) -> None:
    def hits(count: int) -> np.ndarray:
        return hits_of([i < count for i in range(10)])

    draws = draw_resamples(10, 50, 0)
    assert retention(hits(2 + fused), hits(2), hits(5), draws).value == pytest.approx(kept)
    assert math.isnan(retention(hits(1), hits(2), hits(2), draws).value)

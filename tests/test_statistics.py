"""Intervals and paired tests, beside plain counts."""

import itertools
import math

import numpy as np
import pytest

from mm_c2c.evaluation.statistics import (
    accuracy,
    auroc,
    compare,
    draw_resamples,
    hits_of,
    mcnemar,
    retention,
    sign_flip,
    wilson,
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


def test_clusters_are_drawn_whole() -> None:
    clusters = ["a", "b", "a", "c", "b", "a"]
    draws = draw_resamples(6, 50, 0, clusters)
    for name in "abc":
        (here,) = np.where(np.array(clusters) == name)
        assert (draws[:, here] == draws[:, here[:1]]).all()
    assert (draws[:, [0, 1, 3]].sum(1) == 3).all()  # as many as there are
    alone = draw_resamples(6, 50, 0, range(6))
    np.testing.assert_array_equal(alone, draw_resamples(6, 50, 0))


def test_an_interval_over_clusters_holds_the_truth_where_one_over_items_does_not() -> None:
    """Ten items of an episode are right or wrong together."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(range(40), 10)
    held = {"items": 0, "clusters": 0}
    for trial in range(200):
        hits = np.repeat(rng.random(40) < 0.4, 10)
        for unit, groups in (("items", None), ("clusters", clusters)):
            found = accuracy(hits, draw_resamples(400, 300, trial, groups))
            held[unit] += found.low <= 0.4 <= found.high
    assert held["clusters"] >= 175
    assert held["items"] < 130


def test_a_sign_flip_of_single_items_is_mcnemars_test() -> None:
    gap = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 20)
    assert sign_flip(gap, range(31)) == pytest.approx(mcnemar(9, 2), abs=0.01)
    # One cluster may go either way: nothing can be said.
    assert sign_flip(gap, ["same"] * 31) == 1.0
    second = hits_of([False] * 40)
    first = hits_of([True] * 40)
    clusters = np.repeat(range(4), 10)
    draws = draw_resamples(40, 20, 0, clusters)
    assert compare(first, second, draws, clusters).p_value == pytest.approx(2 / 16, abs=0.02)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (7, 9), (40, 50), (250, 250)])
def test_wilsons_interval_are_the_roots_of_its_equation(hits: int, count: int) -> None:
    """(p - q)^2 = z^2 q (1 - q) / n."""
    z, share = 1.959964, hits / count
    roots = np.roots([1 + z * z / count, -2 * share - z * z / count, share * share])
    np.testing.assert_allclose(wilson(hits, count), sorted(roots), atol=1e-12)


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 6, 30).astype(float)
        positive = rng.random(30) < 0.4
        weights = rng.integers(0, 3, (4, 30)).astype(float)
        found = auroc(scores, positive, weights)
        for row in range(4):
            won = pairs = 0.0
            for i, j in itertools.product(np.flatnonzero(positive), np.flatnonzero(~positive)):
                weight = weights[row, i] * weights[row, j]
                won += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                pairs += weight
            assert found[row] == pytest.approx(won / pairs)
    assert np.isnan(auroc(np.arange(3.0), hits_of([True] * 3), np.ones((1, 3)))).all()


def test_auroc_within_strata_compares_nothing_across_them() -> None:
    # Across strata the positives score higher, within each they do not.
    scores = np.array([1.0, 2.0, 8.0, 9.0, 7.0])
    positive = hits_of([False, False, True, False, False])
    strata = np.array([0, 0, 1, 1, 1])
    weights = np.array([[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(auroc(scores, positive, weights), [0.75, 1.0, 1.0])
    np.testing.assert_allclose(auroc(scores, positive, weights, strata), [0.5, 1.0, np.nan])

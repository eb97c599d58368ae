"""What the answers of all arms come to: accuracy, paired tests, retention, swaps, times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_c2c.evaluation.statistics import (
    Hits,
    Interval,
    accuracy,
    compare,
    draw_resamples,
    hits_of,
    retention,
)
from mm_c2c.evaluation.tasks import is_right, is_right_in_a_sentence, vqa_accuracy

Row = Mapping[str, Any]

FLOORS = ("blind", "zeroed")


def summarise(
    rows: Sequence[Row], times: Sequence[Row], batches: Sequence[range], resamples: int, seed: int
) -> dict[str, Any]:
    """Count everything.

    Args:
        rows: of `answers.jsonl`.
        times: of `times.jsonl`, without the warm-up.
        batches: how the rows were asked; in the arm `shuffled` each row of a batch had the cache
            of the next.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Plain values, ready for JSON. For each arm `accuracy`, `in_a_sentence` (a wordy answer may
        name the option), and either by kind; where every item has several people's answers also
        `vqa_accuracy`; `against` the arm `fused` the paired tests; `retention` over
        the blind target and over an empty cache, which knows the form of the answers; `recovered`
        of the items that the source knows and its caption relay misses; `swap`; `time`. Values
        with an interval are [value, low, high]; None where there is nothing to divide by. What
        needs an arm that was left out is left out.
    """
    names = list(rows[0]["answers"])
    hits = {n: hits_of([is_right(row["answers"][n], row["gold"]) for row in rows]) for n in names}
    wordy = {name: hits[name] | _wordy_hits(rows, name) for name in names}
    draws = draw_resamples(len(rows), resamples, seed)
    kinds = {
        kind: np.array([row["kind"] == kind for row in rows])
        for kind in dict.fromkeys(row["kind"] for row in rows)
    }
    summary: dict[str, Any] = {
        "n": len(rows),
        "arms": {
            name: {
                "accuracy": accuracy(hits[name], draws),
                "in_a_sentence": accuracy(wordy[name], draws),
                "kinds": {
                    kind: _accuracy_within(hits[name][where], resamples, seed)
                    for kind, where in kinds.items()
                },
                "kinds_in_a_sentence": {
                    kind: _accuracy_within(wordy[name][where], resamples, seed)
                    for kind, where in kinds.items()
                },
            }
            for name in names
        },
        "kinds": {kind: int(where.sum()) for kind, where in kinds.items()},
        "time": _median_times(times),
    }
    if all(row.get("human_answers") for row in rows):
        for name in names:
            scores = [vqa_accuracy(row["answers"][name], row["human_answers"]) for row in rows]
            summary["arms"][name]["vqa_accuracy"] = accuracy(np.array(scores), draws)
    if "fused" in hits:
        summary["against"] = {
            name: {
                "exact": compare(hits["fused"], hits[name], draws)._asdict(),
                "in_a_sentence": compare(wordy["fused"], wordy[name], draws)._asdict(),
            }
            for name in names
            if name != "fused"
        }
    if {"fused", "source"} <= hits.keys():
        summary["retention"] = {
            f"over_{floor}": retention(hits["fused"], hits[floor], hits["source"], draws)
            for floor in FLOORS
            if floor in hits
        }
    if {"fused", "source", "caption_relay"} <= hits.keys():
        # The relay's wordy answers count as told, or everything would be untold.
        untold = hits["source"] & ~wordy["caption_relay"]
        summary["recovered"] = {
            "n": int(untold.sum()),
            "share": _accuracy_within(hits["fused"][untold], resamples, seed),
        }
    if {"source", "shuffled"} <= hits.keys():
        summary["swap"] = swap_outcomes(rows, batches, hits["source"])
    return {key: _plain(value) for key, value in summary.items()}


def swap_outcomes(
    rows: Sequence[Row], batches: Sequence[range], source: Hits
) -> dict[str, dict[str, float | int]]:
    """Whose answer the target gives when it is handed its neighbour's picture.

    Counted where the neighbour asks the same question and its true answer differs: `truth` has
    them all; `source_right` those where the source itself is right about both pictures.

    Returns:
        For either, `n`, and the shares that `follow` the swapped-in picture, that `stay` with the
        own one, and that do neither.
    """
    pairs = []
    for batch in batches:
        for row, other in zip(batch, [*batch[1:], batch[0]], strict=True):
            same = rows[row]["question"] == rows[other]["question"]
            if same and rows[row]["gold"] != rows[other]["gold"]:
                pairs.append((row, other))
    known = [pair for pair in pairs if source[pair[0]] and source[pair[1]]]
    return {"truth": _followed(pairs, rows), "source_right": _followed(known, rows)}


def _followed(pairs: Sequence[tuple[int, int]], rows: Sequence[Row]) -> dict[str, float | int]:
    said = [rows[row]["answers"]["shuffled"] for row, _ in pairs]
    follow = [is_right(a, rows[other]["gold"]) for a, (_, other) in zip(said, pairs, strict=True)]
    stay = [is_right(a, rows[row]["gold"]) for a, (row, _) in zip(said, pairs, strict=True)]
    neither = [not (a or b) for a, b in zip(follow, stay, strict=True)]
    shares = {"follow": follow, "stay": stay, "neither": neither}
    return {
        "n": len(pairs),
        **{name: statistics.mean(found) if found else math.nan for name, found in shares.items()},
    }


def _wordy_hits(rows: Sequence[Row], name: str) -> Hits:
    options: dict[str, set[str]] = {}
    for row in rows:
        options.setdefault(row["kind"], set()).add(row["gold"])
    return hits_of(
        [
            is_right_in_a_sentence(row["answers"][name], row["gold"], options[row["kind"]])
            for row in rows
        ]
    )


def _accuracy_within(hits: NDArray[np.bool_], resamples: int, seed: int) -> Interval:
    if not len(hits):
        return Interval(math.nan, math.nan, math.nan)
    return accuracy(hits, draw_resamples(len(hits), resamples, seed))


def _median_times(times: Sequence[Row]) -> dict[str, dict[str, float | int]]:
    names = [name for name, value in times[0].items() if isinstance(value, dict)] if times else []
    return {
        name: {
            "n": len(times),
            "ttft_ms": statistics.median(row[name]["ttft_ms"] for row in times),
            "total_ms": statistics.median(row[name]["total_ms"] for row in times),
            "tokens": statistics.mean(row[name]["tokens"] for row in times),
        }
        for name in names
    }


def _plain(value: Any) -> Any:
    """Lists and dicts with None for NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

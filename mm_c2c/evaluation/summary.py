"""What the answers of all arms come to: accuracy, paired tests, retention, swaps, times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
RELAYS = ("caption_relay", "question_aware_relay", "tuned_relay")


def summarise(
    rows: Sequence[Row], times: Sequence[Row], resamples: int, seed: int
) -> dict[str, Any]:
    """Count everything.

    Args:
        rows: of `answers.jsonl`.
        times: of `times.jsonl`.
        resamples: of the bootstrap; of what, see `clusters_of`.
        seed: of the bootstrap.

    Returns:
        Plain values, ready for JSON. For each arm `accuracy`, `in_a_sentence` (a wordy answer may
        name the option), and either by kind; where every item has several people's answers also
        `vqa_accuracy`; `against` the arm `fused` the paired tests; `retention` over
        the blind target and over an empty cache, which knows the form of the answers; `recovered`
        of the items that the source knows and a caption relay misses, by relay; `swap`; `lie`, see
        `lie_outcomes`; `choice`, where answers were decoded among options, see `_choice_counts`, and
        in it `shuffled_over_blind`, the paired test; `episodes`, `pictures` or `recordings`, how
        many, where the intervals and tests are over these; `captions`, of how many pictures the
        source's own caption is the true description; `time`; `speed`, how many times as fast as
        the caption relay fused says its first token, over what ran by the clock.
        Values with an interval are [value, low, high]; None where there is nothing to divide by.
        What needs an arm that was left out is left out.
    """
    names = list(rows[0]["answers"])
    hits = {n: hits_of([is_right(row["answers"][n], row["gold"]) for row in rows]) for n in names}
    options = _options(rows)
    wordy = {name: hits[name] | _wordy_hits(rows, name, options) for name in names}
    unit, clusters = clusters_of(rows)
    draws = draw_resamples(len(rows), resamples, seed, clusters)

    def within(found: NDArray[np.bool_], where: NDArray[np.bool_]) -> Interval:
        groups = None if clusters is None else clusters[where]
        return _accuracy_within(found[where], resamples, seed, groups)

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
                "kinds": {kind: within(hits[name], where) for kind, where in kinds.items()},
                "kinds_in_a_sentence": {
                    kind: within(wordy[name], where) for kind, where in kinds.items()
                },
            }
            for name in names
        },
        "kinds": {kind: int(where.sum()) for kind, where in kinds.items()},
        "time": _median_times(times),
    }
    if times and {"fused", "caption_relay"} <= times[0].keys():
        summary["speed"] = _speed(times, resamples, seed)
    if clusters is not None:
        summary[unit] = len(set(clusters))
    if all(row.get("human_answers") for row in rows):
        for name in names:
            scores = [vqa_accuracy(row["answers"][name], row["human_answers"]) for row in rows]
            summary["arms"][name]["vqa_accuracy"] = accuracy(np.array(scores), draws)
    if "fused" in hits:
        summary["against"] = {
            name: {
                "exact": compare(hits["fused"], hits[name], draws, clusters)._asdict(),
                "in_a_sentence": compare(wordy["fused"], wordy[name], draws, clusters)._asdict(),
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
    if {"fused", "source"} <= hits.keys():
        # The relay's wordy answers count as told, or everything would be untold.
        untold = {name: hits["source"] & ~wordy[name] for name in RELAYS if name in hits}
        if untold:
            summary["recovered"] = {
                name: {"n": int(where.sum()), "share": within(hits["fused"], where)}
                for name, where in untold.items()
            }
    if {"caption_relay", "true_description"} <= rows[0].get("relayed", {}).keys():
        summary["captions"] = _caption_counts(rows, resamples, seed)
    if "shuffled" in hits:
        summary["swap"] = swap_outcomes(rows, hits.get("source"), resamples, seed)
    if any("lists_options" in row for row in rows):
        summary["choice"] = _choice_counts(rows)
        if {"shuffled", "blind"} <= hits.keys():
            test = compare(hits["shuffled"], hits["blind"], draws, clusters)
            summary["choice"]["shuffled_over_blind"] = test._asdict()
    if any(row.get("told") is not None for row in rows):
        summary["lie"] = lie_outcomes(rows, resamples, seed)
    return {key: _plain(value) for key, value in summary.items()}


def _caption_counts(rows: Sequence[Row], resamples: int, seed: int) -> dict[str, Any]:
    """Of how many pictures the source's own caption is the true description."""
    told = {row["image"]: row["relayed"] for row in rows}
    right = [is_right(said["caption_relay"], said["true_description"]) for said in told.values()]
    return {"n": len(told), "share": _accuracy_within(np.array(right), resamples, seed, None)}


def clusters_of(rows: Sequence[Row]) -> tuple[str, NDArray[np.str_] | None]:
    """What several questions are about is one sample, not several: its episode, or what is shown.

    Returns:
        What the clusters are, and each row's; None where every question has one of its own.
    """
    for key in ("episode", "image"):
        if all(row.get(key) is not None for row in rows):
            found = [str(row[key]) for row in rows]
            unit = "episodes" if key == "episode" else _shown(found)
            return unit, np.array(found) if len(set(found)) < len(found) else None
    return "questions", None


def _shown(names: Sequence[str]) -> str:
    return "recordings" if all(name.endswith(".wav") for name in names) else "pictures"


def swap_outcomes(
    rows: Sequence[Row], source: Hits | None, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Whose answer the target gives when it is handed another row's picture, `shuffled_with`.

    Counted where that row asks the same question and its true answer differs: `truth` has them
    all; `source_right` those where the source itself is right about both pictures, for a source
    that answers.

    Returns:
        For either, `n`, and the shares that `follow` the swapped-in picture, that `stay` with the
        own one, and that do neither, with intervals; over what, see `clusters_of`.
    """

    def followed(pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        said = [rows[row]["answers"]["shuffled"] for row, _ in pairs]
        follow, stay = (
            hits_of([is_right(a, rows[row]["gold"]) for a, row in zip(said, whose, strict=True)])
            for whose in ([other for _, other in pairs], [row for row, _ in pairs])
        )
        _, groups = clusters_of([rows[row] for row, _ in pairs])
        shares = {"follow": follow, "stay": stay, "neither": ~(follow | stay)}
        return {
            "n": len(pairs),
            **{
                name: _accuracy_within(found, resamples, seed, groups)
                for name, found in shares.items()
            },
        }

    pairs = []
    for place, row in enumerate(rows):
        other = rows[row["shuffled_with"]]
        if row["question"] == other["question"] and row["gold"] != other["gold"]:
            pairs.append((place, row["shuffled_with"]))
    outcomes = {"truth": followed(pairs)}
    if source is not None:
        known = [pair for pair in pairs if source[pair[0]] and source[pair[1]]]
        outcomes["source_right"] = followed(known)
    return outcomes


def lie_outcomes(rows: Sequence[Row], resamples: int, seed: int) -> dict[str, Any]:
    """What is reported of a policy whose instruction was swapped after the fact.

    Counted where what it does and what it was `told` are different answers; a wordy answer counts
    where it names one of the two, and no other option.

    Returns:
        `n`, and for each arm the shares of answers that report what it `does`, what it was `told`,
        and `neither`, with intervals; over what, see `clusters_of`.
    """
    lies = [row for row in rows if row.get("told") is not None]
    lies = [row for row in lies if not is_right(row["told"], row["gold"])]
    if not lies:
        return {"n": 0, "arms": {}}
    _, groups = clusters_of(lies)
    options = _options(lies)
    arms = {}
    for name in lies[0]["answers"]:
        said = [row["answers"][name] for row in lies]
        does, told = (
            hits_of(
                [
                    is_right(text, row[key]) or is_right_in_a_sentence(text, row[key], among)
                    for text, row, among in zip(said, lies, options, strict=True)
                ]
            )
            for key in ("gold", "told")
        )
        shares = {"does": does, "told": told, "neither": ~(does | told)}
        arms[name] = {
            key: _accuracy_within(found, resamples, seed, groups) for key, found in shares.items()
        }
    return {"n": len(lies), "arms": arms}


def _choice_counts(rows: Sequence[Row]) -> dict[str, float | int]:
    """Of what the choice among options was.

    Returns:
        `n` rows with options, the others having been answered freely; `listed`, those whose item
        lists its own, the others having the answers of their kind; `guess`, the share of the `n`
        that a guess gets right.
    """
    counts = [len(set(row["options"])) for row in rows if row["options"]]
    return {
        "n": len(counts),
        "listed": sum(row["lists_options"] for row in rows),
        "guess": statistics.mean(1 / count for count in counts) if counts else math.nan,
    }


def _options(rows: Sequence[Row]) -> list[frozenset[str]]:
    """The answers that each question has, and what was told.

    Where it is open, or the run did not keep them: those of its kind.
    """
    of_kind: dict[str, set[str]] = {}
    for row in rows:
        of_kind.setdefault(row["kind"], set()).update(_golds(row))
    shared = {kind: frozenset(golds) for kind, golds in of_kind.items()}
    return [
        frozenset((*row["options"], *_golds(row))) if row.get("options") else shared[row["kind"]]
        for row in rows
    ]


def _golds(row: Row) -> set[str]:
    return {row["gold"]} if row.get("told") is None else {row["gold"], row["told"]}


def _wordy_hits(rows: Sequence[Row], name: str, options: Sequence[frozenset[str]]) -> Hits:
    return hits_of(
        [
            is_right_in_a_sentence(row["answers"][name], row["gold"], among)
            for row, among in zip(rows, options, strict=True)
        ]
    )


def _accuracy_within(
    hits: NDArray[np.bool_], resamples: int, seed: int, clusters: Iterable[object] | None = None
) -> Interval:
    if not len(hits):
        return Interval(math.nan, math.nan, math.nan)
    return accuracy(hits, draw_resamples(len(hits), resamples, seed, clusters))


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


def _speed(times: Sequence[Row], resamples: int, seed: int) -> Interval:
    """Ratio of the medians until the first token, caption relay to fused."""
    relay, fused = (
        np.array([row[name]["ttft_ms"] for row in times]) for name in ("caption_relay", "fused")
    )
    drawn = np.random.default_rng(seed).integers(0, len(times), (resamples, len(times)))
    ratios = np.median(relay[drawn], axis=1) / np.median(fused[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(np.median(relay) / np.median(fused)), float(low), float(high))


def _plain(value: Any) -> Any:
    """Lists and dicts with None for NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

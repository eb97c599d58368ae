"""What the arms of a run come to, a sentence each."""

from __future__ import annotations

from typing import Any

from mm_c2c.evaluation.render import interval_text, percent, share_text

BESIDE = "beside"
"""Where a summary keeps that of a run of the same with `decoding=choice`."""


def findings(summary: dict[str, Any]) -> list[str]:
    """What the arms come to, one sentence each."""
    lines = []
    for floor, kept in summary.get("retention", {}).items():
        over = {"over_blind": "blind", "over_zeroed": "empty cache"}[floor]
        shown = "n/a" if None in kept else interval_text(kept)
        lines.append(f"Retention, (fused - {over}) / (source - {over}): {shown}.")
    if BESIDE in summary:
        lines += _found_among_options(summary[BESIDE])
    if recovered := summary.get("recovered"):
        parts = [
            f"{share_text(found['share'])} of the {found['n']} that {short_name(name)} misses"
            for name, found in recovered.items()
        ]
        lines.append(
            "Know but cannot tell, of questions that the source answers right: fused answers "
            f"{', '.join(parts)}."
        )
    if swap := summary.get("swap"):
        truth, known = swap["truth"], swap.get("source_right")
        line = (
            f"Swapped picture, of {truth['n']} questions that two pictures answer differently: "
            f"{share_text(truth['follow'])} of the answers are true of the swapped one, "
            f"{share_text(truth['stay'])} of the own one"
        )
        if known:
            line += (
                f"; of the {known['n']} that the source answers right for both, "
                f"{share_text(known['follow'])} and {share_text(known['stay'])}"
            )
        lines.append(f"{line}.")
    if written := summary.get("captions"):
        lines.append(
            f"The source's own captions: {share_text(written['share'])} of {written['n']} are the "
            "true description, word for word."
        )
    if speed := summary.get("speed"):
        times = interval_text(speed)
        lines.append(f"First token: fused {times} times as fast as the caption relay.")
    return lines


def _found_among_options(choice: dict[str, Any]) -> list[str]:
    """One sentence of a run with `decoding=choice`, where it has the arms for it."""
    parts = []
    if test := choice["choice"].get("shuffled_over_blind"):
        value, low, high = (100 * x for x in test["difference"])
        parts.append(
            f"another picture's cache minus blind {value:+.1f} points ({low:+.1f} to {high:+.1f})"
        )
    kept = choice.get("retention", {}).get("over_blind", [None])
    if None not in kept:
        parts.append(f"retention over blind {interval_text(kept)}")
    return [f"Among options: {', '.join(parts)}."] if parts else []


def decoding(summary: dict[str, Any]) -> str:
    """How the answers were decoded."""
    if (choice := summary.get("choice")) is None:
        return "Decoding: free."
    asked, total = choice["n"], summary["n"]
    some = "all" if asked == total else f"{asked:,} of {total:,}"
    line = f"Decoding among options: {some} questions could only be answered with one of theirs"
    if derived := asked - choice["listed"]:
        where = "" if derived == asked else f" for {derived:,} of them"
        line += f", which are all answers of the same kind in the file{where}"
    if choice["guess"] is not None:
        line += f"; a guess is right in {percent(choice['guess'])} %"
    return f"{line}."


def short_name(name: str) -> str:
    """An arm in a sentence or a plot."""
    return name.replace("_", " ")

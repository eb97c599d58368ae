"""What text to text is worth, in one section of a README.

    python -m mm_c2c.evaluation.text_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm_c2c.evaluation.text_to_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import run_main
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.render import pipe_table
from mm_c2c.evaluation.text_to_text import SEARCHED, SHUFFLED, ZEROED
from mm_c2c.run_folder import read_summary

_NAMES = {
    "target": "target alone",
    "source": "source alone",
    "text_to_text": "text to text: the target is told the source's answer",
    "small": "fused, `small`",
    "c2c": "fused, `c2c`",
    "own": "control: fused, the target as its own source",
}
_CONTROLS = {SHUFFLED: "another question's cache", ZEROED: "an empty cache"}


def text_report(run: Path) -> str:
    """All arms and controls, and what follows from them, in Markdown.

    Raises:
        InputError: the run is not finished.
    """
    summary = read_summary(run, "python -m mm_c2c.evaluation.text_to_text")
    first, kinds = summary["first"], summary["kinds"]
    asked = ", ".join(
        f"{found['n']} questions of {kind} (a guess is right in {100 * found['guess']:.0f} %)"
        for kind, found in kinds.items()
    )
    head = (
        f"`python -m mm_c2c.evaluation.text_to_text`: {asked}; the option whose words are the "
        "likeliest, a character; % with 95 % bootstrap intervals. "
        f"`{first}` *ahead by* in points, paired; p by McNemar's exact test."
    )
    rows = [["", *(cell for kind in kinds for cell in (kind, f"`{first}` ahead by", "p"))]]
    arms = next(iter(kinds.values()))["accuracy"]
    rows += [
        [_name(arm), *(c for found in kinds.values() for c in _cells(found, arm))] for arm in arms
    ]
    found = [
        f"- {_name(fuser)}, {kind}: ahead of itself with another question's cache by "
        f"{_gap(paired)} points (p = {paired['p_value']:.2g}; {paired['only_first']} questions "
        f"against {paired['only_second']})."
        for kind, part in kinds.items()
        for fuser, paired in part["shuffled"].items()
    ]
    told = ", ".join(
        f"*{words}* {100 * right:.0f} %" for words, right in summary["wordings"].items()
    )
    found.append(
        f"- What the target was told, by accuracy on {SEARCHED} questions to train on: {told}; "
        "the best was asked."
    )
    return "\n\n".join([head, pipe_table(rows), "\n".join(found)])


def _cells(found: Mapping[str, Any], arm: str) -> list[str]:
    value, low, high = (100 * found["accuracy"][arm][key] for key in ("value", "low", "high"))
    paired = found["against"].get(arm)  # the first arm is not compared with itself
    return [
        f"{value:.1f} ({low:.1f} to {high:.1f})",
        _gap(paired) if paired else "",
        f"{paired['p_value']:.2g}" if paired else "",
    ]


def _name(arm: str) -> str:
    for end, control in _CONTROLS.items():
        if arm.endswith(end):
            return f"control: `{arm.removesuffix(end)}` with {control}"
    return _NAMES.get(arm, f"`{arm}`")


def _gap(paired: Mapping[str, Any]) -> str:
    points = {key: 100 * value for key, value in paired["difference"].items()}
    return "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**points)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(text_report, "mm_c2c.evaluation.text_to_text", __doc__, argv)


if __name__ == "__main__":
    run_main(main)

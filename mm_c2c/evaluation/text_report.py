"""What text to text is worth, in one section of a README.

    python -m mm_c2c.evaluation.text_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm_c2c.evaluation.text_to_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.render import pipe_table
from mm_c2c.evaluation.results import read_summary
from mm_c2c.evaluation.text_to_text import SEARCHED, SHUFFLED, ZEROED

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
    # All arms are compared with the first fuser, which is not compared with itself.
    (first,) = summary["accuracy"].keys() - summary["against"].keys()
    letters = list(summary["gold"])
    head = (
        f"`python -m mm_c2c.evaluation.text_to_text`: {summary['n']} questions, the likeliest letter, % "
        f"with 95 % bootstrap intervals; `{first}` *ahead by* in points, paired (McNemar's exact test). "
        "*Says*: how often each letter is chosen, %."
    )
    rows = [["", "accuracy", f"`{first}` ahead by", "p", f"says {', '.join(letters)}"]]
    rows += [_row(summary, arm, letters) for arm in summary["accuracy"]]
    rows.append(["what is right", "", "", "", _shares(summary["gold"], letters)])
    found = [
        f"- {_name(fuser)}, ahead of itself with another question's cache by {_gap(paired)} points "
        f"(p = {paired['p_value']:.2g}; {paired['only_first']} questions against "
        f"{paired['only_second']})."
        for fuser, paired in summary["shuffled"].items()
    ]
    asked = ", ".join(
        f"*{words}* {100 * right:.0f} %" for words, right in summary["wordings"].items()
    )
    found.append(
        f"- What the target was told, by accuracy on {SEARCHED} questions to train on: {asked}; "
        "the best was asked."
    )
    return "\n\n".join([head, pipe_table(rows), "\n".join(found)])


def _row(summary: Mapping[str, Any], arm: str, letters: Sequence[str]) -> list[str]:
    value, low, high = (100 * summary["accuracy"][arm][key] for key in ("value", "low", "high"))
    paired = summary["against"].get(arm)
    return [
        _name(arm),
        f"{value:.1f} ({low:.1f} to {high:.1f})",
        _gap(paired) if paired else "",
        f"{paired['p_value']:.2g}" if paired else "",
        _shares(summary["letters"][arm], letters),
    ]


def _name(arm: str) -> str:
    for end, control in _CONTROLS.items():
        if arm.endswith(end):
            return f"control: `{arm.removesuffix(end)}` with {control}"
    return _NAMES.get(arm, f"`{arm}`")


def _gap(paired: Mapping[str, Any]) -> str:
    points = {key: 100 * value for key, value in paired["difference"].items()}
    return "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**points)


def _shares(counts: Mapping[str, int], letters: Sequence[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{100 * counts.get(letter, 0) / total:.0f}" for letter in letters)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(text_report, "mm_c2c.evaluation.text_to_text", __doc__, argv)


if __name__ == "__main__":
    main()

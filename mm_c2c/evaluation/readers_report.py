"""Readers of policies side by side, in one section of a README.

    python -m mm_c2c.evaluation.readers_report TITLE=RUN ... --readme FILE --section NAME

Each RUN is a folder as `intent_report` takes it, and `choice` in it a run with `decoding=choice`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import InputError, run_main
from mm_c2c.evaluation.render import interval_text, percent, pipe_table, span, write_readme
from mm_c2c.run_folder import read_summary

_ARMS = {
    "fused": "**fused**",
    "prefix_only": "... without the policy's state and actions",
    "shuffled": "... another episode's cache",
    "zeroed": "... empty cache",
}
_WORDS = {
    "description_and_instruction_options": "target told in words what camera and policy read",
    "tuned_description": "... and tuned on such words (LoRA)",
}
_MONITORS = {
    "fused": "will it succeed? AUROC among looks at the same step, fused",
    "policy": "... the policy's own uncertainty",
    "probe": "... linear probe of the same cache",
    "caption_relay": "... target told in words",
}
_LEADS = {
    "at_same_step": "... fused ahead of that uncertainty",
    "in_same_task": "... the same, among looks at the same step of the same task",
}


def readers_table(runs: Mapping[str, Path]) -> str:
    """What was measured of each reader, in Markdown: % right with 95 % intervals.

    Args:
        runs: folders by the title of their column.

    Raises:
        InputError: a run is not finished.
    """
    columns = [_column(run) for run in runs.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return pipe_table([["% right (95 %)", *runs], *(row for row in rows if any(row[1:]))])


def _column(run: Path) -> dict[str, str]:
    """All cells; those of what was not measured are empty."""
    summary = read_summary(run)
    arms = summary["arms"]
    probe = _read(run / "probe.json").get("all", {})
    among_options = _read(run / "choice" / "summary.json").get("arms", {})
    lies = _read(run / "lies" / "summary.json").get("lie", {}).get("arms", {}).get("fused", {})
    monitors = _read(run / "monitor.json").get("monitors", {})
    reasons = (_read(run / "why" / "summary.json") or summary)["arms"]
    why = {name: reasons.get(name, {}).get("kinds", {}).get("why") for name in ("fused", "zeroed")}
    return {
        "questions, episodes": f"{summary['n']:,}, {summary['episodes']}",
        **{name: _cell(arms.get(key, {}).get("accuracy")) for key, name in _ARMS.items()},
        "linear probe of the same cache": _cell(probe.get("both")),
        **{name: _cell(arms.get(key, {}).get("in_a_sentence")) for key, name in _WORDS.items()},
        "among options only": ", ".join(
            f"{name.replace('_', ' ')} {percent(arm['accuracy'][0])}"
            for name, arm in among_options.items()
        ),
        "instruction swapped after the fact: tells what it does": _cell(lies.get("does")),
        "... what it was told": _cell(lies.get("told")),
        **_monitor_cells(monitors),
        "what goes wrong?": _cell(why["fused"]),
        "... what goes wrong, empty cache": _cell(why["zeroed"]),
    }


def _monitor_cells(monitors: Mapping[str, Any]) -> dict[str, str]:
    """AUROC of each monitor, and how far fused is ahead of what the policy itself tells."""

    def all_of(key: str) -> str:
        areas = [f"{name.replace('_', ' ')} {row[key][0]:.2f}" for name, row in monitors.items()]
        return ", ".join(areas)

    leads = monitors.get("policy", {}).get("fused_ahead", {})
    return {
        **{
            name: interval_text(monitors[key]["at_same_step"]) if key in monitors else ""
            for key, name in _MONITORS.items()
        },
        **{
            name: interval_text(leads[key], sign="+") if leads else ""
            for key, name in _LEADS.items()
        },
        "... AUROC at the same step of the same task": all_of("in_same_task"),
        "... AUROC among all looks, of which late ones tell the end": all_of("over_steps"),
    }


def _cell(values: Sequence[float] | None) -> str:
    return span(values) if values else ""


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    parser.add_argument("--readme", type=Path, required=True, help="the file to write into")
    parser.add_argument("--section", required=True, help="which of its sections")
    args = parser.parse_args(argv)
    runs = dict(text.partition("=")[::2] for text in args.runs)
    if not all(runs.values()):
        raise InputError(f"expected TITLE=RUN, got {' '.join(args.runs)!r}")
    table = readers_table({title: Path(run) for title, run in runs.items()})
    write_readme(args.readme, table, args.section)


if __name__ == "__main__":
    run_main(main)

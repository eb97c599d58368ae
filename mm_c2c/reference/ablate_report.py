"""What mattered in a fuser, in one section of a README.

python -m mm_c2c.reference.ablate_report RUNS --readme FILE --section NAME
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import InputError, run_main
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.render import interval_text, pipe_table, span

_COMMAND = "python -m mm_c2c.reference.ablate"
_SHARE = 0.9


def ablation_report(runs: Path) -> str:
    """The table of a folder's variants, in Markdown.

    Raises:
        InputError: no variant was evaluated yet.
    """
    path = runs / "ablations.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not result.get("variants"):
        raise InputError(f"{runs} holds no evaluated variant; make some with {_COMMAND} CONFIG")
    head = ["variant", "settings", "parameters", "seeds", "each seed", "all", "against the first"]
    rows = [_row(name, variant) for name, variant in result["variants"].items()]
    over = f", 95 % intervals over {result['pictures']} pictures" if "pictures" in result else ""
    table = f"n = {result['questions']} a seed{over}.\n\n{pipe_table([head, *rows])}"
    return table + _curves(result["curves"]) if result.get("curves") else table


def _curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracies by the scenes seen, and who needed how many for the first's final level."""
    by_scenes = {
        name: {point["scenes"]: point["accuracy"] for point in curve}
        for name, curve in curves.items()
    }
    head = ["scenes seen", *curves]
    rows = [
        [f"{scenes:,}", *(_interval(found.get(scenes)) for found in by_scenes.values())]
        for scenes in sorted({scenes for found in by_scenes.values() for scenes in found})
    ]
    first = next(iter(by_scenes.values()))
    level = _SHARE * first[max(first)][0]
    needed = []
    for name, found in by_scenes.items():
        reached = [scenes for scenes, share in sorted(found.items()) if share[0] >= level]
        needed.append(
            f"{name} after {reached[0]:,} scenes" if reached else f"{name} not in {max(found):,}"
        )
    return (
        f"\n\n{pipe_table([head, *rows])}\n\n{100 * level:.1f} %, which is {100 * _SHARE:.0f} % of where "
        f"the first ends, is reached by {', by '.join(needed)}."
    )


def _row(name: str, variant: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"`{key}={value}`" for key, value in variant["settings"].items())
    gap = variant.get("over_first")
    return [
        name,
        settings,
        f"{variant['parameters'] / 1e6:.2f} M",
        ", ".join(map(str, variant["seeds"])),
        ", ".join(f"{100 * share:.1f}" for share in variant["each"]),
        _interval(variant["accuracy"]),
        "" if gap is None else interval_text([100 * value for value in gap], 1, "+"),
    ]


def _interval(share: Sequence[float] | None) -> str:
    return "" if share is None else span(share)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(ablation_report, _COMMAND, __doc__, argv)


if __name__ == "__main__":
    run_main(main)

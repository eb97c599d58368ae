"""What mattered in a fuser, in one section of a README.

python -m mm_c2c.reference.ablate_report RUNS --readme FILE --section NAME
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import InputError
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.render import pipe_table

_COMMAND = "python -m mm_c2c.reference.ablate"


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
    return f"n = {result['questions']} a seed.\n\n{pipe_table([head, *rows])}"


def _row(name: str, variant: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"`{key}={value}`" for key, value in variant["settings"].items())
    gap = variant.get("over_first")
    return [
        name,
        settings,
        f"{variant['parameters'] / 1e6:.2f} M",
        ", ".join(map(str, variant["seeds"])),
        ", ".join(f"{100 * share:.1f}" for share in variant["each"]),
        "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in variant["accuracy"])),
        "" if gap is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in gap)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(ablation_report, _COMMAND, __doc__, argv)


if __name__ == "__main__":
    main()

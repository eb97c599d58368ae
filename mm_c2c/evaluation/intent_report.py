"""What a policy's reader is worth, in one section of a README.

    python -m mm_c2c.evaluation.intent_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm-c2c evaluate`; of what else lies in it, as far as it is there:
`lies`, the folder of a run on items whose instruction was swapped, `probe.json` and `monitor.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm_c2c.evaluation import monitor, probe
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.report import lie_table, markdown
from mm_c2c.evaluation.results import read_summary


def intent_report(run: Path) -> str:
    """All that was measured, in Markdown.

    Raises:
        InputError: the run is not finished.
    """
    parts = [markdown(read_summary(run))]
    for path, table in (
        (run / "lies" / "summary.json", lie_table),
        (run / "probe.json", probe.table),
        (run / "monitor.json", monitor.table),
    ):
        if path.is_file():
            parts.append(table(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(part.strip() for part in parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(intent_report, "mm-c2c evaluate", __doc__, argv)


if __name__ == "__main__":
    main()

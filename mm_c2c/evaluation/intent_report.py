"""What a policy's reader is worth, in one section of a README.

    python -m mm_c2c.evaluation.intent_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm-c2c evaluate`; of what else lies in it, as far as it is there:
`lies`, the folder of a run on items whose instruction was swapped, `probe.json` and `monitor.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mm_c2c.errors import InputError
from mm_c2c.evaluation import monitor, probe
from mm_c2c.evaluation.report import lie_table, markdown, write_readme


def intent_report(run: Path) -> str:
    """All that was measured, in Markdown.

    Raises:
        InputError: the run is not finished.
    """
    try:
        parts = [markdown(json.loads((run / "summary.json").read_text(encoding="utf-8")))]
    except OSError as error:
        raise InputError(
            f"{run} holds no finished run ({error.strerror}: summary.json); "
            "make one with mm-c2c evaluate --out"
        ) from error
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of mm-c2c evaluate")
    parser.add_argument("--readme", type=Path, required=True, help="the file to write into")
    parser.add_argument("--section", required=True, help="which of its sections")
    args = parser.parse_args(argv)
    write_readme(args.readme, intent_report(args.run), args.section)


if __name__ == "__main__":
    main()

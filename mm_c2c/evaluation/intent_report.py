"""What a policy's reader is worth, in one section of a README.

    python -m mm_c2c.evaluation.intent_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm-c2c evaluate`; of what else lies in it, as far as it is there:
`lies`, the folder of a run on items whose instruction was swapped, `probe.json` and `monitor.json`;
and `why`, the folder of a run that asks what goes wrong, with a `probe.json` of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mm_c2c.errors import run_main
from mm_c2c.evaluation import monitor, probe
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.render import pipe_table, span
from mm_c2c.evaluation.report import lie_table, markdown
from mm_c2c.evaluation.statistics import accuracy, draw_resamples
from mm_c2c.evaluation.tasks import is_right
from mm_c2c.run_folder import read_rows, read_summary

_RESAMPLES = 2000


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
    why = run / "why"
    if (why / "answers.jsonl").is_file():
        parts.append(why_table(why))
    if (why / "probe.json").is_file():
        parts.append(probe.table(json.loads((why / "probe.json").read_text(encoding="utf-8"))))
    return "\n\n".join(part.strip() for part in parts)


def why_table(run: Path) -> str:
    """How often each arm is right about what goes wrong, over all and by the truth, in Markdown."""
    rows = read_rows(run / "answers.jsonl")
    draws = draw_resamples(len(rows), _RESAMPLES, 0, [row["episode"] for row in rows])
    golds = np.array([row["gold"] for row in rows])
    counts = Counter(golds.tolist())
    table = [
        [
            "what goes wrong, % right",
            f"all ({len(rows)})",
            *(f"{gold} ({count})" for gold, count in counts.most_common()),
        ]
    ]
    for arm in rows[0]["answers"]:
        hits = np.array([is_right(row["answers"][arm], row["gold"]) for row in rows])
        whole = accuracy(hits, draws)
        parts = [f"{100 * hits[golds == gold].mean():.1f}" for gold, _ in counts.most_common()]
        spread = span((whole.value, whole.low, whole.high))
        table.append([arm.replace("_", " "), spread, *parts])
    return pipe_table(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(intent_report, "mm-c2c evaluate", __doc__, argv)


if __name__ == "__main__":
    run_main(main)

"""The evaluations that ship with the reference pair, read from their JSON."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from mm_c2c.errors import UnsupportedError
from mm_c2c.evaluation.report import report_body
from mm_c2c.reference.models import BRIDGE_FOLDER

_TITLES = {
    "": "Scenes in a style that no training showed",
    "choice": "The same, answered among options",
    "crowded": "Five and six stickers, where training had one to four",
    "knowledge_choice": "Knowledge, answered with yes or no",
    "own_source": "A control: the target as its own source",
}


@functools.cache
def runs() -> dict[str, Path]:
    """Folders of finished runs, by what was asked; the main one first."""
    found = sorted(BRIDGE_FOLDER.glob("evaluation*/summary.json"))
    return {_title(path.parent.name): path.parent for path in found}


@functools.cache
def run_html(title: str) -> str:
    """A run's tables and plots.

    Args:
        title: a key of `runs`.
    """
    summary = json.loads((runs()[title] / "summary.json").read_text(encoding="utf-8"))
    try:
        body = report_body(summary)
    except UnsupportedError as error:
        return f"<p>{error}</p>"
    return f'<div class="results"><h2>{title}</h2>{body}</div>'


def _title(folder: str) -> str:
    of = folder.removeprefix("evaluation").strip("_")
    return _TITLES.get(of, of.replace("_", " ").capitalize())

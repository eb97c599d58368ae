"""How soon a browser paints the page of `mm-c2c demo`, once its models are loaded.

python -m mm_c2c.bench.paint [visits=N] [tiny=true]

The page runs in a process of its own. Each visit is a new browser profile, with nothing kept of the
one before. Needs Playwright and a Chromium (`CHROMIUM=PATH` where it is not on the search path).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_c2c.bench.visitors import serve_page
from mm_c2c.config import check_at_least_one, from_command_line
from mm_c2c.errors import UnsupportedError, run_main

_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_NOW = "performance.now()"


@dataclass(frozen=True, kw_only=True)
class PaintConfig:
    """Settings.

    Attributes:
        visits: how often the page is opened, after once to warm up.
        tiny: a target of random weights: no download.
    """

    visits: int = 7
    tiny: bool = False

    def __post_init__(self) -> None:
        check_at_least_one(self, "visits")


def bench(config: PaintConfig) -> dict[str, Any]:
    """Open the page, again and again.

    Returns:
        Plain values, as [median, low, high] in milliseconds from the beginning of the navigation:
        `first_contentful_paint_ms`, by the browser's own clock, and `usable_ms`, when a question
        can be asked.

    Raises:
        UnsupportedError: no Playwright or no Chromium.
        PageError: the page did not start.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UnsupportedError("this needs Playwright: pip install playwright") from None
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise UnsupportedError("this needs a Chromium: apt-get install chromium, or CHROMIUM=PATH")
    painted, usable = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_page(Path(folder), tiny=config.tiny) as (url, _),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for visit in range(config.visits + 1):
            page = browser.new_context().new_page()
            page.goto(url)
            page.get_by_role("button", name="Ask", exact=True).wait_for()
            if visit:
                usable.append(page.evaluate(_NOW))
                page.wait_for_function(_PAINTED)
                painted.append(page.evaluate(_PAINTED))
            page.context.close()
        browser.close()
    return {
        "first_contentful_paint_ms": _spread(painted),
        "usable_ms": _spread(usable),
        **vars(config),
    }


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(bench(from_command_line(PaintConfig, argv))) + "\n")


if __name__ == "__main__":
    run_main(main)

"""The bench of the first paint, in a browser of its own."""

from __future__ import annotations

import os
import shutil

import pytest

from mm_c2c.bench import paint

pytestmark = pytest.mark.browser
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
    pytest.skip("needs a Chromium: apt-get install chromium", allow_module_level=True)


def test_the_bench_of_the_first_paint_sees_it_before_the_page_can_be_used() -> None:
    found = paint.bench(paint.PaintConfig(visits=2, tiny=True))
    painted, usable = found["first_contentful_paint_ms"], found["usable_ms"]
    assert 0 < painted[1] <= painted[0] <= painted[2]
    assert painted[0] < usable[0]

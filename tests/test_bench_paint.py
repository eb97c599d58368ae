"""What the bench of the page's first paint says where it cannot run; it runs in tests/browser."""

from __future__ import annotations

import sys

import pytest

from mm_c2c.bench.paint import PaintConfig, bench
from mm_c2c.errors import ConfigError, UnsupportedError


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(UnsupportedError, match="needs Playwright: pip install playwright"):
        bench(PaintConfig(tiny=True))
    with pytest.raises(ConfigError, match="visits must be at least 1, got 0"):
        PaintConfig(visits=0)

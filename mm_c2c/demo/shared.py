"""What the tabs of the page have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gradio as gr

from mm_c2c.demo.compare import Look
from mm_c2c.demo.pair import open_picture
from mm_c2c.errors import MMC2CError
from mm_c2c.evaluation.arms import Setting

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
"""For every event that uses the models: visitors wait in one line."""


class Shared(NamedTuple):
    """What the tabs have in common.

    Attributes:
        setting: the pair that is asked where a visitor has not brought one.
        picture: what is asked about.
        question: what is asked.
        look: state: the visitor's picture and what was seen in it.
        own: state: the visitor's own pair, or None.
        tabs: all of them.
    """

    setting: Setting
    picture: gr.Image
    question: gr.Textbox
    look: gr.State
    own: gr.State
    tabs: gr.Tabs


def look_at(picture: dict[str, Any] | None, look: Look | None, setting: Setting) -> Look:
    """The visitor's look, a new one where picture or pair is another than before.

    Args:
        picture: as it comes without Gradio's own preprocessing, which would open the file and say
            nothing useful of one that is no picture.
        look: the last one.
        setting: the pair that is asked.
    """
    seen = open_picture((picture or {}).get("path"))
    if look is None or look.setting is not setting or look.picture != seen:
        return Look(setting, seen)
    return look


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows a visitor what the library's errors say; others stay in the log."""
    try:
        yield
    except MMC2CError as error:
        raise gr.Error(str(error), print_exception=False) from error

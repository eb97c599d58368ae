"""What the tabs of the page have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from mm_c2c.demo.compare import Look
from mm_c2c.demo.pair import known, open_picture
from mm_c2c.errors import InputError, MMC2CError
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


def open_shown(picture: dict[str, Any] | None) -> Image.Image:
    """The picture that is shown on the page: uploaded, drawn or shipped.

    Args:
        picture: as it comes without Gradio's own preprocessing, which would open the file and say
            nothing useful of one that is no picture.

    Raises:
        InputError: there is none, or it cannot be read; any other file of this machine is none.
    """
    path = (picture or {}).get("path")
    if path and path not in {str(scene.path) for scene in known().scenes}:
        # Gradio itself lets a path through that does not come marked as a file.
        if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            return open_picture(None)
        try:
            os.utime(path)  # Gradio deletes what has not changed for a while
        except OSError as error:
            raise InputError(
                "The picture was deleted after some ten minutes: upload it again."
            ) from error
    return open_picture(path)


def look_at(picture: dict[str, Any] | None, look: Look | None, setting: Setting) -> Look:
    """The visitor's look, a new one where picture or pair is another than before.

    Args:
        picture: as `open_shown` takes it.
        look: the last one.
        setting: the pair that is asked.
    """
    seen = open_shown(picture)
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

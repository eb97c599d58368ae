"""The pair that the page shows, its scenes, and what is asked about them."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.fuser import FuserConfig
from mm_c2c.images import load_image
from mm_c2c.link import LinkConfig
from mm_c2c.reference.models import (
    HERE,
    SOURCE_NAME,
    load_source,
    tiny_target,
)
from mm_c2c.reference.scenes import CAPTION_REQUEST

PROMPTS = HERE / "prompts.json"
ITEMS = HERE / "unseen_style" / "items.jsonl"
GENERIC = (
    "How many things are there?",
    "What is on the left?",
    "Can you eat the thing on the right?",
    "What kind of thing is at the top?",
    "Is there a dog?",
    "Which is the odd one out?",
)
NUM_SCENES = 8


class ShippedScene(NamedTuple):
    """A picture that ships with the library.

    Attributes:
        path: of the picture.
        question: one to begin with.
        description: what it shows, truly.
    """

    path: Path
    question: str
    description: str


class Known(NamedTuple):
    """What the shipped questions say.

    Attributes:
        scenes: some pictures.
        by_picture: questions of each picture, by `digest`.
        options: answers that a question can have.
    """

    scenes: list[ShippedScene]
    by_picture: dict[str, list[str]]
    options: dict[str, tuple[str, ...]]


def reference_setting(bridge: Bridge) -> Setting:
    """How the reference pair, or its stand-in, is asked, with the searched prompt."""
    return Setting(
        bridge=bridge,
        source_name=SOURCE_NAME,
        request=CAPTION_REQUEST,
        prompts=PROMPTS,
    )


def load_tiny_bridge() -> Bridge:
    """The reference source before a tiny target of random weights: no download, no sense.

    For trying the page itself; what this target says means nothing.
    """
    source = load_source()
    torch.manual_seed(0)
    target = tiny_target()
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=32, rank=8)
    link = LinkConfig(source=SOURCE_NAME, geometry="slots", rows=9, cols=9, fuser=fuser)
    return Bridge(target, {SOURCE_NAME: source}, BridgeConfig(links=(link,), slot_token="a")).eval()


@functools.cache
def known() -> Known:
    """Read the shipped questions, once."""
    by_path: dict[Path, list[Item]] = {}
    options = {}
    for item in load_items(ITEMS):
        by_path.setdefault(item.image, []).append(item)
        options[item.question] = item.options
    full = [items for items in by_path.values() if len(items) >= 6] or list(by_path.values())
    picked = full[:: max(1, len(full) // NUM_SCENES)][:NUM_SCENES]
    return Known(
        [ShippedScene(i[0].image, i[0].question, i[0].description or "") for i in picked],
        {digest(items[0].picture()): [item.question for item in items] for items in picked},
        options,
    )


def digest(picture: Image.Image) -> str:
    """Tells pictures apart."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def suggestions(picture: Image.Image | None) -> list[str]:
    """Questions to ask about a picture: a bundled scene's own, else some that suit most."""
    own = known().by_picture.get(digest(picture), []) if picture else []
    return [*dict.fromkeys([*own, *GENERIC])][: len(GENERIC)]


def open_picture(path: str | None) -> Image.Image:
    """A picture that a visitor handed in.

    Raises:
        InputError: there is none, or it cannot be read; says what to do.
    """
    if not path:
        raise InputError("There is no picture: pick a scene, upload one or take one.")
    try:
        return load_image(path)
    except InputError as error:
        # A visitor knows the file's name, not where the page keeps it.
        raise InputError(str(error).replace(f"{Path(path).parent}/", "")) from error


def picture_html(picture: Image.Image, alt: str, *, pixels: int = 320) -> str:
    """A picture inside the page itself: nothing of it is kept on disk.

    Args:
        picture: RGB.
        alt: what it shows, in words.
        pixels: its longer side is made no longer than this.
    """
    small = picture.copy()
    small.thumbnail((pixels, pixels))
    with io.BytesIO() as file:
        small.save(file, "WEBP", quality=85)
        data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{html.escape(alt)}">'

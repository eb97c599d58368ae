"""The scene builder: stickers that a visitor drags onto a canvas become a picture.

The canvas (`builder.js`) says as JSON what lies where; the picture is drawn here, by what drew the
scenes of the training.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from mm_c2c.errors import InputError
from mm_c2c.reference.scenes import CELLS, Scene, Sticker, questions, render

STICKERS = {path.stem: path for path in sorted(Path(__file__).with_name("stickers").glob("*.webp"))}
"""Cut-outs by concept: Twemoji, a style that no training showed; see NOTICE."""
SCRIPT = Path(__file__).with_name("builder.js")
BACKGROUNDS = (4, 0, 7, 11)
"""Seeds of the backgrounds to choose from."""
MAX_STICKERS = 6
MIN_SIZE, MAX_SIZE = 0.15, 0.6
_STYLE = "twemoji"


def read_scene(text: str | None) -> Scene:
    """The scene that a canvas describes.

    Args:
        text: JSON of `{"background": index, "stickers": [{"name", "x", "y", "size"}]}`, lengths as
            shares of the picture's side, `x` and `y` of a sticker's centre.

    Raises:
        InputError: it describes no scene, or one without stickers; says what to do.
    """
    try:
        found = json.loads(text or "{}")
        seed = BACKGROUNDS[int(found.get("background", 0)) % len(BACKGROUNDS)]
        stickers = [_read_sticker(entry) for entry in found.get("stickers", [])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            'a scene is {"background": 0, "stickers": [{"name": "cat", "x": 0.5, "y": 0.5, '
            f'"size": 0.3}}]}}; this one cannot be read: {error}'
        ) from error
    if not 1 <= len(stickers) <= MAX_STICKERS:
        raise InputError(
            f"The scene has {len(stickers)} stickers: put 1 to {MAX_STICKERS} on the canvas."
        )
    return Scene(tuple(sorted(stickers, key=lambda s: (s.row, s.col))), seed)


def _read_sticker(entry: dict[str, Any]) -> Sticker:
    name = str(entry["name"])
    if name not in STICKERS:
        raise ValueError(f"no sticker {name!r}; known: {', '.join(STICKERS)}")
    x, y, size = (float(entry[key]) for key in ("x", "y", "size"))
    if not (0 <= x <= 1 and 0 <= y <= 1 and MIN_SIZE <= size <= MAX_SIZE):
        raise ValueError(
            f"{name}: x and y go from 0 to 1, size from {MIN_SIZE} to {MAX_SIZE}, got {x}, {y}, {size}"
        )
    row, col = (min(int(share * CELLS), CELLS - 1) for share in (y, x))
    return Sticker(name=name, style=_STYLE, row=row, col=col, x=x, y=y, size=size, angle=0.0)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return render(scene, {_STYLE: _cut_outs()})


def first_question(scene: Scene) -> str:
    """A question that suits a scene."""
    return questions(scene, random.Random(0), sorted(STICKERS))[0].question


def canvas_props() -> dict[str, Any]:
    """What `builder.js` is given: pictures as data, and limits."""
    return {
        "stickers": {name: _data(path.read_bytes()) for name, path in STICKERS.items()},
        "backgrounds": [_background(seed) for seed in BACKGROUNDS],
        "limits": {"count": MAX_STICKERS, "min": MIN_SIZE, "max": MAX_SIZE},
    }


@functools.cache
def _cut_outs() -> dict[str, Image.Image]:
    return {name: Image.open(path).convert("RGBA") for name, path in STICKERS.items()}


def _background(seed: int) -> str:
    with io.BytesIO() as file:
        render(Scene((), seed), {}).save(file, "WEBP", quality=80)
        return _data(file.getvalue())


def _data(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()

"""Sticker scenes with known truth: 1 to 4 cut-outs on a background, and questions about them.

A scene is data (`Scene`); `render` turns it into a picture, `questions` into questions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from mm_c2c.reference.concepts import BY_NAME, GROUPS

SCENE_PIXELS = 288
CELLS = 3
_CENTRES = (0.2, 0.5, 0.8)
CAPTION_REQUEST = "Describe the picture."

PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_AT = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
}
KINDS = ("what", "kind", "where", "count", "exists", "relation", "odd")
_PLURALS = {
    "animal": "animals",
    "food": "foods",
    "vehicle": "vehicles",
    "clothing": "clothes",
    "instrument": "instruments",
    "plant": "plants",
    "tool": "tools",
}
# Share of a sticker's longer side that surely shows it, from the centre out.
_COVERED = 0.45
_PLURAL_NAMES = {"grapes", "cherries", "glasses", "jeans", "scissors"}
_RELATIONS = {
    "left of": lambda a, b: a.col < b.col,
    "right of": lambda a, b: a.col > b.col,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


@dataclass(frozen=True, kw_only=True)
class Sticker:
    """One cut-out: what, where and how it is drawn.

    Attributes:
        name: a concept's name.
        style: the artwork it is drawn in.
        row: cell of the 3 x 3 grid, from the top.
        col: cell of the 3 x 3 grid, from the left.
        x: centre, as a share of the picture's width.
        y: centre, as a share of its height.
        size: longer side, as a share of the picture's width.
        angle: rotation in degrees, counter-clockwise.
    """

    name: str
    style: str
    row: int
    col: int
    x: float
    y: float
    size: float
    angle: float

    @property
    def group(self) -> str:
        """The kind of thing it is."""
        return BY_NAME[self.name].group

    @property
    def place(self) -> str:
        """Its cell in words."""
        return PLACES[self.row][self.col]


@dataclass(frozen=True)
class Scene:
    """Stickers in reading order, and the seed of the background."""

    stickers: tuple[Sticker, ...]
    seed: int


class Question(NamedTuple):
    """A question with its kind (one of `KINDS`) and the true answer."""

    kind: str
    question: str
    answer: str


def sample_scene(
    rng: random.Random,
    names: Sequence[str],
    styles: Mapping[str, Sequence[str]],
    num_stickers: int | None = None,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of randomness.
        names: concepts that may appear.
        styles: for each concept, the styles it may be drawn in.
        num_stickers: 1 to 9; drawn from 1 to 4 when None.
    """
    count = num_stickers or rng.randint(1, 4)
    cells = rng.sample(range(CELLS * CELLS), count)
    stickers = []
    for name, cell in zip(_sample_names(rng, names, count), cells, strict=True):
        row, col = divmod(cell, CELLS)
        stickers.append(
            Sticker(
                name=name,
                style=rng.choice(list(styles[name])),
                row=row,
                col=col,
                x=_CENTRES[col] + rng.uniform(-0.04, 0.04),
                y=_CENTRES[row] + rng.uniform(-0.04, 0.04),
                size=rng.uniform(0.26, 0.36),
                angle=rng.uniform(-25, 25),
            )
        )
    stickers.sort(key=lambda s: (s.row, s.col))
    return Scene(tuple(stickers), rng.randrange(2**31))


def _sample_names(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """Distinct concepts, each group as likely as another; two of five larger scenes hold an odd one."""
    by_group: dict[str, list[str]] = {}
    for name in names:
        by_group.setdefault(BY_NAME[name].group, []).append(name)
    if count >= 3 and rng.random() < 0.4:
        same = rng.choice([g for g, members in by_group.items() if len(members) >= count - 1])
        other = rng.choice([g for g in by_group if g != same])
        return [*rng.sample(by_group[same], count - 1), rng.choice(by_group[other])]
    picked: list[str] = []
    while len(picked) < count:
        name = rng.choice(by_group[rng.choice(list(by_group))])
        if name not in picked:
            picked.append(name)
    return picked


def render(
    scene: Scene,
    artwork: Mapping[str, Mapping[str, Image.Image]],
    *,
    size: int = SCENE_PIXELS,
    jitter: bool = False,
) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to draw.
        artwork: by style, then by concept, RGBA cut-outs.
        size: side of the square picture in pixels.
        jitter: vary each sticker's colours a little, for training.

    Returns:
        An RGB picture.
    """
    rng = random.Random(scene.seed)
    canvas = _background(rng, size)
    for sticker in scene.stickers:
        cut = artwork[sticker.style][sticker.name]
        if jitter:
            cut = _jitter(cut, rng)
        scale = sticker.size * size / max(cut.size)
        cut = cut.resize(
            (max(1, round(cut.width * scale)), max(1, round(cut.height * scale))),
            Image.Resampling.BICUBIC,
        ).rotate(sticker.angle, Image.Resampling.BICUBIC, expand=True)
        corner = (round(sticker.x * size - cut.width / 2), round(sticker.y * size - cut.height / 2))
        canvas.paste(cut, corner, cut)
    return canvas


def _background(rng: random.Random, size: int) -> Image.Image:
    """Plain, gradient, stripes, checks or cloudy noise, in muted colours."""
    first, second = ([rng.uniform(70, 250) for _ in range(3)] for _ in range(2))
    y, x = np.mgrid[0:size, 0:size] / size
    pattern = rng.choice(["plain", "gradient", "stripes", "checks", "clouds"])
    if pattern == "plain":
        blend = np.zeros((size, size))
    elif pattern == "gradient":
        turn = rng.uniform(0, 2 * math.pi)
        blend = 0.5 + 0.5 * np.clip(
            math.cos(turn) * (2 * x - 1) + math.sin(turn) * (2 * y - 1), -1, 1
        )
    elif pattern == "stripes":
        turn, waves = rng.uniform(0, math.pi), rng.uniform(3, 12)
        blend = 0.2 + 0.2 * np.sin(2 * math.pi * waves * (math.cos(turn) * x + math.sin(turn) * y))
    elif pattern == "checks":
        tiles = rng.randint(4, 12)
        blend = 0.25 * ((np.floor(x * tiles) + np.floor(y * tiles)) % 2)
    else:
        coarse = np.random.default_rng(rng.randrange(2**31)).random((6, 6))
        cloud = Image.fromarray((coarse * 255).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        blend = 0.6 * np.asarray(cloud) / 255
    pixels = np.asarray(first) + blend[..., None] * (np.asarray(second) - np.asarray(first))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _jitter(cut: Image.Image, rng: random.Random) -> Image.Image:
    rgb, alpha = cut.convert("RGB"), cut.getchannel("A")
    for enhance, spread in (
        (ImageEnhance.Color, 0.4),
        (ImageEnhance.Brightness, 0.2),
        (ImageEnhance.Contrast, 0.3),
    ):
        rgb = enhance(rgb).enhance(rng.uniform(1 - spread, 1 + spread))
    hue = np.asarray(rgb.convert("HSV")).copy()
    hue[..., 0] = (hue[..., 0].astype(int) + rng.randint(-8, 8)) % 256
    rgb = Image.fromarray(hue, "HSV").convert("RGB")
    rgb.putalpha(alpha)
    return rgb


def caption(scene: Scene) -> str:
    """A full description in reading order, such as `a cat in the top left, an egg at the top.`."""
    parts = [f"{_one(s.name)} {at_place(s.place)}" for s in scene.stickers]
    return ", ".join(parts) + "."


def questions(scene: Scene, rng: random.Random, names: Sequence[str]) -> list[Question]:
    """Every kind of question the scene can be asked, one of each.

    Args:
        scene: the truth.
        rng: picks the sticker, the relation and the absent concept.
        names: concepts that an `exists` question may ask for in vain.
    """
    present = {s.name for s in scene.stickers}
    pick = rng.choice(scene.stickers)
    asked = [
        Question("what", f"What is {at_place(pick.place)}?", pick.name),
        _kind_question(scene, rng),
        _where_question(scene, rng),
        _count_question(scene, rng),
    ]
    if rng.random() < 0.5:
        name, answer = rng.choice(scene.stickers).name, "yes"
    else:
        name, answer = rng.choice([n for n in names if n not in present]), "no"
    asked.append(Question("exists", f"{_is_there(name)}?", answer))
    asked.extend(rng.sample(found, 1) if (found := _relation_questions(scene)) else [])
    odd = odd_one_out(scene)
    if odd is not None:
        asked.append(Question("odd", "Which is the odd one out?", odd))
    return asked


def patch_contents(scene: Scene, side: int) -> list[tuple[str | None, str]]:
    """What lies on each patch of a `side` x `side` grid, in reading order.

    Returns:
        The name of the sticker that covers the patch's centre, if one does, and the place.
    """
    contents = []
    for row in range(side):
        for col in range(side):
            x, y = (col + 0.5) / side, (row + 0.5) / side
            name = None
            for sticker in scene.stickers:
                if max(abs(x - sticker.x), abs(y - sticker.y)) < _COVERED * sticker.size:
                    name = sticker.name
            contents.append((name, PLACES[int(y * CELLS)][int(x * CELLS)]))
    return contents


def odd_one_out(scene: Scene) -> str | None:
    """The one sticker of another group than all the rest, in scenes of three or more."""
    if len(scene.stickers) < 3:
        return None
    groups = [s.group for s in scene.stickers]
    lone = [s.name for s in scene.stickers if groups.count(s.group) == 1]
    return lone[0] if len(lone) == 1 and len(set(groups)) == 2 else None


def _kind_question(scene: Scene, rng: random.Random) -> Question:
    pick = rng.choice(scene.stickers)
    return Question("kind", f"What kind of thing is {at_place(pick.place)}?", pick.group)


def _where_question(scene: Scene, rng: random.Random) -> Question:
    pick = rng.choice(scene.stickers)
    return Question("where", f"Where {_is(pick.name)} the {pick.name}?", pick.place)


def _count_question(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        return Question("count", "How many things are there?", str(len(scene.stickers)))
    groups = [s.group for s in scene.stickers]
    counts = {group: groups.count(group) for group in GROUPS}
    wanted = rng.choice(sorted(set(counts.values())))
    group = rng.choice([g for g in GROUPS if counts[g] == wanted])
    return Question("count", f"How many {_PLURALS[group]} are there?", str(wanted))


def _relation_questions(scene: Scene) -> list[Question]:
    """`What is left of the cat?`, wherever just one sticker is."""
    found = []
    for anchor in scene.stickers:
        for words, holds in _RELATIONS.items():
            there = [s.name for s in scene.stickers if holds(s, anchor)]
            if len(there) == 1:
                found.append(Question("relation", f"What is {words} the {anchor.name}?", there[0]))
    return found


def at_place(place: str) -> str:
    """`at the top`, `in the top left`."""
    return _AT.get(place, f"in the {place}")


def _one(name: str) -> str:
    """`a cat`, `an apple`, `scissors`."""
    if name in _PLURAL_NAMES:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _is(name: str) -> str:
    return "are" if name in _PLURAL_NAMES else "is"


def _is_there(name: str) -> str:
    return f"{_is(name).capitalize()} there {_one(name)}"

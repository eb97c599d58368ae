"""Questions whose answer is not in the picture: the source's eyes and the target's knowledge.

No part of the reference pair was trained on them.
"""

from __future__ import annotations

from typing import NamedTuple

from mm_c2c.reference.concepts import CONCEPTS
from mm_c2c.reference.scenes import Question, Scene, at_place

_THINGS = ("vehicle", "clothing", "instrument", "tool")


class _Fact(NamedTuple):
    """A yes-or-no question, the names it is true of, and those it is not; others are not asked."""

    question: str
    true_of: frozenset[str]
    false_of: frozenset[str]


def _of(*groups: str) -> frozenset[str]:
    return frozenset(concept.name for concept in CONCEPTS if concept.group in groups)


_WHEELED = frozenset({"car", "bus", "bicycle", "train", "tractor", "truck", "ambulance", "taxi"})
_FLYING = frozenset({"bee", "airplane", "rocket", "helicopter"})

FACTS = {
    "edible": _Fact("Can you eat the thing {place}?", _of("food"), _of(*_THINGS)),
    "alive": _Fact("Is the thing {place} alive?", _of("animal", "plant"), _of(*_THINGS)),
    # A chicken flies a little.
    "flies": _Fact(
        "Can the thing {place} fly?",
        _FLYING,
        _of("animal", "food", "plant", *_THINGS) - _FLYING - {"chicken"},
    ),
    # Airplanes have wheels that are seldom drawn.
    "wheels": _Fact(
        "Does the thing {place} have wheels?",
        _WHEELED,
        _of("animal", "food", "plant", "clothing", "instrument", "tool"),
    ),
}


def knowledge_questions(scene: Scene) -> list[Question]:
    """Every fact about every sticker that it can be asked of."""
    return [
        Question(kind, fact.question.format(place=at_place(sticker.place)), answer)
        for sticker in scene.stickers
        for kind, fact in FACTS.items()
        for answer, names in (("yes", fact.true_of), ("no", fact.false_of))
        if sticker.name in names
    ]

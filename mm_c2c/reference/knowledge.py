"""Questions whose answer is not in the picture: the source's eyes and the target's knowledge.

The source was never trained on them. The fuser was, for half of the names that a fact is true of
and half of those that it is not; the other half only the evaluation asks about.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from mm_c2c.reference.concepts import CONCEPTS
from mm_c2c.reference.scenes import Question, Scene, at_place

_THINGS = ("vehicle", "clothing", "instrument", "tool")


class _Fact(NamedTuple):
    """A yes-or-no question, the names it is true of, and those it is not; others are not asked."""

    question: str
    true_of: frozenset[str]
    false_of: frozenset[str]

    def names(self, answer: str, *, taught: bool) -> list[str]:
        """Half of the names that have this answer: those that training asks about, or the rest."""
        return sorted(self.true_of if answer == "yes" else self.false_of)[not taught :: 2]


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


_FEWEST = min(len(fact.names(a, taught=True)) for fact in FACTS.values() for a in ("yes", "no"))


def knowledge_questions(scene: Scene, *, taught: bool) -> list[Question]:
    """Every fact about every sticker that it can be asked of.

    Args:
        scene: what is seen.
        taught: ask about names that training may ask about; otherwise about all others.
    """
    return [question for question, _ in _asked(scene, taught=taught)]


def draw_knowledge(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions for training; over many scenes, each fact and answer comes about as often.

    An answer that many names have is asked for the more seldom.
    """
    asked = _asked(scene, taught=True)
    return [question for question, names in asked if rng.random() < _FEWEST / names]


def _asked(scene: Scene, *, taught: bool) -> list[tuple[Question, int]]:
    """Questions, and of how many names each of them has the same answer."""
    asked = []
    for sticker in scene.stickers:
        for kind, fact in FACTS.items():
            for answer in ("yes", "no"):
                names = fact.names(answer, taught=taught)
                if sticker.name in names:
                    text = fact.question.format(place=at_place(sticker.place))
                    asked.append((Question(kind, text, answer), len(names)))
    return asked

"""Questions whose answer is not in the picture: the source's eyes and the target's knowledge.

The source was never trained on them. The fuser was, for half of the names that a fact is true of
and half of those that it is not; the other half only the evaluation asks about.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
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


_SEEN = Counter(concept.group for concept in CONCEPTS if not concept.heldout)


def _chance(names: Collection[str]) -> float:
    """How often a sticker of a training scene has one of these names, up to a constant.

    Its group is drawn first, each as likely as another.
    """
    return sum(1 / _SEEN[c.group] for c in CONCEPTS if c.name in names and not c.heldout)


_CHANCES = {
    kind: {answer: _chance(fact.names(answer, taught=True)) for answer in ("yes", "no")}
    for kind, fact in FACTS.items()
}
_RAREST = min(chance for answers in _CHANCES.values() for chance in answers.values())


def knowledge_questions(scene: Scene, *, taught: bool) -> list[Question]:
    """Every fact about every sticker that it can be asked of.

    Args:
        scene: what is seen.
        taught: ask about names that training may ask about; otherwise about all others.
    """
    asked = []
    for sticker in scene.stickers:
        for kind, fact in FACTS.items():
            for answer in ("yes", "no"):
                if sticker.name in fact.names(answer, taught=taught):
                    text = fact.question.format(place=at_place(sticker.place))
                    asked.append(Question(kind, text, answer))
    return asked


def draw_knowledge(scene: Scene, rng: random.Random, often: float = 1.0) -> list[Question]:
    """Questions for training; over many scenes, both answers of a fact come about as often.

    Args:
        scene: what is seen.
        rng: what draws.
        often: 1 asks as often as lets all facts come about as often; more asks so many times as
            often about each fact, up to where its rarer answer is asked for whenever it can be.
    """
    drawn = []
    for question in knowledge_questions(scene, taught=True):
        chances = _CHANCES[question.kind]
        if rng.random() < min(often * _RAREST, *chances.values()) / chances[question.answer]:
            drawn.append(question)
    return drawn

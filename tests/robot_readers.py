"""Readers that need no model, in a module that is quick to import: a process is made with it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from mm_c2c.robot import Narration, Reading, Snapshot


class Unreadable(Reading):
    """Can be sent, but not received."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


WRONG = {
    "nothing": None,
    "words": ["it turns left"],
    "unsent": [Narration(step=0, text=lambda: "no text")],
    "unread": [Unreadable(step=0)],
}
"""What a reader must not say, by the task that makes it say so."""


class Scripted:
    """Does what the task says: wait, fail or end, also later; tells what it was given."""

    def __call__(self, snapshot: Snapshot, questions: Sequence[str]) -> Any:
        word, _, value = snapshot.observation["task"].partition(" ")
        if word == "wait":
            time.sleep(float(value))
        if word == "fail" and snapshot.step % 2 == 0:
            raise ValueError("cannot read this")
        if word == "end":
            time.sleep(float(value or 0))
            os._exit(3)
        if word in WRONG:
            return WRONG[word]
        return [Narration(step=snapshot.step, text=f"{word} {' '.join(questions)}".strip())]


def build_nothing() -> Any:
    raise OSError("no weights here")

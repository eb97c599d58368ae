"""Episodes of BabyAI written down by hand."""

from __future__ import annotations

from typing import Any

from mm_c2c.reference.babyai.levels import ACTIONS
from mm_c2c.reference.babyai.rollouts import Episode, Step, Thing

EMPTY = bytes([1, 0, 0] * 49).hex()
BALL, KEY, BOX = Thing("red", "ball", 3, 1), Thing("blue", "key", 5, 3), Thing("grey", "box", 5, 5)


def step(action: str | None, x: int, y: int, direction: int, *things: Thing, **other: Any) -> Step:
    number = ACTIONS.index(action) if action else -1
    return Step(
        **{"view": EMPTY, "text": "", "chunk": (number,), "carrying": None, **other},
        action=number,
        x=x,
        y=y,
        direction=direction,
        things=things,
    )


def episode(level: str, *steps: Step, success: bool = True, mission: str = "") -> Episode:
    return Episode(
        level=level, seed=1, mission=mission, steps=steps[:-1], end=steps[-1], success=success
    )


def put_next_episode() -> Episode:
    """It fetches the ball at (3, 1) and puts it at (5, 4), between key and box: beside both."""
    held = {"carrying": "red ball"}
    return episode(
        "PutNextLocal",
        step("left", 3, 2, 0, BALL, KEY),
        step("pickup", 3, 2, 3, BALL, KEY),
        step("right", 3, 2, 3, KEY, **held),
        step("right", 3, 2, 0, KEY, **held),
        step("forward", 3, 2, 1, KEY, **held),
        step("left", 3, 3, 1, KEY, **held),
        step("drop", 3, 3, 0, KEY, **held),
        step(None, 3, 3, 0, Thing("red", "ball", 4, 3), KEY),
    )

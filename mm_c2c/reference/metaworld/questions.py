"""Questions about what the policy does, with the truth of the simulator and of what it then did.

Directions are the robot's own: x to its right, y forward, z up.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_c2c.reference.metaworld.tasks import TASKS, Truth, read_truth
from mm_c2c.reference.scenes import Question

DIRECTIONS = (("right", "left"), ("forward", "back"), ("up", "down"))
GRIPPER = ("closing", "opening", "staying")
PROGRESS = ("just begun", "half way", "nearly done")
REASONS = ("nothing", "missed grasp", "wrong place")
KINDS = (
    "task",
    "object",
    "motion",
    "gripper",
    "touching",
    "progress",
    "success",
    "why",
    "narration",
)
# Steps of a look's future: what was executed of this chunk, and of the next one.
HORIZON = 8

_PLAIN_METRES = 0.01  # a shorter way is none
_CLEAR_SHARE = 0.8  # of the longest axis, above which no axis is the main one
_NEAR_METRES = 0.03
_MOVED_METRES = 0.03  # a thing that was moved by less stayed where it was
_GRIPPER_CHANGE = 0.08
_RELATIONS = (("right of", "left of"), ("beyond", "short of"), ("above", "below"))
_SHOWN = {
    "reach": "a red ball in the air and a dark red puck on a table",
    "push": "a dark red puck and a green ball on a table",
    "drawer-open": "a green drawer with a white handle on a table",
    "button-press": "a yellow box with a red button on a table",
    "door-open": "a dark cabinet with a door and a grey handle on a table",
    "window-close": "a brown window frame with a white handle on a table",
}
# Narrations have none.
OPTIONS = {
    "task": tuple(task.doing for task in TASKS.values()),
    "object": tuple(task.object for task in TASKS.values()),
    "motion": tuple(name for pair in DIRECTIONS for name in pair),
    "gripper": GRIPPER,
    "touching": ("yes", "no"),
    "progress": PROGRESS,
    "success": ("yes", "no"),
    "why": REASONS,
}
SENTENCE_PARTS = {
    "task": rf"\bis ({'|'.join(OPTIONS['task'])})",
    "motion": r"\bthe hand (hardly moves|moves \w+)",
    "gripper": rf"\bgripper is ({'|'.join(GRIPPER)})\b",
}
"""What a narration says, and where."""

_ASKED = {
    "task": ("What is the robot doing?", "Which task is the robot busy with?"),
    "object": ("Which object does the hand go for?", "What is the hand going for?"),
    "motion": (
        "Seen from the robot, which way will the hand move next?",
        "Where does the hand move next, seen from the robot?",
    ),
    "gripper": ("What will the gripper do next?", "Is the gripper closing, opening or staying?"),
    "touching": ("Does the hand touch anything?", "Is the hand in touch with something?"),
    "progress": ("How far along is the robot?", "How much of the task is done?"),
    "success": ("Will the robot succeed?", "Will this end in success?"),
    "why": ("What will go wrong?", "What goes wrong?"),
    "narration": ("Say what the robot does now.", "Narrate what the robot is doing."),
}


class Moment(NamedTuple):
    """A look of the policy, and what came of it.

    Attributes:
        task: whose scene it is.
        reason: why the episode fails, one of `REASONS`.
        truth: of the simulator, now.
        touching: whether the robot touches what stands on the table.
        moved: `(3,)` metres that the hand moves in the next `HORIZON` steps.
        gripper_change: of the opening in these steps.
        progress: share of the episode's steps that have passed, in [0, 1).
    """

    task: str
    reason: str
    truth: Truth
    touching: bool
    moved: NDArray[np.float64]
    gripper_change: float
    progress: float

    @property
    def done(self) -> bool:
        """Whether the episode ended in success of the scene's task."""
        return self.reason == REASONS[0]


def failure(task: str, raw: NDArray[np.float64], *, done: bool) -> str:
    """Why an episode fails, one of `REASONS`; `nothing` where it succeeds.

    `missed grasp`: what the hand was to move stayed where it was. `wrong place`: it was moved, but
    not to where it belongs; and so is the hand that reaches beside the ball.

    Args:
        task: whose scene it is.
        raw: `(steps, 39)` as `rollouts` keeps it.
        done: whether the task was done at the end.
    """
    if done:
        return REASONS[0]
    first, last = read_truth(task, raw[0]), read_truth(task, raw[-1])
    stayed = math.dist(first.object, last.object) < _MOVED_METRES
    return REASONS[1] if stayed and task != "reach" else REASONS[2]


def direction(moved: NDArray[np.float64]) -> str | None:
    """The main direction of a way `(3,)`; None where it is short, or of two directions alike."""
    order = np.argsort(-np.abs(moved))
    first, second = np.abs(moved)[order[:2]]
    if first < _PLAIN_METRES or second > _CLEAR_SHARE * first:
        return None
    return DIRECTIONS[order[0]][int(moved[order[0]] < 0)]


def gripper_motion(change: float) -> str:
    """One of `GRIPPER`, by the change of the opening (0 closed, 1 open)."""
    if abs(change) < _GRIPPER_CHANGE:
        return "staying"
    return "closing" if change < 0 else "opening"


def answers(moment: Moment) -> dict[str, str]:
    """The true answer of each kind that can be told of a moment.

    What the policy is doing is only sure where the scene's task ended in success.
    """
    task, way = TASKS[moment.task], direction(moment.moved)
    gripper = gripper_motion(moment.gripper_change)
    found = {
        "gripper": gripper,
        "touching": "yes" if moment.touching else "no",
        "success": "yes" if moment.done else "no",
        "why": moment.reason,
    }
    if way is not None:
        found["motion"] = way
    if moment.done:
        moves = "hardly moves" if way is None else f"moves {way}"
        found |= {
            "task": task.doing,
            "object": task.object,
            "progress": PROGRESS[min(2, int(3 * moment.progress))],
            "narration": f"The robot is {task.doing}; the hand {moves} and the gripper is {gripper}.",
        }
    return found


def questions(moment: Moment, rng: random.Random) -> list[Question]:
    """A question of each kind that can be told of a moment, each in one of two wordings."""
    found = answers(moment)
    return [
        Question(kind, rng.choice(_ASKED[kind]), found[kind]) for kind in KINDS if kind in found
    ]


def caption(moment: Moment) -> str:
    """What the camera shows: the apparatus, the gripper, and where it is to the object."""
    task, truth = TASKS[moment.task], moment.truth
    opening = "open" if truth.gripper > 0.75 else "half open" if truth.gripper > 0.5 else "closed"
    away = truth.hand - truth.object
    words = [
        names[int(offset < 0)]
        for offset, names in zip(away, _RELATIONS, strict=True)
        if abs(offset) > _NEAR_METRES
    ]
    where = f"{', '.join(words)} the {task.object}" if words else f"at the {task.object}"
    touch = "touches something" if moment.touching else "touches nothing"
    return (
        f"A robot hand and {_SHOWN[moment.task]}. The gripper is {opening}, "
        f"{math.dist(truth.hand, truth.object) * 100:.0f} cm from the {task.object}: {where}. "
        f"It {touch}."
    )

"""What happens in an episode, one dataclass a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_c2c.robot.observation import Observation


# Not compared field by field: arrays have no truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of the control loop.

    Attributes:
        index: from 0.
        observation: what the policy was shown, as `check_observation` gives it.
        action: what the environment was given then: an integer, or `(action_dim,)`.
        tokens: `(num_tokens,)`: the action tokens, where the policy decided here and writes them.
        reward: of this step.
        terminated: whether the episode came to its own end.
        truncated: whether it was cut short.
        frame: `(height, width, 3)` uint8, the scene from outside, for people; None without.
    """

    index: int
    observation: Observation
    action: Any
    tokens: NDArray[np.int64] | None
    reward: float
    terminated: bool
    truncated: bool
    frame: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Base of what a reader says.

    Attributes:
        step: what it is about; it may arrive some steps later.
        latency_ms: from the policy's decision to its arrival.
    """

    step: int
    latency_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Narration(Reading):
    """What the policy is about, in a sentence."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Answer(Reading):
    """The answer to a question."""

    question: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Monitor(Reading):
    """How likely success looks.

    Attributes:
        success: probability of "yes" against "no", in [0, 1].
        smoothed: that, smoothed over the steps that were read.
        alarm: whether it is below the threshold.
        reason: why, asked when the alarm goes off; else None.
    """

    success: float
    smoothed: float
    alarm: bool
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReaderFailure(Reading):
    """Why a reader could not read; the robot goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class EpisodeEnd:
    """How it ended.

    Attributes:
        steps: taken.
        success: what the environment says; see `run_episode`.
        reward: sum of all.
        read: snapshots that were read.
        dropped: snapshots that a newer one replaced before they were read.
    """

    steps: int
    success: bool
    reward: float
    read: int = 0
    dropped: int = 0


Event = Step | Reading | EpisodeEnd

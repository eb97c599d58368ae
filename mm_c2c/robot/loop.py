"""The control loop: environment, policy, and a reader beside them, as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_c2c.errors import ConfigError, ShapeError
from mm_c2c.robot.background import BackgroundReader, Snapshot
from mm_c2c.robot.events import EpisodeEnd, Event, Step
from mm_c2c.robot.observation import Observation, check_observation
from mm_c2c.robot.policy import Policy

if TYPE_CHECKING:
    import gymnasium


def run_episode(
    env: gymnasium.Env[Any, Any],
    policy: Policy,
    reader: BackgroundReader | None = None,
    *,
    observe: Callable[[Any], Observation] = dict,
    seed: int | None = None,
    max_steps: int | None = None,
    fps: float | None = None,
    linger_s: float = 10.0,
) -> Iterator[Event]:
    """Run one episode.

    Args:
        env: of Gymnasium; with `render_mode="rgb_array"` each step has a frame.
        policy: decides, and acts the same with a reader and without.
        reader: reads snapshots of what the policy saw and decided; it is begun, not closed.
        observe: the environment's observation to LeRobot's names, such as `rename({...})`.
        seed: of the environment.
        max_steps: cut the episode short; None leaves that to the environment.
        fps: at most so many steps a second; None runs as fast as it goes.
        linger_s: how long to wait, once the robot stands, for what is still being read, in s; a
            `ReaderFailure` where that was too short.

    Yields:
        After each step, the step and what has been read meanwhile; an `EpisodeEnd` at last. Its
        `success` is what the environment's info says (`is_success`, as in LeRobot, or `success`),
        else whether it came to its own end with a reward above 0.

    Raises:
        ConfigError: fps or max_steps is out of range.
        InputError, ShapeError: an observation that the policy cannot be shown.
        ShapeError: the policy decided on no action.
    """
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"max_steps must be at least 1, or None, got {max_steps}")
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps must be above 0, or None, got {fps}")
    episode = reader.begin() if reader else 0
    raw, info = env.reset(seed=seed)
    total, index, done = 0.0, 0, False
    pending: list[Any] = []
    past: list[Any] = []
    terminated = truncated = False
    while not done:
        started = time.monotonic()
        observation = check_observation(observe(raw), policy.spec)
        tokens = None
        if not pending:
            decision = policy.decide(observation, past)
            pending, tokens = list(decision.actions), decision.tokens
            if not pending:
                raise ShapeError(
                    f"step {index}: expected one action or more of the policy, got none"
                )
            if reader:
                reader.offer(
                    Snapshot(
                        episode=episode,
                        step=index,
                        observation=observation,
                        past=tuple(past),
                        tokens=tokens,
                        taken_s=time.monotonic(),
                    )
                )
        action = pending.pop(0)
        frame = env.render() if env.render_mode == "rgb_array" else None
        raw, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        done = terminated or truncated or index + 1 == max_steps
        if fps is not None:
            time.sleep(max(0.0, started + 1 / fps - time.monotonic()))
        yield Step(
            index=index,
            observation=observation,
            action=action,
            tokens=tokens,
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated or (done and not terminated)),
            frame=None if frame is None else np.asarray(frame, dtype=np.uint8),
        )
        if reader:
            yield from reader.poll()
        past.append(action)
        index += 1
    if reader:
        yield from reader.finish(linger_s)
    succeeded = info.get("is_success", info.get("success", terminated and total > 0))
    yield EpisodeEnd(
        steps=index,
        success=bool(succeeded),
        reward=total,
        read=reader.read if reader else 0,
        dropped=reader.dropped if reader else 0,
    )

"""What a policy is about, read from its cache by the target of a bridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError
from mm_c2c.perception import Perception
from mm_c2c.robot.background import Snapshot
from mm_c2c.robot.events import Answer, Narration, Reading
from mm_c2c.robot.monitor import FailureMonitor, MonitorConfig
from mm_c2c.robot.observation import Observation
from mm_c2c.robot.policy import SourcePolicy

NARRATE = "What is the robot doing?"
_TOKENS = 32


class CacheReader:
    """Reads snapshots of a policy through a bridge; a `Read` for `BackgroundReader`.

    Args:
        bridge: from the policy to the LLM that answers.
        policy: the bridge's source; in another process, a copy of the one that acts.
        narrate: the question whose answer is the narration; None narrates nothing.
        questions: asked of every snapshot.
        monitor: how failures are noticed; None looks for none.

    Raises:
        ConfigError: the bridge reads several sources.
    """

    def __init__(
        self,
        bridge: Bridge,
        policy: SourcePolicy,
        *,
        narrate: str | None = NARRATE,
        questions: Sequence[str] = (),
        monitor: MonitorConfig | None = None,
    ) -> None:
        names = {link.source for link in bridge.config.links}
        if len(names) != 1:
            raise ConfigError(
                f"a policy is read by a bridge with one source, this one has {sorted(names)}"
            )
        (self._source,) = names
        self.bridge = bridge
        self.policy = policy
        self.narrate = narrate
        self.questions = tuple(questions)
        self.monitor = monitor
        self._watch: FailureMonitor | None = None
        self._episode = 0

    def __call__(self, snapshot: Snapshot, questions: Sequence[str] = ()) -> list[Reading]:
        """Narrate, answer and watch, from one look."""
        seen = self.perceive(snapshot.observation, snapshot.past, snapshot.tokens)
        step = snapshot.step
        asked = [*self.questions, *questions]
        narrated = [] if self.narrate is None else [self.narrate]
        texts = self.answer(seen, [*narrated, *asked])
        said: list[Reading] = [Narration(step=step, text=text) for text in texts[: len(narrated)]]
        for question, text in zip(asked, texts[len(narrated) :], strict=True):
            said.append(Answer(step=step, question=question, text=text))
        if self.monitor is not None:
            if self._watch is None or snapshot.episode != self._episode:
                self._watch = FailureMonitor(self.bridge, self.monitor)
                self._episode = snapshot.episode
            said.append(self._watch.update(seen, step))
        return said

    @torch.no_grad()
    def perceive(
        self, observation: Observation, past: Sequence[Any], tokens: NDArray[np.int64] | None
    ) -> Perception:
        """The slots of what the policy saw and decided, as `Step` has them."""
        cache = self.policy.read(observation, past, tokens)
        return self.bridge.fuse_slots({self._source: cache})

    def answer(self, seen: Perception, questions: Sequence[str]) -> list[str]:
        """Answers to questions about one look; none to none."""
        if not questions:
            return []
        texts = self.bridge.generate(seen, questions, max_new_tokens=_TOKENS, do_sample=False)
        return [text.strip() for text in texts]

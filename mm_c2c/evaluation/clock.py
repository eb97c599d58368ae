"""Time to the first token of an answer and to its last, from raw inputs."""

from __future__ import annotations

import time
from typing import NamedTuple

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.evaluation.arms import Arm, Asked


class Answer(NamedTuple):
    """An answer and what it took.

    Attributes:
        answer: the text.
        ttft_ms: from raw inputs to the first token of the answer.
        total_ms: from raw inputs to the end.
        tokens: tokens of the answer, and of texts that were written on the way.
        relayed: the text that the target had to go by, if there was one.
    """

    answer: str
    ttft_ms: float
    total_ms: float
    tokens: int
    relayed: str | None = None


class Stopwatch(BaseStreamer):
    """Notes when the first token of an answer came; the prompt comes first and does not count."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        del value
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` at the end."""


def timed(arm: Arm, bridge: Bridge, asked: Asked, watch: Stopwatch | None = None) -> Answer:
    """Run one arm on one question by the clock.

    Args:
        arm: who answers.
        bridge: whose target's tokenizer counts the tokens.
        asked: the question.
        watch: one that also does something with the tokens; it must be new.
    """
    watch = watch or Stopwatch()
    started = time.perf_counter()
    reply = arm.answer([asked], watch)[0]
    ended = time.perf_counter()
    text = reply.answer if reply.relayed is None else f"{reply.relayed} {reply.answer}"
    return Answer(
        answer=reply.answer,
        ttft_ms=1000 * ((watch.first or ended) - started),
        total_ms=1000 * (ended - started),
        tokens=len(bridge.target.tokenizer(text, add_special_tokens=False)["input_ids"]),
        relayed=reply.relayed,
    )

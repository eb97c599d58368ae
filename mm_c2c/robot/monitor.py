"""Will it succeed? A policy's fused cache, asked at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError
from mm_c2c.perception import FusedInputs, Perception
from mm_c2c.robot.events import Monitor


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How a failure is noticed.

    Attributes:
        question: answered with yes or no.
        reason: what is asked when the alarm goes off.
        threshold: the alarm goes off below it, in [0, 1].
        smoothing: share of the newest probability in the smoothed one, in (0, 1]; 1 smooths not.
    """

    question: str = "Will it succeed?"
    reason: str = "Why will it fail?"
    threshold: float = 0.5
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1], got {self.threshold}")
        if not 0 < self.smoothing <= 1:
            raise ConfigError(f"smoothing must be in (0, 1], got {self.smoothing}")


class FailureMonitor:
    """Watches one episode; make a new one for the next.

    Args:
        bridge: answers; it is not changed.
        config: how.
    """

    def __init__(self, bridge: Bridge, config: MonitorConfig) -> None:
        self.bridge = bridge
        self.config = config
        self._smoothed: float | None = None
        self._alarm = False

    def update(self, seen: Perception, step: int) -> Monitor:
        """Look at one step; the reason is asked once, when the alarm goes off."""
        success = yes_probability(self.bridge, seen, self.config.question)
        share = self.config.smoothing
        before = success if self._smoothed is None else self._smoothed
        self._smoothed = share * success + (1 - share) * before
        alarm = self._smoothed < self.config.threshold
        reason = None
        if alarm and not self._alarm:
            asked = [self.config.reason]
            (reason,) = self.bridge.generate(seen, asked, max_new_tokens=16, do_sample=False)
            reason = reason.strip()
        self._alarm = alarm
        return Monitor(
            step=step, success=success, smoothed=self._smoothed, alarm=alarm, reason=reason
        )


@torch.no_grad()
def yes_probability(bridge: Bridge, seen: Perception, question: str) -> float:
    """Probability of "yes" against "no" as the answer's first token, in [0, 1].

    Args:
        bridge: it is not changed.
        seen: of one row.
        question: what is asked.

    Raises:
        ConfigError: the target's tokenizer begins both words alike.
    """
    return float(torch.sigmoid(-no_over_yes(bridge, bridge.fuse(seen, [question]))))


def no_over_yes(bridge: Bridge, inputs: FusedInputs) -> Tensor:
    """`(batch,)`: log P(no) - log P(yes) of the answer's first token, capital letters or not.

    Args:
        bridge: whose target says it.
        inputs: a prompt, with a cache of its first tokens.

    Raises:
        ConfigError: the target's tokenizer begins both words alike.
    """
    no, yes = (_first_tokens(bridge, word) for word in ("no", "yes"))
    if no == yes:
        raise ConfigError("the target's tokenizer begins `yes` and `no` with the same token")
    logits = bridge.target.next_logits(inputs).float()
    return (logits[:, no].logsumexp(1) - logits[:, yes].logsumexp(1)).cpu()


def _first_tokens(bridge: Bridge, word: str) -> list[int]:
    tokenizer = bridge.target.tokenizer
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    ids = tokenizer(list(forms), add_special_tokens=False)["input_ids"]
    return sorted({row[0] for row in ids if row})

"""Optimiser steps that are logged and saved as they go, and go on where they were stopped."""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_c2c.errors import ConfigError
from mm_c2c.training.log import append_log, cut_log

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long to train, and where what comes of it goes.

    Attributes:
        out: folder of `last.pt`, which a training that is started again goes on from, and of
            `log.csv`.
        steps: optimiser steps.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of the random numbers that `loss` draws from.
    """

    out: Path
    steps: int
    save_every: int
    log_every: int
    seed: int

    def run(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rate: Callable[[int], float],
        loss: Callable[[int, random.Random], Tensor],
        save: Callable[[], None],
    ) -> None:
        """Train, or go on with, what of a module asks for gradients.

        Args:
            module: holds what is trained; the rest of it is neither moved nor kept.
            optimizers: of what is trained; gradients are clipped to norm 1 over all of it.
            rate: factor of the learning rates at a step.
            loss: of a step; draws all that is random from the generator it is given.
            save: called after each checkpoint, to write the result so far in its own form.
        """
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        logger.info("%d trained parameters", sum(p.numel() for p in trained.values()))
        schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in optimizers]
        stepped: list[Any] = [*optimizers, *schedules]
        rng = random.Random(self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint, log = self.out / "last.pt", self.out / "log.csv"
        first = _restore(checkpoint, trained, stepped, rng) if checkpoint.exists() else 0
        if first:
            cut_log(log, first)
            logger.info("resumed at step %d", first)
        started = time.monotonic()
        losses: list[float] = []
        for step in range(first, self.steps):
            found = loss(step, rng)
            module.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            for part in stepped:
                part.step()
            losses.append(found.item())
            done = step + 1
            if done % self.log_every == 0:
                seconds = round(time.monotonic() - started)
                append_log(log, {"step": done, "seconds": seconds, "loss": statistics.mean(losses)})
                losses.clear()
            if done % self.save_every == 0 or done == self.steps:
                state = {
                    "weights": {name: p.detach() for name, p in trained.items()},
                    "optimizers": [part.state_dict() for part in stepped],
                    "rng": rng.getstate(),
                    "step": done,
                }
                scratch = checkpoint.with_suffix(".part")
                torch.save(state, scratch)
                scratch.replace(checkpoint)
                save()


def cosine_rate(step: int, warmup: int, length: int) -> float:
    """Up from 0 in a warm-up, then down to 0 along a cosine; `step` counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, length - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _restore(
    checkpoint: Path, trained: dict[str, nn.Parameter], stepped: list[Any], rng: random.Random
) -> int:
    """Put everything back as it was saved; returns the steps done."""
    saved = torch.load(checkpoint, weights_only=True)
    if saved["weights"].keys() != trained.keys():
        raise ConfigError(
            f"{checkpoint} holds a training of other parts than this one; give another `out`, or "
            "delete it to start anew"
        )
    with torch.no_grad():
        for name, weight in saved["weights"].items():
            trained[name].copy_(weight)
    for part, state in zip(stepped, saved["optimizers"], strict=True):
        part.load_state_dict(state)
    rng.setstate(saved["rng"])
    return int(saved["step"])

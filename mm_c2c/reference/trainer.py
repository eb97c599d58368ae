"""What the trainers of this folder have alike: settings, loop, command line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from mm_c2c.config import from_command_line
from mm_c2c.errors import ConfigError, run_main
from mm_c2c.training.loop import Loop, cosine_rate

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings that each trainer has, beside its own.

    Attributes:
        out: where checkpoints, the log and the result go.
        steps: optimiser steps.
        learning_rate: on AdamW's scale, after the warm-up; falls to zero along a cosine.
        warmup: steps of the warm-up.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of weights and of all that is drawn.
    """

    out: Path
    steps: int
    learning_rate: float
    warmup: int
    save_every: int
    log_every: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps <= self.warmup:
            raise ConfigError(f"steps ({self.steps}) must exceed warmup ({self.warmup})")

    @property
    def all_steps(self) -> int:
        """Of all phases."""
        return self.steps

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        return cosine_rate(step, self.warmup, self.steps)

    def loop(self, accelerator: Accelerator | None = None) -> Loop:
        """The loop of such a training.

        Args:
            accelerator: what carries it; None is one process on the CPU.
        """
        return Loop(
            out=self.out,
            steps=self.all_steps,
            save_every=self.save_every,
            log_every=self.log_every,
            seed=self.seed,
            accelerator=accelerator or Accelerator(cpu=True),
        )


def run(kind: type[C], action: Callable[[C], None]) -> None:
    """`CONFIG [key=value ...]`: do something by the config that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = from_command_line(kind, file=True)
    run_main(lambda: action(config))

"""The loop of all trainings: steps that are logged and saved, and go on where they were stopped.

`accelerate` carries it: one process or many, accumulation, mixed precision, clipping, trackers.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_tensorboard_available, is_wandb_available
from torch import Tensor, nn
from tqdm import tqdm

from mm_c2c.config import PRECISIONS
from mm_c2c.errors import ConfigError, TrainingError, UnsupportedError
from mm_c2c.training.checkpoints import SHARDED, Checkpoints

logger = logging.getLogger(__name__)

ON_NAN = ("stop", "skip")
TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
# Steps in succession whose gradients are no numbers, after which `skip` gives up.
_MOST_SKIPPED = 100


def build_accelerator(
    out: Path, *, precision: str = "fp32", tracking: Sequence[str] = (), cpu: bool = False
) -> Accelerator:
    """What carries a training; `accelerate launch` says on how many processes.

    Args:
        out: folder for what trackers write.
        precision: `fp32`, or `bf16` for bfloat16 products over float32 weights.
        tracking: some of `TRACKERS`.
        cpu: stay on the CPU whatever the machine has.

    Raises:
        UnsupportedError: a tracker's package is not installed.
    """
    for name in tracking:
        if not TRACKERS[name]():
            raise UnsupportedError(f"tracking with {name} needs its package: pip install {name}")
    return Accelerator(
        mixed_precision=PRECISIONS[precision],
        log_with=list(tracking) or None,
        project_dir=out,
        cpu=cpu,
    )


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long to train, and where what comes of it goes.

    Attributes:
        out: folder of `last.pt`, which a training that is started again goes on from, and of
            `log.csv`. Where weights are sharded (FSDP, DeepSpeed), folders `step-N` take the
            place of `last.pt`.
        steps: optimiser steps.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of the random numbers that `loss` draws, from the generator it is given and from
            torch's.
        accumulation: pieces of a step, one after the other; their losses are averaged.
        clip: norm to which gradients are clipped.
        on_nan: what to do where gradients are no finite numbers: `stop`, or `skip` the step, up
            to 100 in succession.
        accelerator: what carries the training.
        settings: what trackers are told of it.
    """

    out: Path
    steps: int
    save_every: int
    log_every: int
    seed: int
    accumulation: int = 1
    clip: float = 1.0
    on_nan: str = "stop"
    accelerator: Accelerator
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rate: Callable[[int], float],
        loss: Callable[[int, random.Random], Tensor],
        save: Callable[[Mapping[str, Tensor]], None],
        gauges: Callable[[float], Mapping[str, float]] = lambda seconds: {},
    ) -> None:
        """Train, or go on with, what of a module asks for gradients.

        Args:
            module: holds what is trained; the rest of it is neither moved nor kept.
            optimizers: of what is trained; gradients are clipped over all of it.
            rate: factor of the learning rates at a step.
            loss: of a piece, by its number: step times `accumulation`, plus its place in the step.
                Draws what is random from the generator it is given, from torch's, which is seeded
                anew before each piece, or from the number alone.
            save: called by one process after each checkpoint with the module's weights, to write
                the result so far in its own form; and where no step is left to do, since a
                training may have been stopped in between.
            gauges: further columns of the log, given the seconds since the last row.

        Raises:
            ConfigError: more steps were done in the folder already, or by another training.
            TrainingError: gradients that are not finite and `on_nan` is `stop`, or a checkpoint,
                a log or a result that could not be read or written; the last checkpoint is whole.
        """
        accelerator = self.accelerator
        accelerator.gradient_accumulation_steps = self.accumulation
        self._check_strategy(optimizers)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        count = sum(p.numel() for p in trained.values())
        logger.info("%d trained parameters on %d processes", count, accelerator.num_processes)
        rates = [[group["lr"] for group in part.param_groups] for part in optimizers]
        wanted = [[_settings(group) for group in part.param_groups] for part in optimizers]
        stepper, *stepped = accelerator.prepare(_Piece(module, loss), *optimizers)
        keeper = Checkpoints(self.out, accelerator, stepper, stepped, trained)
        rng = random.Random(self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        log = self.out / "log.csv"
        first = keeper.restore(rng)
        for part, groups in zip(optimizers, wanted, strict=True):
            for group, settings in zip(part.param_groups, groups, strict=True):
                group.update(settings)  # a checkpoint brings those that it was written with
        if first > self.steps:
            raise ConfigError(
                f"{self.out}: expected a training of at most {self.steps} steps to go on with, but "
                f"{first} are done there; ask for as many or more, or train in another folder"
            )
        if accelerator.is_main_process:
            # Also without a checkpoint: one that was killed before its first has logged steps.
            keeper.cut_log(log, first)
            if first:
                logger.info("resumed at step %d", first)
        if first == self.steps:
            logger.warning("%s: all %d steps are done, nothing is left to train", self.out, first)
            keeper.write_result(save)
        if accelerator.log_with:
            accelerator.init_trackers("mm-c2c", dict(self.settings))
        bar = tqdm(
            total=self.steps,
            initial=first,
            desc=self.out.name,
            disable=not accelerator.is_local_main_process,
        )
        with bar:
            started = logged = time.monotonic()
            losses: list[Tensor] = []
            skipped = 0
            for step in range(first, self.steps):
                for part, bases in zip(optimizers, rates, strict=True):
                    for group, base in zip(part.param_groups, bases, strict=True):
                        group["lr"] = base * rate(step)
                found: list[Tensor] = []
                for piece in range(self.accumulation):
                    number = step * self.accumulation + piece
                    self._seed_torch(number)
                    with accelerator.accumulate(stepper):
                        cost = stepper(number, rng)
                        accelerator.backward(cost)
                        found.append(cost.detach().float())
                total = torch.stack(found).mean()
                # After the reduction over processes, so that all of them see the same.
                norm = accelerator.clip_grad_norm_(stepper.parameters(), self.clip)
                # A number from DeepSpeed; a tensor, maybe sharded, from the others.
                if torch.isfinite(torch.as_tensor(total if norm is None else norm)):
                    for part in stepped:
                        part.step()
                    losses.append(total)
                    skipped = 0
                else:
                    skipped += 1
                    self._meet_nan(step, skipped, keeper)
                for part in stepped:
                    part.zero_grad()
                done = step + 1
                bar.update()
                if done % self.log_every == 0 or done == self.steps:
                    mean = _mean(accelerator, losses)
                    losses.clear()
                    now = time.monotonic()
                    row = {"step": done, "seconds": round(now - started), "loss": mean}
                    row |= gauges(now - logged)
                    logged = now
                    if accelerator.is_main_process:
                        keeper.log(log, row)
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
                    shown = {k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "seconds")}
                    bar.set_postfix(
                        {**shown, "memory": f"{memory_bytes(accelerator) / 1e9:.2f} GB"}
                    )
                if done % self.save_every == 0 or done == self.steps:
                    keeper.save(done, rng, save)
        accelerator.end_training()

    def _check_strategy(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """What sharded weights cannot do."""
        kind = self.accelerator.distributed_type
        if kind in SHARDED and len(optimizers) > 1:
            raise UnsupportedError(
                f"{kind.value} shards weights, and Muon wants whole matrices: set optimizer.name "
                "to adamw"
            )
        if kind == DistributedType.DEEPSPEED:
            if self.on_nan == "skip":
                raise UnsupportedError(
                    "DeepSpeed steps before anyone can look at the gradients: set on_nan to stop"
                )
            # It wants a number; batches are cut before it sees them.
            plugin: Any = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
            # It clips by itself, and takes 0 for not at all.
            clip = self.clip if math.isfinite(self.clip) else 0.0
            plugin.deepspeed_config["gradient_clipping"] = clip

    def _seed_torch(self, number: int) -> None:
        """So that dropout draws the same whether or not the training was stopped before."""
        drawn = random.Random(f"{self.seed}/{number}/{self.accelerator.process_index}")
        torch.manual_seed(drawn.getrandbits(63))

    def _meet_nan(self, step: int, skipped: int, keeper: Checkpoints) -> None:
        words = f"step {step + 1}: loss or gradients are not finite numbers"
        if self.on_nan == "stop":
            raise TrainingError(
                f"{words}. {keeper.standing}, with a lower learning rate, or with on_nan=skip to "
                "leave such steps out"
            )
        if skipped == _MOST_SKIPPED:
            raise TrainingError(
                f"{words}, nor are those of the {skipped - 1} steps before. {keeper.standing}, "
                "with a lower learning rate"
            )
        logger.warning("%s; it is left out", words)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer was told about a group of parameters."""
    return {name: value for name, value in group.items() if name != "params"}


class _Piece(nn.Module):
    """The forward of one piece, in the form in which gradients can be shared among processes."""

    def __init__(self, module: nn.Module, loss: Callable[[int, random.Random], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, number: int, rng: random.Random) -> Tensor:
        return self.loss(number, rng)


def memory_bytes(accelerator: Accelerator) -> int:
    """The most that was used of an accelerator's memory; without one, what this process holds."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def cosine_rate(step: int, warmup: int, length: int) -> float:
    """Up from 0 in a warm-up, then down to 0 along a cosine; `step` counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, length - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _mean(accelerator: Accelerator, losses: Sequence[Tensor]) -> float:
    """Over steps and processes; NaN where every step was left out."""
    if not losses:
        return math.nan
    mean: Any = accelerator.reduce(torch.stack(list(losses)).mean(), "mean")
    return float(mean)

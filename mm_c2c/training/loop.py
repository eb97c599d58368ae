"""The loop of all trainings: steps that are logged and saved, and go on where they were stopped.

`accelerate` carries it: one process or many, accumulation, mixed precision, clipping, trackers.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_tensorboard_available, is_wandb_available
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from mm_c2c.config import PRECISIONS
from mm_c2c.errors import ConfigError, TrainingError, UnsupportedError
from mm_c2c.training.log import append_log, cut_log

logger = logging.getLogger(__name__)

ON_NAN = ("stop", "skip")
TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


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
        on_nan: what to do where gradients are no finite numbers: `stop`, or `skip` the step.
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
            TrainingError: gradients that are not finite and `on_nan` is `stop`, or a checkpoint
                or a result that could not be written; the last checkpoint is whole.
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
        keeper = _Checkpoints(self.out, accelerator, stepper, stepped, trained)
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
            cut_log(log, first)
            if first:
                logger.info("resumed at step %d", first)
        if first == self.steps:
            keeper.write_result(save)
        if accelerator.log_with:
            accelerator.init_trackers("mm-c2c", dict(self.settings))
        bar = tqdm(
            total=self.steps,
            initial=first,
            desc=self.out.name,
            disable=not accelerator.is_local_main_process,
        )
        started = logged = time.monotonic()
        losses: list[Tensor] = []
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
            else:
                self._meet_nan(step, keeper.saved)
            for part in stepped:
                part.zero_grad()
            done = step + 1
            bar.update()
            if done % self.log_every == 0:
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
                bar.set_postfix({**shown, "memory": f"{memory_bytes(accelerator) / 1e9:.2f} GB"})
            if done % self.save_every == 0 or done == self.steps:
                keeper.save(done, rng, save)
        bar.close()
        accelerator.end_training()

    def _check_strategy(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """What sharded weights cannot do."""
        kind = self.accelerator.distributed_type
        if kind in _SHARDED and len(optimizers) > 1:
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

    def _meet_nan(self, step: int, saved: int) -> None:
        words = f"step {step + 1}: loss or gradients are not finite numbers"
        if self.on_nan == "stop":
            raise TrainingError(
                f"{words}; the last good checkpoint is of step {saved}. Start again to go on from "
                "there, with a lower learning rate, or with on_nan=skip to leave such steps out"
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


class _Checkpoints:
    """What a stopped training goes on from; written whole or not at all."""

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        stepper: nn.Module,
        stepped: Sequence[Any],
        trained: Mapping[str, nn.Parameter],
    ) -> None:
        self.out, self.accelerator, self.stepper = out, accelerator, stepper
        self.stepped, self.trained = stepped, trained
        self.sharded = accelerator.distributed_type in _SHARDED
        self.saved = 0

    def restore(self, rng: random.Random) -> int:
        """Put everything back as it was saved; returns the steps done."""
        if self.sharded:
            folders = sorted(self.out.glob("step-*[0-9]"))
            if folders:
                self.accelerator.load_state(str(folders[-1]))
                self.saved = int(folders[-1].name.removeprefix("step-"))
            return self.saved
        checkpoint = self.out / "last.pt"
        if not checkpoint.exists():
            return 0
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        self._check(saved)
        with torch.no_grad():
            for name, weight in saved["weights"].items():
                self.trained[name].copy_(weight)
        for part, state in zip(self.stepped, saved["optimizers"], strict=True):
            part.load_state_dict(state)
        rng.setstate(saved["rng"])
        self.saved = int(saved["step"])
        return self.saved

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Refuse what another training has left."""
        ours = _parts(self.trained, [part.state_dict() for part in self.stepped])
        came = _parts(saved["weights"], saved["optimizers"])
        for name in ours | came:
            expected, got = ours.get(name, "none"), came.get(name, "none")
            if expected != got:
                raise ConfigError(
                    f"{self.out / 'last.pt'} holds a training of other parts than this one: "
                    f"{name}: expected {expected}, got {got}; go on with the settings that it "
                    "began with, give another `out`, or delete it to start anew"
                )

    def save(
        self, step: int, rng: random.Random, save: Callable[[Mapping[str, Tensor]], None]
    ) -> None:
        """Write a checkpoint, then the result so far."""
        try:
            if self.sharded:
                self._write_shards(step)
            elif self.accelerator.is_main_process:
                self._write(step, rng)
        # torch and safetensors report a full disk in errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            with suppress(OSError):
                (self.out / "last.part").unlink(missing_ok=True)
            free = shutil.disk_usage(self.out).free / 1e9
            raise TrainingError(
                f"step {step}: the checkpoint could not be written to {self.out} ({error}); "
                f"{free:.2f} GB are free there. The last good one, of step {self.saved}, is whole: "
                "make room and start again to go on from it"
            ) from error
        self.saved = step
        self.write_result(save)

    def log(self, path: Path, row: Mapping[str, float]) -> None:
        """Add a row to the log."""
        try:
            append_log(path, row)
        except OSError as error:
            raise TrainingError(
                f"the log {path} could not be written ({error}). The last good checkpoint, of step "
                f"{self.saved}, is whole: make room and start again to go on from it"
            ) from error

    def write_result(self, save: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Hand the weights to one process's `save`."""
        weights = self._weights()
        if self.accelerator.is_main_process:
            try:
                save(weights)
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"step {self.saved}: the result could not be written ({error}). The "
                    f"checkpoint of this step, in {self.out}, is whole: start again to go on "
                    "from it"
                ) from error
        self.accelerator.wait_for_everyone()

    def _weights(self) -> Mapping[str, Tensor]:
        """Of what is trained, whole."""
        if not self.sharded:
            return {name: p.detach() for name, p in self.trained.items()}
        state = self.accelerator.get_state_dict(self.stepper)
        return {name.removeprefix("module."): weight for name, weight in state.items()}

    def _write(self, step: int, rng: random.Random) -> None:
        state = {
            "weights": self._weights(),
            "optimizers": [part.state_dict() for part in self.stepped],
            "rng": rng.getstate(),
            "step": step,
        }
        scratch = self.out / "last.part"
        torch.save(state, scratch)
        scratch.replace(self.out / "last.pt")

    def _write_shards(self, step: int) -> None:
        """Every process writes its part."""
        scratch = self.out / "step.part"
        self.accelerator.save_state(str(scratch))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scratch.rename(self.out / f"step-{step:08d}")
            for old in sorted(self.out.glob("step-*[0-9]"))[:-1]:
                shutil.rmtree(old)


def _parts(
    weights: Mapping[str, Tensor], optimizers: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What a checkpoint and the training that goes on from it must have alike, in words."""
    parts = {f"weight {name}": f"shape {tuple(weight.shape)}" for name, weight in weights.items()}
    for index, state in enumerate(optimizers, 1):
        groups = []
        for group in state["param_groups"]:
            # Flags are left out: they come and go with torch's releases.
            settings = sorted(k for k, v in group.items() if not isinstance(v, bool | list | None))
            groups.append(f"{len(group['params'])} weights with {', '.join(settings)}")
        parts[f"optimizer {index}"] = " and ".join(groups)
    return parts


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

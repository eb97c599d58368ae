"""Checkpoints of a training, and its log, which is cut to what the last one knows."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn

from mm_c2c.errors import ConfigError, TrainingError
from mm_c2c.training.log import append_log, cut_log

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def has_checkpoint(out: Path) -> bool:
    """Whether a training left something to go on from."""
    return (out / "last.pt").exists() or any(out.glob("step-*[0-9]"))


class Checkpoints:
    """What a stopped training goes on from; written whole or not at all.

    Args:
        out: folder of `last.pt`, or of folders `step-N` where weights are sharded.
        accelerator: what carries the training.
        stepper: what it has wrapped.
        stepped: the optimizers, as it has wrapped them.
        trained: the weights, by name.

    Attributes:
        saved: steps of the last good checkpoint; 0 where there is none.
    """

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
        self.sharded = accelerator.distributed_type in SHARDED
        self.saved = 0

    @property
    def standing(self) -> str:
        """What is left of the training, and how to go on with it."""
        if not self.saved:
            return "No checkpoint was written yet: start again from the beginning"
        return f"The last good checkpoint, of step {self.saved}, is whole: start again from there"

    def restore(self, rng: random.Random) -> int:
        """Put everything back as it was saved; returns the steps done.

        Raises:
            ConfigError: another training has left a checkpoint here, or one that was carried
                otherwise.
            TrainingError: the checkpoint cannot be read.
        """
        folders = sorted(self.out.glob("step-*[0-9]"))
        checkpoint = self.out / "last.pt"
        if checkpoint.exists() if self.sharded else folders:
            found = checkpoint.name if self.sharded else folders[-1].name
            raise ConfigError(
                f"{self.out} holds {found}, a checkpoint of a training whose weights were "
                f"{'whole' if self.sharded else 'sharded'}, and in this one they are "
                f"{'sharded' if self.sharded else 'whole'}: go on as it began, give another "
                "`out`, or delete it to start anew"
            )
        if self.sharded:
            if folders:
                self.accelerator.load_state(str(folders[-1]))
                self.saved = int(folders[-1].name.removeprefix("step-"))
            return self.saved
        if not checkpoint.exists():
            return 0
        try:
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        # torch reports what it stumbles over in errors of several kinds.
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise TrainingError(
                f"{checkpoint} cannot be read ({error}): put a whole one in its place, or delete "
                "it to start anew"
            ) from error
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
                f"{free:.2f} GB are free there. Make room. {self.standing}"
            ) from error
        self.saved = step
        self.write_result(save)

    def log(self, path: Path, row: Mapping[str, float]) -> None:
        """Add a row to the log."""
        try:
            append_log(path, row)
        except OSError as error:
            raise TrainingError(
                f"the log {path} could not be written ({error}). Make room. {self.standing}"
            ) from error

    def cut_log(self, path: Path, last_step: int) -> None:
        """Drop the rows of a log after a step."""
        try:
            cut_log(path, last_step)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"the log {path} could not be cut to {last_step} steps ({error}): make room, or "
                "move it away if it is damaged, and start again"
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
        with scratch.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name without the content
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

"""What `ablate` trains: one training of any of the trainers, and how what comes of it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mm_c2c.bridge import Bridge
from mm_c2c.config import DTYPES, from_dict
from mm_c2c.evaluation.arms import FILES
from mm_c2c.reference import train_baseline, train_fuser
from mm_c2c.reference.models import SOURCE_NAME, load_source, load_target
from mm_c2c.reference.train_baseline import BaselineTrainingConfig
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.training import models
from mm_c2c.training import run as training_run
from mm_c2c.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One training.

    Attributes:
        training: its settings.
        steps: those that learn from answers.
        scenes: pictures a step.
        train: goes on up to so many of these steps.
        load: the bridge whose models its arms ask.
        arms: of `mm-c2c evaluate`: what was trained, and its controls.
        files: settings of the evaluation: where the arm's own files are.
        pauses: it can be judged on its way.
    """

    training: Any
    steps: int
    scenes: int
    train: Callable[[int], None]
    load: Callable[[], Bridge]
    arms: tuple[str, ...] = ("fused", "zeroed")
    files: Mapping[str, Any]
    pauses: bool = False

    @property
    def out(self) -> Path:
        """Where the training lies."""
        return Path(self.training.out)


def build_variant(settings: Mapping[str, Any]) -> Variant:
    """A variant by its settings: `links` are for `mm-c2c train`, `kind` is for `train_baseline`.

    Raises:
        ConfigError: a setting that its trainer does not know or refuses.
    """
    if "links" in settings:
        return _general(from_dict(TrainingConfig, settings))
    if "kind" in settings:
        return _baseline(from_dict(BaselineTrainingConfig, settings))
    return _fuser(from_dict(FuserTrainingConfig, settings))


def _fuser(config: FuserTrainingConfig) -> Variant:
    return Variant(
        training=config,
        steps=config.steps,
        scenes=config.scenes,
        train=lambda steps: train_fuser.train(config, config.reconstruct_steps + steps),
        load=partial(_load_reference, config.out / "bridge", config.dtype, config.source),
        files={},
        pauses=True,
    )


def _general(config: TrainingConfig) -> Variant:
    def load() -> Bridge:
        sources: dict[str, Any]
        sources = {name: models.load_source(model) for name, model in config.sources.items()}
        target = models.load_target(config.target)
        return Bridge.from_pretrained(config.out / "bridge", target, sources)

    return Variant(
        training=config,
        steps=config.phases.generate.steps,
        scenes=config.batch_size,
        train=lambda steps: training_run.train(config, config.phases.reconstruct.steps + steps),
        load=load,
        files={},
        pauses=True,
    )


def _baseline(config: BaselineTrainingConfig) -> Variant:
    return Variant(
        training=config,
        steps=config.steps,
        scenes=config.scenes,
        train=lambda steps: train_baseline.train(config),
        load=partial(_load_reference, config.bridge, config.dtype, config.source),
        arms=(config.kind,),
        files={FILES[config.kind]: config.out / config.kind},
    )


def _load_reference(folder: Path, dtype: str, source: Path) -> Bridge:
    target = load_target(dtype=DTYPES[dtype])
    return Bridge.from_pretrained(folder, target, {SOURCE_NAME: load_source(source)})

"""Settings of `mm-c2c train`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_c2c.cache import CacheShape
from mm_c2c.config import (
    DTYPES,
    PRECISIONS,
    WIDE_DTYPES,
    check_at_least_one,
    check_one_of,
    from_dict,
)
from mm_c2c.errors import ConfigError
from mm_c2c.link import LinkConfig
from mm_c2c.training.loop import ON_NAN, TRACKERS
from mm_c2c.training.optimizers import OPTIMIZERS, build_optimizers

FORMATS = ("jsonl", "webdataset", "datasets")
ON_CORRUPT = ("stop", "skip")
MATCHES = ("cache", "attention")
# What an example may say; `mm_c2c.training.data` says what it means.
FIELDS = (
    "image",
    "images",
    "video",
    "fps",
    "audio",
    "text",
    "state",
    "action_tokens",
    "question",
    "answer",
    "turns",
    "caption",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A frozen model.

    Attributes:
        model: Hub id or folder.
        revision: the Hub's commit.
        dtype: of its weights.
    """

    model: str
    revision: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Examples; `mm_c2c.training.data` says what one looks like.

    Attributes:
        path: a JSONL file, or a pattern of several (`part*/items.jsonl`), each with its pictures
            beside it; a shard or a pattern of shards (`shards/*.tar`, `shards/{000..012}.tar`); or
            what `datasets.load_dataset` takes.
        format: `jsonl`, `webdataset` (tar shards on disk) or `datasets`; what is said of a data set
            below is for the last alone.
        name: of a configuration of a data set, where it has several.
        split: of a data set.
        streaming: read a data set as it comes, without keeping it on disk.
        columns: our names to a data set's own, such as `{answer: multiple_choice_answer}`.
        questions: at most so many of a picture's questions are asked at once, chosen anew each
            time; they share what the source saw.
        window: examples of a stream that are shuffled among each other.
        on_corrupt: what to do about a line, a picture or a shard that cannot be read: `stop`, or
            `skip` it, with a warning; the example after it takes its place.
    """

    path: str
    format: str = "jsonl"
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    questions: int = 4
    window: int = 1024
    on_corrupt: str = "stop"

    def __post_init__(self) -> None:
        check_one_of("data.format", self.format, FORMATS)
        check_one_of("data.on_corrupt", self.on_corrupt, ON_CORRUPT)
        check_at_least_one(self, "questions", "window", where="data.")
        given = {
            "name": self.name is not None,
            "split": self.split != "train",
            "streaming": self.streaming,
            "columns": bool(self.columns),
        }
        if self.format != "datasets" and (idle := [f"data.{k}" for k, v in given.items() if v]):
            raise ConfigError(
                f"expected {', '.join(idle)} with data.format datasets alone, got {self.format}; "
                "leave it out, or set data.format=datasets"
            )
        for name in self.columns:
            check_one_of("a name of data.columns, which is ours,", name, FIELDS)


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """First phase: the target reads the question as it does after a true description.

    It reads `description, question, answer`, and over the slots `question, answer`; the squared
    distance between both readings of the question and the answer is what is learned from.

    Attributes:
        steps: optimiser steps; 0 leaves the phase out.
        warmup: steps of its warm-up.
        match: what of a reading: the `cache` that it leaves, or what `attention` returns in each
            layer. Words that are aligned stand in the cache before the target reads on, and are
            matched as `cache` only.
    """

    steps: int = 0
    warmup: int = 20
    match: str = "cache"

    def __post_init__(self) -> None:
        check_one_of("phases.reconstruct.match", self.match, MATCHES)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Second phase: cross-entropy of the answers.

    Attributes:
        steps: optimiser steps.
        warmup: steps of its warm-up.
        distill: share of the questions whose answer is the source's own in place of the true one
            (sequence-level distillation, Kim & Rush, arXiv:1606.07947: it needs no common
            vocabulary). Takes one link.
        temperature: of the distribution that these answers are drawn from, anew in each step; at 1
            it is the source's own, so that the fuser learns it whole, and at 0 the source writes
            greedily.
        answer_tokens: at most so many are written for that.
    """

    steps: int = 1000
    warmup: int = 20
    distill: float = 0.0
    temperature: float = 0.0
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        _share("phases.generate.distill", self.distill)
        check_at_least_one(self, "answer_tokens", where="phases.generate.")
        _zero_or_more("phases.generate.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    """The two phases, one after the other; the learning rate starts anew in each."""

    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        for phase in (self.reconstruct, self.generate):
            if min(phase.steps, phase.warmup) < 0:
                raise ConfigError(
                    f"steps and warmup of a phase must be 0 or more, got {phase.steps} and "
                    f"{phase.warmup}"
                )
            if phase.steps and phase.steps <= phase.warmup:
                raise ConfigError(f"steps ({phase.steps}) must exceed warmup ({phase.warmup})")
        if not self.steps:
            raise ConfigError("expected steps in at least one phase, got none")

    @property
    def steps(self) -> int:
        """Of both."""
        return self.reconstruct.steps + self.generate.steps


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Shares of what is left out at random, so that a fuser stays usable where it is missing.

    Attributes:
        sources: share of rows in which a source's cache is emptied, drawn for each source; the only
            one of these that aligned links know.
        slots: share of slots that stay as the target has them.
        links: share of rows in which all slots of a link stay so, drawn for each link: what is left
            out when a reader is asked with one of its links only.
        named: shares of single links, by the name that a bridge gives them, in place of `links`.
        questions: share of rows in which the sources of slots look without reading the question;
            1 is question-blind: look once, ask any number of questions.
    """

    sources: float = 0.1
    slots: float = 0.0
    links: float = 0.0
    named: dict[str, float] = field(default_factory=dict)
    questions: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sources", "slots", "links", "questions"):
            _share(f"drop.{name}", getattr(self, name))
        for name, share in self.named.items():
            _share(f"drop.named.{name}", share)

    def share_of(self, link: str) -> float:
        """Of rows in which this link is left out."""
        return self.named.get(link, self.links)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the fuser's weights move.

    Attributes:
        name: `muon` for the weights with AdamW for biases and gates, or `adamw` for all.
        learning_rate: after the warm-up; falls to zero along a cosine in each phase.
        weight_decay: AdamW's.
        clip: norm to which gradients are clipped; `.inf` leaves them as they are.
        dtype: of Muon's own products; `bfloat16` is as published, and faster where hardware has it.
    """

    name: str = "muon"
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_one_of("optimizer.name", self.name, OPTIMIZERS)
        check_one_of("optimizer.dtype", self.dtype, WIDE_DTYPES)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name} must exceed 0, got {getattr(self, name)}")
        _zero_or_more("optimizer.weight_decay", self.weight_decay)

    def build(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        """What moves the weights of a module."""
        return build_optimizers(
            module, self.learning_rate, self.name, self.weight_decay, dtype=DTYPES[self.dtype]
        )


@dataclass(frozen=True, kw_only=True)
class KeptConfig:
    """Source caches that are kept on disk, so that later epochs do not run the source.

    Attributes:
        folder: where; caches of other models and of other examples may lie there too.
        budget_gb: at most so many gigabytes of all processes; what is over is computed each time.
    """

    folder: Path
    budget_gb: float = 20.0

    def __post_init__(self) -> None:
        _zero_or_more("kept.budget_gb", self.budget_gb)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one training.

    Attributes:
        sources: by name.
        target: the LLM that answers.
        links: by any name, what `LinkConfig` takes, without the shapes of the caches, which are
            read off the models; `source` is the link's own name unless it says otherwise.
        data: examples.
        out: where checkpoints, the log and the finished bridge (`out/bridge`) go.
        start: folder of a saved bridge to go on from, whose links and prompt are then taken in
            place of these; None starts from nothing.
        system: as in `BridgeConfig`.
        slot_token: as in `BridgeConfig`.
        phases: what is learned, and for how long.
        drop: what is left out at random.
        frozen: how the names of the fusers' weights begin that stay as they are, such as a link's
            name, where others are to be trained beside it.
        optimizer: how weights move.
        batch_size: examples of a step, over all processes and pieces: the number of processes does
            not change what a step sees.
        accumulation: pieces in which a process takes its share of a step.
        precision: `fp32`, or `bf16` for bfloat16 products over float32 weights.
        packed: the answers of an example's questions are learned in one sequence behind its slots,
            where they do not see each other: the same loss for less work. For slots that are
            question-blind, and targets whose layers see all that came before.
        kept: source caches on disk; None computes them each time.
        seed: of weights, order of the examples, questions and what is dropped.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        on_nan: what to do where gradients are no finite numbers: `stop`, or `skip` the step.
        tracking: `tensorboard`, `wandb` or both, beside `out/log.csv`.
    """

    sources: dict[str, ModelConfig]
    target: ModelConfig
    links: dict[str, dict[str, Any]]
    data: DataConfig
    out: Path
    start: Path | None = None
    system: str | None = None
    slot_token: str = " image"
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    frozen: tuple[str, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 32
    accumulation: int = 1
    precision: str = "fp32"
    packed: bool = False
    kept: KeptConfig | None = None
    seed: int = 0
    save_every: int = 100
    log_every: int = 10
    on_nan: str = "stop"
    tracking: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        check_one_of("on_nan", self.on_nan, ON_NAN)
        for name in self.tracking:
            check_one_of("tracking", name, TRACKERS)
        check_at_least_one(self, "batch_size", "accumulation", "save_every", "log_every")
        blank = CacheShape(num_layers=1, num_key_value_heads=1, head_dim=2)
        links = self.build_links(dict.fromkeys(self.sources, blank), blank)
        for link in links:
            if link.source not in self.sources:
                raise ConfigError(
                    f"a link names source {link.source!r}; sources: {', '.join(self.sources)}"
                )
        if self.start is None:
            if not links:
                raise ConfigError("links: expected one or more, got none")
            self.check_links(links)

    def check_links(self, links: Sequence[LinkConfig]) -> None:
        """Refuse settings that do not go with these links, this config's own or a saved bridge's.

        Raises:
            ConfigError: which, and what to set.
        """
        names = [link.name for link in links]
        slotted = [link.name for link in links if link.geometry == "slots"]
        for name in self.drop.named:
            check_one_of("a link of drop.named", name, names)
        idle = sorted(set(self.drop.named) - set(slotted))
        if idle or ((self.drop.slots or self.drop.links) and not slotted):
            raise ConfigError(
                f"drop.{'named' if idle else 'slots and drop.links'}: expected links with slots, "
                f"which alone can be left out, got {', '.join(idle or names)}; drop.sources "
                "empties what an aligned link reads"
            )
        aligned = any(link.geometry == "aligned" for link in links)
        if self.packed and (aligned or self.drop.questions < 1):
            raise ConfigError(
                "packed questions share one look of sources that have not read them: expected "
                f"links of geometry slots and drop.questions=1, got {', '.join(names)} and "
                f"{self.drop.questions:g}; set packed to false"
            )
        if self.phases.generate.distill and len(links) != 1:
            raise ConfigError(
                f"phases.generate.distill takes the answers of one source, and there are "
                f"{len(links)} links; set it to 0"
            )

    def build_links(
        self, shapes: dict[str, CacheShape], target: CacheShape
    ) -> tuple[LinkConfig, ...]:
        """The links for caches of these shapes, by source name."""
        links = []
        for name, link in self.links.items():
            source = link.get("source", name)
            shape = asdict(shapes.get(source, target))
            given = link.get("fuser") or {}
            if not isinstance(given, Mapping):
                raise ConfigError(
                    f"links.{name}.fuser: expected settings such as {{hidden_size: 256}}, got "
                    f"{given!r}"
                )
            fuser = {**given, "source": shape, "target": asdict(target)}
            values = {**link, "source": source, "fuser": fuser}
            links.append(from_dict(LinkConfig, values, f"links.{name}."))
        return tuple(links)

    def share(self, processes: int) -> int:
        """Examples of one piece on one process.

        Raises:
            ConfigError: a step cannot be cut into so many.
        """
        count, rest = divmod(self.batch_size, processes * self.accumulation)
        if rest or not count:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {processes} processes x "
                f"{self.accumulation} pieces; take a multiple of {processes * self.accumulation}"
            )
        return count


def _zero_or_more(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be 0 or more, got {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1 or math.isnan(value):
        raise ConfigError(f"{name} must be in [0, 1], got {value}")

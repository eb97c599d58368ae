"""`mm-c2c train`: a fuser, between any source and any target.

    mm-c2c train CONFIG [key.sub=value ...]
    accelerate launch -m mm_c2c.cli train CONFIG [key.sub=value ...]

trains in one process or in as many as `accelerate` starts. Only the fuser is trained, wrapped and
sharded; each process holds the frozen models.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache
from mm_c2c.config import to_dict, with_defaults
from mm_c2c.errors import AlignmentError, ConfigError, InputError, ShapeError
from mm_c2c.run_folder import hold, read_object, write_json
from mm_c2c.sources.base import SourceInput, for_source
from mm_c2c.target import Target
from mm_c2c.training.checkpoints import has_checkpoint
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.data import Example, Examples, Turn, open_examples
from mm_c2c.training.gumbel import GumbelNoise
from mm_c2c.training.kept import KeptCaches, fingerprint_source, row_key
from mm_c2c.training.loop import Loop, build_accelerator, cosine_rate
from mm_c2c.training.models import build_bridge, load_source, load_target
from mm_c2c.training.objective import Asked, Objective, draw_questions
from mm_c2c.training.packing import check_packs

logger = logging.getLogger(__name__)

_SETTINGS = "config.json"
_UNUSABLE = (InputError, ShapeError, AlignmentError)


def train(config: TrainingConfig, until: int | None = None) -> None:
    """Run, or go on with, one training.

    Args:
        config: its settings.
        until: step of both phases after which to stop, so that it can be gone on with; None is the
            last.

    Raises:
        TrainingError: it cannot go on; the last checkpoint is whole.
    """
    accelerator = build_accelerator(
        config.out, precision=config.precision, tracking=config.tracking
    )
    with hold(config.out) if accelerator.is_main_process else nullcontext():
        target = load_target(config.target)
        sources = {name: load_source(model) for name, model in config.sources.items()}
        run_training(config, accelerator, target, sources, until)


def run_training(
    config: TrainingConfig,
    accelerator: Accelerator,
    target: Target,
    sources: dict[str, Any],
    until: int | None = None,
) -> None:
    """As `train`, with frozen models that are loaded already."""
    examples = open_examples(config.data, config.seed)
    trainer = Trainer(config, accelerator, target, sources, examples)
    run_loop(config, accelerator, trainer, until)


class Learner(Protocol):
    """What a loop asks of those it trains; each as `Loop.run` has it."""

    fusers: nn.ModuleDict

    def rate(self, step: int) -> float:
        """Factor of the learning rates."""

    def loss(self, number: int, rng: random.Random) -> Tensor:
        """Of a piece of a step."""

    def save(self, weights: Mapping[str, Tensor]) -> None:
        """Write the result so far."""

    def gauges(self, seconds: float) -> dict[str, float]:
        """Columns of the log."""


def run_loop(
    config: TrainingConfig, accelerator: Accelerator, learner: Learner, until: int | None = None
) -> None:
    """Train fusers, with their settings beside what comes of it."""
    settings = to_dict(config)
    path = config.out / _SETTINGS
    known = _compare(path, config)
    trained = False

    def loss(number: int, rng: random.Random) -> Tensor:
        nonlocal trained
        trained = True
        return learner.loss(number, rng)

    def save(weights: Mapping[str, Tensor]) -> None:
        learner.save(weights)
        # Where no step was left to do, the weights came of the settings that stand there.
        if trained or not known:
            write_json(path, settings)

    loop = Loop(
        out=config.out,
        steps=config.phases.steps if until is None else until,
        save_every=config.save_every,
        log_every=config.log_every,
        seed=config.seed,
        accumulation=config.accumulation,
        clip=config.optimizer.clip,
        on_nan=config.on_nan,
        accelerator=accelerator,
        settings=flatten(settings),
    )
    optimizers = config.optimizer.build(learner.fusers)
    loop.run(learner.fusers, optimizers, learner.rate, loss, save, learner.gauges)


def _compare(path: Path, config: TrainingConfig) -> bool:
    """Say where a training that goes on has other settings than it was saved with.

    Returns:
        Whether the settings that it was saved with are there.

    Raises:
        ConfigError: they say what it began with, which the checkpoint takes the place of.
    """
    if not path.is_file():
        return False
    try:
        kept = read_object(path)
    except InputError as error:
        logger.warning("%s; it is written anew", error)
        return False
    both = [with_defaults(config, kept), json.loads(json.dumps(to_dict(config)))]
    for settings in both:
        if settings.get("start"):
            settings["start"] = str(Path(settings["start"]).resolve())
    before, now = map(flatten, both)
    changed = {
        key: f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if str(before.get(key)) != str(now.get(key))
    }
    # What is frozen is in no checkpoint: it is drawn anew, or read from the start.
    begun = {"start", "seed"} if config.frozen and config.start is None else {"start"}
    found = [words for key, words in changed.items() if key in begun]
    if found and has_checkpoint(path.parent):
        raise ConfigError(
            f"{path.parent} holds a training that began otherwise ({', '.join(found)}): give "
            "another out, or go on with what it began with"
        )
    if changed:
        words = ", ".join(changed.values())
        logger.warning("%s: goes on with other settings: %s", path.parent, words)
    return True


def freeze(fusers: nn.ModuleDict, frozen: Sequence[str]) -> None:
    """Leave the weights whose names begin so as they are.

    Raises:
        ConfigError: none does.
    """
    for start in frozen:
        found = [weight for name, weight in fusers.named_parameters() if name.startswith(start)]
        if not found:
            raise ConfigError(
                f"frozen: no weight's name begins with {start!r}; links: {', '.join(fusers)}"
            )
        for weight in found:
            weight.requires_grad = False
    if not any(weight.requires_grad for weight in fusers.parameters()):
        raise ConfigError(f"frozen: {', '.join(frozen)} leaves no weight to train")


class Trainer:
    """What is learned from which examples.

    Args:
        config: settings.
        accelerator: the processes, and where this one computes.
        target: the frozen target.
        sources: the frozen sources, by name.
        examples: what is learned from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        target: Target,
        sources: dict[str, Any],
        examples: Examples,
    ) -> None:
        self.config, self.accelerator, self.examples = config, accelerator, examples
        for reader in (target, *sources.values()):
            reader.model.to(accelerator.device)
        self.bridge: Bridge = build_bridge(config, target, sources)
        self.fusers = self.bridge.fusers.to(accelerator.device)
        if config.start is not None:
            config.check_links(self.bridge.config.links)
        if config.packed:
            check_packs(target)
        freeze(self.fusers, config.frozen)
        self.share = config.share(accelerator.num_processes)
        self.objective = Objective(self.bridge, self.prefill, config.drop)
        self.kept: KeptCaches | None = None
        if config.kept is not None:
            budget = int(config.kept.budget_gb * 1e9)
            self.kept = KeptCaches(config.kept.folder, budget, accelerator.num_processes)
        self._tokens = 0

    def loss(self, number: int, rng: random.Random) -> Tensor:
        """Of one process's share of a piece of a step; random by the examples' positions alone.

        Raises:
            InputError, ShapeError, AlignmentError: an example that cannot be learned from, and
                where it stands.
        """
        step, piece = divmod(number, self.config.accumulation)
        examples, rngs = self.draw(step, piece)
        states = [rng.getstate() for rng in rngs]
        try:
            return self._cost(step, examples, rngs)
        except _UNUSABLE:
            for example, rng, state in zip(examples, rngs, states, strict=True):
                rng.setstate(state)
                try:
                    self._cost(step, [example], [rng])
                except _UNUSABLE as alone:
                    raise type(alone)(f"{example.where}: {alone}") from alone
            raise

    def _cost(self, step: int, examples: list[Example], rngs: list[random.Random]) -> Tensor:
        """The loss of these examples in a step."""
        asked = draw_questions(examples, rngs, self.config.data.questions)
        phases = self.config.phases
        reconstruct = step < phases.reconstruct.steps
        if not reconstruct and phases.generate.distill:
            asked = self.distil(examples, asked, rngs)
        if self.config.packed and not reconstruct:
            perception, _ = self.objective.perceive(examples, asked, rngs, once=True)
            if perception is None:
                raise ConfigError("packed questions stand behind slots, and no link has any")
            loss, tokens = self.objective.generate_packed(perception, asked)
            self._tokens += tokens
            return loss
        fused = self.objective.fuse(examples, asked, rngs)
        self._tokens += int(fused["attention_mask"].sum())
        if reconstruct:
            return self.objective.reconstruct(fused, asked, examples, phases.reconstruct.match)
        return self.objective.generate(fused, asked)

    def draw(self, step: int, piece: int) -> tuple[list[Example], list[random.Random]]:
        """This process's examples of a piece, each with a generator that its position seeds."""
        config, process = self.config, self.accelerator.process_index
        before = piece * self.accelerator.num_processes + process
        first = step * config.batch_size + before * self.share
        places = range(first, first + self.share)
        return (
            [self.examples.at(place) for place in places],
            [random.Random(f"{config.seed}/{place}") for place in places],
        )

    def prefill(self, name: str, looks: Sequence[SourceInput]) -> SourceCache:
        """What a source makes of inputs: kept, or computed in its own precision."""
        source = self.bridge.sources[name]
        device = self.accelerator.device
        looks = for_source(self.bridge.sources, name, looks)

        def compute(rows: Sequence[int]) -> SourceCache:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                return source.prefill([looks[row] for row in rows])

        if self.kept is None:
            return compute(range(len(looks)))
        salt = self._fingerprints[name]
        return self.kept.fetch([row_key(salt, look) for look in looks], compute, device)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Of each source, whose weights stay as they are throughout a training."""
        return {name: fingerprint_source(source) for name, source in self.bridge.sources.items()}

    def distil(
        self, examples: Sequence[Example], asked: Asked, rngs: Sequence[random.Random]
    ) -> Asked:
        """Put the source's own answers in the place of some true ones."""
        generate = self.config.phases.generate
        (link,) = self.bridge.config.links
        chosen = [
            row for row, owner in enumerate(asked.owners) if rngs[owner].random() < generate.distill
        ]
        if not chosen:
            return asked
        looks = [examples[asked.owners[row]].look(asked.turns[row].question) for row in chosen]
        settings: dict[str, Any] = {"max_new_tokens": generate.answer_tokens, "do_sample": False}
        if generate.temperature:
            seeds = [rngs[asked.owners[row]].getrandbits(63) for row in chosen]
            settings["logits_processor"] = [GumbelNoise(seeds, generate.temperature)]
        with torch.no_grad(), torch.autocast(self.accelerator.device.type, enabled=False):
            written = self.bridge.sources[link.source].generate(looks, **settings)
        turns = list(asked.turns)
        for row, text in zip(chosen, written, strict=True):
            turns[row] = Turn(turns[row].question, text)
        return asked._replace(turns=turns)

    def rate(self, step: int) -> float:
        """A warm-up and a cosine to zero in each phase."""
        first, second = self.config.phases.reconstruct, self.config.phases.generate
        if step < first.steps:
            return cosine_rate(step, first.warmup, first.steps)
        return cosine_rate(step - first.steps, second.warmup, second.steps)

    def save(self, weights: Mapping[str, Tensor]) -> None:
        """The bridge so far, with what of it is not trained."""
        frozen = {name: p for name, p in self.fusers.named_parameters() if not p.requires_grad}
        self.bridge.save_pretrained(self.config.out / "bridge", weights={**frozen, **weights})

    def gauges(self, seconds: float) -> dict[str, float]:
        """Columns of the log: the share of open gates, and prompt tokens a second in all."""
        tokens, self._tokens = self._tokens, 0
        columns = {"tokens_per_s": tokens * self.accelerator.num_processes / seconds}
        if self.accelerator.distributed_type != DistributedType.FSDP:  # no process has them whole
            fusers: Any = self.fusers.values()
            gates = [fuser.gates().flatten() for fuser in fusers]
            columns["open_gates"] = float((torch.cat(gates) > 0.5).float().mean())
        return columns


def flatten(settings: Mapping[str, Any], where: str = "") -> dict[str, str | int | float]:
    """Nested settings as `a.b: value`, which is what trackers take."""
    flat: dict[str, str | int | float] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{where}{key}.")
        else:
            flat[f"{where}{key}"] = value if isinstance(value, str | int | float) else str(value)
    return flat

"""`mm-c2c train CONFIG --dry-run`: the same training on random weights, and what it would cost.

The frozen models are built from their published geometry (`mm_c2c.geometry`): no weights, no data
and no tokenizer are needed. Narrow ones by default, for which six layers of little width stand;
in their published width with `--true-width`. Sources are their text decoders over random
embeddings: the vision tower is left out, in the steps and in what they cost. Speech models are
whole, and hear noise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mm_c2c.bridge import BridgeConfig
from mm_c2c.cache import CacheOrigin
from mm_c2c.config import from_dict
from mm_c2c.errors import MismatchError
from mm_c2c.geometry import Geometry, find, training_memory
from mm_c2c.link import LinkConfig, build_fuser
from mm_c2c.pretrained import check_origin, read_header
from mm_c2c.training.blank import ANSWER, INNER, blank_source, blank_target
from mm_c2c.training.config import PhasesConfig, TrainingConfig
from mm_c2c.training.data import Example, Turn
from mm_c2c.training.loop import build_accelerator, memory_bytes
from mm_c2c.training.run import Trainer

STEPS = 3
# Tokens that costs are reckoned with, where the data is not looked at.
QUESTION, DESCRIPTION = 16, 48
SUSTAINED_TFLOPS = 40
"""What a run's time is reckoned with: a quarter of an RTX 4090's 165 dense bfloat16 TFLOP/s."""


def dry_run(config: TrainingConfig, *, true_width: bool = False) -> dict[str, Any]:
    """Train three steps, of both phases where the config has both.

    Returns:
        Plain values: `losses`, `seconds_a_step`, `memory_bytes` (measured), `parameters` of the
        fuser in its published width, and from `estimate`: `flop`, `hours` and `true_memory_bytes`.

    Raises:
        ConfigError: a step cannot be cut into the pieces that its config says.
        InputError: a model whose geometry is not known.
        MismatchError: the bridge to go on from is none, or one between other models.
        UnsupportedError: a source of a kind that is not tried on random weights.
    """
    config.share(1)
    original = config
    quiet = replace(config.phases.generate, steps=config.phases.generate.steps or 1, warmup=0)
    phases = PhasesConfig(reconstruct=config.phases.reconstruct, generate=quiet)
    trainer = blank_trainer(replace(config, phases=phases, kept=None), true_width=true_width)
    config, accelerator = trainer.config, trainer.accelerator
    fusers = trainer.bridge.fusers
    optimizers = config.optimizer.build(fusers)
    losses, seconds = [], []
    for step in (0, *range(phases.steps - STEPS + 1, phases.steps)):
        started = time.perf_counter()
        found = 0.0
        for piece in range(config.accumulation):
            with accelerator.autocast():
                number = max(step, 0) * config.accumulation + piece
                cost = trainer.loss(number, random.Random(0)) / config.accumulation
            cost.backward()
            found += cost.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
        seconds.append(time.perf_counter() - started)
    return {
        "losses": losses,
        "seconds_a_step": min(seconds[1:]),
        "memory_bytes": memory_bytes(accelerator),
        "true_width": true_width,
        "steps": phases.steps,
        **estimate(original),
    }


def blank_trainer(config: TrainingConfig, *, true_width: bool = False) -> Trainer:
    """What a config trains, on random weights and blank examples; narrow ones two at a time."""
    target, sources = _geometries(config)
    config = _unstarted(config, sources, target)
    links = _links(config, sources, target)
    if not true_width:
        narrow_links = {
            name: {**link, "fuser": {**link.get("fuser", {}), "hidden_size": INNER}}
            for name, link in config.links.items()
        }
        config = replace(config, links=narrow_links, batch_size=2, accumulation=1)
    accelerator = build_accelerator(config.out, precision=config.precision)
    blank = {
        name: blank_source(
            model,
            [link for link in links if link.source == name],
            config.sources[name].dtype,
            true_width=true_width,
        )
        for name, model in sources.items()
        if any(link.source == name for link in links)
    }
    answering = blank_target(target, config.target.dtype, config.slot_token, true_width=true_width)
    return Trainer(config, accelerator, answering, blank, _Blank())


def estimate(config: TrainingConfig) -> dict[str, Any]:
    """What a whole run costs at its published width, reckoned and not measured.

    A frozen model costs 2 operations a weight and token to read, and 2 more where gradients run
    through it (Kaplan et al., arXiv:2001.08361, without the gradients of weights); the fuser's
    weights cost 6 at each position that is fused. Gradients run through questions and answers.
    Sources look once for all slots, or, like those of aligned links, anew with each question that
    they may hear, in each step: what kept caches save is not counted.
    """
    target, sources = _geometries(config)
    config = _unstarted(config, sources, target)
    links = _links(config, sources, target)
    slots = sum(link.num_slots for link in links)
    questions = config.data.questions
    asked = questions * (QUESTION + ANSWER)
    with torch.device("meta"):
        fusers = [build_fuser(link).num_parameters for link in links]
    fuse = sum(
        count * (_looks(config) * link.num_slots or questions * QUESTION)
        for count, link in zip(fusers, links, strict=True)
    )
    read_by = {link.source: sources[link.source] for link in links}
    read = sum(
        model.num_reading * _positions([k for k in links if k.source == name], model, config)
        for name, model in read_by.items()
    )
    generate = 4 * target.num_parameters * asked + 6 * fuse + 2 * read
    told = 2 * target.num_parameters * questions * (DESCRIPTION + QUESTION + ANSWER)
    phases = config.phases
    flop = config.batch_size * (phases.steps * generate + phases.reconstruct.steps * told)
    rows = config.batch_size // config.accumulation * questions
    positions = slots + QUESTION + ANSWER
    memory = training_memory(sum(fusers), [*read_by.values()], target, rows, positions)
    return {
        "parameters": sum(fusers),
        "flop": flop,
        "hours": flop / (SUSTAINED_TFLOPS * 1e12) / 3600,
        "true_memory_bytes": memory.total,
    }


def text_table(result: dict[str, Any]) -> str:
    """For a terminal."""
    width = "published width" if result["true_width"] else "narrow"
    steps, seconds = result["steps"], result["seconds_a_step"]
    lines = [
        f"{STEPS} steps on random weights ({width}), losses "
        + ", ".join(f"{loss:.3f}" for loss in result["losses"]),
        f"measured here: {seconds:.2f} s a step, {result['memory_bytes'] / 1e9:.2f} GB",
    ]
    if result["true_width"]:
        lines.append(f"so that {steps:,} steps take {steps * seconds / 3600:.1f} h here")
    lines.append(
        f"estimated for the whole run at published width: fuser of {result['parameters']:,} "
        f"parameters, {result['flop']:.1e} FLOP, {result['hours']:.1f} h at {SUSTAINED_TFLOPS} "
        f"TFLOP/s sustained, {result['true_memory_bytes'] / 1e9:.0f} GB; without vision towers"
    )
    return "\n".join(lines)


class _Blank:
    """Examples of the usual length, all alike but for their number."""

    def at(self, position: int) -> Example:
        """See `Examples`."""
        turns = [Turn(f"{place}".zfill(QUESTION), "x" * ANSWER) for place in range(16)]
        return Example(
            images=(),
            text=f"{position:04d}",
            state=(),
            turns=tuple(turns),
            description="x" * DESCRIPTION,
        )


def _geometries(config: TrainingConfig) -> tuple[Geometry, dict[str, Geometry]]:
    """The target's and the sources', as published."""
    sources = {name: find(model.model) for name, model in config.sources.items()}
    return find(config.target.model), sources


def _unstarted(
    config: TrainingConfig, sources: dict[str, Geometry], target: Geometry
) -> TrainingConfig:
    """The same from nothing, with the links and the prompt of the bridge that it goes on from."""
    # The training before it in a chain need not have run; its own links say the same.
    if config.start is None or (config.links and not config.start.exists()):
        return replace(config, start=None)
    header = read_header(config.start)
    _check_model("the target", header["target"], target)
    for name, origin in header["sources"].items():
        if name not in sources:
            raise MismatchError(f"{config.start} needs a source named {name!r} ({origin['model']})")
        _check_model(f"source {name!r}", origin, sources[name])
    bridge = from_dict(BridgeConfig, header["bridge"])
    return replace(
        config,
        start=None,
        links={link.name: asdict(link) for link in bridge.links},
        system=bridge.system,
        slot_token=bridge.slot_token,
    )


def _check_model(what: str, origin: dict[str, Any], model: Geometry) -> None:
    """Refuse a bridge that was trained with another model; revisions are not known here."""
    found = CacheOrigin(model.name, origin.get("revision"), model.model_type)
    check_origin(what, origin, found)


def _links(
    config: TrainingConfig, sources: dict[str, Geometry], target: Geometry
) -> tuple[LinkConfig, ...]:
    shapes = {name: model.layout.shape for name, model in sources.items()}
    return config.build_links(shapes, target.layout.shape)


def _positions(links: Sequence[LinkConfig], source: Geometry, config: TrainingConfig) -> int:
    """What a source reads for an example: the pictures with each look, and words that it hears."""
    questions = config.data.questions
    pictures = max(link.images for link in links) * (source.picture_tokens or 0)
    slots = [link for link in links if link.geometry == "slots"]
    others = sum(link.cols for link in slots if link.kinds)
    heard = (1 - config.drop.questions) * QUESTION
    looked = _looks(config) * (pictures + others + heard) if slots else 0
    aligned = questions * (pictures + QUESTION) if len(slots) < len(links) else 0
    # Where its own answers are learned, it reads picture and question anew for each, and answers.
    distilled = config.phases.generate.distill * questions * (pictures + QUESTION + ANSWER)
    return round(looked + aligned + distilled)


def _looks(config: TrainingConfig) -> int:
    """Rows of slots for an example: one for each question where their sources may hear it."""
    return config.data.questions if config.drop.questions < 1 else 1

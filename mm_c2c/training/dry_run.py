"""`mm-c2c train CONFIG --dry-run`: the same training on random weights, and what it would cost.

The frozen models are built from their published geometry (`mm_c2c.geometry`): no weights, no data
and no tokenizer are needed. Narrow ones by default, for which six layers of little width stand;
in their published width with `--true-width`. Sources are their text decoders over random
embeddings: the vision tower is left out, in the steps and in what they cost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mm_c2c.fuser import CacheFuser
from mm_c2c.geometry import Geometry, find, training_memory
from mm_c2c.link import LinkConfig
from mm_c2c.training.blank import ANSWER, INNER, BlankSource, blank_target
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
    links = _links(config, sources, target)
    config = replace(config, start=None)
    if not true_width:
        narrow_links = {
            name: {**link, "fuser": {**link.get("fuser", {}), "hidden_size": INNER}}
            for name, link in config.links.items()
        }
        config = replace(config, links=narrow_links, batch_size=2, accumulation=1)
    accelerator = build_accelerator(config.out, precision=config.precision)
    blank = {
        name: BlankSource(
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
    Sources read a picture, or a question, in each step: what kept caches save is not counted.
    """
    target, sources = _geometries(config)
    links = _links(config, sources, target)
    slots = sum(link.num_slots for link in links)
    questions = config.data.questions
    asked = questions * (QUESTION + ANSWER)
    with torch.device("meta"):
        fusers = [CacheFuser(link.fuser).num_parameters for link in links]
    fuse = sum(
        count * (link.num_slots or questions * QUESTION)
        for count, link in zip(fusers, links, strict=True)
    )
    read = sum(
        model.num_parameters * _positions([k for k in links if k.source == name], model, config)
        for name, model in sources.items()
    )
    generate = 4 * target.num_parameters * asked + 6 * fuse + 2 * read
    told = 2 * target.num_parameters * questions * (DESCRIPTION + QUESTION + ANSWER)
    phases = config.phases
    flop = config.batch_size * (phases.steps * generate + phases.reconstruct.steps * told)
    rows = config.batch_size // config.accumulation * questions
    read_by = [sources[name] for name in {link.source for link in links}]
    memory = training_memory(sum(fusers), read_by, target, rows, slots + QUESTION + ANSWER)
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


def _links(
    config: TrainingConfig, sources: dict[str, Geometry], target: Geometry
) -> tuple[LinkConfig, ...]:
    shapes = {name: model.layout.shape for name, model in sources.items()}
    return config.build_links(shapes, target.layout.shape)


def _positions(links: Sequence[LinkConfig], source: Geometry, config: TrainingConfig) -> int:
    """What a source reads for an example: once for all links with slots, once for all of words."""
    questions = config.data.questions
    slots = [link for link in links if link.geometry == "slots"]
    pictures = max((link.images for link in slots), default=0) * (source.picture_tokens or 0)
    others = sum(link.cols for link in slots if link.kinds)
    words = questions * QUESTION if len(slots) < len(links) else 0
    # Where its own answers are learned, it reads picture and question anew for each, and answers.
    distilled = config.phases.generate.distill * questions
    return pictures + others + words + round(distilled * (pictures + QUESTION + ANSWER))

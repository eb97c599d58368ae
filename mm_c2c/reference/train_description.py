"""Tune the target with LoRA to read a camera's true description and the instruction.

    python -m mm_c2c.reference.train_description configs/baseline_description.yaml [key=value ...]

What the arm `tuned_description` takes: the strong form of a caption relay for a policy, trained on
the items that the policy's reader was trained on. Saves as it goes, and resumes.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from mm_c2c.config import load_config
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Setting
from mm_c2c.evaluation.arms.relay import DescriptionAndInstruction
from mm_c2c.evaluation.arms.tuned import add_adapter
from mm_c2c.evaluation.probe import load_pair
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.reference.packing import Turn
from mm_c2c.reference.train_fuser import turns_loss
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import render_chat
from mm_c2c.training.loop import Loop, cosine_rate
from mm_c2c.training.optimizers import build_optimizers


@dataclass(frozen=True, kw_only=True)
class DescriptionTrainingConfig:
    """Settings of one training.

    Attributes:
        items: JSONL with `caption` and `text`, lines of one step after each other; pictures are
            not read.
        bridge: the reader it is compared with: its target and prompt are taken.
        out: where checkpoints, the log and the result (in `out/adapter`) go.
        source_model: as in `EvaluationConfig`.
        target_model: likewise.
        parameters: about so many are trained; None takes as many as the reader's fusers have.
        steps: optimiser steps.
        examples: descriptions a step.
        questions: questions about each, or as many as it has.
        learning_rate: of AdamW, after the warm-up; falls to zero along a cosine.
        warmup: steps of the warm-up.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of weights and data order.
    """

    items: Path
    bridge: str
    out: Path
    source_model: str | None = None
    target_model: str | None = None
    parameters: int | None = None
    steps: int = 120
    examples: int = 8
    questions: int = 5
    learning_rate: float = 1e-3
    warmup: int = 20
    save_every: int = 10
    log_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps <= self.warmup:
            raise ConfigError(f"steps ({self.steps}) must exceed warmup ({self.warmup})")
        if min(self.examples, self.questions) < 1:
            raise ConfigError("examples and questions must be at least 1")


def train(config: DescriptionTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    bridge = load_pair(config)
    parameters = config.parameters or sum(p.numel() for p in bridge.fusers.parameters())
    wrapped, model = add_adapter(bridge.target, parameters)
    arm = DescriptionAndInstruction(Setting(bridge=bridge, source_name="", request=""))
    groups = group_steps(load_items(config.items))
    tokenizer = bridge.target.tokenizer

    def turns(items: list[Item]) -> list[Turn]:
        asked = [
            Asked(SourceInput(text=i.row.get("text", "")), i.question, (), i.description)
            for i in items
        ]
        shown = [arm.prompt(*pair) for pair in zip(arm.write(asked), asked, strict=True)]
        texts = [render_chat(tokenizer, text, bridge.config.system) for text in shown]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        answers = tokenizer([i.answer for i in items], add_special_tokens=False)["input_ids"]
        ends = [tokenizer.eos_token_id]
        return [Turn(p, [*a, *ends]) for p, a in zip(prompts, answers, strict=True)]

    def loss(step: int, rng: random.Random) -> Tensor:
        del step
        picked = rng.sample(groups, min(config.examples, len(groups)))
        rows = [turns(rng.sample(g, min(config.questions, len(g)))) for g in picked]
        return turns_loss(model, rows, DynamicCache(config=model.config), done=0)

    Loop(
        out=config.out,
        steps=config.steps,
        save_every=config.save_every,
        log_every=config.log_every,
        seed=config.seed,
    ).run(
        wrapped,
        build_optimizers(wrapped, config.learning_rate, "adamw"),
        lambda step: cosine_rate(step, config.warmup, config.steps),
        loss,
        # "auto" would ask the Hub whether the vocabulary has grown.
        lambda _: wrapped.save_pretrained(config.out / "adapter", save_embedding_layers=False),
    )


def group_steps(items: list[Item]) -> list[list[Item]]:
    """The questions of each description that lines in succession share."""
    return [
        list(group)
        for _, group in itertools.groupby(
            items, lambda item: (item.image, item.description, item.row.get("text"))
        )
    ]


def main() -> None:
    """Read the config named on the command line and train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    train(load_config(DescriptionTrainingConfig, Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()

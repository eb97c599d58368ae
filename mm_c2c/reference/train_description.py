"""Tune the target with LoRA to read a camera's true description and the instruction.

    python -m mm_c2c.reference.train_description configs/baseline_description.yaml [key=value ...]

What the arm `tuned_description` takes: the strong form of a caption relay for a policy, trained on
the items that the policy's reader was trained on. Saves as it goes, and resumes.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Setting
from mm_c2c.evaluation.arms.relay import DescriptionAndInstruction
from mm_c2c.evaluation.arms.tuned import add_adapter
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.reference.models import load_saved_bridge
from mm_c2c.reference.train_fuser import turns_loss
from mm_c2c.reference.trainer import TrainerConfig, run
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import render_chat
from mm_c2c.training.optimizers import build_optimizers
from mm_c2c.training.packing import Turn, split_beginning


@dataclass(frozen=True, kw_only=True)
class DescriptionTrainingConfig(TrainerConfig):
    """Settings of one training, beside those that each has.

    Attributes:
        items: JSONL with `caption` and `text`, lines of one step after each other; pictures are
            not read.
        bridge: the reader it is compared with: its target and prompt are taken.
        out: where checkpoints, the log and the result (in `out/adapter`) go.
        source_model: as in `EvaluationConfig`.
        target_model: likewise.
        parameters: about so many are trained; None takes as many as the reader's fusers have.
        examples: descriptions a step.
        questions: questions about each, or as many as it has.
    """

    items: Path
    bridge: str
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.examples, self.questions) < 1:
            raise ConfigError("examples and questions must be at least 1")


def train(config: DescriptionTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    bridge = load_saved_bridge(config.bridge, config.source_model, config.target_model)
    parameters = config.parameters or sum(p.numel() for p in bridge.fusers.parameters())
    wrapped, model = add_adapter(bridge.target, parameters)
    arm = DescriptionAndInstruction(Setting(bridge=bridge, source_name="", request=""))
    groups = group_steps(load_items(config.items))
    tokenizer = bridge.target.tokenizer

    def cost(items: list[Item]) -> Tensor:
        """Of the answers about one description."""
        asked = [
            Asked(SourceInput(text=i.row.get("text", "")), i.question, (), i.description)
            for i in items
        ]
        shown = [arm.prompt(*pair) for pair in zip(arm.write(asked), asked, strict=True)]
        texts = [render_chat(tokenizer, text, bridge.config.system) for text in shown]
        return shared_loss(model, tokenizer, texts, [item.answer for item in items])

    def loss(step: int, rng: random.Random) -> Tensor:
        del step
        picked = rng.sample(groups, min(config.examples, len(groups)))
        costs = [cost(rng.sample(g, min(config.questions, len(g)))) for g in picked]
        return torch.stack(costs).mean()

    def save(_: object) -> None:
        # "auto" would ask the Hub whether the vocabulary has grown.
        wrapped.save_pretrained(config.out / "adapter", save_embedding_layers=False)

    optimizers = build_optimizers(wrapped, config.learning_rate, "adamw")
    config.loop().run(wrapped, optimizers, config.rate, loss, save)


def shared_loss(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> Tensor:
    """Cross-entropy of answers, mean over tokens; what all prompts begin with is read once.

    Args:
        model: a causal LM of transformers.
        tokenizer: its own.
        prompts: rendered; one or more.
        answers: one a prompt; the token that ends each is learned too.
    """
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    said = tokenizer(answers, add_special_tokens=False)["input_ids"]
    beginning, rest = split_beginning(asked)
    end = tokenizer.eos_token_id
    turns = [Turn(ids, [*a, end]) for ids, a in zip(rest, said, strict=True)]
    return turns_loss(model, [turns], DynamicCache(config=model.config), 0, [beginning])


def group_steps(items: list[Item]) -> list[list[Item]]:
    """The questions of each description that lines in succession share."""
    return [
        list(group)
        for _, group in itertools.groupby(
            items, lambda item: (item.image, item.description, item.row.get("text"))
        )
    ]


if __name__ == "__main__":
    run(DescriptionTrainingConfig, train)

"""Train what the fuser is compared with, on the fuser's scenes and questions.

python -m mm_c2c.reference.train_baseline configs/baseline_tuned_relay.yaml [key=value ...]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache
from mm_c2c.config import DTYPES, check_one_of
from mm_c2c.evaluation.arms.own_source import OWN_NAME, build_own_bridge, load_own_bridge
from mm_c2c.evaluation.arms.prompts import RelayPrompt
from mm_c2c.evaluation.arms.soft_prompt import Connector, ConnectorConfig
from mm_c2c.evaluation.arms.tuned import add_adapter, load_adapter
from mm_c2c.reference.lessons import LessonConfig, draw_lesson
from mm_c2c.reference.models import BRIDGE_FOLDER, SOURCE_NAME, load_source, load_target
from mm_c2c.reference.scene_data import ScenePool
from mm_c2c.reference.scenes import CAPTION_REQUEST, Question
from mm_c2c.reference.train_fuser import (
    FeatureReader,
    answer_loss,
    answer_turns,
    turns_loss,
)
from mm_c2c.reference.trainer import run
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import render_chat
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.training import objective
from mm_c2c.training.config import DropConfig
from mm_c2c.training.data import Turn
from mm_c2c.training.packing import split_beginning

KINDS = ("tuned_relay", "soft_prompt", "own_source")


@dataclass(frozen=True, kw_only=True)
class BaselineTrainingConfig(LessonConfig):
    """Settings of one training, beside those that each on scenes has.

    Attributes:
        kind: `tuned_relay` puts a LoRA into the target, which reads the source's captions;
            `soft_prompt` trains a connector from the source's vision tower into the frozen target;
            `own_source` trains a fuser from the target into itself, which sees no picture.
        out: where checkpoints, the log and the result (in `out/KIND`) go.
        bridge: folder of the fuser it is compared with: its prompt is taken.
        parameters: about so many are trained, where `start` names none; the reference fuser has
            3,419,432.
    """

    kind: str
    bridge: Path = BRIDGE_FOLDER
    parameters: int = 3_419_432
    optimizer: str = "adamw"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("kind", self.kind, KINDS)


class _Baseline(NamedTuple):
    """What is trained, what a batch of features and questions costs it, and how it is saved."""

    module: nn.Module
    loss: Callable[[Tensor, list[list[Question]]], Tensor]
    save: Callable[[], None]


def train(config: BaselineTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    source = load_source(config.source)
    target = load_target(dtype=DTYPES[config.dtype])
    bridge = Bridge.from_pretrained(config.bridge, target, {SOURCE_NAME: source})
    builds = {"tuned_relay": _tuned_relay, "soft_prompt": _soft_prompt, "own_source": _own_source}
    baseline = builds[config.kind](config, bridge, source)
    pool = ScenePool(config.data)

    def loss(step: int, rng: random.Random) -> Tensor:
        easily = step < config.easy_steps
        features, scenes = pool.draw(rng, config.scenes, easily=easily, odd=config.odd)
        return baseline.loss(features, draw_lesson(scenes, rng, config))

    optimizers = config.optimizers(baseline.module)
    config.loop().run(baseline.module, optimizers, config.rate, loss, lambda _: baseline.save())


def _tuned_relay(config: BaselineTrainingConfig, bridge: Bridge, source: VLMSource) -> _Baseline:
    """The target with a LoRA, on what the arm of that name will show it."""
    if config.start is None:
        wrapped, model = add_adapter(bridge.target, config.parameters)
    else:
        wrapped, model = load_adapter(bridge.target, config.start, trainable=True)
    reader = FeatureReader(source)
    tokenizer, prompt = bridge.target.tokenizer, RelayPrompt()

    def loss(features: Tensor, asked: list[list[Question]]) -> Tensor:
        turns, beginnings = [], []
        for caption, questions in zip(
            reader.describe(features, CAPTION_REQUEST), asked, strict=True
        ):
            shown = [prompt.ask_target(caption, q.question) for q in questions]
            texts = [render_chat(tokenizer, text, bridge.config.system) for text in shown]
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            beginning, rest = split_beginning(ids)
            turns.append(answer_turns(tokenizer, rest, questions))
            beginnings.append(beginning)
        cache = DynamicCache(config=model.config)
        return turns_loss(model, turns, cache, done=0, beginnings=beginnings)

    def save() -> None:
        # "auto" would ask the Hub whether the vocabulary has grown.
        wrapped.save_pretrained(config.out / config.kind, save_embedding_layers=False)

    return _Baseline(wrapped, loss, save)


def _soft_prompt(config: BaselineTrainingConfig, bridge: Bridge, source: VLMSource) -> _Baseline:
    """A connector from the vision tower, on what the arm of that name will show the target."""
    tower = source.model.model.vision_tower
    if config.start is None:
        width = tower.config.hidden_size
        connector = Connector(ConnectorConfig.of_budget(width, bridge, config.parameters))
    else:
        connector = Connector.from_pretrained(config.start, bridge)

    def loss(features: Tensor, asked: list[list[Question]]) -> Tensor:
        with torch.no_grad():
            states = tower.encode(features)
        return answer_loss(bridge, connector.perceive(bridge, states), asked)

    return _Baseline(connector, loss, lambda: connector.save_pretrained(config.out / config.kind))


def _own_source(config: BaselineTrainingConfig, bridge: Bridge, source: VLMSource) -> _Baseline:
    """A fuser from the target into itself, on the questions alone."""
    del source
    if config.start is None:
        own = build_own_bridge(bridge, config.parameters)
    else:
        own = load_own_bridge(config.start, bridge.target)

    def loss(features: Tensor, asked: list[list[Question]]) -> Tensor:
        del features
        questions = [q for row in asked for q in row]
        texts = [q.question for q in questions]
        cache = own.sources[OWN_NAME].prefill([SourceInput(text=text) for text in texts])
        return aligned_loss(own, {OWN_NAME: cache}, texts, [q.answer for q in questions])

    return _Baseline(own.fusers, loss, lambda: own.save_pretrained(config.out / config.kind))


def aligned_loss(
    bridge: Bridge, caches: dict[str, SourceCache], questions: list[str], answers: list[str]
) -> Tensor:
    """Cross-entropy of the answers and their end over aligned links, mean over tokens.

    Args:
        bridge: with the fusers in training.
        caches: of the same questions, by source.
        questions: one a row.
        answers: one a row.
    """
    turns = [Turn(*pair) for pair in zip(questions, answers, strict=True)]
    asked = objective.Asked(turns, owners=list(range(len(turns))), weights=[1.0] * len(turns))
    reader = objective.Objective(bridge, lambda name, _: caches[name], DropConfig())
    read = reader.read(bridge.fuse(None, questions, caches), asked)
    return F.cross_entropy(read.logits.flatten(0, 1).float(), read.labels.flatten())


if __name__ == "__main__":
    run(BaselineTrainingConfig, train)

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
from mm_c2c.config import DTYPES, WIDE_DTYPES, check_one_of
from mm_c2c.evaluation.arms.own_source import OWN_NAME, build_own_bridge
from mm_c2c.evaluation.arms.prompts import RelayPrompt
from mm_c2c.evaluation.arms.soft_prompt import Connector, ConnectorConfig
from mm_c2c.evaluation.arms.tuned import add_adapter
from mm_c2c.reference.models import BRIDGE_FOLDER, SOURCE_NAME, load_source, load_target
from mm_c2c.reference.scene_data import ScenePool
from mm_c2c.reference.scenes import CAPTION_REQUEST, Question
from mm_c2c.reference.train_fuser import (
    FeatureReader,
    answer_loss,
    answer_turns,
    draw_questions,
    turns_loss,
)
from mm_c2c.reference.trainer import TrainerConfig, run
from mm_c2c.sources.base import SourceInput, count_positions
from mm_c2c.sources.text import render_chat
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.training.optimizers import OPTIMIZERS, build_optimizers
from mm_c2c.training.packing import split_beginning

KINDS = ("tuned_relay", "soft_prompt", "own_source")


@dataclass(frozen=True, kw_only=True)
class BaselineTrainingConfig(TrainerConfig):
    """Settings of one training, beside those that each has.

    Attributes:
        kind: `tuned_relay` puts a LoRA into the target, which reads the source's captions;
            `soft_prompt` trains a connector from the source's vision tower into the frozen target;
            `own_source` trains a fuser from the target into itself, which sees no picture.
        data: folder of shards written by `scene_data`.
        source: folder of the trained source.
        out: where checkpoints, the log and the result (in `out/KIND`) go.
        bridge: folder of the fuser it is compared with: its prompt is taken.
        parameters: about so many are trained; the reference fuser has 3,419,432.
        scenes: pictures a step.
        questions: questions a picture; a request to describe it comes on top.
        optimizer: `adamw`, or `muon` for the weights, as the fuser has it.
        easy_steps: steps in which only scenes of one and two stickers are shown.
        dtype: of the frozen target while training; see `FuserTrainingConfig`.
    """

    kind: str
    data: Path
    source: Path
    bridge: Path = BRIDGE_FOLDER
    parameters: int = 3_419_432
    steps: int = 400
    scenes: int = 8
    questions: int = 4
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 20
    easy_steps: int = 60
    save_every: int = 25
    log_every: int = 5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("kind", self.kind, KINDS)
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("dtype", self.dtype, WIDE_DTYPES)


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
        features, scenes = pool.draw(rng, config.scenes, easily=step < config.easy_steps)
        return baseline.loss(features, draw_questions(scenes, rng, config.questions))

    optimizers = build_optimizers(baseline.module, config.learning_rate, config.optimizer)
    config.loop().run(baseline.module, optimizers, config.rate, loss, lambda _: baseline.save())


def _tuned_relay(config: BaselineTrainingConfig, bridge: Bridge, source: VLMSource) -> _Baseline:
    """The target with a LoRA, on what the arm of that name will show it."""
    wrapped, model = add_adapter(bridge.target, config.parameters)
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
    shape = ConnectorConfig.of_budget(tower.config.hidden_size, bridge, config.parameters)
    connector = Connector(shape)

    def loss(features: Tensor, asked: list[list[Question]]) -> Tensor:
        with torch.no_grad():
            states = tower.encode(features)
        return answer_loss(bridge, connector.perceive(bridge, states), asked)

    return _Baseline(connector, loss, lambda: connector.save_pretrained(config.out / config.kind))


def _own_source(config: BaselineTrainingConfig, bridge: Bridge, source: VLMSource) -> _Baseline:
    """A fuser from the target into itself, on the questions alone."""
    del source
    own = build_own_bridge(bridge, config.parameters)

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
    target = bridge.target
    fused = bridge.fuse(None, questions, caches)
    cache = fused["past_key_values"]
    done = cache.get_seq_length()
    encoded = target.tokenizer(answers, add_special_tokens=False)["input_ids"]
    wanted = [torch.tensor([*ids, target.tokenizer.eos_token_id]) for ids in encoded]
    labels = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-100)
    # The last word of the prompt, which is not in the cache yet, and the answer but its end.
    input_ids = torch.cat([fused["input_ids"], labels[:, :-1].clamp(min=0)], dim=1)
    mask = torch.cat([fused["attention_mask"], (labels[:, :-1] != -100).long()], dim=1)
    logits = target.model(
        input_ids[:, done:],
        attention_mask=mask,
        position_ids=count_positions(mask)[:, done:],
        past_key_values=cache,
    ).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


if __name__ == "__main__":
    run(BaselineTrainingConfig, train)

"""Train the policy by flow matching on demonstrations; saves as it goes, and resumes.

python -m mm_c2c.reference.metaworld.train_policy configs/metaworld_policy.yaml [key=value ...]
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PI0ForConditionalGeneration

from mm_c2c.errors import ConfigError
from mm_c2c.reference.metaworld.demonstrations import read_shard, shards_of
from mm_c2c.reference.metaworld.policy import (
    CHUNK,
    NUM_PATCHES,
    build_model,
    build_processor,
    build_tokenizer,
)
from mm_c2c.reference.metaworld.tasks import STATE_DIM, TASKS, read_truth
from mm_c2c.reference.trainer import TrainerConfig, run
from mm_c2c.training.optimizers import build_optimizers, mixes_channels

logger = logging.getLogger(__name__)

_PLACES = 9  # numbers of `Frames.places`
_HELD = 20  # frames of each task of the dev split that the log's gauges look at


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig(TrainerConfig):
    """Settings of one training, beside those that each has.

    Attributes:
        data: folder of shards written by `demonstrations`.
        out: where checkpoints, the log and the finished policy (`out/policy`) go.
        hidden_size: width of the vision tower and of the prefix's decoder.
        expert_size: width of the action expert.
        num_layers: of both decoders.
        tower_layers: of the vision tower.
        batch_size: frames in one, the same number of each task.
        draws: noises and timesteps at which each frame's chunk is learned.
        place_loss: weight of a training aid: where hand, object and goal are, read off the patches
            by a linear map that is thrown away.
    """

    data: Path
    hidden_size: int = 128
    expert_size: int = 96
    num_layers: int = 4
    tower_layers: int = 3
    steps: int = 900
    batch_size: int = 48
    draws: int = 4
    learning_rate: float = 2e-3
    warmup: int = 50
    place_loss: float = 1.0
    save_every: int = 100
    log_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % len(TASKS):
            raise ConfigError(
                f"batch_size must be a multiple of {len(TASKS)} tasks, got {self.batch_size}"
            )


class Frames(NamedTuple):
    """Demonstrated moments, in the environment's units.

    Attributes:
        images: `(frames, 96, 96, 3)` uint8.
        states: `(frames, 4)`.
        chunks: `(frames, action_horizon, 4)`: what the expert does from there on; its last action
            stays when the episode ends.
        places: `(frames, 9)`: of hand, object and goal, in metres.
    """

    images: Tensor
    states: Tensor
    chunks: Tensor
    places: Tensor

    def take(self, rows: Tensor) -> Frames:
        """Some of them."""
        return Frames(*(value[rows] for value in self))


def read_frames(folder: Path, split: str, task: str) -> Frames:
    """The moments of a task's episodes that ended in success."""
    found = []
    for path in shards_of(folder, split, task):
        for episode in read_shard(path):
            if not episode["success"][-1]:
                continue
            labels, raw = episode["labels"], episode["raw"]
            steps = episode["frame_steps"]
            ahead = (steps[:, None] + torch.arange(CHUNK)).clamp(max=len(labels) - 1)
            truths = [read_truth(task, row) for row in raw[steps].numpy()]
            places = [[*t.hand, *t.object, *t.goal] for t in truths]
            found.append(
                Frames(
                    episode["images"], raw[steps, :STATE_DIM], labels[ahead], torch.tensor(places)
                )
            )
    return Frames(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class Aided(nn.Module):
    """The policy and the training aid."""

    def __init__(self, policy: PI0ForConditionalGeneration) -> None:
        super().__init__()
        self.policy = policy
        embed: Any = policy.get_input_embeddings()
        width: int = embed.weight.shape[1]
        self.where = nn.Linear(NUM_PATCHES * width, _PLACES)


def losses(
    module: Aided, batch: Mapping[str, Tensor], places: Tensor, draws: int
) -> tuple[Tensor, Tensor]:
    """The flow matching loss and that of the aid.

    The prefix is run once; the expert learns each chunk at several noises and timesteps.

    Args:
        module: policy and aid.
        batch: what the processor makes of the frames.
        places: `(batch, 9)`, standardised.
        draws: noises a frame.
    """
    policy = module.policy
    mask = batch["attention_mask"]
    embeds = policy.model.embed_prefix(
        batch["input_ids"], batch["pixel_values"], batch["pixel_attention_mask"]
    )
    where = module.where(embeds[:, :NUM_PATCHES].flatten(1))
    cache = policy.model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
        use_cache=True,
    ).past_key_values
    cache.batch_repeat_interleave(draws)
    flow = policy(
        state=batch["state"].repeat_interleave(draws, 0),
        actions=batch["actions"].repeat_interleave(draws, 0),
        attention_mask=mask.repeat_interleave(draws, 0),
        past_key_values=cache,
    ).loss
    return flow, F.mse_loss(where, places)


def statistics(values: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each column of `(rows, columns)`."""
    return values.mean(0).tolist(), values.std(0).tolist()


def train(config: PolicyTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    pools = [read_frames(config.data, "train", task) for task in TASKS]
    dev = [read_frames(config.data, "dev", task) for task in TASKS]
    states, chunks, places = (
        torch.cat([getattr(pool, name) for pool in pools]) for name in Frames._fields[1:]
    )
    logger.info("%d frames, of each task %s", len(states), [len(pool.states) for pool in pools])
    processor = build_processor(
        build_tokenizer(), state=statistics(states), actions=statistics(chunks.flatten(0, 1))
    )
    place_mean, place_std = places.mean(0), places.std(0)
    model = build_model(
        processor,
        hidden_size=config.hidden_size,
        expert_size=config.expert_size,
        num_layers=config.num_layers,
        tower_layers=config.tower_layers,
    )
    module = Aided(model).train()
    texts = processor.tokenizer(
        [f"<s>{task.instruction}\n" for task in TASKS.values()], padding=True
    )

    def prepare(frames: Sequence[Frames]) -> tuple[dict[str, Tensor], Tensor]:
        """As the processor has it, for the same number of frames of each task."""
        count = len(frames[0].states)
        rows = torch.arange(len(TASKS)).repeat_interleave(count)
        words = torch.tensor(texts["input_ids"])[rows]
        mask = torch.tensor(texts["attention_mask"])[rows]
        shown = torch.full((len(rows), NUM_PATCHES), processor.image_token_id)
        joined = Frames(*(torch.cat(parts) for parts in zip(*frames, strict=True)))
        pixels = joined.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = {
            "input_ids": torch.cat([shown, words], 1),
            "attention_mask": torch.cat([torch.ones_like(shown), mask], 1),
            "pixel_values": pixels.unsqueeze(1),
            "pixel_attention_mask": torch.ones(len(rows), 1, dtype=torch.bool),
            "state": processor.normalize(joined.states, "state"),
            "actions": processor.normalize(joined.chunks, "actions"),
        }
        return batch, (joined.places - place_mean) / place_std

    held = prepare(
        [pool.take(torch.linspace(0, len(pool.states) - 1, _HELD).long()) for pool in dev]
    )
    seen: dict[str, float] = {}

    def loss(step: int, rng: random.Random) -> Tensor:
        each = config.batch_size // len(TASKS)
        chosen = [pool.take(torch.randint(len(pool.states), (each,))) for pool in pools]
        flow, aid = losses(module, *prepare(chosen), config.draws)
        seen.update(flow_loss=flow.item(), place_loss=aid.item())
        return flow + config.place_loss * aid

    def gauges(_: float) -> dict[str, float]:
        with torch.no_grad():
            torch.manual_seed(0)
            flow, aid = losses(module, *held, config.draws)
        return {**seen, "dev_flow_loss": flow.item(), "dev_place_loss": aid.item()}

    def save(_: object) -> None:
        folder = config.out / "policy"
        copy.deepcopy(model).half().save_pretrained(folder)
        processor.save_pretrained(folder)

    optimizers = build_optimizers(module, config.learning_rate, is_matrix=_is_matrix)
    config.loop().run(module, optimizers, config.rate, loss, save, gauges)


def _is_matrix(name: str, param: nn.Parameter) -> bool:
    """For Muon; the aid is for AdamW."""
    return mixes_channels(name, param) and not name.startswith("where")


if __name__ == "__main__":
    run(PolicyTrainingConfig, train)

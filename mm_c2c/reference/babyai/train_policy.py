"""Train the policy by behaviour cloning; saves as it goes, and resumes.

python -m mm_c2c.reference.babyai.train_policy configs/babyai_policy.yaml [key=value ...]
"""

from __future__ import annotations

import functools
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mm_c2c.errors import InputError
from mm_c2c.reference.babyai.demonstrations import Demonstrations
from mm_c2c.reference.babyai.levels import ACTIONS, VIEW_CELLS, Camera, instruction_text
from mm_c2c.reference.babyai.policy import build_model, build_processor, build_tokenizer
from mm_c2c.reference.source import ASSISTANT_TOKEN, USER_TOKEN
from mm_c2c.reference.trainer import TrainerConfig, run
from mm_c2c.training.optimizers import build_optimizers, mixes_channels
from mm_c2c.training.packing import Packed, Turn, block_mask, pack

logger = logging.getLogger(__name__)

PREFIX = VIEW_CELLS**2 + 1
"""Positions before the instruction: the begin token, and one for each cell."""

_BUCKETS = 8


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig(TrainerConfig):
    """Settings of one training, beside those that each has.

    Attributes:
        data: folder of `easy.npz` and `full.npz`, written by `demonstrations`.
        out: where checkpoints, the log and the finished policy (`out/policy`) go.
        hidden_size: width of the decoder.
        num_layers: decoder layers.
        tower_size: width of the vision tower.
        tower_layers: its layers.
        batch_size: demonstrated steps in one.
        easy_steps: steps in which only levels with few objects are shown.
        patch_loss: weight of `patch_words`, a training aid.
    """

    data: Path
    hidden_size: int = 96
    num_layers: int = 4
    tower_size: int = 64
    tower_layers: int = 2
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    easy_steps: int = 300
    patch_loss: float = 0.3
    save_every: int = 200
    log_every: int = 20


class Batch(NamedTuple):
    """Demonstrated steps, each with several instructions.

    Attributes:
        views: `(batch, columns, rows, 3)` uint8.
        packed: the instructions and the actions they ask for.
    """

    views: NDArray[np.uint8]
    packed: Packed


class Pool:
    """Demonstrations that batches are drawn from.

    Args:
        path: written by `demonstrations`.
        tokenizer: the policy's.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        if not path.exists():
            raise InputError(
                f"no demonstrations in {path}; run python -m "
                "mm_c2c.reference.babyai.demonstrations first"
            )
        self.data = Demonstrations.load(path)
        self.chunks = self.data.chunks()
        self.owners = np.repeat(np.arange(len(self.data.missions)), np.diff(self.data.starts))
        self.tokenizer = tokenizer

    def draw(self, rng: random.Random, count: int) -> Batch:
        """Steps of any episodes, of about equally many past actions: less padding."""
        mixed = [rng.randrange(len(self.owners)) for _ in range(count * _BUCKETS)]
        mixed.sort(key=lambda step: step - self.data.starts[self.owners[step]])
        first = rng.randrange(_BUCKETS) * count
        chosen = mixed[first : first + count]
        turns = [self._turns(step) for step in chosen]
        return Batch(self.data.views[chosen], pack(turns, PREFIX))

    def _turns(self, step: int) -> list[Turn]:
        """The step's own instruction with a chunk, and others with one action."""
        data, owner = self.data, self.owners[step]
        past = data.executed[data.starts[owner] : step].tolist()
        chunk = [action for action in self.chunks[step].tolist() if action >= 0]
        asked = [(data.missions[owner], chunk)]
        others = range(data.other_starts[step], data.other_starts[step + 1])
        asked += [(data.other_missions[i], [int(data.other_advised[i])]) for i in others]
        texts = [instruction_text(mission, past) for mission, _ in asked]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        user, assistant = (self.tokenizer.vocab[word] for word in (USER_TOKEN, ASSISTANT_TOKEN))
        last = len(self.tokenizer) - 1
        return [
            Turn([user, *prompt, assistant], [last - action for action in actions])
            for prompt, (_, actions) in zip(prompts, asked, strict=True)
        ]


def hidden_states(
    model: LlavaForConditionalGeneration, pixels: Tensor, packed: Packed, bos: int
) -> tuple[Tensor, Tensor]:
    """The cells as the decoder reads them, and its states at the instructions' tokens.

    Args:
        model: the policy.
        pixels: `(batch, height, width, 3)` uint8.
        packed: as in `Batch`.
        bos: the token that begins a prompt.
    """
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    features = model.model.get_image_features(pixel_values=scaled, vision_feature_layer=-1)
    image = torch.stack(list(features.pooler_output))
    embed = model.get_input_embeddings()
    start = embed(torch.full((len(pixels), 1), bos))
    prefix = torch.arange(PREFIX).expand(len(pixels), -1)
    out = model.model.language_model(
        inputs_embeds=torch.cat([start, image, embed(packed.input_ids)], dim=1),
        attention_mask=block_mask(packed.segments, PREFIX),
        position_ids=torch.cat([prefix, packed.position_ids], dim=1),
        use_cache=False,
    )
    return image, out.last_hidden_state[:, PREFIX:]


def patch_words(views: NDArray[np.uint8], table: Tensor, fallback: int) -> Tensor:
    """The two words that a cell should say in the decoder's vocabulary: its colour and its kind.

    With this aid a cell that shows a red ball lies near these words, so that the decoder's attention
    finds it by them.

    Args:
        views: `(batch, columns, rows, 3)`.
        table: `(2, 16)`, of kinds and of colours, from `word_table`.
        fallback: token of a cell that shows no object.

    Returns:
        `(batch, cells, 2)`, cells row by row.
    """
    cells = torch.from_numpy(views).long().transpose(1, 2).flatten(1, 2)
    kinds, colours = table[0][cells[..., 0]], table[1][cells[..., 1]]
    colours = torch.where(kinds == fallback, fallback, colours)
    return torch.stack([colours, kinds], dim=-1)


def word_table(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """`(2, 16)`: the token of each object's and of each colour's number; padding for no object."""
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

    table = torch.full((2, 16), tokenizer.pad_token_id)
    objects = {name: OBJECT_TO_IDX[name] for name in ("ball", "box", "key")}
    for row, numbers in enumerate((objects, COLOR_TO_IDX)):
        for word, number in numbers.items():
            (table[row, number],) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return table


def corpus() -> list[str]:
    """Sentences that make every word of the levels one token."""
    from minigrid.core.constants import COLOR_TO_IDX

    places = ["in front of you", "behind you", "on your left", "on your right"]
    things = [
        f"{article} {colour} {kind} {place}"
        for article in ("a", "the")
        for colour in COLOR_TO_IDX
        for kind in ("ball", "box", "key", "object")
        for place in places
    ]
    tasks = ["go to", "pick up", "put the red ball next to"]
    past = " ".join((*ACTIONS, "none"))
    return [f"{task} {thing}. past: {past}" for task in tasks for thing in things]


def train(config: PolicyTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(corpus())
    model = build_model(
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        tower_size=config.tower_size,
        tower_layers=config.tower_layers,
    )
    easy = functools.cache(lambda: Pool(config.data / "easy.npz", tokenizer))
    full = functools.cache(lambda: Pool(config.data / "full.npz", tokenizer))
    camera, table = Camera(), word_table(tokenizer)

    def loss(step: int, rng: random.Random) -> Tensor:
        pool = easy if step < config.easy_steps else full
        batch = pool().draw(rng, config.batch_size)
        pixels = torch.from_numpy(camera.pixels(batch.views))
        image, states = hidden_states(model, pixels, batch.packed, tokenizer.bos_token_id)
        labels = batch.packed.labels
        known = labels != -100
        actions = F.cross_entropy(model.lm_head(states[known]), labels[known])
        said = model.lm_head(F.rms_norm(image, image.shape[-1:])).log_softmax(-1)
        wanted = patch_words(batch.views, table, tokenizer.pad_token_id)
        return actions - config.patch_loss * said.gather(2, wanted).mean()

    def save(_: object) -> None:
        folder = config.out / "policy"
        model.save_pretrained(folder)
        build_processor(tokenizer).save_pretrained(folder)

    model.train()
    optimizers = build_optimizers(model, config.learning_rate, is_matrix=mixes_channels)
    config.loop().run(model, optimizers, config.rate, loss, save)


if __name__ == "__main__":
    run(PolicyTrainingConfig, train)

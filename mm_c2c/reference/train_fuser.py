"""Train the reference fuser: sticker scenes in the source's cache, answers from SmolLM2.

python -m mm_c2c.reference.train_fuser configs/reference_fuser.yaml [key=value ...]
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import LayerKV, SourceCache, fork, read_layers, zeroed
from mm_c2c.config import DTYPES
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import CAPTION_TOKENS
from mm_c2c.fuser import FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.perception import Perception
from mm_c2c.reference.lessons import LessonConfig, draw_lesson
from mm_c2c.reference.models import SOURCE_NAME, SYSTEM, load_source, load_target
from mm_c2c.reference.scene_data import SPLITS, ScenePool
from mm_c2c.reference.scenes import (
    PLACES,
    SCENE_PIXELS,
    Question,
    Scene,
    patch_contents,
)
from mm_c2c.reference.trainer import run
from mm_c2c.rope import RopeSpec, derotate
from mm_c2c.sources.base import SourceInput, count_positions
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.target import Target
from mm_c2c.training.loop import cosine_rate
from mm_c2c.training.packing import Turn, pack, read_packed

_NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class FuserTrainingConfig(LessonConfig):
    """Settings of one training, beside those that each on scenes has.

    Attributes:
        out: where checkpoints, the log and the finished bridge go.
        preset: the fuser's preset.
        layers: which source layers feed a target layer.
        hidden_size: width of the fuser's projection.
        rank: inner width of its heads.
        gate: as in `FuserConfig`.
        weighting: likewise.
        raw_keys: likewise.
        rows: rows of slots.
        cols: columns of slots.
        pooling: as in `LinkConfig`.
        slot_token: one token of the target, as in `BridgeConfig`.
        reconstruct_steps: steps of the first phase: each slot learns to hold what the target's
            cache holds after reading what lies there; no pass through the target.
        reconstruct_scenes: pictures a step of that phase.
        steps: steps of the second phase: cross-entropy of the answers.
        learning_rate: after the warm-up; falls to zero along a cosine. Matrices follow Muon, the
            rest AdamW.
        drop: share of answer steps with an empty source cache: the fuser then learns what can be
            said without looking, and the zeroed control is a blind target that knows the form.
        shuffled: each picture's questions are learned over the next picture's cache: a control,
            which can learn how answers look and nothing about pictures.
    """

    preset: str = "small"
    layers: str = "mix"
    hidden_size: int = 256
    rank: int = 96
    gate: str = "sigmoid"
    weighting: bool = True
    raw_keys: bool = False
    rows: int = 9
    cols: int = 9
    pooling: str = "window"
    slot_token: str = " image"
    reconstruct_steps: int = 300
    reconstruct_scenes: int = 16
    learning_rate: float = 2e-3
    drop: float = 0.1
    shuffled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffled and min(self.scenes, self.reconstruct_scenes) < 2:
            raise ConfigError("shuffled needs at least 2 scenes and 2 reconstruct_scenes a step")

    @property
    def all_steps(self) -> int:
        """Of both phases."""
        return self.reconstruct_steps + self.steps

    def rate(self, step: int) -> float:
        """A warm-up and a cosine to zero in each phase."""
        length = self.reconstruct_steps
        if step >= length:
            step, length = step - length, self.steps
        return cosine_rate(step, self.warmup, length)


class FeatureReader:
    """What a source makes of stored tower features: the same as of the pictures themselves."""

    def __init__(self, source: VLMSource) -> None:
        self.source = source
        self.blank = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS))
        self.layout = source.prefill([SourceInput(images=(self.blank,))])

    @torch.no_grad()
    def read(self, features: Tensor) -> SourceCache:
        """Caches of a batch.

        Args:
            features: `(batch, patches, 2240)`.
        """
        model = self.source.model
        cache = DynamicCache(config=model.config.get_text_config())
        model.model.language_model(
            inputs_embeds=self._embed(features, ""), past_key_values=cache, use_cache=True
        )
        rows = torch.zeros(len(features), dtype=torch.long)
        return replace(self.layout.select(rows), layers=read_layers(cache)[0])

    @torch.no_grad()
    def describe(self, features: Tensor, request: str) -> list[str]:
        """What the source writes about each picture when it is asked for that."""
        embeds = self._embed(features, request)
        written = self.source.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=CAPTION_TOKENS,
            do_sample=False,
        )
        texts = self.source.processor.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _embed(self, features: Tensor, text: str) -> Tensor:
        """The prompt of each picture and a text, `(batch, seq_len, hidden_size)`."""
        model = self.source.model
        rendered = self.source.render(SourceInput(text=text, images=(self.blank,)))
        ids = self.source.processor(images=[self.blank], text=[rendered])["input_ids"]
        input_ids = torch.tensor(ids).expand(len(features), -1)
        image = model.model.multi_modal_projector(model.model.vision_tower.encode(features))
        embeds = model.get_input_embeddings()(input_ids)
        is_image = (input_ids == model.config.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(is_image, image)


class WordCache:
    """The target's own K (without rotation) and V after reading what a patch may show.

    A phrase ends with the name, `In the top left: cat`, so that its last token holds both.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        places = [place for row in PLACES for place in row]
        names = [*SPLITS["train"].names, _NOTHING]
        self.rows = {pair: i for i, pair in enumerate((n, p) for n in names for p in places)}
        texts = [f"In the {place}: {name}" for name, place in self.rows]
        states = torch.cat(
            [read_phrases(bridge.target, texts[i : i + 64]) for i in range(0, len(texts), 64)]
        )
        # A layer's own scale, so that all layers weigh alike.
        self.mean = states.mean(0)
        self.scale = (states - self.mean).pow(2).mean((0, 3)).sqrt().unsqueeze(-1)
        self.states = states

    def wanted(self, scenes: Sequence[Scene], side: int) -> tuple[Tensor, Tensor]:
        """What the slots should hold, and which of them show a sticker.

        Returns:
            `(batch, slots, layers, 2, width)` and `(batch, slots)` bool.
        """
        contents = [patch_contents(scene, side) for scene in scenes]
        rows = [[self.rows[name or _NOTHING, place] for name, place in row] for row in contents]
        covered = [[name is not None for name, _ in row] for row in contents]
        return self.states[torch.tensor(rows)], torch.tensor(covered)


@torch.no_grad()
def read_phrases(target: Target, texts: list[str]) -> Tensor:
    """The target's own K (without rotation) and V at the last token of each phrase.

    Returns:
        `(texts, layers, 2, width)`.
    """
    encoded = target.tokenizer(
        texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
    )
    positions = count_positions(encoded["attention_mask"])
    layers, _, rope = target.read(encoded, positions)
    return last_states(layers, positions, rope).float()


def last_states(
    layers: Sequence[LayerKV], positions: Tensor, rope: Sequence[RopeSpec | None], count: int = 1
) -> Tensor:
    """K without rotation and V of the last positions: `(batch * count, layers, 2, width)`."""
    rows = []
    for (keys, values), spec in zip(layers, rope, strict=True):
        plain = derotate(keys[:, :, -count:], positions[:, -count:], spec)
        both = torch.stack([plain, values[:, :, -count:]], dim=1)
        rows.append(both.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1))
    return torch.stack(rows, dim=1)


def reconstruct_loss(
    bridge: Bridge, words: WordCache, perception: Perception, scenes: Sequence[Scene], side: int
) -> Tensor:
    """Squared distance of the slots from what the target would hold, in units of its spread.

    Slots that show a sticker weigh as much as all that show none.
    """
    layers, _ = read_layers(perception.past_key_values)
    length = perception.input_ids.shape[1]
    positions = torch.arange(length).expand(len(scenes), -1)
    states = last_states(layers, positions, bridge.target.rope(length), side * side)
    wanted, covered = words.wanted(scenes, side)
    error = ((states - wanted.flatten(0, 1)) / words.scale).pow(2).mean((1, 2, 3))
    shown = covered.flatten()
    return 0.5 * (error[shown].mean() + error[~shown].mean())


def answer_loss(bridge: Bridge, perception: Perception, asked: list[list[Question]]) -> Tensor:
    """Cross-entropy of the answers and their end, mean over tokens; gradients reach the fusers.

    Args:
        bridge: with the fusers in training.
        perception: of as many pictures.
        asked: questions about each picture; they share its slots and do not see each other.
    """
    tokenizer = bridge.target.tokenizer
    turns = [
        answer_turns(tokenizer, bridge.question_tokens([q.question for q in questions]), questions)
        for questions in asked
    ]
    done = perception.input_ids.shape[1]
    return turns_loss(bridge.target.model, turns, fork(perception.past_key_values), done)


def turns_loss(
    model: Any,
    turns: list[list[Turn]],
    cache: Cache,
    done: int,
    beginnings: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Cross-entropy of the answers of packed turns, mean over tokens.

    Args:
        model: a causal LM of transformers.
        turns: for each row, in any number; they do not see each other.
        cache: what each of a row's turns reads on from; it grows.
        done: positions in the cache.
        beginnings: as in `pack`.
    """
    packed = pack(turns, done, beginnings)
    logits = read_packed(model, packed, cache, done)
    return F.cross_entropy(logits.float(), packed.labels[packed.labels != -100])


def answer_turns(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], asked: list[Question]
) -> list[Turn]:
    """Each prompt with the answer to its question, and the token that ends it."""
    answers = tokenizer([q.answer for q in asked], add_special_tokens=False)["input_ids"]
    return [Turn(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def train(config: FuserTrainingConfig, until: int | None = None) -> None:
    """Run, or go on with, one training.

    Args:
        config: its settings.
        until: step of both phases after which to stop, so that it can be gone on with; None is the
            last.
    """
    torch.manual_seed(config.seed)
    bridge, source = _build_bridge(config)
    reader = FeatureReader(source)
    pool = ScenePool(config.data)
    # Only the first phase asks for them.
    words = functools.cache(lambda: WordCache(bridge))

    def loss(step: int, rng: random.Random) -> Tensor:
        reconstruct = step < config.reconstruct_steps
        easily = not reconstruct and step < config.reconstruct_steps + config.easy_steps
        count = config.reconstruct_scenes if reconstruct else config.scenes
        odd = 0 if reconstruct else config.odd
        features, scenes = pool.draw(rng, count, easily=easily, odd=odd)
        cache = reader.read(features)
        if config.shuffled:
            cache = cache.select(torch.arange(count).roll(-1))
        if not reconstruct and rng.random() < config.drop:
            cache = zeroed(cache)
        perception = bridge.fuse_slots({SOURCE_NAME: cache})
        if reconstruct:
            return reconstruct_loss(bridge, words(), perception, scenes, config.rows)
        return answer_loss(bridge, perception, draw_lesson(scenes, rng, config))

    def save(_: object) -> None:
        bridge.save_pretrained(config.out / "bridge", dtype=torch.float16)

    loop = replace(config.loop(), steps=until or config.all_steps)
    loop.run(bridge.fusers, config.optimizers(bridge.fusers), config.rate, loss, save)


def _build_bridge(config: FuserTrainingConfig) -> tuple[Bridge, VLMSource]:
    """A bridge to train: untrained, or the one to go on from."""
    target, source = load_target(dtype=DTYPES[config.dtype]), load_source(config.source)
    sources = {SOURCE_NAME: source}
    if config.start is not None:
        return Bridge.from_pretrained(config.start, target, sources), source
    link = LinkConfig(
        source=SOURCE_NAME,
        geometry="slots",
        rows=config.rows,
        cols=config.cols,
        pooling=config.pooling,
        fuser=FuserConfig(
            source=source.shape,
            target=target.shape,
            preset=config.preset,
            layers=config.layers,
            hidden_size=config.hidden_size,
            rank=config.rank,
            gate=config.gate,
            weighting=config.weighting,
            raw_keys=config.raw_keys,
        ),
    )
    prompt = BridgeConfig(links=(link,), system=SYSTEM, slot_token=config.slot_token)
    return Bridge(target, sources, prompt), source


if __name__ == "__main__":
    run(FuserTrainingConfig, train)

"""Train the reference source on sticker scenes; saves as it goes, and resumes.

python -m mm_c2c.reference.train_source configs/reference_source.yaml [key=value ...]
"""

from __future__ import annotations

import functools
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mm_c2c.config import PRECISIONS, check_one_of
from mm_c2c.reference.scene_data import SPLITS, ScenePool, read_shard
from mm_c2c.reference.scenes import (
    CAPTION_REQUEST,
    KINDS,
    Question,
    Scene,
    caption,
    patch_contents,
    questions,
    sample_scene,
)
from mm_c2c.reference.source import (
    ASSISTANT_TOKEN,
    USER_TOKEN,
    build_model,
    build_processor,
    build_tokenizer,
    load_model,
)
from mm_c2c.reference.trainer import TrainerConfig, run
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.optimizers import build_optimizers, mixes_channels
from mm_c2c.training.packing import Packed, Turn, block_mask, pack

logger = logging.getLogger(__name__)

_LEARNED_LATE = ("where", "relation", "odd")


@dataclass(frozen=True, kw_only=True)
class SourceTrainingConfig(TrainerConfig):
    """Settings of one training, beside those that each has.

    Attributes:
        data: folder of shards written by `scene_data`.
        tower: the convolutions' weights, safetensors.
        out: where checkpoints, the log and the finished model go.
        start: folder of a trained source to go on from, with its shape; None starts from nothing.
        hidden_size: width of the attention layers and of the decoder.
        num_layers: decoder layers.
        tower_layers: attention layers over the grid.
        batch_size: pictures a step.
        learning_rate: on AdamW's scale, after the warm-up; falls to zero along a cosine. Matrices
            follow Muon, the rest AdamW.
        precision: `fp32`, or `bf16` for bfloat16 products over float32 weights.
        easy_steps: steps in which only scenes of one and two stickers are shown.
        patch_loss: weight of `patch_words`, a training aid.
        questions: questions a picture a step.
        caption_rate: share of pictures whose caption is asked for too.
    """

    data: Path
    tower: Path
    start: Path | None = None
    hidden_size: int = 192
    num_layers: int = 4
    tower_layers: int = 2
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    precision: str = "fp32"
    warmup: int = 60
    easy_steps: int = 150
    patch_loss: float = 1.0
    questions: int = 8
    caption_rate: float = 0.4
    save_every: int = 100
    log_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("precision", self.precision, PRECISIONS)


def pack_questions(
    tokenizer: PreTrainedTokenizerFast, asked: list[list[Question]], num_patches: int
) -> Packed:
    """Tokenise and pack the questions of a batch of pictures."""
    user, assistant = tokenizer.vocab[USER_TOKEN], tokenizer.vocab[ASSISTANT_TOKEN]

    def turn(question: Question) -> Turn:
        said, answer = tokenizer(
            [question.question, question.answer], add_special_tokens=False
        ).input_ids
        return Turn([user, *said, assistant], [*answer, tokenizer.eos_token_id])

    return pack([[turn(q) for q in picture] for picture in asked], num_patches + 1)


def hidden_states(
    model: LlavaForConditionalGeneration, features: Tensor, packed: Packed, bos: int
) -> tuple[Tensor, Tensor]:
    """The patches as the decoder reads them, and its states at the questions' tokens."""
    tower = model.model.vision_tower
    image = model.model.multi_modal_projector(tower.encode(features))
    embed = model.get_input_embeddings()
    batch, num_patches = image.shape[:2]
    start = embed(torch.full((batch, 1), bos))
    states = torch.cat([start, image, embed(packed.input_ids)], dim=1)
    prefix = torch.arange(num_patches + 1).expand(batch, -1)
    out = model.model.language_model(
        inputs_embeds=states,
        attention_mask=block_mask(packed.segments, num_patches + 1),
        position_ids=torch.cat([prefix, packed.position_ids], dim=1),
        use_cache=False,
    )
    return image, out.last_hidden_state[:, num_patches + 1 :]


def patch_words(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, num_patches: int
) -> Tensor:
    """What a patch should say in the decoder's own vocabulary: its sticker and its place.

    With this aid a patch that shows a cat in the top left lies near the words, so that the
    decoder's attention finds by one what belongs to the other.

    Returns:
        `(batch, num_patches, vocab_size)`, each a distribution: half on the name of the sticker
        that covers the patch's centre (padding where none does), half on the words of its cell.
    """
    words = functools.cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    size = len(tokenizer)
    places: list[int] = []
    shares: list[float] = []
    for row, scene in enumerate(scenes):
        for patch, (name, place) in enumerate(patch_contents(scene, math.isqrt(num_patches))):
            first = size * (row * num_patches + patch)
            named = words(name)[0] if name else tokenizer.pad_token_id
            places += [first + named, *(first + word for word in words(place))]
            shares += [0.5, *[0.5 / len(words(place))] * len(words(place))]
    wanted = torch.zeros(len(scenes) * num_patches * size)
    wanted.index_add_(0, torch.tensor(places), torch.tensor(shares))
    return wanted.view(len(scenes), num_patches, size)


def draw_questions(
    scene: Scene, rng: random.Random, config: SourceTrainingConfig
) -> list[Question]:
    """A mixed handful about one scene; the kinds that are learned last go first."""
    names = SPLITS["train"].names
    found = dict.fromkeys(questions(scene, rng, names) + questions(scene, rng, names))
    mixed = rng.sample(list(found), len(found))
    asked = sorted(mixed, key=lambda q: q.kind not in _LEARNED_LATE)[: config.questions]
    if rng.random() < config.caption_rate:
        asked.append(Question("caption", CAPTION_REQUEST, caption(scene)))
    return asked


def corpus(seed: int, count: int = 3000) -> list[str]:
    """Sentences to train the tokenizer on; held-out names are in its vocabulary too."""
    rng = random.Random(seed)
    names = SPLITS["train"].names + SPLITS["unseen_concept"].names
    lines = []
    for _ in range(count):
        scene = sample_scene(rng, names, {name: ["any"] for name in names})
        lines += [f"{q.question} {q.answer}" for q in questions(scene, rng, names)]
        lines.append(caption(scene))
    return lines


@torch.no_grad()
def accuracy_by_kind(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    scenes: list[Scene],
    seed: int = 1,
) -> dict[str, float]:
    """Share of answers all of whose tokens are the likeliest (equals greedy exact match)."""
    rng = random.Random(seed)
    right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "caption")}
    for first in range(0, len(scenes), 64):
        batch = scenes[first : first + 64]
        asked = [
            [
                *questions(s, rng, SPLITS["train"].names),
                Question("caption", CAPTION_REQUEST, caption(s)),
            ]
            for s in batch
        ]
        packed = pack_questions(tokenizer, asked, features.shape[1])
        states = hidden_states(
            model, features[first : first + 64].float(), packed, tokenizer.bos_token_id
        )[1]
        hit = (model.lm_head(states).argmax(-1) == packed.labels) | (packed.labels == -100)
        for row, picture in enumerate(asked):
            for index, question in enumerate(picture):
                inside = packed.segments[row] == index
                right[question.kind].append(bool(hit[row][inside].all()))
    return {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}


def train(config: SourceTrainingConfig) -> None:
    """Run, or go on with, one training."""
    torch.manual_seed(config.seed)
    model, tokenizer = _build(config)
    pool = ScenePool(config.data)
    # Scenes with an odd one out are few, and the question is the hardest: they come twice.
    pool.all += pool.odd
    if config.start is None:
        model.model.vision_tower.standardise(pool.shards[0][0][:256])
    dev_features, dev_scenes = read_shard(config.data / "dev-0000.safetensors")

    def loss(step: int, rng: random.Random) -> Tensor:
        features, scenes = pool.draw(rng, config.batch_size, easily=step < config.easy_steps)
        packed = pack_questions(
            tokenizer, [draw_questions(s, rng, config) for s in scenes], features.shape[1]
        )
        image, states = hidden_states(model, features, packed, tokenizer.bos_token_id)
        answers = packed.labels != -100
        answer_loss = F.cross_entropy(
            model.lm_head(states[answers]).float(), packed.labels[answers]
        )
        words = model.lm_head(F.rms_norm(image, image.shape[-1:])).float()
        patch_loss = F.cross_entropy(
            words.flatten(0, 1), patch_words(scenes, tokenizer, features.shape[1]).flatten(0, 1)
        )
        return answer_loss + config.patch_loss * patch_loss

    def save(_: object) -> None:
        model.eval()
        scores = accuracy_by_kind(model, tokenizer, dev_features, dev_scenes)
        logger.info("dev %s", {k: round(v, 3) for k, v in scores.items()})
        folder = config.out / "model"
        halves = {name: w.half() for name, w in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=halves)
        build_processor(tokenizer).save_pretrained(folder)
        model.train()

    model.train()
    accelerator = build_accelerator(config.out, precision=config.precision, cpu=True)
    optimizers = build_optimizers(model, config.learning_rate, is_matrix=mixes_channels)
    config.loop(accelerator).run(model, optimizers, config.rate, loss, save)


def _build(
    config: SourceTrainingConfig,
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """A model to train, and its tokenizer: untrained, or the one to go on from."""
    if config.start is not None:
        model, processor = load_model(config.start)
        model.requires_grad_(requires_grad=True)
        model.model.vision_tower.convolutions.requires_grad_(requires_grad=False)
        return model, processor.tokenizer
    tokenizer = build_tokenizer(corpus(config.seed))
    model = build_model(
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        tower_layers=config.tower_layers,
    )
    model.model.vision_tower.convolutions.load_state_dict(load_file(config.tower))
    return model, tokenizer


if __name__ == "__main__":
    run(SourceTrainingConfig, train)

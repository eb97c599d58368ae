"""What trainings on sticker scenes ask about a picture: the settings they share, and the draw."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mm_c2c.config import DTYPES, WIDE_DTYPES, check_one_of
from mm_c2c.errors import ConfigError
from mm_c2c.reference.knowledge import draw_knowledge
from mm_c2c.reference.scene_data import SPLITS
from mm_c2c.reference.scenes import CAPTION_REQUEST, Question, Scene, caption, questions
from mm_c2c.reference.trainer import TrainerConfig
from mm_c2c.training.optimizers import OPTIMIZERS, build_optimizers

# What wants a name to be found among the slots, or all slots to be looked through.
_LEARNED_LATE = ("where", "count", "exists", "odd")
_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class LessonConfig(TrainerConfig):
    """Settings of a training that asks a frozen or tuned target about scenes.

    Attributes:
        data: folder of shards written by `scene_data`.
        source: folder of the trained source.
        start: folder of what such a training saved, to go on from, with its shape; None starts
            from nothing.
        scenes: pictures a step.
        questions: questions a picture; a request to describe it comes on top.
        late: questions a picture of the kinds that are learned late, beside those.
        odd: pictures a step that have an odd one out, among `scenes`; the others may.
        knowledge: how often questions whose answer is not in the picture come beside them, as
            `draw_knowledge` has it; 0 is never.
        easy_steps: steps in which only scenes of one and two stickers are shown, but for those that
            `odd` asks for.
        optimizer: `adamw`, or `muon` for the weights and AdamW for the rest.
        optimizer_dtype: of Muon's own products, as `optimizer.dtype` of `mm-c2c train` has it.
        dtype: of the frozen target while training; what is trained stays in float32. bfloat16 is
            faster only on CPUs with AVX-512 bf16 or AMX; on AVX2 it was measured 36 times slower.
    """

    data: Path
    source: Path
    start: Path | None = None
    steps: int = 400
    scenes: int = 8
    questions: int = 4
    late: int = 0
    odd: int = 0
    knowledge: float = 0.0
    warmup: int = 20
    easy_steps: int = 60
    save_every: int = 25
    log_every: int = 5
    optimizer: str = "muon"
    optimizer_dtype: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.odd <= self.scenes:
            raise ConfigError(f"odd must be in [0, scenes={self.scenes}], got {self.odd}")
        if self.knowledge < 0:
            raise ConfigError(f"knowledge must be 0 or more, got {self.knowledge}")
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("optimizer_dtype", self.optimizer_dtype, WIDE_DTYPES)
        check_one_of("dtype", self.dtype, WIDE_DTYPES)

    def optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        """What moves the weights of a module."""
        dtype = DTYPES[self.optimizer_dtype]
        return build_optimizers(module, self.learning_rate, self.optimizer, dtype=dtype)


def draw_lesson(
    scenes: Sequence[Scene], rng: random.Random, config: LessonConfig
) -> list[list[Question]]:
    """What a step asks about each scene."""
    asked = draw_questions(scenes, rng, config.questions)
    if config.late:
        asked = [q + draw_late(s, rng, config.late) for s, q in zip(scenes, asked, strict=True)]
    if config.knowledge:
        asked = [
            q + draw_knowledge(s, rng, config.knowledge) for s, q in zip(scenes, asked, strict=True)
        ]
    return asked


def draw_questions(scenes: Sequence[Scene], rng: random.Random, count: int) -> list[list[Question]]:
    """As many questions about each scene, and one for all of it.

    `odd` and `relation` come where a scene has them.
    """
    names = SPLITS["train"].names
    return [
        [
            *rng.sample(questions(scene, rng, names), count),
            Question("caption", CAPTION_REQUEST, caption(scene)),
        ]
        for scene in scenes
    ]


def draw_late(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """At most so many questions of the kinds that are learned late, no two the same."""
    names = SPLITS["train"].names
    found = [q for _ in range(_TRIES) for q in questions(scene, rng, names)]
    late = list(dict.fromkeys(q for q in found if q.kind in _LEARNED_LATE))
    return rng.sample(late, min(count, len(late)))

"""The target answers from the source's cache; and controls that hand it another cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Perception
from mm_c2c.cache import SourceCache, zeroed
from mm_c2c.evaluation.arms import Asked, Reply, Setting, captions, options
from mm_c2c.sources.base import SourceInput


@dataclass(frozen=True)
class Fused:
    """The source looks without knowing the question; its cache is all the target gets."""

    setting: Setting

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        return [Reply(text) for text in self._ask(asked, [row.question for row in asked], streamer)]

    def alter(self, cache: SourceCache) -> SourceCache:
        """What is handed over; a control hands over something else."""
        return cache

    def see(self, asked: Sequence[Asked]) -> Perception:
        """The slots, written from what is handed over."""
        looks = [SourceInput(images=(row.picture,)) for row in asked]
        cache = self.alter(self.setting.source.prefill(looks))
        return self.setting.bridge.fuse_slots({self.setting.source_name: cache})

    @torch.no_grad()
    def _ask(
        self, asked: Sequence[Asked], questions: list[str], streamer: BaseStreamer | None
    ) -> list[str]:
        answers = self.setting.bridge.generate(self.see(asked), questions, **options(streamer))
        return [text.strip() for text in answers]


class Shuffled(Fused):
    """A control: each row of a batch gets the next row's cache."""

    def alter(self, cache: SourceCache) -> SourceCache:
        """The rows, moved on by one."""
        return cache.select(torch.arange(cache.batch_size).roll(-1))


class Zeroed(Fused):
    """A control: the same positions with nothing in them."""

    def alter(self, cache: SourceCache) -> SourceCache:
        """Zeros."""
        return zeroed(cache)


class FusedAndCaption(Fused):
    """The cache, and the source's caption as words beside it."""

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        written = captions(self.setting.source, [self.setting.request] * len(asked), asked)
        questions = [
            f"The picture shows: {text}\n{row.question}"
            for text, row in zip(written, asked, strict=True)
        ]
        answers = self._ask(asked, questions, streamer)
        return [Reply(*pair) for pair in zip(answers, written, strict=True)]

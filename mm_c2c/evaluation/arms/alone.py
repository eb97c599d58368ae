"""Each model by itself: the target without the picture, the source without the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.generation.streamers import BaseStreamer

from mm_c2c.evaluation.arms import Asked, Reply, Setting, target_answers


@dataclass(frozen=True)
class Blind:
    """The target alone: the same prompt without slots; the picture is not looked at."""

    setting: Setting

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        questions = [row.question for row in asked]
        decoding = self.setting.decoding(asked, streamer)
        return [Reply(text) for text in target_answers(self.setting.bridge, questions, decoding)]


@dataclass(frozen=True)
class SourceAlone:
    """The source answers itself."""

    setting: Setting

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        looks = [row.look_for(row.question) for row in asked]
        source = self.setting.source
        answers = source.generate(looks, **self.setting.decoding(asked, streamer, source))
        return [Reply(text.strip()) for text in answers]

"""Words instead of the cache: the target reads what another has written about the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers.generation.streamers import BaseStreamer

from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import (
    MAX_NEW_TOKENS,
    Asked,
    Reply,
    Setting,
    captions,
    target_answers,
)
from mm_c2c.evaluation.arms.prompts import OPTIONS_LINE, RelayPrompt, read_winner
from mm_c2c.sources.base import SourceInput


@dataclass(frozen=True)
class CaptionRelay:
    """The source writes a caption without knowing the question, the target reads it."""

    setting: Setting

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        written = self.write(asked)
        prompts = [self.prompt(text, row) for text, row in zip(written, asked, strict=True)]
        answers = target_answers(self.setting.bridge, prompts, streamer)
        return [Reply(*pair) for pair in zip(answers, written, strict=True)]

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The text that is relayed."""
        return captions(self.setting.source, [self.setting.request] * len(asked), asked)

    def prompt(self, text: str, asked: Asked) -> str:
        """What the target reads."""
        return RelayPrompt().ask_target(text, asked.question)


class CaptionRelayWithOptions(CaptionRelay):
    """A caption relay that also shows the target which answers there are."""

    def prompt(self, text: str, asked: Asked) -> str:
        """The caption, the question and its options."""
        return RelayPrompt(options_line=OPTIONS_LINE).ask_target(
            text, asked.question, asked.options
        )


class QuestionAwareRelay(CaptionRelay):
    """A caption relay in the words that a prompt search found best.

    The source writes with the question in view where the winning request holds it.
    """

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """Captions, asked for by the winning request."""
        requests = [self.wording.ask_source(row.question) for row in asked]
        return captions(self.setting.source, requests, asked)

    def prompt(self, text: str, asked: Asked) -> str:
        """In the winning words."""
        return self.wording.ask_target(text, asked.question, asked.options)

    @cached_property
    def wording(self) -> RelayPrompt:
        """What the search found."""
        return read_winner(self.setting.file_of("question_aware_relay"))


class TrueDescription(CaptionRelay):
    """The target reads a true description: the ceiling of what words can tell it."""

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The descriptions that came with the items."""
        missing = sum(row.description is None for row in asked)
        if missing:
            raise InputError(
                f"{missing} of {len(asked)} items have no true description (`caption` in the "
                "JSONL), which the arm 'true_description' reads; leave that arm out"
            )
        return [row.description or "" for row in asked]


class AnswerRelay(CaptionRelay):
    """The source answers, the target repeats the answer in its own words."""

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The source's own answers."""
        looks = [SourceInput(text=row.question, images=(row.picture,)) for row in asked]
        answers = self.setting.source.generate(
            looks, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        return [text.strip() for text in answers]

    def prompt(self, text: str, asked: Asked) -> str:
        """The source's answer before the question."""
        return f"Somebody who sees the picture answers: {text}\n{asked.question}"

"""Words instead of the cache: the target reads what another has written about the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import (
    Asked,
    Reply,
    Setting,
    captions,
    target_answers,
)
from mm_c2c.evaluation.arms.prompts import OPTIONS_LINE, RelayPrompt, read_winner


@dataclass(frozen=True)
class CaptionRelay:
    """The source writes a caption without knowing the question, the target reads it."""

    setting: Setting
    wording: ClassVar[RelayPrompt] = RelayPrompt()

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        written = self.write(asked)
        prompts = [self.prompt(text, row) for text, row in zip(written, asked, strict=True)]
        decoding = self.setting.decoding(asked, streamer)
        answers = target_answers(self.reader, prompts, decoding)
        return [Reply(*pair) for pair in zip(answers, written, strict=True)]

    @property
    def reader(self) -> Bridge:
        """Whose target reads what was written."""
        return self.setting.bridge

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The text that is relayed."""
        return captions(self.setting.source, [self.setting.request] * len(asked), asked)

    def prompt(self, text: str, asked: Asked) -> str:
        """What the target reads."""
        return self.wording.ask_target(text, asked.question, asked.options)


class CaptionRelayWithOptions(CaptionRelay):
    """A caption relay that also shows the target which answers there are."""

    wording = RelayPrompt(options_line=OPTIONS_LINE)


class QuestionAwareRelay(CaptionRelay):
    """A caption relay in the words that a prompt search found best.

    The source writes with the question in view where the winning request holds it.
    """

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """Captions, asked for by the winning request."""
        requests = [self.wording.ask_source(row.question) for row in asked]
        return captions(self.setting.source, requests, asked)

    @cached_property
    def wording(self) -> RelayPrompt:  # type: ignore[override]
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


class TrueDescriptionWithOptions(TrueDescription, CaptionRelayWithOptions):
    """The same with the options shown."""


class InstructionOnly(CaptionRelay):
    """The target reads what a policy reads as words, and sees nothing of what it does."""

    wording = RelayPrompt(template="The robot was told: {caption}\n{question}")

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The policy's own text."""
        missing = sum(not row.look.text.strip() for row in asked)
        if missing:
            raise InputError(
                f"{missing} of {len(asked)} items have no instruction (`text` in the JSONL), which "
                "this arm reads; leave it out"
            )
        return [row.look.text.strip() for row in asked]


class InstructionOnlyWithOptions(InstructionOnly):
    """The same with the options shown."""

    wording = dataclasses.replace(InstructionOnly.wording, options_line=OPTIONS_LINE)


class DescriptionAndInstruction(TrueDescription):
    """A camera that describes all it sees, and the policy's instruction: all but its actions."""

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The description, then the policy's own text."""
        told = InstructionOnly(self.setting).write(asked)
        return [
            f"{seen}\nThe robot was told: {text}"
            for seen, text in zip(super().write(asked), told, strict=True)
        ]


class DescriptionAndInstructionWithOptions(DescriptionAndInstruction, CaptionRelayWithOptions):
    """The same with the options shown."""


class AnswerRelay(CaptionRelay):
    """The source answers, the target repeats the answer in its own words."""

    wording = RelayPrompt(template="Somebody who sees the picture answers: {caption}\n{question}")

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """The source's own answers."""
        looks = [row.look_for(row.question) for row in asked]
        tokens = self.setting.answer_tokens
        answers = self.setting.source.generate(looks, max_new_tokens=tokens, do_sample=False)
        return [text.strip() for text in answers]

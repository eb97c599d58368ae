"""The arms of a comparison: each answers questions about pictures in its own way.

An arm starts from raw pictures and questions and ends with the last token. Adding one is a class
with one method in a file of this folder, and a line in `ARMS`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from transformers import Cache, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.cache import repeat_rows
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms.choice import AmongOptions
from mm_c2c.perception import FusedInputs
from mm_c2c.sources.base import Source, SourceInput, full_cache, with_request
from mm_c2c.sources.text import encode_chats

MAX_NEW_TOKENS = 32
CAPTION_TOKENS = 64

ARMS: dict[str, str] = {
    "fused": "fused:Fused",
    "fused_aligned": "fused:FusedAligned",
    "prefix_only": "fused:PrefixOnly",
    "action_only": "fused:ActionOnly",
    "fused_and_caption": "fused:FusedAndCaption",
    "blind": "alone:Blind",
    "caption_relay": "relay:CaptionRelay",
    "caption_relay_options": "relay:CaptionRelayWithOptions",
    "question_aware_relay": "relay:QuestionAwareRelay",
    "tuned_relay": "tuned:TunedRelay",
    "soft_prompt": "soft_prompt:SoftPrompt",
    "answer_relay": "relay:AnswerRelay",
    "instruction_only": "relay:InstructionOnly",
    "instruction_only_options": "relay:InstructionOnlyWithOptions",
    "true_description": "relay:TrueDescription",
    "true_description_options": "relay:TrueDescriptionWithOptions",
    "description_and_instruction": "relay:DescriptionAndInstruction",
    "description_and_instruction_options": "relay:DescriptionAndInstructionWithOptions",
    "tuned_description": "tuned:TunedDescription",
    "source": "alone:SourceAlone",
    "shuffled": "fused:Shuffled",
    "zeroed": "fused:Zeroed",
    "own_source": "own_source:OwnSource",
}
"""Name to `file:Class`, in the order of the tables; the controls come last."""

FILES = {
    "question_aware_relay": "prompts",
    "tuned_relay": "adapter",
    "tuned_description": "description_adapter",
    "soft_prompt": "connector",
    "fused_aligned": "aligned_bridge",
    "own_source": "own_bridge",
}
"""Arms that want something trained or found before, and the attribute of `Setting` that says where."""

SOURCE_WORDS = (
    "fused_and_caption",
    "caption_relay",
    "caption_relay_options",
    "question_aware_relay",
    "tuned_relay",
    "answer_relay",
    "source",
)
"""Arms that want words of the source; a policy has none."""


class Asked(NamedTuple):
    """One question about what a source is shown.

    Attributes:
        look: what that is, without the question.
        question: what is asked.
        options: answers that this kind of question can have; empty where that is open.
        description: a true description of the picture, where there is one.
        other: what else the source is shown, in the control `shuffled`.
    """

    look: SourceInput
    question: str
    options: tuple[str, ...] = ()
    description: str | None = None
    other: SourceInput | None = None

    @property
    def picture(self) -> Image.Image:
        """The first picture."""
        return self.look.images[0]

    def look_for(self, request: str) -> SourceInput:
        """The same with a question or another request after the source's own text."""
        return with_request(self.look, request)


class Reply(NamedTuple):
    """An arm's answer, and the text that was handed to the target on the way, if any."""

    answer: str
    relayed: str | None = None


class Arm(Protocol):
    """One way to answer."""

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """Answer a batch; a streamer, for a batch of one, gets the answer's tokens as they come."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every arm is built from.

    Attributes:
        bridge: with the frozen models.
        source_name: the source that looks.
        request: what the source is asked for when it writes a caption.
        prompts: result of `mm-c2c prompts`, for the arm `question_aware_relay`.
        adapter: folder of a trained LoRA, for the arm `tuned_relay`.
        description_adapter: folder of a LoRA trained on true descriptions and instructions, for the
            arm `tuned_description`.
        connector: folder of a trained connector, for the arm `soft_prompt`.
        aligned_bridge: folder of a bridge between the same two models whose words are aligned, for
            the arm `fused_aligned`.
        own_bridge: folder of a bridge from the target into itself, for the arm `own_source`.
        among_options: whether an answer can only be one of its question's options, where it has
            any; texts on the way to an answer are free.
        answer_tokens: how many an answer may have.
    """

    bridge: Bridge
    source_name: str
    request: str
    prompts: Path | None = None
    adapter: Path | None = None
    description_adapter: Path | None = None
    connector: Path | None = None
    aligned_bridge: Path | None = None
    own_bridge: Path | None = None
    among_options: bool = False
    answer_tokens: int = MAX_NEW_TOKENS

    @property
    def source(self) -> Source:
        """The source that looks."""
        return self.bridge.sources[self.source_name]

    def decoding(
        self, asked: Sequence[Asked], streamer: BaseStreamer | None, reader: Any = None
    ) -> dict[str, Any]:
        """How an arm decodes its answers, as `generate` takes it; for one call.

        Args:
            asked: the rows of the batch.
            streamer: for a batch of one.
            reader: a source, where that answers; None is the target.
        """
        if not self.among_options:
            return options(streamer, self.answer_tokens)
        rows = [row.options for row in asked]
        choice = AmongOptions(rows, reader or self.bridge.target, self.answer_tokens)
        return {
            **options(streamer, choice.max_new_tokens),
            "logits_processor": LogitsProcessorList([choice]),
        }

    def file_of(self, arm: str) -> Path:
        """Where the arm's own file or folder is.

        Raises:
            ConfigError: the setting does not say.
        """
        found: Path | None = getattr(self, FILES[arm])
        if found is None:
            raise ConfigError(
                f"the arm {arm!r} wants `{FILES[arm]}=PATH`; configs/README.md says what makes it"
            )
        return found


def build_arm(name: str, setting: Setting) -> Arm:
    """An arm by its name.

    Raises:
        ConfigError: no arm of that name, or one whose file is not given.
    """
    if name not in ARMS:
        close = difflib.get_close_matches(name, ARMS, n=1)
        hint = f"; closest: {close[0]}" if close else ""
        raise ConfigError(f"no arm {name!r}; known: {', '.join(ARMS)}{hint}")
    if name in FILES:
        setting.file_of(name)
    module, _, kind = ARMS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(setting)


def target_answers(
    bridge: Bridge, prompts: Sequence[str], decoding: Mapping[str, Any] | None = None
) -> list[str]:
    """The target's own answers to a batch of prompts, in its chat template.

    Args:
        bridge: with the target.
        prompts: one a row.
        decoding: from `Setting.decoding`; None is free.
    """
    inputs = chat_inputs(bridge, prompts)
    out = bridge.target.generate(inputs, **(decoding or options(None)))
    texts = bridge.target.tokenizer.batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


@torch.no_grad()
def chat_inputs(bridge: Bridge, prompts: Sequence[str]) -> FusedInputs:
    """What `target.generate` takes of words alone, in its chat template.

    What stands before every prompt is read once and kept, as a bridge keeps it where slots follow:
    by the clock, words and caches begin at the same place. Rows of unlike length, which are padded
    in front, are read whole.

    Args:
        bridge: with the target.
        prompts: one a row.
    """
    encoded, _ = encode_chats(
        bridge.target.tokenizer, list(prompts), bridge.device, bridge.config.system
    )
    rows, begun = encoded["input_ids"], bridge.fuse_slots({})
    cache: Cache = full_cache(bridge.target.model)
    if begun.input_ids.numel() and (rows[:, : begun.input_ids.shape[1]] == begun.input_ids).all():
        cache = repeat_rows(begun.past_key_values, len(rows))
    return FusedInputs(
        input_ids=rows, attention_mask=encoded["attention_mask"], past_key_values=cache
    )


def captions(source: Source, requests: Sequence[str], asked: Sequence[Asked]) -> list[str]:
    """What the source writes about each picture when it is asked for that."""
    looks = [row.look_for(request) for request, row in zip(requests, asked, strict=True)]
    written = source.generate(looks, max_new_tokens=CAPTION_TOKENS, do_sample=False)
    return [text.strip() for text in written]


def options(streamer: BaseStreamer | None, tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
    """How every arm decodes a free answer: greedily, a few tokens."""
    return {"max_new_tokens": tokens, "do_sample": False, "streamer": streamer}

"""Arms of a comparison: each answers a question about a picture in its own way.

All arms start from the raw picture and question, and end with the last token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache
from mm_c2c.sources.base import Source, SourceInput
from mm_c2c.sources.text import encode_chats

MAX_NEW_TOKENS = 12
CAPTION_TOKENS = 64


class Answer(NamedTuple):
    """An answer and what it took.

    Attributes:
        answer: the text.
        ttft_ms: from raw inputs to the first token of the answer.
        total_ms: from raw inputs to the end.
        tokens: tokens of the answer, and of texts that were written on the way.
        relayed: the text that the target had to go by, if there was one.
    """

    answer: str
    ttft_ms: float
    total_ms: float
    tokens: int
    relayed: str | None = None


class Reply(NamedTuple):
    """What an arm returns: the answer, and the text that was relayed to the target, if any."""

    answer: str
    relayed: str | None = None


class Arm(Protocol):
    """One way to answer."""

    def answer(
        self, picture: Image.Image, question: str, streamer: BaseStreamer | None = None
    ) -> Reply:
        """Answer one question; the streamer is given the answer's tokens as they are made."""


class Stopwatch(BaseStreamer):
    """Notes when the first token of an answer came; the prompt comes first and does not count."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        del value
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` at the end."""


def timed(arm: Arm, bridge: Bridge, picture: Image.Image, question: str) -> Answer:
    """Run one arm by the clock."""
    watch = Stopwatch()
    started = time.perf_counter()
    reply = arm.answer(picture, question, watch)
    ended = time.perf_counter()
    text = reply.answer if reply.relayed is None else f"{reply.relayed} {reply.answer}"
    return Answer(
        answer=reply.answer,
        ttft_ms=1000 * ((watch.first or ended) - started),
        total_ms=1000 * (ended - started),
        tokens=len(bridge.target.tokenizer(text)["input_ids"]),
        relayed=reply.relayed,
    )


@dataclass(frozen=True)
class Fused:
    """The target answers from the source's cache."""

    bridge: Bridge

    def answer(
        self, picture: Image.Image, question: str, streamer: BaseStreamer | None = None
    ) -> Reply:
        """See `Arm`."""
        seen = self.bridge.perceive(picture)
        return Reply(self.bridge.generate(seen, [question], **_options(streamer))[0].strip())


@dataclass(frozen=True)
class Blind:
    """The target alone: the same prompt without slots."""

    bridge: Bridge

    def answer(
        self, picture: Image.Image, question: str, streamer: BaseStreamer | None = None
    ) -> Reply:
        """See `Arm`; the picture is not looked at."""
        del picture
        return Reply(target_answers(self.bridge, [question], streamer)[0])


@dataclass(frozen=True)
class CaptionRelay:
    """The source writes a caption, the target reads it and answers."""

    bridge: Bridge
    source: Source
    request: str

    def answer(
        self, picture: Image.Image, question: str, streamer: BaseStreamer | None = None
    ) -> Reply:
        """See `Arm`."""
        item = SourceInput(text=self.request, images=(picture,))
        caption = self.source.generate([item], max_new_tokens=CAPTION_TOKENS, do_sample=False)[0]
        prompt = relay_prompt(caption.strip(), question)
        return Reply(target_answers(self.bridge, [prompt], streamer)[0], caption.strip())


@dataclass(frozen=True)
class SourceAlone:
    """The source answers itself."""

    source: Source

    def answer(
        self, picture: Image.Image, question: str, streamer: BaseStreamer | None = None
    ) -> Reply:
        """See `Arm`."""
        item = SourceInput(text=question, images=(picture,))
        return Reply(self.source.generate([item], **_options(streamer))[0].strip())


def relay_prompt(caption: str, question: str) -> str:
    """What the target reads in a caption relay."""
    return f"The picture shows: {caption}\n{question}"


def arms(bridge: Bridge, source: Source, request: str) -> dict[str, Arm]:
    """All arms by name, in the order of the tables."""
    return {
        "fused": Fused(bridge),
        "blind": Blind(bridge),
        "caption_relay": CaptionRelay(bridge, source, request),
        "source": SourceAlone(source),
    }


@torch.no_grad()
def target_answers(
    bridge: Bridge, prompts: list[str], streamer: BaseStreamer | None = None
) -> list[str]:
    """The target's own answers to a batch of prompts, in its chat template."""
    encoded, _ = encode_chats(bridge.target.tokenizer, prompts, bridge.device, bridge.config.system)
    out = bridge.target.model.generate(**encoded, **_options(streamer))
    texts = bridge.target.tokenizer.batch_decode(
        out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def shuffled(cache: SourceCache) -> SourceCache:
    """A control: each row gets the next row's cache."""
    return cache.select(torch.arange(cache.batch_size).roll(-1))


def fused_answers(
    bridge: Bridge, caches: Mapping[str, SourceCache], questions: list[str]
) -> list[str]:
    """Answers to a batch, from the sources' caches."""
    with torch.no_grad():
        perception = bridge.fuse_slots(caches)
    return bridge.generate(perception, questions, **_options(None))


def _options(streamer: BaseStreamer | None) -> dict[str, Any]:
    return {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "streamer": streamer}

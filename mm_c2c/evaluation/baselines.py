"""Arms of a comparison: each answers a question about a picture in its own way.

All arms start from the raw picture and question, and end with the last token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from mm_c2c.bridge import Bridge, Perception
from mm_c2c.cache import LayerKV, SourceCache
from mm_c2c.sources.base import Source, SourceInput
from mm_c2c.sources.text import encode_chats

MAX_NEW_TOKENS = 12
CAPTION_TOKENS = 64


class Answer(NamedTuple):
    """An answer and what it took.

    Attributes:
        answer: the text.
        ttft_ms: from raw inputs to the first piece of the answer.
        total_ms: from raw inputs to the end.
        tokens: tokens of the answer, and of texts that were written on the way.
        relayed: the text that the target had to go by, if there was one.
    """

    answer: str
    ttft_ms: float
    total_ms: float
    tokens: int
    relayed: str | None = None


class Arm(Protocol):
    """One way to answer."""

    def pieces(self, picture: Image.Image, question: str) -> Iterator[str]:
        """The answer, piece by piece."""


def timed(arm: Arm, bridge: Bridge, picture: Image.Image, question: str) -> Answer:
    """Run one arm by the clock."""
    started = time.perf_counter()
    first = None
    parts = []
    for piece in arm.pieces(picture, question):
        if first is None and piece:
            first = time.perf_counter()
        parts.append(piece)
    ended = time.perf_counter()
    answer = "".join(parts).strip()
    relayed = getattr(arm, "relayed", None)
    text = answer if relayed is None else f"{relayed} {answer}"
    return Answer(
        answer=answer,
        ttft_ms=1000 * ((first or ended) - started),
        total_ms=1000 * (ended - started),
        tokens=len(bridge.target.tokenizer(text)["input_ids"]),
        relayed=relayed,
    )


@dataclass
class Fused:
    """The target answers from the source's cache."""

    bridge: Bridge

    def pieces(self, picture: Image.Image, question: str) -> Iterator[str]:
        """The answer, piece by piece."""
        perception = self.bridge.perceive(picture)
        yield from self.bridge.stream(
            perception, question, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )


@dataclass
class Blind:
    """The target alone: the same prompt without slots."""

    bridge: Bridge

    def pieces(self, picture: Image.Image, question: str) -> Iterator[str]:
        """The answer, piece by piece."""
        yield from _target_pieces(self.bridge, question)


@dataclass
class CaptionRelay:
    """The source writes a caption, the target reads it and answers."""

    bridge: Bridge
    source: Source
    request: str
    relayed: str | None = None

    def pieces(self, picture: Image.Image, question: str) -> Iterator[str]:
        """The answer, piece by piece."""
        item = SourceInput(text=self.request, images=(picture,))
        caption = self.source.generate([item], max_new_tokens=CAPTION_TOKENS, do_sample=False)[0]
        self.relayed = caption.strip()
        yield from _target_pieces(self.bridge, relay_prompt(self.relayed, question))


@dataclass
class SourceAlone:
    """The source answers itself."""

    source: Source

    def pieces(self, picture: Image.Image, question: str) -> Iterator[str]:
        """The answer in one piece."""
        item = SourceInput(text=question, images=(picture,))
        yield self.source.generate([item], max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]


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
def target_answers(bridge: Bridge, prompts: list[str]) -> list[str]:
    """The target's own answers to a batch of prompts, in its chat template."""
    encoded, _ = encode_chats(bridge.target.tokenizer, prompts, bridge.device, bridge.config.system)
    out = bridge.target.model.generate(**encoded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return bridge.target.tokenizer.batch_decode(
        out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )


def shuffled(cache: SourceCache) -> SourceCache:
    """A control: each row gets the next row's cache."""
    return cache.select(torch.arange(cache.batch_size).roll(-1))


def zeroed(cache: SourceCache) -> SourceCache:
    """A control: the same positions, nothing in them."""
    blank = tuple(LayerKV(torch.zeros_like(k), torch.zeros_like(v)) for k, v in cache.layers)
    return replace(cache, layers=blank)


def fused_answers(
    bridge: Bridge, caches: Mapping[str, SourceCache], questions: list[str]
) -> list[str]:
    """Answers to a batch, from the sources' caches."""
    with torch.no_grad():
        perception: Perception = bridge.fuse_slots(caches)
    return bridge.generate(perception, questions, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)


def _target_pieces(bridge: Bridge, prompt: str) -> Iterator[str]:
    encoded, _ = encode_chats(
        bridge.target.tokenizer, [prompt], bridge.device, bridge.config.system
    )
    streamer = TextIteratorStreamer(
        bridge.target.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    worker = Thread(
        target=bridge.target.model.generate,
        kwargs={**encoded, **options, "streamer": streamer},
        daemon=True,
    )
    worker.start()
    yield from streamer
    worker.join()

"""Bridges between tiny models, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Cache, DynamicCache

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import SourceCache
from mm_c2c.fuser import FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs
from mm_c2c.sources import SourceInput
from mm_c2c.sources.text import TextSource
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.sources.vlm_families import PaliGemmaSource
from mm_c2c.target import Target

QUESTIONS = ("is it red ?", "Which sticker is above the apple ? answer with one word :")
EYES = ("eyes", "slots")
ATTENTIVE_EYES = (*EYES, "resampler")
GEOMETRIES: dict[str, list[tuple[str, ...]]] = {
    "slots": [EYES],
    "resampled slots": [ATTENTIVE_EYES],
    "aligned": [("eyes", "aligned")],
    "both": [EYES, ("reader", "aligned")],
}
SLOT = "a"  # one token in any byte-level vocabulary
EACH_GEOMETRY = pytest.mark.parametrize("geometry", list(GEOMETRIES))
EACH_POOLING = pytest.mark.parametrize(
    "eyes_link", [EYES, ATTENTIVE_EYES], ids=["window", "resampler"]
)


class Rig:
    """A target, its sources and the bridges between them, over one pair of pictures."""

    def __init__(self, target: Target, sources: dict[str, Any], pictures: list[Image.Image]):
        self.target = target
        self.sources = sources
        self.pictures = pictures

    def link(self, source: str, geometry: str, pooling: str = "window", **fuser: Any) -> LinkConfig:
        shapes = {"source": self.sources[source].shape, "target": self.target.shape}
        return LinkConfig(
            source=source,
            geometry=geometry,
            fuser=FuserConfig(**{**shapes, "hidden_size": 16, "rank": 8, **fuser}),
            rows=2,
            cols=3,
            pooling=pooling,
        )

    def bridge(
        self,
        links: Sequence[tuple[str, ...]],
        *,
        fresh: bool = False,
        images: int = 1,
        **fuser: Any,
    ) -> Bridge:
        """A bridge with random weights; the same links get the same weights."""
        config = BridgeConfig(
            links=tuple(replace(self.link(*link, **fuser), images=images) for link in links),
            slot_token=SLOT,
        )
        bridge = Bridge(self.target, self.sources, config)
        if not fresh:
            for module in bridge.fusers.values():
                generator = torch.Generator().manual_seed(3)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return bridge.eval()

    def caches(
        self, bridge: Bridge, questions: Sequence[str] = QUESTIONS, rows: Sequence[int] = (0, 1)
    ) -> dict[str, SourceCache]:
        """The sources' caches of the same questions (and pictures) for the aligned links."""
        named = {link.source for link in bridge.config.links if link.geometry == "aligned"}
        inputs = [
            SourceInput(text=question, images=(self.pictures[row],))
            for question, row in zip(questions, rows, strict=True)
        ]
        texts = [SourceInput(text=question) for question in questions]
        return {
            name: self.sources[name].prefill(texts if name == "reader" else inputs)
            for name in named
        }

    @torch.no_grad()
    def fuse(
        self, bridge: Bridge, questions: Sequence[str] = QUESTIONS, rows: Sequence[int] = (0, 1)
    ) -> FusedInputs:
        """All that a bridge has to say about the pictures of some rows."""
        perception = None
        if any(link.num_slots for link in bridge.config.links):
            perception = bridge.perceive([self.pictures[row] for row in rows])
        return bridge.fuse(perception, questions, self.caches(bridge, questions, rows))


class LazySources(dict[str, Any]):
    """Sources that are built when first asked for: a test pays for those it uses."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self.request = request

    def __missing__(self, name: str) -> Any:
        get = self.request.getfixturevalue
        if name == "eyes":
            vlm = get("tiny_llava")
            self[name] = VLMSource(vlm.model, vlm.processor, "tiny/llava", "e1")
        elif name == "second":
            vlm = get("tiny_paligemma")
            self[name] = PaliGemmaSource(vlm.model, vlm.processor, "tiny/pali")
        else:
            tokenizer = get("tiny_text_source_tokenizer")
            self[name] = TextSource(get("tiny_text_source"), tokenizer, "tiny/text")
        return self[name]


def close(bridge: Bridge) -> Bridge:
    for fuser in bridge.fusers.values():
        fuser.close()
    return bridge


def repeated(cache: Cache, times: int) -> DynamicCache:
    """A cache of its own, each row `times` times, made without the library."""
    new = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            torch.stack([x[row] for row in range(x.shape[0]) for _ in range(times)])
            for x in (layer.keys, layer.values)
        )
        new.update(keys, values, index)
    return new


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def read_on(model: Any, fused: FusedInputs) -> Tensor:
    """Logits of the positions that the cache does not cover; the cache is not grown."""
    cache = repeated(fused["past_key_values"], 1)
    done = cache.get_seq_length()
    return model(
        fused["input_ids"][:, done:],
        attention_mask=fused["attention_mask"],
        position_ids=positions(fused["attention_mask"])[:, done:],
        past_key_values=cache,
    ).logits


@torch.no_grad()
def target_alone(model: Any, fused: FusedInputs, prefix_len: int) -> FusedInputs:
    """The same inputs with the target's own cache, prefilled in the same pieces.

    Pieces of another length would round differently, and bit for bit could not be asked.
    """
    ids, mask = fused["input_ids"], fused["attention_mask"]
    first = DynamicCache()
    model(ids[:1, :prefix_len], past_key_values=first)
    cache = repeated(first, len(ids))
    done = fused["past_key_values"].get_seq_length()
    if done > prefix_len:
        model(
            ids[:, prefix_len:done],
            attention_mask=mask[:, :done],
            position_ids=positions(mask)[:, prefix_len:done],
            past_key_values=cache,
        )
    return FusedInputs(input_ids=ids, attention_mask=mask, past_key_values=cache)


def prefix_len(bridge: Bridge, fused: FusedInputs) -> int:
    question_len = bridge.prompt.read(QUESTIONS).input_ids.shape[1]
    return fused["input_ids"].shape[1] - question_len


def assert_same_cache(got: Cache, expected: Cache, **tolerance: float) -> None:
    assert len(got.layers) == len(expected.layers)
    for one, other in zip(got.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **tolerance)
        torch.testing.assert_close(one.values, other.values, **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

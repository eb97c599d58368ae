"""The target answers from the source's cache; and controls that hand it another cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache, zeroed
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Reply, Setting, captions
from mm_c2c.link import LinkConfig
from mm_c2c.perception import Perception
from mm_c2c.pretrained import read_header
from mm_c2c.sources.base import SourceInput


@dataclass(frozen=True)
class Fused:
    """The source looks without knowing the question; its cache is all the target gets.

    Where links are aligned, the source reads the question too, for them.
    """

    setting: Setting

    def __post_init__(self) -> None:
        others = {link.source for link in self.setting.bridge.config.links}
        others -= {self.setting.source_name}
        if others:
            raise ConfigError(
                f"this arm hands over what one source saw, {self.setting.source_name!r}; the "
                f"bridge has links of {', '.join(sorted(others))} too: evaluate it by its own code"
            )

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        return [Reply(text) for text in self._ask(asked, [row.question for row in asked], streamer)]

    def alter(self, cache: SourceCache) -> SourceCache:
        """What is handed over; a control hands over something else."""
        return cache

    def see(self, asked: Sequence[Asked]) -> Perception:
        """The slots, written from what is handed over."""
        cache = self.alter(self.setting.source.prefill([row.look for row in asked]))
        return self.setting.bridge.fuse_slots({self.setting.source_name: cache}, self.keep(asked))

    def hear(self, asked: Sequence[Asked], questions: Sequence[str]) -> SourceCache:
        """What is handed over of the words that the source reads with the target."""
        looks = [row.look_for(text) for row, text in zip(asked, questions, strict=True)]
        return self.alter(self.setting.source.prefill(looks))

    def keep(self, asked: Sequence[Asked]) -> dict[str, Tensor] | None:
        """The slots that are written, as `Bridge.fuse_slots` takes them; None writes all."""
        del asked
        return None

    @torch.no_grad()
    def _ask(
        self, asked: Sequence[Asked], questions: list[str], streamer: BaseStreamer | None
    ) -> list[str]:
        bridge, name = self.setting.bridge, self.setting.source_name
        geometries = {link.geometry for link in bridge.config.links}
        seen = self.see(asked) if "slots" in geometries else None
        heard = {}
        if "aligned" in geometries:
            heard[name] = self.hear(asked, questions)
            # Words that are aligned must be the source's own.
            questions = [
                row.look_for(text).text for row, text in zip(asked, questions, strict=True)
            ]
        decoding = self.setting.decoding(asked, streamer)
        return [text.strip() for text in bridge.generate(seen, questions, heard, **decoding)]


@dataclass(frozen=True)
class FusedAligned:
    """Another fuser between the same two models, whose links are aligned.

    The source reads every question too, as the paper's does; nothing it saw serves a second one.
    """

    setting: Setting

    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        return self.fused.answer(asked, streamer)

    @cached_property
    def fused(self) -> Fused:
        """The arm of that bridge."""
        folder = self.setting.file_of("fused_aligned")
        sources = dict.fromkeys(read_header(folder)["sources"], self.setting.source)
        bridge = Bridge.from_pretrained(folder, self.setting.bridge.target, sources)
        blind = sorted(link.name for link in bridge.config.links if link.geometry != "aligned")
        if blind or len(sources) != 1:
            raise ConfigError(
                f"aligned_bridge={folder}: expected a bridge of one source whose links are all "
                f"aligned, got {len(sources)} sources and the slots of {', '.join(blind) or 'none'}"
                "; `bridge=` evaluates any other"
            )
        return Fused(
            dataclasses.replace(self.setting, bridge=bridge, source_name=next(iter(sources)))
        )


class PrefixOnly(Fused):
    """Of a policy's cache what stands before its state and actions; their slots stay unwritten.

    That is what `drop.links` of a training leaves.
    """

    actions = False

    def keep(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """The slots of the links of that part."""
        bridge = self.setting.bridge
        links = [link for link in bridge.config.links if link.source == self.setting.source_name]
        kept = [reads_actions(link) == self.actions for link in links]
        if not any(kept):
            raise ConfigError(
                f"no link of source {self.setting.source_name!r} reads "
                f"{'its state or actions' if self.actions else 'what stands before its actions'}; "
                f"leave this arm out (links: {', '.join(link.name for link in links)})"
            )
        return {
            link.name: torch.full((len(asked), link.num_slots), here, device=bridge.device)
            for link, here in zip(links, kept, strict=True)
        }


class ActionOnly(PrefixOnly):
    """Of a policy's cache its state and actions alone."""

    actions = True


def reads_actions(link: LinkConfig) -> bool:
    """Whether a link draws on a policy's state or actions."""
    return not {"state", "action"}.isdisjoint(link.kinds)


class Shuffled(Fused):
    """A control: each row gets the cache of what another item shows."""

    def see(self, asked: Sequence[Asked]) -> Perception:
        """The slots, written from the other look."""
        return super().see([row._replace(look=_other(row)) for row in asked])

    def hear(self, asked: Sequence[Asked], questions: Sequence[str]) -> SourceCache:
        """The row's own words, for they are aligned, beside what the other look shows."""
        looks = [dataclasses.replace(_other(row), text=row.look.text) for row in asked]
        rows = [row._replace(look=look) for row, look in zip(asked, looks, strict=True)]
        return super().hear(rows, questions)


def _other(row: Asked) -> SourceInput:
    if row.other is None:
        raise ConfigError(
            "the arm 'shuffled' wants `other`, what another item shows; give items of two "
            "pictures (of two episodes, where they are of such), or leave this arm out"
        )
    return row.other


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

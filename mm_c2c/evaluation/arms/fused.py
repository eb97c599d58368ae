"""The target answers from the source's cache; and controls that hand it another cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mm_c2c.cache import SourceCache, zeroed
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Reply, Setting, captions
from mm_c2c.link import LinkConfig
from mm_c2c.perception import Perception


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
        cache = self.alter(self.setting.source.prefill([row.look for row in asked]))
        return self.setting.bridge.fuse_slots({self.setting.source_name: cache}, self.keep(asked))

    def keep(self, asked: Sequence[Asked]) -> dict[str, Tensor] | None:
        """The slots that are written, as `Bridge.fuse_slots` takes them; None writes all."""
        del asked
        return None

    @torch.no_grad()
    def _ask(
        self, asked: Sequence[Asked], questions: list[str], streamer: BaseStreamer | None
    ) -> list[str]:
        decoding = self.setting.decoding(asked, streamer)
        answers = self.setting.bridge.generate(self.see(asked), questions, **decoding)
        return [text.strip() for text in answers]


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

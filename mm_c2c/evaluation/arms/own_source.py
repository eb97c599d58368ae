"""A control: the target is its own source, so that a fuser has nothing new to hand over."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Reply, Setting
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import TextSource
from mm_c2c.target import Target

OWN_NAME = "itself"
"""The source's name in such a bridge."""
_WIDEST = 4096


@dataclass(frozen=True)
class OwnSource:
    """The target's own cache of the question, through a fuser trained for that, into itself.

    Nobody looks at the picture: what this arm gets right, the fuser's parameters know.
    """

    setting: Setting

    @torch.no_grad()
    def answer(self, asked: Sequence[Asked], streamer: BaseStreamer | None = None) -> list[Reply]:
        """See `Arm`."""
        questions = [row.question for row in asked]
        cache = self.bridge.sources[OWN_NAME].prefill([SourceInput(text=q) for q in questions])
        decoding = self.setting.decoding(asked, streamer)
        said = self.bridge.generate(None, questions, {OWN_NAME: cache}, **decoding)
        return [Reply(text.strip()) for text in said]

    @cached_property
    def bridge(self) -> Bridge:
        """The trained bridge from the target into itself."""
        return load_own_bridge(self.setting.file_of("own_source"), self.setting.bridge.target)


def own_source(target: Target) -> TextSource:
    """The target as a source of text; the model is shared."""
    origin = target.origin
    return TextSource(target.model, target.tokenizer, origin.model, origin.revision)


def load_own_bridge(folder: Path, target: Target) -> Bridge:
    """A trained bridge from a target into itself."""
    return Bridge.from_pretrained(folder, target, {OWN_NAME: own_source(target)})


def build_own_bridge(bridge: Bridge, parameters: int) -> Bridge:
    """An untrained bridge from a target into itself: one link between the words of a question.

    Args:
        bridge: whose target, prompt, and proportion of the fuser's rank to its width it takes.
        parameters: at most so many are trained, as far as a whole width goes.
    """
    target, like = bridge.target, bridge.config.links[0].fuser

    def fuser(width: int) -> FuserConfig:
        rank = max(1, round(width * like.rank / like.hidden_size))
        return FuserConfig(source=target.shape, target=target.shape, hidden_size=width, rank=rank)

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(param.numel() for param in CacheFuser(fuser(width)).parameters())

    width = bisect_right(range(1, _WIDEST + 1), parameters, key=count)
    if not width:
        raise ConfigError(
            f"parameters={parameters} is too few: a fuser of width 1 between {target} and itself "
            f"has {count(1)}"
        )
    link = LinkConfig(source=OWN_NAME, geometry="aligned", fuser=fuser(width))
    config = dataclasses.replace(bridge.config, links=(link,))
    return Bridge(target, {OWN_NAME: own_source(target)}, config)

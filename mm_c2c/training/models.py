"""The frozen models of a training, and the bridge between them."""

from __future__ import annotations

from typing import Any

import torch

from mm_c2c import sources
from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.config import DTYPES
from mm_c2c.errors import ConfigError
from mm_c2c.reference import models as reference
from mm_c2c.reference import whisper
from mm_c2c.reference.fetch import HUB_ID
from mm_c2c.reference.tower import register
from mm_c2c.sources import Source
from mm_c2c.target import Target
from mm_c2c.training.config import ModelConfig, TrainingConfig


def load_target(config: ModelConfig) -> Target:
    """The LLM that answers; the reference target as this library fetches it."""
    if (config.model, config.revision) == (HUB_ID, None):
        return reference.load_target(dtype=DTYPES[config.dtype])
    return Target.from_pretrained(config.model, config.revision, dtype=DTYPES[config.dtype])


def load_source(config: ModelConfig) -> Source:
    """A model that is read; the reference source's tower is known too.

    Whisper tiny.en as this library fetches it, in float32.
    """
    if (config.model, config.revision, config.dtype) == (whisper.NAME, None, "float32"):
        return whisper.load_whisper()
    register()
    return sources.load_source(config.model, config.revision, dtype=DTYPES[config.dtype])


def build_bridge(config: TrainingConfig, target: Target, named: dict[str, Any]) -> Bridge:
    """A bridge to train: untrained, or the one to go on from.

    Raises:
        ConfigError: answers of a source are to be learned that has no words.
    """
    if config.start is not None:
        bridge = Bridge.from_pretrained(config.start, target, named).train()
    else:
        shapes = {name: source.shape for name, source in named.items()}
        links = config.build_links(shapes, target.shape)
        prompt = BridgeConfig(links=links, system=config.system, slot_token=config.slot_token)
        torch.manual_seed(config.seed)
        bridge = Bridge(target, named, prompt)
    if config.phases.generate.distill:
        for link in bridge.config.links:
            _check_words(link.source, named[link.source])
    return bridge


def _check_words(name: str, source: Any) -> None:
    if not getattr(source, "answers_in_words", True):
        raise ConfigError(
            f"phases.generate.distill takes the answers of source {name!r}, and "
            f"{source.origin.model} answers with actions, not words; set it to 0"
        )

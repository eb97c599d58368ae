"""The frozen models of a training, and the bridge between them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.errors import FetchError
from mm_c2c.reference.tower import register
from mm_c2c.sources import Source, source_class
from mm_c2c.sources.text import TextSource
from mm_c2c.target import Target
from mm_c2c.training.config import ModelConfig, TrainingConfig


def load_target(config: ModelConfig) -> Target:
    """The LLM that answers, from a folder or the Hub."""
    model = _load(AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype))
    return Target(model, _load(AutoTokenizer, config), config.model, config.revision)


def load_source(config: ModelConfig) -> Source:
    """A model that is read, by the class that its family has.

    Raises:
        FetchError: it could not be had.
        UnsupportedError: a family that is not known here.
    """
    register()
    found = _load(AutoConfig, config)
    kind = source_class(found.model_type, has_vision=hasattr(found, "vision_config"))
    dtype = getattr(torch, config.dtype)
    is_text = issubclass(kind, TextSource)
    architecture = getattr(transformers, found.architectures[0])
    model = _load(architecture, config, dtype=dtype)
    reader = _load(AutoTokenizer if is_text else AutoProcessor, config)
    source: Source = kind(model, reader, config.model, config.revision)
    return source


def build_bridge(config: TrainingConfig, target: Target, sources: dict[str, Any]) -> Bridge:
    """A bridge to train: untrained, or the one to go on from."""
    if config.start is not None:
        return Bridge.from_pretrained(config.start, target, sources).train()
    shapes = {name: source.shape for name, source in sources.items()}
    links = config.build_links(shapes, target.shape)
    prompt = BridgeConfig(links=links, system=config.system, slot_token=config.slot_token)
    torch.manual_seed(config.seed)
    return Bridge(target, sources, prompt)


def _load(kind: Any, config: ModelConfig, **kwargs: Any) -> Any:
    try:
        return kind.from_pretrained(config.model, revision=config.revision, **kwargs)
    except OSError as error:
        raise FetchError(f"model {config.model!r} could not be had: {error}") from error

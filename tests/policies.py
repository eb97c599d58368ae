"""Tiny policies, what they are shown, and a check that reading one changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tiny_vlm import build_frozen, train_tokenizer, vision_config
from torch import Tensor
from transformers import PI0Config, PI0ForConditionalGeneration, SiglipImageProcessorPil
from transformers.models.pi0.processing_pi0 import PI0Processor

from mm_c2c.sources import SourceInput, source_class
from mm_c2c.sources.action import PI0Source

WORDS = ("pick the cat", "put the red square left of a blue circle")
CHUNK = 4
ACTION_DIM = 8


def weights_of(policy: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of weights and buffers, also of those that no checkpoint holds."""
    held = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def attributes_of(policy: torch.nn.Module) -> list[tuple[str, bool, list[str]]]:
    """What each module is called, its mode, and the names of all that it holds."""
    return [(name, m.training, sorted(vars(m))) for name, m in policy.named_modules()]


def assert_reading_changes_nothing(
    policy: torch.nn.Module, act: Callable[[], Tensor], read: Callable[[], Any]
) -> None:
    """Act, read, act again from the same seed: same actions, same random stream, same policy."""
    torch.manual_seed(7)
    before, stream = act(), torch.rand(3)
    weights, attributes = weights_of(policy), attributes_of(policy)
    torch.manual_seed(7)
    cache = read()
    after = act()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(3), stream, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(policy), weights, rtol=0, atol=0)
    assert attributes_of(policy) == attributes
    assert not any(kv.keys.requires_grad or kv.values.requires_grad for kv in cache.layers)
    assert all(weight.grad is None for weight in policy.parameters())


def build_pi0() -> PI0Source:
    """pi0: cameras of 3 x 3 patches; 3 layers, 1 KV head of 10; 4 actions of width 8."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"],
        merges=30,
        chat_template=None,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    image_processor = SiglipImageProcessorPil(size={"height": 21, "width": 21})
    image_processor.image_seq_length = 9
    processor = PI0Processor(
        image_processor,
        tokenizer,
        state_mean=[0.1, 0.2, 0.3],
        state_std=[2.0, 1.0, 0.5],
        max_state_dim=6,
        chunk_size=CHUNK,
    )
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 512,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "vision_config": {
                **vision_config("siglip_vision_model", image_size=21),
                "vision_use_head": False,
            },
            "text_config": {
                **gemma,
                "vocab_size": len(tokenizer),
                "hidden_size": 20,
                "intermediate_size": 32,
            },
            "image_token_id": processor.image_token_id,
            "projection_dim": 20,
        },
        dit_config={**gemma, "hidden_size": 16, "intermediate_size": 24},
        chunk_size=CHUNK,
        max_state_dim=6,
        max_action_dim=ACTION_DIM,
        num_inference_steps=3,
    )
    model = build_frozen(lambda: PI0ForConditionalGeneration(config), seed=5)
    build = source_class("pi0", has_vision=True)
    assert build is PI0Source
    return build(model, processor, "tiny/pi0")


def observe(pictures: list[Image.Image]) -> list[SourceInput]:
    """Two cameras and a short instruction; one camera and a long one."""
    states = torch.tensor([[0.5, -0.5, 1.0], [0.0, 2.0, -1.0]])
    return [
        SourceInput(text=WORDS[0], images=tuple(pictures), state=states[0]),
        SourceInput(text=f" {WORDS[1]}\n", images=(pictures[0],), state=states[1]),
    ]

"""Tiny models of every kind of RoPE, and what `rope_specs` should say of each."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 1, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(rope_type: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model, and what `rope_specs` should say of each of its layers."""

    family: str = "Llama"
    config: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    rotating: tuple[bool, ...] = (True, True, True)
    rotary_dim: int = 16
    scaling: float = 1.0
    interleaved: bool = False
    section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    # A shift by 5 keeps the frequencies.
    is_static: bool = True

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        text, config_class = TEXT | self.config, getattr(transformers, f"{self.family}Config")
        if self.vision is None:
            return AutoModelForCausalLM.from_config(config_class(**text)).eval()
        config = config_class(text_config=text, vision_config=VISION | self.vision)
        return AutoModelForImageTextToText.from_config(config).eval()


LONGROPE = {
    "short_factor": [1.1 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "patch_size": 7}
CASES = {
    "default": Case(config=rope()),
    "linear": Case(config=rope("linear", factor=4.0)),
    "dynamic within its length": Case(config=rope("dynamic", factor=2.0)),
    "dynamic beyond its length": Case(
        config=rope("dynamic", factor=2.0) | {"max_position_embeddings": 8}, is_static=False
    ),
    "llama3": Case(
        config=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "yarn": Case(
        config=rope("yarn", factor=4.0, original_max_position_embeddings=16),
        scaling=0.1 * math.log(4) + 1,
    ),
    "longrope, short": Case(
        family="Phi3",
        config=rope("longrope", **LONGROPE) | {"original_max_position_embeddings": 32},
        scaling=math.sqrt(1 + math.log(2) / math.log(32)),
    ),
    "longrope, long": Case(
        family="Phi3",
        config=rope("longrope", **LONGROPE) | {"original_max_position_embeddings": 8},
        scaling=math.sqrt(1 + math.log(8) / math.log(8)),
    ),
    "a scaling of its own (PhiMoE)": Case(
        family="Phimoe",
        config=rope(
            "longrope",
            original_max_position_embeddings=32,
            short_mscale=1.25,
            long_mscale=1.5,
            **LONGROPE,
        )
        | {"num_local_experts": 2},
        scaling=1.25,
    ),
    "partial (Phi)": Case(family="Phi", config=rope(partial_rotary_factor=0.5), rotary_dim=8),
    "partial (StableLM)": Case(
        family="StableLm", config=rope(partial_rotary_factor=0.25), rotary_dim=4
    ),
    "partial, fused projection (GPT-NeoX)": Case(
        family="GPTNeoX", config=rope(partial_rotary_factor=0.25), rotary_dim=4
    ),
    "key norm (Qwen3)": Case(family="Qwen3", config=rope() | {"head_dim": 16}),
    "sinks and yarn (gpt-oss)": Case(
        family="GptOss",
        config=rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32}
        | {"layer_types": SLIDING},
        scaling=0.1 * math.log(4) + 1,
    ),
    "interleaved (Cohere)": Case(family="Cohere", config=rope(), interleaved=True),
    "interleaved, partial (GLM)": Case(
        family="Glm",
        config=rope(partial_rotary_factor=0.5) | {"head_dim": 16},
        rotary_dim=8,
        interleaved=True,
    ),
    "NoPE layers (SmolLM3)": Case(
        family="SmolLM3",
        config=rope() | {"no_rope_layers": [1, 0, 1]},
        rotating=(True, False, True),
    ),
    "NoPE layers, interleaved (Cohere 2)": Case(
        family="Cohere2",
        config=rope() | {"layer_types": SLIDING, "sliding_window": 32},
        rotating=(True, False, True),
        interleaved=True,
    ),
    "local and global (Gemma 3)": Case(
        family="Gemma3",
        config={
            "head_dim": 16,
            "sliding_window": 32,
            "layer_types": SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        vision={"hidden_size": 24, "num_hidden_layers": 1, "image_size": 28, "patch_size": 7},
    ),
    "blocks (Qwen2-VL)": Case(
        family="Qwen2VL",
        config=rope(mrope_section=[3, 3, 2]),
        vision={"embed_dim": 32, "hidden_size": 64, "patch_size": 7},
        section=(3, 3, 2),
    ),
    "blocks (Qwen2.5-VL)": Case(
        family="Qwen2_5_VL",
        config=rope(mrope_section=[2, 3, 3]),
        vision=QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 28},
        section=(2, 3, 3),
    ),
    "blocks, linear scaling": Case(
        family="Qwen2_5_VL",
        config=rope("linear", factor=2.0, mrope_section=[2, 3, 3]),
        vision=QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 28},
        section=(2, 3, 3),
    ),
    "alternating rows (Qwen3-VL)": Case(
        family="Qwen3VL",
        config=rope(mrope_section=[4, 2, 2], mrope_interleaved=True) | {"head_dim": 16},
        vision=QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        section=(4, 2, 2),
        mrope_interleaved=True,
    ),
    "blocks, partial, interleaved (GLM-4V)": Case(
        family="Glm4v",
        config=rope(mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
        vision=QWEN_VISION,
        rotary_dim=8,
        interleaved=True,
        section=(1, 1, 2),
    ),
}

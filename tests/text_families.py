"""Tiny real text models of many families, and a tokenizer they share: random weights, no hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 8
# Where every layer slides: three layers then see far enough for a slot to reach the answer.
WIDE = 24
SLIDING = ("sliding_attention", "full_attention", "sliding_attention")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SHARED = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_d_conv": 3,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
}


class Family(NamedTuple):
    """A tiny model of a family, and what its cache should hold.

    Attributes:
        config: name of its config class, without `Config`.
        settings: what differs from the settings that all families share.
        fused: decoder layers that hold keys and values.
        head_dim: channels of one head.
        heads: KV heads.
    """

    config: str
    settings: Mapping[str, Any] = {}
    fused: tuple[int, ...] = (0, 1, 2)
    head_dim: int = 8
    heads: int = 2


def _rope(rope_type: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


FAMILIES = {
    "qwen2": Family("Qwen2"),
    "qwen2, sliding": Family(
        "Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Family("Qwen3", {"head_dim": 12}, head_dim=12),
    "qwen3_moe": Family("Qwen3Moe", {"head_dim": 12, **_EXPERTS}, head_dim=12),
    "llama": Family(
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "gemma3_text": Family(
        "Gemma3Text",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": list(SLIDING)}
        | {"num_key_value_heads": 1, "query_pre_attn_scalar": 12},
        head_dim=12,
        heads=1,
    ),
    "mistral": Family("Mistral", {"sliding_window": WIDE, "head_dim": 12}, head_dim=12),
    "phi": Family("Phi", _rope(partial_rotary_factor=0.5)),
    "phi3": Family("Phi3", {"sliding_window": WIDE, **_rope(partial_rotary_factor=0.75)}),
    "smollm3": Family("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": Family("Olmo2"),
    # Its attention knows no groups, whatever a config says of them.
    "gpt_neox": Family(
        "GPTNeoX", {"num_key_value_heads": None, **_rope(partial_rotary_factor=0.25)}, heads=4
    ),
    "gpt_oss": Family(
        "GptOss",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": list(SLIDING)}
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | _rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        head_dim=12,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5Text",
        {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, **_DELTA}
        | _rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
        fused=(1, 3),
        head_dim=16,
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16, **_EXPERTS, **_DELTA},
        fused=(1, 3),
        head_dim=16,
    ),
    "lfm2": Family(
        "Lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        }
        | {"block_multiple_of": 8},
        fused=(1, 3),
    ),
    "falcon_h1": Family("FalconH1", {"mamba_d_ssm": 64, **_MAMBA}),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {"num_hidden_layers": 4, "num_local_experts": 4, "shared_intermediate_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"] * 2, **_MAMBA},
        fused=(1, 3),
    ),
    "gemma3n_text": Family(
        "Gemma3nText",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.0] * 4},
        fused=(0, 1),
    ),
}
# Feel padding amid a prompt, which their caches do not tell.
PADDED = {
    "mpt": Family("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2}),
    "gpt_neo": Family(
        "GPTNeo",
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]}
        | {"window_size": WIDE},
    ),
}
_FACTORS = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
# Turn their keys otherwise in a prompt of more than 72 tokens.
LONGER = {
    "longrope": Family(
        "Phi3", {"original_max_position_embeddings": 72, **_rope("longrope", **_FACTORS)}
    ),
    "dynamic": Family("Llama", {"max_position_embeddings": 72, **_rope("dynamic", factor=2.0)}),
}
# transformers 5.23 lets its recurrent layers start afresh where a cache ends.
FORGETFUL = Family(
    "RecurrentGemma",
    {"block_types": ["recurrent", "attention"], "attention_window_size": WIDE, "lru_width": 32},
    fused=(1,),
)
REFUSED = {
    "deepseek_v2": Family("DeepseekV2", _MLA),
    "deepseek_v3": Family("DeepseekV3", {**_MLA, "n_group": 2, "topk_group": 1}),
    "mamba": Family("Mamba", {"state_size": 4}),
    "mamba2": Family("Mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "gemma4_text": Family(
        "Gemma4Text",
        {"head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW}
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
}


def build(family: Family, vocab_size: int, **changes: Any) -> PreTrainedModel:
    """The family's model with seeded weights, normalisations and biases moved off one and zero."""
    config_class = getattr(transformers, f"{family.config}Config")
    settings = {**_SHARED, "vocab_size": vocab_size, **family.settings, **changes}
    if "hidden_size_per_layer_input" in settings:
        settings["vocab_size_per_layer_input"] = vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config_class(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.0
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # so that attention has something to say
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML, padding on the left."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.add_special_tokens(list(_SPECIAL))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="left",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def states(cache: Cache) -> list[Tensor]:
    """All that a cache holds, recurrent states included."""
    return [
        tensor
        for layer in cache.layers
        for name in ("keys", "values", "conv_states", "recurrent_states")
        for tensor in _tensors(getattr(layer, name, None))
    ]


def _tensors(held: Any) -> list[Tensor]:
    found = held.values() if isinstance(held, dict) else [held]
    return [tensor for tensor in found if tensor is not None]

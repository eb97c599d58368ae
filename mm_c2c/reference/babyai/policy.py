"""The policy: a small LLaVA of transformers' own classes that writes its actions as tokens.

An action is a chunk: the next actions as the policy would take them now, one token each. The loop
executes the first, looks again, and plans again. Of itself the policy remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from mm_c2c.reference.babyai.levels import ACTIONS, CELL_PIXELS, VIEW_CELLS, VIEW_PIXELS
from mm_c2c.reference.source import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    build_llava,
    wrap_tokenizer,
)

CHUNK = 4
"""Actions of a chunk."""

# Edges of the bins, so that the centres of seven are the numbers of the actions.
NUM_BINS = len(ACTIONS) + 1
_HEAD_DIM = 32
# As of the reference source: slow rotation, and weights that do not begin with even attention.
_ROPE_THETA = 1e6


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of whole words; the action tokens come last, as OpenVLA has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([f"<action_{bin}>" for bin in reversed(range(NUM_BINS))])
    return wrap_tokenizer(tokenizer)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that goes with the model: one token a cell of the view."""
    side = {"height": VIEW_PIXELS, "width": VIEW_PIXELS}
    return LlavaProcessor(
        SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        patch_size=CELL_PIXELS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 96,
    num_layers: int = 4,
    tower_size: int = 64,
    tower_layers: int = 2,
) -> LlavaForConditionalGeneration:
    """An untrained policy, whose config says what its action tokens mean."""
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // _HEAD_DIM,
        "num_key_value_heads": hidden_size // _HEAD_DIM,
        "max_position_embeddings": 256,
        "initializer_range": hidden_size**-0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": tower_size,
        "intermediate_size": tower_size * 2,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": tower_size // _HEAD_DIM,
        "image_size": VIEW_PIXELS,
        "patch_size": CELL_PIXELS,
        "vision_use_head": False,
    }
    action = {
        "q01": [-0.5] * CHUNK,
        "q99": [len(ACTIONS) - 0.5] * CHUNK,
        "mask": [True] * CHUNK,
    }
    return build_llava(
        vision,
        text,
        tokenizer.vocab[IMAGE_TOKEN],
        VIEW_CELLS**2,
        n_action_bins=NUM_BINS,
        norm_stats={"babyai": {"action": action}},
    )

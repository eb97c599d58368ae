"""A small pi0 of transformers' own classes, and its processor, built without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PI0Config,
    PI0ForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.models.pi0.processing_pi0 import PI0Processor

from mm_c2c.reference.metaworld.tasks import ACTION_DIM, IMAGE_PIXELS, STATE_DIM, TASKS
from mm_c2c.sources.action import PI0Source

PATCH_PIXELS = 16
NUM_PATCHES = (IMAGE_PIXELS // PATCH_PIXELS) ** 2
CHUNK = 8
# Of a chunk, before the policy looks again.
EXECUTED = 4
DENOISING_STEPS = 5
_HEAD_DIM = 32
_INITIALIZER_RANGE = 0.07  # as for the reference source: about 1 / sqrt(width)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which each word of the instructions is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{task.instruction}\n" for task in TASKS.values()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast,
    *,
    state: tuple[Sequence[float], Sequence[float]],
    actions: tuple[Sequence[float], Sequence[float]],
) -> PI0Processor:
    """The processor: pictures to 96 x 96, state and actions by the demonstrations' statistics.

    Args:
        tokenizer: from `build_tokenizer`; gets PaliGemma's tokens of places.
        state: mean and standard deviation of each number of the state.
        actions: those of the actions.
    """
    # Any: `image_seq_length` is what PI0Processor looks for, and no attribute of the class.
    image_processor: Any = SiglipImageProcessorPil(
        size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    image_processor.image_seq_length = NUM_PATCHES
    return PI0Processor(
        image_processor,
        tokenizer,
        state_mean=list(state[0]),
        state_std=list(state[1]),
        actions_mean=list(actions[0]),
        actions_std=list(actions[1]),
        max_state_dim=STATE_DIM,
        chunk_size=CHUNK,
    )


def build_model(
    processor: PI0Processor,
    *,
    hidden_size: int,
    expert_size: int,
    num_layers: int,
    tower_layers: int,
) -> PI0ForConditionalGeneration:
    """An untrained pi0; the action expert shares the prefix's layers, heads and rotation.

    Args:
        processor: from `build_processor`.
        hidden_size: width of the vision tower and of the prefix's decoder.
        expert_size: width of the action expert.
        num_layers: of both decoders.
        tower_layers: of the vision tower.
    """
    heads = hidden_size // _HEAD_DIM
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 512,
        "initializer_range": _INITIALIZER_RANGE,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": hidden_size,
                "intermediate_size": 2 * hidden_size,
                "num_hidden_layers": tower_layers,
                "num_attention_heads": heads,
                "image_size": IMAGE_PIXELS,
                "patch_size": PATCH_PIXELS,
                "vision_use_head": False,
            },
            "text_config": {
                **gemma,
                "vocab_size": len(processor.tokenizer),
                "hidden_size": hidden_size,
                "intermediate_size": 2 * hidden_size,
            },
            "image_token_id": processor.image_token_id,
            "projection_dim": hidden_size,
        },
        dit_config={**gemma, "hidden_size": expert_size, "intermediate_size": 2 * expert_size},
        chunk_size=CHUNK,
        max_state_dim=STATE_DIM,
        max_action_dim=ACTION_DIM,
        num_inference_steps=DENOISING_STEPS,
    )
    return PI0ForConditionalGeneration(config)


def load_policy(folder: Path, name: str | None = None) -> PI0Source:
    """The trained policy, frozen, as a source that acts.

    Args:
        folder: written by `train_policy`.
        name: in the caches' origin; the folder where None.
    """
    model = PI0ForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    processor = PI0Processor.from_pretrained(folder, local_files_only=True)
    return PI0Source(model, processor, name or str(folder))


def to_actions(acted: Tensor, processor: PI0Processor) -> NDArray[np.float32]:
    """What `PI0Source.act` gave, in the environment's units.

    Args:
        acted: `(..., action_horizon, action_dim)`, normalised.
        processor: with the statistics of the actions.

    Returns:
        `(..., action_horizon, action_dim)` in [-1, 1].
    """
    mean, std = torch.tensor(processor.actions_mean), torch.tensor(processor.actions_std)
    actions: NDArray[np.float32] = (acted.cpu() * std + mean).clamp(-1, 1).numpy()
    return actions

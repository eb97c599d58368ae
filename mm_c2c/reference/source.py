"""The reference source: a small LLaVA that sees sticker scenes, of transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from mm_c2c.hub import load_pretrained
from mm_c2c.reference.concepts import CONCEPTS, GROUPS
from mm_c2c.reference.scene_data import PIXEL_MEAN, PIXEL_STD
from mm_c2c.reference.scenes import SCENE_PIXELS
from mm_c2c.reference.tower import STRIDE, GridTowerConfig, register

IMAGE_TOKEN = "<image>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", IMAGE_TOKEN, USER_TOKEN, ASSISTANT_TOKEN)
VOCAB_SIZE = 768
# About 1 / sqrt(width). With the usual 0.02 a model as narrow as this one attends evenly for so long
# that it does not learn which thing lies where.
_INITIALIZER_RANGE = 0.07
# Slow rotation leaves most channels to likeness, over the 82 positions of a picture.
_ROPE_THETA = 1e6

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}<|user|>{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}<|user|>"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% else %}<|assistant|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the questions and captions of sticker scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [concept.name for concept in CONCEPTS] + list(GROUPS)
    tokenizer.train_from_iterator([*corpus, *(f" {word}" for word in words * 200)], trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A trained core with the special tokens and the chat template of the models made here."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that goes with the model: pictures to 288 x 288, one token a 32-pixel patch."""
    image_processor = SiglipImageProcessorPil(
        size={"height": SCENE_PIXELS, "width": SCENE_PIXELS},
        image_mean=[PIXEL_MEAN / 255] * 3,
        image_std=[PIXEL_STD / 255] * 3,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, tower_layers: int
) -> LlavaForConditionalGeneration:
    """An untrained model; the tower's convolutions still want their published weights."""
    register()
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 32,
        "max_position_embeddings": 512,
        "initializer_range": _INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    tower = GridTowerConfig(
        hidden_size=hidden_size,
        num_hidden_layers=tower_layers,
        num_attention_heads=hidden_size // 32,
        initializer_range=_INITIALIZER_RANGE,
    )
    image_token, num_patches = tokenizer.vocab[IMAGE_TOKEN], (SCENE_PIXELS // STRIDE) ** 2
    return build_llava(tower, text, image_token, num_patches)


def build_llava(
    vision: Any, text: dict[str, Any], image_token: int, num_patches: int, **extra: Any
) -> LlavaForConditionalGeneration:
    """An untrained model that reads all patches of a tower's last layer.

    Args:
        vision: config of the tower.
        text: of the decoder.
        image_token: stands for a patch in the prompt.
        num_patches: of a picture.
        **extra: what else the config says.
    """
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=num_patches,
        tie_word_embeddings=True,
        **extra,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            # Attention then starts by likeness: a word finds the patch that shows it.
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def load_model(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained source, frozen, and its processor.

    Raises:
        FetchError: its files are missing or damaged.
    """
    register()
    model = load_pretrained("LlavaForConditionalGeneration", str(folder), None, torch.float32)
    processor = load_pretrained("LlavaProcessor", str(folder), None)
    return model.float().eval().requires_grad_(requires_grad=False), processor

"""Tiny real vision-language models that ask a picture with queries, which have no grid."""

from __future__ import annotations

import json

import torch
from tiny_vlm import CORPUS, TinyVLM, build_frozen, special_ids, train_tokenizer, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    T5Tokenizer,
)


def build_blip2() -> TinyVLM:
    """BLIP-2 over OPT: five queries."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>", "<image>"],
        merges=40,
        chat_template=None,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, num_query_tokens=5
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 7},
        qformer_config={**sizes, "intermediate_size": 32, "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            **special_ids(tokenizer),
        },
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = build_frozen(lambda: Blip2ForConditionalGeneration(config), seed=7)
    # A fresh model's queries are zero, and would all sum up the same.
    model.query_tokens.normal_(generator=torch.Generator().manual_seed(7))
    return TinyVLM(processor, model)


def build_blip2_t5() -> TinyVLM:
    """BLIP-2 over T5: five queries."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(piece) for piece in json.loads(core.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, num_query_tokens=5
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 7},
        qformer_config={**sizes, "intermediate_size": 32, "encoder_hidden_size": 16},
        text_config={
            "model_type": "t5",
            "vocab_size": len(tokenizer),
            "d_model": 24,
            "d_kv": 10,
            "d_ff": 32,
            "num_layers": 3,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = build_frozen(lambda: Blip2ForConditionalGeneration(config), seed=9)
    # A fresh model's queries are zero, and would all sum up the same.
    model.query_tokens.normal_(generator=torch.Generator().manual_seed(9))
    return TinyVLM(processor, model)


def build_kosmos2() -> TinyVLM:
    """KOSMOS-2: five queries; sinusoidal positions that begin after the padding's."""
    tokenizer = train_tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", *(f"<image_{index}>" for index in range(5))],
        merges=40,
        chat_template=None,
        padding_side="right",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = Kosmos2Processor(image_processor, tokenizer, num_patch_index_tokens=4)
    processor.num_image_tokens = 5
    config = Kosmos2Config(
        vision_config=vision_config("kosmos_2_vision_model", image_size=28),
        text_config={
            "vocab_size": len(tokenizer),
            "embed_dim": 24,
            "layers": 3,
            "ffn_dim": 32,
            "attention_heads": 4,
            "max_position_embeddings": 256,
            **special_ids(tokenizer),
        },
        latent_query_num=5,
    )
    return TinyVLM(processor, build_frozen(lambda: Kosmos2ForConditionalGeneration(config), seed=8))

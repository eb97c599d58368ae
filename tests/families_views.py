"""Tiny real vision-language models that show a picture in one view, each with its own processor."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tiny_vlm import (
    LLAVA_CHAT,
    TinyVLM,
    build_frozen,
    make_tokenizer,
    make_vlm,
    special_ids,
    train_tokenizer,
    unchecked,
    vision_config,
)
from transformers import (
    CLIPImageProcessorPil,
    Florence2Processor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma4Processor,
    Glm4vProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.pixtral import image_processing_pil_pixtral


def build_llava() -> TinyVLM:
    """LLaVA (CLIP and Llama): a grid of 4 x 4; 4 layers, 4 KV heads of 6; has a chat template."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>", "<image>"],
        merges=40,
        chat_template=LLAVA_CHAT,
        extra={"image_token": "<image>"},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    config = LlavaConfig(
        vision_config={**vision_config("clip_vision_model", image_size=28), "projection_dim": 16},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "max_position_embeddings": 512,
            **special_ids(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return TinyVLM(processor, build_frozen(lambda: LlavaForConditionalGeneration(config), seed=3))


def build_paligemma() -> TinyVLM:
    """PaliGemma (SigLIP and Gemma): a grid of 3 x 3, seen both ways; 5 layers, 1 KV head of 10."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>", "<image>"],
        merges=30,
        chat_template=None,
        extra={"image_token": "<image>"},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    image_processor = SiglipImageProcessorPil(size={"height": 21, "width": 21})
    image_processor.image_seq_length = 9
    processor = PaliGemmaProcessor(image_processor, tokenizer)  # adds location tokens
    config = PaliGemmaConfig(
        vision_config={
            **vision_config("siglip_vision_model", image_size=21),
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "vocab_size": len(tokenizer),
            "hidden_size": 20,
            "intermediate_size": 32,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "max_position_embeddings": 512,
            **special_ids(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=20,
    )
    return TinyVLM(
        processor, build_frozen(lambda: PaliGemmaForConditionalGeneration(config), seed=4)
    )


def build_gemma3() -> TinyVLM:
    """Gemma 3: 6 x 6 patches pooled to 3 x 3; a sliding and a full layer, 2 KV heads of 8."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<boi>", "<eoi>"],
        merges=40,
        chat_template=None,
        extra={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 42, "width": 42}),
        tokenizer,
        image_seq_length=9,
        chat_template=LLAVA_CHAT.replace("<image>", "<boi>"),
    )
    config = Gemma3Config(
        vision_config={
            **vision_config("siglip_vision_model", image_size=42),
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma3_text",
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 512,
            **special_ids(tokenizer),
        },
        mm_tokens_per_image=9,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
    )
    model = build_frozen(lambda: Gemma3ForConditionalGeneration(config), seed=5)
    # The projection of a fresh Gemma 3 is zero: it would see nothing.
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return TinyVLM(processor, model)


def build_qwen(
    model_type: str, processor_class: type[ProcessorMixin], vision: dict[str, Any], **text: Any
) -> TinyVLM:
    """Patches of 4 pixels merged by 2 x 2: a cell is 8 pixels wide."""
    tokenizer = make_tokenizer(
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        shown="<|vision_start|><|image_pad|><|vision_end|>",
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 64}
    )
    return make_vlm(
        model_type,
        unchecked(processor_class)(image_processor, tokenizer, None),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            **vision,
        },
        text_config=text,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def mrope(*section: int, **own: Any) -> dict[str, Any]:
    """RoPE parameters with three rows of positions."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **own}


def build_qwen2_vl() -> TinyVLM:
    """Qwen2-VL: M-RoPE in three blocks."""
    return build_qwen(
        "qwen2_vl",
        Qwen2VLProcessor,
        {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        rope_parameters=mrope(1, 1, 2),
    )


def build_qwen2_5_vl() -> TinyVLM:
    """Qwen2.5-VL: one of two vision layers sees windows of 2 x 2 merged patches."""
    return build_qwen(
        "qwen2_5_vl",
        Qwen2_5_VLProcessor,
        {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        rope_parameters=mrope(1, 1, 2),
    )


def build_qwen3_vl() -> TinyVLM:
    """Qwen3-VL: M-RoPE pair by pair, and vision features added to the first decoder layers."""
    return build_qwen(
        "qwen3_vl",
        Qwen3VLProcessor,
        {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        head_dim=12,
        rope_parameters=mrope(2, 2, 2, mrope_interleaved=True),
    )


def pixtral_processor() -> type[Any]:
    """The class, whose module wants torchvision for the sake of one function."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[name] = image_processing_pil_pixtral
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        del sys.modules[name]
    return PixtralProcessor


def build_pixtral(model_type: str = "llava", merge: int = 1, **own: Any) -> TinyVLM:
    """Pixtral, on the Hub a LLaVA: patches of 4 pixels, row by row with a break between."""
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image_processor = image_processing_pil_pixtral.PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": 4, "width": 4}
    )
    return make_vlm(
        model_type,
        pixtral_processor()(image_processor, tokenizer, patch_size=4, spatial_merge_size=merge),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
        },
        text_config={"model_type": "mistral", "head_dim": 6},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **own,
    )


def build_mistral3() -> TinyVLM:
    """Mistral 3: as Pixtral, 2 x 2 patches merged."""
    return build_pixtral("mistral3", merge=2, spatial_merge_size=2)


def build_gemma4() -> TinyVLM:
    """Gemma 4: patches of 2 pixels pooled to cells of 4; layers differ in head_dim, the last shares."""
    tokenizer = make_tokenizer(
        "<image>", boi_token="<boi>", eoi_token="<eoi>", boa_token="<boa>", eoa_token="<eoa>"
    )
    image_processor = Gemma4ImageProcessorPil(
        patch_size=2, pooling_kernel_size=2, max_soft_tokens=70
    )
    processor = unchecked(Gemma4Processor)(None, image_processor, tokenizer, None)
    return make_vlm(
        "gemma4",
        processor,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 2,
            "position_embedding_size": 64,
        },
        text_config={
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "sliding_window": 8,
            "vocab_size_per_layer_input": len(tokenizer) + 1,
            "hidden_size_per_layer_input": 8,
            "use_bidirectional_attention": "vision",
        },
        audio_config=None,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=processor.video_token_id,
    )


def build_glm4v() -> TinyVLM:
    """GLM-4V: as Qwen2-VL, half of each head rotated, neighbours in pairs."""
    tokenizer = make_tokenizer(
        "<|image|>",
        "<|video|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        shown="<|begin_of_image|><|image|><|end_of_image|>",
    )
    image_processor = Glm4vImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 128, "longest_edge": 2 * 64 * 64}
    )
    return make_vlm(
        "glm4v",
        unchecked(Glm4vProcessor)(image_processor, tokenizer, None),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
        },
        text_config={
            "hidden_size": 64,
            "rope_parameters": mrope(1, 1, 2, partial_rotary_factor=0.5),
        },
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in {
                "video": "video",
                "image_start": "begin_of_image",
                "image_end": "end_of_image",
                "video_start": "begin_of_video",
                "video_end": "end_of_video",
            }.items()
        },
    )


def build_qwen3_5() -> TinyVLM:
    """Qwen3.5: two of four layers attend linearly, and keep no keys."""
    return build_qwen(
        "qwen3_5",
        Qwen3VLProcessor,
        {"out_hidden_size": 32, "num_position_embeddings": 16},
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
    )


def build_florence2() -> TinyVLM:
    """Florence-2: a square of 4 x 4 patches and their mean, in a BART."""
    tokenizer = make_tokenizer("<image>")
    image_processor = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=17
    )
    image_processor.image_seq_length = 17
    return make_vlm(
        "florence2",
        Florence2Processor(image_processor, tokenizer),
        vision_config={
            "depths": (1, 1),
            "patch_size": (7, 3),
            "patch_stride": (4, 4),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
            "embed_dim": (8, 16),
            "num_heads": (2, 2),
            "num_groups": (2, 2),
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 24,
        },
        text_config={
            "model_type": "bart",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            # A fresh model says again what it started with: not the end token.
            "decoder_start_token_id": tokenizer.convert_tokens_to_ids("a"),
            "forced_eos_token_id": None,
        },
    )

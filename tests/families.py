"""Tiny real vision-language models, one a family, each with its own processor.

`FAMILIES` says how each lays pictures out; weights come from a fixed seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2Processor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma4Processor,
    Glm4vProcessor,
    Idefics3Processor,
    InternVLProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    Lfm2VlProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    T5Tokenizer,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ImagesKwargs

CORPUS = [
    "the cat sat on the mat . what is in the image ? describe the picture in detail",
    "a red square left of a blue circle ; answer the question with one word : yes or no",
    "user assistant system You are a helpful assistant . Which sticker is above the apple ?",
] * 4

LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class TinyVLM(NamedTuple):
    """A vision-language model beside the processor that feeds it."""

    processor: ProcessorMixin
    model: PreTrainedModel


def train_tokenizer(
    special: Sequence[str],
    *,
    merges: int,
    chat_template: str | None,
    padding_side: str = "left",
    extra: dict[str, str] | None = None,
    **roles: str,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `CORPUS`.

    Args:
        special: special tokens in the order of their ids.
        merges: how many merges at most; it sets the vocabulary's size.
        chat_template: Jinja source.
        padding_side: where padding goes.
        extra: further special tokens that the tokenizer exposes by name.
        roles: `pad_token="..."` and the like, each one of `special`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side=padding_side,
        extra_special_tokens=extra or {},
        **roles,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The special ids that a model's config repeats."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def build_frozen(build: Callable[[], ModelT], *, seed: int) -> ModelT:
    """A model with seeded weights, in `eval()` and without gradients; global RNG untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    # A fresh model's normalisations are all ones and its biases zeros, which hides mistakes.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def vision_config(model_type: str, *, image_size: int) -> dict[str, Any]:
    """A CLIP or SigLIP tower over patches of 7 x 7 pixels."""
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 7,
    }


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


def make_tokenizer(
    image: str, *further: str, shown: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template shows a picture as `shown`, by default the image token.

    Args:
        image: the image token.
        further: other special tokens.
        shown: what the template puts where a picture stands.
        named: special tokens that the tokenizer exposes by name.
    """
    special = dict.fromkeys([image, *further, *named.values()])
    return train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>", *special],
        merges=40,
        chat_template=LLAVA_CHAT.replace("<image>", shown or image),
        extra={"image_token": image, **named},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def make_vlm(model_type: str, processor: ProcessorMixin, **config: Any) -> TinyVLM:
    """A tiny model beside its processor; `config` says what is the family's own."""
    tokenizer = processor.tokenizer
    processor.chat_template = tokenizer.chat_template
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **special_ids(tokenizer),
        **config.pop("text_config"),
    }
    full = AutoConfig.for_model(
        model_type,
        text_config=text,
        **{"image_token_id": tokenizer.convert_tokens_to_ids(tokenizer.image_token), **config},
    )
    return TinyVLM(
        processor, build_frozen(lambda: AutoModelForImageTextToText.from_config(full), seed=6)
    )


def unchecked(processor_class: type[ProcessorMixin]) -> type[Any]:
    """The class without its demand for parts that need torchvision, such as a video processor."""
    return type(
        processor_class.__name__,
        (processor_class,),
        {"check_argument_for_proper_class": lambda _self, _name, _value: None},
    )


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


def build_idefics(
    model_type: str, processor_class: type[ProcessorMixin], image_processor: Any
) -> TinyVLM:
    """Tiles of 16 pixels a side, 4 x 4 patches each, shuffled to 2 x 2."""
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    tokenizer = make_tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tags
    )
    image_processor = image_processor(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, resample=2
    )
    return make_vlm(
        model_type,
        processor_class(image_processor, tokenizer, image_seq_len=4),
        vision_config={**siglip(image_size=16, patch_size=4), "model_type": f"{model_type}_vision"},
        text_config={"model_type": "llama"},
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )


def siglip(**own: int) -> dict[str, Any]:
    """A SigLIP tower."""
    return vision_config("siglip_vision_model", image_size=28) | {"vision_use_head": False} | own


def build_idefics3() -> TinyVLM:
    """Idefics 3 over a Llama."""
    return build_idefics("idefics3", Idefics3Processor, Idefics3ImageProcessorPil)


def build_smolvlm() -> TinyVLM:
    """SmolVLM: as Idefics 3."""
    # Spells out the number of a video's frames; its package is not installed.
    processing_smolvlm.num2words = str
    processor = partial(
        unchecked(processing_smolvlm.SmolVLMProcessor),
        video_processor=SimpleNamespace(num_frames=1, fps=1),
    )
    return build_idefics("smolvlm", processor, SmolVLMImageProcessorPil)


def build_internvl() -> TinyVLM:
    """InternVL: tiles of 16 pixels a side, 4 x 4 patches each, shuffled to 2 x 2."""
    tokenizer = make_tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=6)
    return make_vlm(
        "internvl",
        unchecked(InternVLProcessor)(image_processor, tokenizer, None, image_seq_length=4),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (16, 16),
            "patch_size": (4, 4),
        },
        text_config={"model_type": "qwen3", "head_dim": 10},
        image_seq_length=4,
    )


def build_llava_next() -> TinyVLM:
    """LLaVA-NeXT: tiles of 28 pixels a side, 4 x 4 patches each."""
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor,
        make_tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return make_vlm(
        "llava_next",
        processor,
        vision_config=vision_config("clip_vision_model", image_size=28),
        text_config={"model_type": "mistral"},
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )


def build_llava_onevision() -> TinyVLM:
    """LLaVA-OneVision: tiles of 28 pixels a side, 4 x 4 patches each, shrunk to 2 tiles' worth."""
    pinpoints = [[28, 56], [56, 28], [56, 112]]
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = unchecked(LlavaOnevisionProcessor)(
        image_processor,
        make_tokenizer("<image>", "<video>"),
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return make_vlm(
        "llava_onevision",
        processor,
        vision_config=siglip(),
        text_config={"model_type": "qwen2"},
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        video_token_id=processor.video_token_id,
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


class TiledKwargs(ImagesKwargs, total=False):
    """What LFM2-VL's processor asks for beyond the usual."""

    return_row_col_info: bool


class TiledImages(SiglipImageProcessorPil):
    """LFM2-VL's image processor in short, without torchvision: tiles of 8 pixels, patches of 2."""

    valid_kwargs = TiledKwargs
    use_thumbnail = True
    tile_size, encoder_patch_size, downsample_factor = 8, 2, 2

    def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
        side = self.tile_size
        shown: list[np.ndarray] = []
        rows, cols, sizes = [], [], []
        for picture in [picture for row in images for picture in row]:
            high, wide = (max(1, round(size / side)) for size in picture.size[::-1])
            whole = np.asarray(picture.resize((wide * 4, high * 4), Image.Resampling.BOX))
            if high * wide > 1:
                fine = np.asarray(picture.resize((wide * side, high * side), Image.Resampling.BOX))
                tiles = fine.reshape(high, side, wide, side, 3).swapaxes(1, 2)
                shown += list(tiles.reshape(-1, side, side, 3))
            else:
                whole = np.asarray(picture.resize((side, side), Image.Resampling.BOX))
            shown.append(whole)
            rows.append(high)
            cols.append(wide)
            sizes.append(whole.shape[:2])
        shapes = torch.tensor([image.shape[:2] for image in shown]) // 2
        lengths = shapes.prod(1)
        pixels = torch.zeros(len(shown), int(lengths.max()), 12)
        for index, image in enumerate(shown):
            (high, wide), patch = shapes[index].tolist(), self.encoder_patch_size
            patches = image.reshape(high, patch, wide, patch, 3).swapaxes(1, 2)
            patches = patches.reshape(high * wide, -1).astype(np.float32)
            pixels[index, : high * wide] = torch.from_numpy(patches) / 127.5 - 1
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": (torch.arange(pixels.shape[1]) < lengths[:, None]).int(),
            "spatial_shapes": shapes,
            "image_rows": rows,
            "image_cols": cols,
            "image_sizes": sizes,
        }


def build_lfm2_vl() -> TinyVLM:
    """LFM2-VL: cells of 4 pixels, tiles of 2 x 2; two of four layers convolve, and keep no keys."""
    tags = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 8) for col in range(1, 8)]
    tokenizer = make_tokenizer(
        "<image>",
        *tags,
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    return make_vlm(
        "lfm2_vl",
        unchecked(Lfm2VlProcessor)(TiledImages(), tokenizer),
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 2,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
        },
        projector_hidden_size=16,
        downsample_factor=2,
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


def build_mllama() -> TinyVLM:
    """Llama 3.2 Vision: up to 4 tiles of 28 pixels, 4 x 4 patches each; layers 1 and 3 look."""
    tokenizer = make_tokenizer("<|image|>", "<|python_tag|>")
    image_processor = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    return make_vlm(
        "mllama",
        MllamaProcessor(image_processor, tokenizer),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
        },
        text_config={
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
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


class Family(NamedTuple):
    """How a family shows pictures.

    Attributes:
        build: makes the model and its processor.
        shown: by height and width of a picture in pixels, the rows and columns of each of its
            views, in the order of the prompt; empty for queries, which have no grid.
        reads_words: whether the cache has positions for the question.
        brightened: how much of a patch's height and width to paint, from its top left.
    """

    build: Callable[[], TinyVLM]
    shown: dict[tuple[int, int], list[tuple[int, int]]]
    reads_words: bool = True
    brightened: float = 1.0


# A grid as the picture is shaped, a cell of 8 pixels.
AS_SHAPED = {(16, 32): [(2, 4)], (40, 24): [(5, 3)]}
# Tiles of 2 x 2 cells, three along the longer side, then an overview of 2 x 2.
TILED = {(32, 48): [(4, 6), (2, 2)], (48, 16): [(6, 2), (2, 2)], (48, 48): [(6, 6), (2, 2)]}

FAMILIES = {
    "blip-2": Family(build_blip2, {}),
    "blip-2_t5": Family(build_blip2_t5, {}),
    # Its convolutions centre each patch on the top left of its cell.
    "florence2": Family(build_florence2, {(64, 64): [(4, 4)]}, brightened=0.25),
    "gemma3": Family(build_gemma3, {(42, 42): [(3, 3)]}),
    "gemma4": Family(build_gemma4, {(20, 48): [(5, 12)], (48, 20): [(12, 5)], (32, 32): [(8, 8)]}),
    "glm4v": Family(build_glm4v, AS_SHAPED),
    "idefics3": Family(build_idefics3, TILED),
    "internvl": Family(
        build_internvl,
        {(32, 48): [(4, 6), (2, 2)], (48, 16): [(6, 2), (2, 2)], (16, 16): [(2, 2)]},
    ),
    "kosmos-2": Family(build_kosmos2, {}),
    "lfm2_vl": Family(
        build_lfm2_vl,
        {(16, 24): [(4, 6), (2, 3)], (24, 8): [(6, 2), (3, 1)], (8, 8): [(2, 2)]},
    ),
    "llava": Family(build_llava, {(28, 28): [(4, 4)]}),
    "llava_next": Family(
        build_llava_next, {(28, 56): [(4, 4), (4, 8)], (56, 42): [(4, 4), (8, 6)]}
    ),
    "llava_onevision": Family(
        build_llava_onevision,
        # The last grid has 8 x 16 patches, and is shrunk.
        {(28, 56): [(4, 4), (4, 8)], (28, 42): [(4, 4), (4, 6)], (56, 112): [(4, 4), (4, 8)]},
    ),
    "mistral3": Family(build_mistral3, AS_SHAPED),
    "mllama": Family(
        build_mllama,
        # The last fills a canvas of 2 x 2 tiles up to its last columns.
        {(28, 28): [(4, 4)], (28, 56): [(4, 8)], (56, 42): [(8, 6)]},
        reads_words=False,
    ),
    "paligemma": Family(build_paligemma, {(21, 21): [(3, 3)]}),
    "pixtral": Family(build_pixtral, {(16, 32): [(4, 8)], (28, 20): [(7, 5)]}),
    "qwen2_5_vl": Family(build_qwen2_5_vl, AS_SHAPED),
    "qwen2_vl": Family(build_qwen2_vl, AS_SHAPED),
    "qwen3_5": Family(build_qwen3_5, AS_SHAPED),
    "qwen3_vl": Family(build_qwen3_vl, AS_SHAPED),
    "smolvlm": Family(build_smolvlm, TILED),
}

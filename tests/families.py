"""Tiny real vision-language models, one a family, each with its own processor.

`FAMILIES` says how each lays pictures out; weights come from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
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
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

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


class Family(NamedTuple):
    """How a family shows pictures.

    Attributes:
        build: makes the model and its processor.
        shown: by height and width of a picture in pixels, the rows and columns of each of its
            views, in the order of the prompt.
    """

    build: Callable[[], TinyVLM]
    shown: dict[tuple[int, int], list[tuple[int, int]]]


# A grid as the picture is shaped, a cell of 8 pixels.
AS_SHAPED = {(16, 32): [(2, 4)], (40, 24): [(5, 3)]}

FAMILIES = {
    "gemma3": Family(build_gemma3, {(42, 42): [(3, 3)]}),
    "llava": Family(build_llava, {(28, 28): [(4, 4)]}),
    "paligemma": Family(build_paligemma, {(21, 21): [(3, 3)]}),
    "qwen2_5_vl": Family(build_qwen2_5_vl, AS_SHAPED),
    "qwen2_vl": Family(build_qwen2_vl, AS_SHAPED),
    "qwen3_vl": Family(build_qwen3_vl, AS_SHAPED),
}

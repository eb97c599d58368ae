"""Tiny real models: transformers' own classes, random weights, no hub.

Target and sources differ in layers, heads, head_dim, vocabulary and chat template, so that a
transposed axis or a swapped tokenizer cannot pass unseen. Weights come from a fixed seed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
)

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.sources.vlm import VLMSource

torch.set_num_threads(1)

CORPUS = [
    "the cat sat on the mat . what is in the image ? describe the picture in detail",
    "a red square left of a blue circle ; answer the question with one word : yes or no",
    "user assistant system You are a helpful assistant . Which sticker is above the apple ?",
] * 4

# The system line that SmolLM2's template adds where the messages have none.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant .<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
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


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that reaches for the network without the marker that says so."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1"}:
            self.close()
            # Not an OSError, which code that expects a missing network would swallow.
            raise AssertionError(f"a test without `network` wants to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a test starts


@pytest.fixture
def tiny_target_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML, with SmolLM2's special tokens: padding is the end token. Pads left."""
    return train_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        merges=60,
        chat_template=CHATML,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


@pytest.fixture
def tiny_target(tiny_target_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama, as SmolLM2 is: 3 layers, 4 heads over 2 KV heads of 8."""
    config = LlamaConfig(
        vocab_size=len(tiny_target_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special_ids(tiny_target_tokenizer),
    )
    return build_frozen(lambda: LlamaForCausalLM(config), seed=1)


@pytest.fixture
def tiny_text_source_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary, another template, `pad_token` of its own. Pads left."""
    return train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"],
        merges=25,
        chat_template=BRACKETS,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture
def tiny_text_source(tiny_text_source_tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Qwen3, which normalises q and k: 2 layers, 6 heads over 3 KV heads of 12."""
    config = Qwen3Config(
        vocab_size=len(tiny_text_source_tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=12,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        **special_ids(tiny_text_source_tokenizer),
    )
    return build_frozen(lambda: Qwen3ForCausalLM(config), seed=2)


@pytest.fixture
def tiny_llava() -> TinyVLM:
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


@pytest.fixture
def tiny_paligemma() -> TinyVLM:
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


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Two pictures of noise, wide and tall, the same in every run."""
    generator = np.random.default_rng(0)
    shapes = [(40, 56, 3), (48, 36, 3)]
    return [Image.fromarray(generator.integers(0, 256, s, dtype=np.uint8)) for s in shapes]


@pytest.fixture
def bridge(
    tiny_target: LlamaForCausalLM,
    tiny_target_tokenizer: PreTrainedTokenizerFast,
    tiny_llava: TinyVLM,
) -> Bridge:
    """A question-blind LLaVA into the tiny target, under the reference pair's name."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    source = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny-llava")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source=SOURCE_NAME, geometry="slots", rows=2, cols=2, fuser=fuser)
    config = BridgeConfig(links=(link,), slot_token="a")
    return Bridge(target, {SOURCE_NAME: source}, config).eval()

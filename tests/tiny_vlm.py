"""What tiny vision-language models are built with: tokenizers, towers, seeded weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

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


@torch.no_grad()
def amplify(model: PreTrainedModel) -> None:
    """Make a model's words depend on all it reads.

    Fresh weights are so small that what layers add is lost beside the embedding that they add it
    to: tied heads then say the last token again, whatever stands before it.
    """
    kept = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in kept:
            parameter.mul_(15)


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


def siglip(**own: int) -> dict[str, Any]:
    """A SigLIP tower."""
    return vision_config("siglip_vision_model", image_size=28) | {"vision_use_head": False} | own

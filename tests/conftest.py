"""Tiny real models: transformers' own classes, random weights, no hub.

Target and sources differ in layers, heads, head_dim, vocabulary and chat template, so that a
transposed axis or a swapped tokenizer cannot pass unseen. Weights come from a fixed seed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before huggingface_hub is imported, which otherwise tries for a minute what `_no_network` refuses.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from bridge_rigs import LazySources, Rig
from families_views import build_llava, build_paligemma
from PIL import Image
from policies import build_pi0, observe
from tiny_vlm import TinyVLM, amplify, build_frozen, special_ids, train_tokenizer
from training_rigs import WORDS
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.sources import SourceInput
from mm_c2c.sources.action import PI0Source
from mm_c2c.sources.vlm import VLMSource

torch.set_num_threads(1)

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
def fresh_accelerate() -> Iterator[None]:
    """Each training of a process takes up what accelerate shares among all of them."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


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
    return build_llava()


@pytest.fixture
def tiny_paligemma() -> TinyVLM:
    """PaliGemma (SigLIP and Gemma): a grid of 3 x 3, seen both ways; 5 layers, 1 KV head of 10."""
    return build_paligemma()


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Two pictures of noise, wide and tall, the same in every run."""
    generator = np.random.default_rng(0)
    shapes = [(40, 56, 3), (48, 36, 3)]
    return [Image.fromarray(generator.integers(0, 256, s, dtype=np.uint8)) for s in shapes]


@pytest.fixture
def rig(
    request: pytest.FixtureRequest,
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pictures: list[Image.Image],
) -> Rig:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny/target", "t1")
    return Rig(target, LazySources(request), pictures)


@pytest.fixture
def bridge(
    tiny_target: LlamaForCausalLM,
    tiny_target_tokenizer: PreTrainedTokenizerFast,
    tiny_llava: TinyVLM,
) -> Bridge:
    """A question-blind LLaVA into the tiny target, under the reference pair's name.

    Either answers otherwise wherever it reads something else.
    """
    amplify(tiny_target)
    amplify(tiny_llava.model)
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    source = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny-llava")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source=SOURCE_NAME, geometry="slots", rows=2, cols=2, fuser=fuser)
    config = BridgeConfig(links=(link,), slot_token="a")
    return Bridge(target, {SOURCE_NAME: source}, config).eval()


@pytest.fixture
def pi0() -> PI0Source:
    return build_pi0()


@pytest.fixture
def observations(pictures: list[Image.Image]) -> list[SourceInput]:
    """Two cameras and a short instruction; one camera and a long one."""
    return observe(pictures)


@pytest.fixture
def tiny_settings(
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tiny_llava: TinyVLM,
    pictures: list[Image.Image],
    tmp_path: Path,
) -> list[str]:
    """What `configs/tiny.yaml` is told: two models, three examples with several questions."""
    for name, model, reader in (
        ("target", tiny_target, tiny_target_tokenizer),
        ("source", *reversed(tiny_llava)),
    ):
        model.save_pretrained(tmp_path / name)
        reader.save_pretrained(tmp_path / name)
    lines = []
    for index, count in enumerate((1, 3, 2)):
        picture = pictures[index % 2].rotate(90 * index)
        picture.save(tmp_path / f"{index}.png")
        for question in WORDS[:count]:
            row = {
                "image": f"{index}.png",
                "question": question,
                "answer": ["red", "a blue circle", "cat"][index],
                "caption": f"picture {index} shows a square and a cat",
            }
            lines.append(json.dumps(row) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return [
        f"sources.eyes.model={tmp_path / 'source'}",
        f"target.model={tmp_path / 'target'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        f"out={tmp_path / 'out'}",
    ]

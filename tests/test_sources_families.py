"""Further vision families as sources: each one's cache, grid and words, on a tiny real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    LLAVA_CHAT,
    TinyVLM,
    build_frozen,
    special_ids,
    train_tokenizer,
    vision_config,
)
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mm_c2c.cache import PatchGrid, PositionKind
from mm_c2c.sources import SourceInput, source_class

WORDS = ("what is in the image ?", "Which sticker is above the apple ? answer with one word :")


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


BUILDERS = {"gemma3": build_gemma3}
# Rows, columns, and pixels a side of a cell.
GRIDS = {"gemma3": (PatchGrid(3, 3), 14)}


@pytest.fixture(params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(family: str) -> Any:
    tiny = BUILDERS[family]()
    return source_class(family, has_vision=True)(tiny.model, tiny.processor, f"tiny/{family}")


@pytest.fixture
def inputs(pictures: list[Image.Image]) -> list[SourceInput]:
    return [SourceInput(text=t, images=(p,)) for t, p in zip(WORDS, pictures, strict=True)]


def test_the_layers_are_those_of_a_plain_forward(source: Any, inputs: list[SourceInput]) -> None:
    encoded = source.processor(
        images=[list(inputs[0].images)], text=[source.render(inputs[0])], return_tensors="pt"
    )
    with torch.no_grad():
        plain = source.model(**source._known(encoded), use_cache=True).past_key_values
    cache = source.prefill(inputs[:1])
    assert cache.shape == source.shape
    assert len(plain.layers) == len(cache.layers)
    for got, expected in zip(cache.layers, plain.layers, strict=True):
        kept = expected.keys.shape[2]  # a sliding layer keeps its window only
        torch.testing.assert_close(got.keys[:, :, -kept:], expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.values[:, :, -kept:], expected.values, rtol=1e-5, atol=1e-5)


def test_patches_fill_the_image_positions_in_reading_order(
    source: Any, inputs: list[SourceInput], family: str
) -> None:
    cache = source.prefill(inputs)
    grid, _ = GRIDS[family]
    assert cache.grids == ((grid,), (grid,))
    cells = [[0, row, col] for row in range(grid.rows) for col in range(grid.cols)]
    for row in range(2):
        assert cache.patches[row][cache.kinds[row] == PositionKind.IMAGE].tolist() == cells


def test_a_bright_cell_shows_at_the_position_that_names_its_place(source: Any, family: str) -> None:
    grid, side = GRIDS[family]
    blank = np.zeros((side * grid.rows, side * grid.cols, 3), dtype=np.uint8)
    cells = [(row, col) for row in range(grid.rows) for col in range(grid.cols)]
    painted = [blank]
    for row, col in cells:
        picture = blank.copy()
        picture[side * row : side * (row + 1), side * col : side * (col + 1)] = 255
        painted.append(picture)
    looks = [SourceInput(images=(Image.fromarray(picture),)) for picture in painted]
    seen: list[torch.Tensor] = []
    handle = source.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    cache = source.prefill(looks)
    handle.remove()
    change = (seen[0][1:] - seen[0][:1]).square().sum(-1)
    for index, cell in enumerate(cells):
        assert tuple(cache.patches[0, change[index].argmax(), 1:].tolist()) == cell


def test_a_padded_row_gives_what_the_row_alone_gives(
    source: Any, inputs: list[SourceInput]
) -> None:
    both = source.prefill(inputs)
    assert (both.kinds == PositionKind.PAD).any()
    for row, item in enumerate(inputs):
        alone = source.prefill([item])
        real = both.kinds[row] != PositionKind.PAD
        for got, expected in zip(both.layers, alone.layers, strict=True):
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours[row][:, real], theirs[0], rtol=1e-5, atol=1e-5)
        for field in ("kinds", "patches", "spans"):
            torch.testing.assert_close(getattr(both, field)[row, real], getattr(alone, field)[0])


def test_spans_spell_the_words_of_the_text(source: Any, inputs: list[SourceInput]) -> None:
    cache = source.prefill(inputs)
    ids = source._encode(inputs, [source.render(item) for item in inputs])["input_ids"]
    for row, text in enumerate(cache.texts):
        covered = ""
        for token, (start, end) in zip(ids[row].tolist(), cache.spans[row].tolist(), strict=True):
            if end > start:
                assert text[start:end].strip() == source.processor.tokenizer.decode([token]).strip()
                covered += text[start:end]
        assert covered.replace(" ", "") == text.replace(" ", "")


def test_generate_gives_the_models_own_answer_to_each_row(
    source: Any, inputs: list[SourceInput]
) -> None:
    both = source.generate(inputs, max_new_tokens=4, do_sample=False)
    assert both == [
        source.generate([item], max_new_tokens=4, do_sample=False)[0] for item in inputs
    ]
    assert any(both)


def test_gemma3_sees_a_picture_both_ways() -> None:
    tiny = build_gemma3()
    source = source_class("gemma3", has_vision=True)(tiny.model, tiny.processor, "tiny/gemma3")
    blank = np.zeros((42, 42, 3), dtype=np.uint8)
    painted = blank.copy()
    painted[28:, 28:] = 255
    looks = [SourceInput(images=(Image.fromarray(picture),)) for picture in (blank, painted)]
    cache = source.prefill(looks)
    before, first = (cache.kinds[0] == PositionKind.IMAGE).nonzero()[0, 0] + torch.tensor([-1, 0])
    keys = cache.layers[1].keys
    torch.testing.assert_close(keys[0, :, before], keys[1, :, before])
    # The vision tower mixes patches too: compare with the same prompt read one way.
    encoded = source._encode(looks, [source.render(item) for item in looks])
    del encoded["token_type_ids"]
    one_way, _, _ = source.read(encoded, cache.position_ids)
    assert not torch.allclose(one_way[1].keys[:, :, first], keys[:, :, first])

"""Sources: what stands at each position of a prompt, and the cache of a plain forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from text_families import LONGER, build
from torch import Tensor
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mm_c2c import hub
from mm_c2c.cache import CacheShape, PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import FetchError, InputError, UnsupportedError
from mm_c2c.rope_probe import rope_specs
from mm_c2c.sources import SOURCES, Source, SourceInput, load_source, source_class
from mm_c2c.sources.action import PI0Source
from mm_c2c.sources.base import full_cache
from mm_c2c.sources.speech import SpeechSource
from mm_c2c.sources.text import TextSource, encode_chats
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.sources.vlm_families import PaliGemmaSource
from mm_c2c.target import Target

WORDS = ("what is in the image ?", "Which sticker is above the apple ? answer with one word :")
GEOMETRY = {
    "text": CacheShape(num_layers=2, num_key_value_heads=3, head_dim=12),
    "llava": CacheShape(num_layers=4, num_key_value_heads=4, head_dim=6),
    "paligemma": CacheShape(num_layers=5, num_key_value_heads=1, head_dim=10),
}
GRIDS = {"llava": PatchGrid(4, 4), "paligemma": PatchGrid(3, 3)}
NAMES = list(GEOMETRY)
VLMS = list(GRIDS)


@pytest.fixture
def sources(
    tiny_text_source: Any, tiny_text_source_tokenizer: Any, tiny_llava: Any, tiny_paligemma: Any
) -> dict[str, Any]:
    return {
        "text": TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny/text", "abc"),
        "llava": VLMSource(tiny_llava.model, tiny_llava.processor, "tiny/llava"),
        "paligemma": PaliGemmaSource(tiny_paligemma.model, tiny_paligemma.processor, "tiny/pali"),
    }


def make_inputs(
    name: str, pictures: Sequence[Image.Image], texts: Sequence[str] = WORDS
) -> list[SourceInput]:
    if name == "text":
        return [SourceInput(text=text) for text in texts]
    return [
        SourceInput(text=text, images=(picture,))
        for text, picture in zip(texts, pictures, strict=True)
    ]


def tokenizer_of(source: Any) -> Any:
    return source.tokenizer if isinstance(source, TextSource) else source.processor.tokenizer


def record_forward(
    source: Any, inputs: Sequence[SourceInput]
) -> tuple[SourceCache, dict[str, Any]]:
    """The source's cache, and the arguments its model was called with."""
    seen: dict[str, Any] = {}
    handle = source.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        return source.prefill(inputs), seen
    finally:
        handle.remove()


def real_positions(cache: SourceCache, row: int) -> Tensor:
    return cache.kinds[row] != PositionKind.PAD


# --- every source -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_has_the_geometry_that_the_source_announces(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    source: Source = sources[name]
    cache = source.prefill(make_inputs(name, pictures))
    assert cache.shape == source.shape == GEOMETRY[name]
    assert cache.layer_indices == tuple(range(GEOMETRY[name].num_layers))
    assert cache.origin == source.origin
    assert cache.kinds.shape == (2, cache.seq_len)
    assert cache.spans.shape == (2, cache.seq_len, 2)
    assert cache.patches.shape == (2, cache.seq_len, 3)
    assert cache.texts == WORDS
    assert all(spec is not None for spec in cache.rope)


@pytest.mark.parametrize("name", NAMES)
def test_spans_spell_the_words_of_the_text(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    texts = [f"  {WORDS[0]}", f"{WORDS[1]}\n"]  # templates strip white space; spans must agree
    cache, seen = record_forward(sources[name], make_inputs(name, pictures, texts))
    tokenizer = tokenizer_of(sources[name])
    for row, text in enumerate(cache.texts):
        covered = ""
        for token, (start, end) in zip(
            seen["input_ids"][row].tolist(), cache.spans[row].tolist(), strict=True
        ):
            if end > start:
                assert text[start:end].strip() == tokenizer.decode([token]).strip()
                covered += text[start:end]
        assert covered.replace(" ", "") == texts[row].replace(" ", "").strip()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["a", "ASSISTANT", "assistant", "user", "s"])
def test_a_word_that_the_template_holds_too_is_found_where_the_user_wrote_it(
    sources: dict[str, Any], pictures: list[Image.Image], name: str, text: str
) -> None:
    cache, seen = record_forward(sources[name], make_inputs(name, pictures[:1], [text]))
    is_text = cache.kinds[0] == PositionKind.TEXT
    assert is_text.any()
    # All that follows the user's word is the template's tail.
    last = int(is_text.nonzero().max())
    tail = tokenizer_of(sources[name]).decode(seen["input_ids"][0, last + 1 :])
    assert tail == {"text": "\n[assistant] ", "llava": "\nASSISTANT:", "paligemma": "\n"}[name]


@pytest.mark.parametrize("name", NAMES)
def test_kinds_tell_text_patches_template_and_padding_apart(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    cache, seen = record_forward(sources[name], make_inputs(name, pictures))
    has_text = cache.spans[..., 1] > cache.spans[..., 0]
    torch.testing.assert_close(cache.kinds == PositionKind.TEXT, has_text)
    torch.testing.assert_close(cache.kinds == PositionKind.PAD, seen["attention_mask"] == 0)
    torch.testing.assert_close(cache.kinds == PositionKind.IMAGE, cache.patches[..., 0] >= 0)
    assert (cache.kinds == PositionKind.PAD).any()  # the texts are of uneven length
    if name == "text":
        assert cache.grids == ((), ())
    else:
        image_id = sources[name].model.config.image_token_id
        torch.testing.assert_close(cache.kinds == PositionKind.IMAGE, seen["input_ids"] == image_id)


@pytest.mark.parametrize("name", NAMES)
def test_positions_count_real_tokens_from_the_models_first(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    cache = sources[name].prefill(make_inputs(name, pictures))
    first = 1 if name == "paligemma" else 0
    for row in range(2):
        real = real_positions(cache, row)
        expected = torch.arange(int(real.sum())) + first
        torch.testing.assert_close(cache.position_ids[row, real], expected)
        assert real[-1]  # padded on the left


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_gives_what_the_row_alone_gives(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    inputs = make_inputs(name, pictures)
    both = sources[name].prefill(inputs)
    for row, item in enumerate(inputs):
        alone = sources[name].prefill([item])
        real = real_positions(both, row)
        assert alone.seq_len == int(real.sum())
        for got, expected in zip(both.layers, alone.layers, strict=True):
            torch.testing.assert_close(
                got.keys[row][:, real], expected.keys[0], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                got.values[row][:, real], expected.values[0], rtol=1e-5, atol=1e-5
            )
        for field in ("position_ids", "kinds", "patches", "spans"):
            torch.testing.assert_close(
                getattr(both, field)[row][real], getattr(alone, field)[0], msg=field
            )


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_are_those_of_a_plain_forward(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    source = sources[name]
    inputs = make_inputs(name, pictures)[:1]
    if name == "text":
        prompt = f"<s>[user] {WORDS[0]}\n[assistant] "
        encoded = source.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        encoded = {"input_ids": encoded["input_ids"]}
    else:
        prompt = (
            f"<image>{WORDS[0]}"
            if name == "paligemma"
            else f"USER: <image>\n{WORDS[0]}\nASSISTANT:"
        )
        encoded = source.processor(images=[pictures[0]], text=[prompt], return_tensors="pt")
        encoded.pop("token_type_ids", None)
    with torch.no_grad():
        plain = source.model(**encoded, use_cache=True).past_key_values
    cache = source.prefill(inputs)
    assert len(plain.layers) == len(cache.layers)
    for got, expected in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(got.keys, expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefill_computes_no_logits_but_the_last(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    head = sources[name].model.get_output_embeddings()
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    cache = sources[name].prefill(make_inputs(name, pictures))
    hook.remove()
    assert [states.shape[:2] for states in seen] == [(cache.batch_size, 1)]
    # A slice is not, and torch's product over it copies the vocabulary for each row.
    assert all(states.is_contiguous() for states in seen)


@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_the_models_own_answer_to_each_row(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    inputs = make_inputs(name, pictures)
    both = sources[name].generate(inputs, max_new_tokens=4, do_sample=False)
    assert both == [
        sources[name].generate([item], max_new_tokens=4, do_sample=False)[0] for item in inputs
    ]
    assert any(both)


@pytest.mark.parametrize("name", NAMES)
def test_reading_leaves_no_gradients_and_changes_no_weights(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    source = sources[name]
    before = {key: value.clone() for key, value in source.model.state_dict().items()}
    source.model.requires_grad_(True)
    cache = source.prefill(make_inputs(name, pictures))
    assert not any(kv.keys.requires_grad or kv.values.requires_grad for kv in cache.layers)
    for key, value in source.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VLMS)
def test_patches_stand_in_reading_order(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    cache = sources[name].prefill(make_inputs(name, pictures))
    grid = GRIDS[name]
    assert cache.grids == ((grid,), (grid,))
    expected = [[0, row, col] for row in range(grid.rows) for col in range(grid.cols)]
    for row in range(2):
        found = cache.patches[row][cache.patches[row, :, 0] >= 0]
        assert found.tolist() == expected


@pytest.mark.parametrize("name", VLMS)
def test_a_bright_patch_shows_at_the_position_that_names_its_place(
    sources: dict[str, Any], name: str
) -> None:
    grid = GRIDS[name]
    cells = [(row, col) for row in range(grid.rows) for col in range(grid.cols)]
    painted = [np.zeros((7 * grid.rows, 7 * grid.cols, 3), dtype=np.uint8)]
    for row, col in cells:
        picture = painted[0].copy()
        picture[7 * row : 7 * row + 7, 7 * col : 7 * col + 7] = 255
        painted.append(picture)
    inputs = [SourceInput(text="describe", images=(Image.fromarray(p),)) for p in painted]
    cache = sources[name].prefill(inputs)
    keys = cache.layers[0].keys
    change = (keys[1:] - keys[:1]).square().sum((1, 3))
    for index, cell in enumerate(cells):
        assert tuple(cache.patches[0, change[index].argmax(), 1:].tolist()) == cell


def test_two_pictures_in_a_row_are_told_apart(
    sources: dict[str, Any], pictures: list[Image.Image]
) -> None:
    cache = sources["llava"].prefill([SourceInput(text="compare", images=tuple(pictures))])
    assert cache.grids == ((PatchGrid(4, 4, image=0), PatchGrid(4, 4, image=1)),)
    images = cache.patches[0, :, 0]
    assert images[images >= 0].tolist() == [0] * 16 + [1] * 16


@pytest.mark.parametrize("name", VLMS)
def test_a_vlm_may_look_without_a_question(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    cache = sources[name].prefill(make_inputs(name, pictures, ["", ""]))
    assert not (cache.kinds == PositionKind.TEXT).any()
    assert (cache.spans == -1).all()
    assert cache.texts == ("", "")


# --- text models ------------------------------------------------------------------------------


def test_a_sliding_window_model_keeps_every_position(
    tiny_text_source_tokenizer: Any,
) -> None:
    config = MistralConfig(
        vocab_size=len(tiny_text_source_tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(config).eval()
    source = TextSource(model, tiny_text_source_tokenizer, "tiny/mistral")
    cache, seen = record_forward(source, [SourceInput(text=WORDS[1])])
    assert cache.seq_len > 3 * config.sliding_window
    assert cache.layers[1].keys.shape[2] == cache.seq_len == seen["input_ids"].shape[1]

    # The window still masks, and what a sliding cache keeps are the newest of these positions.
    sliding = DynamicCache(config=config)
    assert sliding.layers[0].is_sliding
    with torch.no_grad():
        model(seen["input_ids"], past_key_values=sliding)
    for got, expected in zip(cache.layers, sliding.layers, strict=True):
        kept = expected.keys.shape[2]
        assert kept < cache.seq_len
        torch.testing.assert_close(got.keys[:, :, -kept:], expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.values[:, :, -kept:], expected.values, rtol=1e-5, atol=1e-5)


def test_a_full_cache_is_empty_and_has_no_window(tiny_target: Any) -> None:
    cache = full_cache(tiny_target)
    assert cache.get_seq_length() == 0
    assert len(cache.layers) == 3
    assert not any(cache.is_sliding)


def test_without_a_chat_template_a_text_is_read_as_it_stands(
    tiny_text_source_tokenizer: Any,
) -> None:
    tiny_text_source_tokenizer.chat_template = None
    encoded, spans = encode_chats(
        tiny_text_source_tokenizer, ["the cat"], torch.device("cpu"), system="in one word"
    )
    assert tiny_text_source_tokenizer.decode(encoded["input_ids"][0]) == "in one word\nthe cat"
    text_ids = encoded["input_ids"][0][spans[0, :, 1] > spans[0, :, 0]]
    assert tiny_text_source_tokenizer.decode(text_ids) == "the cat"


# --- loading -----------------------------------------------------------------------------------


def test_a_text_model_loads_as_source_and_as_target(
    tiny_text_source: Any, tiny_text_source_tokenizer: Any, tmp_path: Path
) -> None:
    name = str(tmp_path)
    tiny_text_source.save_pretrained(name)
    tiny_text_source_tokenizer.save_pretrained(name)
    source, target = load_source(name), Target.from_pretrained(name, dtype=torch.bfloat16)
    assert type(source) is TextSource
    assert source.origin == target.origin
    assert target.model.dtype == torch.bfloat16
    own = TextSource(tiny_text_source, tiny_text_source_tokenizer, name)
    asked = [SourceInput(text="hello")]
    for got, expected in zip(source.prefill(asked).layers, own.prefill(asked).layers, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_origin_names_the_commit_that_was_the_newest(
    tmp_path: Path,
    tiny_text_source: Any,
    tiny_text_source_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = "0123456789" * 4
    there = tmp_path / "models--org--llm" / "snapshots" / commit
    tiny_text_source.save_pretrained(there)
    tiny_text_source_tokenizer.save_pretrained(there)
    asked: list[str | None] = []
    own = hub.load_pretrained

    def load(kind: str, name: str, revision: str | None, dtype: Any = None) -> Any:
        asked.append(revision)
        return own(kind, str(there), None, dtype)

    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(there / "config.json"))
    for module in ("sources", "target"):
        monkeypatch.setattr(f"mm_c2c.{module}.load_pretrained", load)
    for read in (load_source, Target.from_pretrained):
        assert read("org/llm").origin.revision == commit
        assert read("org/llm", "main").origin.revision == commit
    assert set(asked) == {commit}


def test_a_model_that_cannot_be_had_is_said_by_name(tmp_path: Path, tiny_text_source: Any) -> None:
    for load in (load_source, Target.from_pretrained):
        with pytest.raises(FetchError, match="'no/such' could not be loaded: it is no folder"):
            load("no/such")
    tiny_text_source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen9"]}))
    with pytest.raises(UnsupportedError, match="is a Qwen9, which transformers has not"):
        load_source(str(tmp_path))


def test_a_model_whose_file_was_cut_short_is_said_by_name(
    tmp_path: Path, tiny_text_source: Any, tiny_text_source_tokenizer: Any
) -> None:
    tiny_text_source.save_pretrained(tmp_path)
    tiny_text_source_tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FetchError, match=f"'{tmp_path}' could not be loaded as Auto"):
        Target.from_pretrained(str(tmp_path))


# --- refusals ---------------------------------------------------------------------------------


def test_known_families_find_their_class() -> None:
    assert source_class("llava", has_vision=True) is VLMSource
    assert source_class("paligemma", has_vision=True) is PaliGemmaSource
    assert source_class("qwen3", has_vision=False) is TextSource
    assert source_class("pi0", has_vision=True) is PI0Source
    assert source_class("whisper", has_vision=False) is SpeechSource
    others = SOURCES.keys() - {"pi0", "whisper"}
    assert all(issubclass(source_class(kind, has_vision=True), VLMSource) for kind in others)


def test_an_unknown_vision_family_lists_the_known_ones() -> None:
    with pytest.raises(
        UnsupportedError, match=r"type 'lava'; known: .*llava, .*paligemma.*; closest: llava"
    ):
        source_class("lava", has_vision=True)


@pytest.mark.parametrize("name", VLMS)
def test_a_vlm_without_a_picture_names_the_row(
    sources: dict[str, Any], pictures: list[Image.Image], name: str
) -> None:
    inputs = [*make_inputs(name, pictures)[:1], SourceInput(text="hello")]
    with pytest.raises(InputError, match=r"row 1: tiny/\w+ needs a picture, got none"):
        sources[name].prefill(inputs)
    with pytest.raises(InputError, match="row 1"):
        sources[name].generate(inputs)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_source_refuses_an_empty_text(sources: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match="needs a question, got an empty text"):
        sources["text"].prefill([SourceInput(text=text)])


def test_a_text_source_refuses_an_encoder_decoder(tiny_text_source_tokenizer: Any) -> None:
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match=r"tiny/t5: .* encoder and decoder \(t5\) cannot"):
        TextSource(model, tiny_text_source_tokenizer, "tiny/t5")


def test_a_text_source_refuses_a_picture(
    sources: dict[str, Any], pictures: list[Image.Image]
) -> None:
    with pytest.raises(InputError, match="tiny/text reads text only, but got a picture"):
        sources["text"].prefill([SourceInput(text="hello", images=(pictures[0],))])


def test_keys_turn_as_a_longer_prompt_before_them_left_it(tiny_text_source_tokenizer: Any) -> None:
    tokenizer = tiny_text_source_tokenizer
    model = build(LONGER["dynamic"], len(tokenizer))
    source = TextSource(model, tokenizer, "tiny/dynamic")
    short, long = ([SourceInput(text=" what" * count)] for count in (80, 160))
    fresh = source.prefill(short).rope
    source.prefill(long)
    assert source.prefill(short).rope == rope_specs(model, source.prefill(short).seq_len)
    assert source.prefill(short).rope != fresh

"""Vision families as sources: each one's cache, grids and words, on a tiny real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, DynamicCache

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import AlignmentError, InputError
from mm_c2c.rope import derotate
from mm_c2c.sources import SourceInput, load_source, source_class

WORDS = ("what is in the image ?", "Which sticker is above the apple ? answer with one word :")
# Their processors neither save nor load without it, for the sake of videos.
NEED_TORCHVISION = {
    "gemma4",
    "glm4v",
    "internvl",
    "lfm2_vl",
    "llava_onevision",
    "mistral3",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def source(name: str, family: Family) -> Any:
    tiny = family.build()
    read = source_class(tiny.model.config.model_type, has_vision=True)
    return read(tiny.model, tiny.processor, f"tiny/{name}")


@pytest.fixture
def inputs(pictures: list[Image.Image]) -> list[SourceInput]:
    return [SourceInput(text=t, images=(p,)) for t, p in zip(WORDS, pictures, strict=True)]


@contextmanager
def recorded_calls(modules: Sequence[Any]) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    calls: list[tuple[tuple[Any, ...], Any]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for module in modules
    ]
    yield calls
    for handle in handles:
        handle.remove()


def encode(source: Any, inputs: Sequence[SourceInput]) -> dict[str, Any]:
    """What the family's processor makes of the inputs, without what its model does not know."""
    encoded = source.processor(
        images=[list(item.images) for item in inputs],
        text=[source.render(item) for item in inputs],
        return_tensors="pt",
    )
    if source.model.config.is_encoder_decoder:
        encoded["decoder_input_ids"] = torch.full((len(inputs), 1), 3)
    return source._known(encoded)


def painted(size: tuple[int, int], box: tuple[int, int, int, int] | None) -> Image.Image:
    """A black picture, bright from top to bottom and left to right of a box."""
    picture = np.zeros((*size, 3), dtype=np.uint8)
    if box:
        top, bottom, left, right = box
        picture[top:bottom, left:right] = 255
    return Image.fromarray(picture)


def plain_layers(source: Any, encoded: dict[str, Any]) -> Any:
    """What the model itself leaves of a prompt."""
    with torch.no_grad():
        out = source.model(**encoded, use_cache=True)
    cache = getattr(out, "language_model_outputs", out).past_key_values
    return getattr(cache, "cross_attention_cache", cache).layers


def features_change(source: Any, looks: Sequence[SourceInput]) -> tuple[SourceCache, Tensor]:
    """How much the features of the pictures differ from those of the first look.

    Where the first text model does not take them in place of words, they are keys and values alone.
    """
    model = source.model
    reader = model.get_encoder() if model.config.is_encoder_decoder else model.get_decoder()
    with recorded_calls([reader]) as calls:
        cache = source.prefill(looks)
    features = calls[0][1].get("inputs_embeds")
    if features is None:
        features = cache.layers[0].values.transpose(1, 2).flatten(2)
    return cache, (features[1:] - features[:1]).square().sum(-1)


# --- the cache --------------------------------------------------------------------------------


def test_the_layers_are_those_of_a_plain_forward(source: Any, inputs: list[SourceInput]) -> None:
    for item in inputs:
        plain = plain_layers(source, encode(source, [item]))
        cache = source.prefill([item])
        assert cache.shape == source.shape
        for index, got in zip(cache.layer_indices, cache.layers, strict=True):
            expected = plain[index]
            kept = expected.keys.shape[2]  # a sliding layer keeps its window only
            torch.testing.assert_close(got.keys[:, :, -kept:], expected.keys, **CLOSE)
            torch.testing.assert_close(got.values[:, :, -kept:], expected.values, **CLOSE)


@pytest.mark.parametrize("pictures_shown", [(1, 1), (2, 1)])
def test_a_padded_row_gives_what_the_row_alone_gives(
    source: Any,
    inputs: list[SourceInput],
    family: Family,
    pictures: list[Image.Image],
    pictures_shown: tuple[int, int],
) -> None:
    if max(pictures_shown) > 1 and source.one_picture:
        pytest.skip("a prompt shows one picture")
    inputs = [
        replace(item, images=tuple((pictures[row:] + pictures)[:count]))
        for row, (item, count) in enumerate(zip(inputs, pictures_shown, strict=True))
    ]
    both, turned = source.prefill(inputs), source.prefill(inputs[::-1])
    assert [len({grid.image for grid in grids}) for grids in both.grids] == (
        list(pictures_shown) if family.shown else [0, 0]
    )
    if family.reads_words:  # of uneven length
        assert (both.kinds == PositionKind.PAD).any()
    for row, item in enumerate(inputs):
        alone = source.prefill([item])
        own = alone.kinds[0] != PositionKind.PAD
        for cache, index in ((both, row), (turned, 1 - row)):
            real = cache.kinds[index] != PositionKind.PAD
            for got, expected in zip(cache.layers, alone.layers, strict=True):
                for ours, theirs in zip(got, expected, strict=True):
                    torch.testing.assert_close(ours[index][:, real], theirs[0][:, own], **CLOSE)
            for field in ("kinds", "patches", "spans"):
                torch.testing.assert_close(
                    getattr(cache, field)[index, real], getattr(alone, field)[0, own]
                )
            assert cache.grids[index] == alone.grids[0]


def test_derotated_keys_are_those_projected_without_rope(
    source: Any, inputs: list[SourceInput]
) -> None:
    if not any(source.prefill(inputs).rope):
        pytest.skip("its keys are not rotated")
    layers = source.model.get_decoder().layers
    attentions = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    with recorded_calls(attentions) as calls:
        cache = source.prefill(inputs)
    bare = DynamicCache()
    with torch.no_grad():
        for attention, (args, kwargs) in zip(attentions, calls, strict=True):
            cos, sin = kwargs["position_embeddings"]
            still = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
            attention(*args, **kwargs | still | {"past_key_values": bare})
    for index, kv, spec in zip(cache.layer_indices, cache.layers, cache.rope, strict=True):
        found, expected = derotate(kv.keys, cache.position_ids, spec), bare.layers[index].keys
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if spec is not None:
            assert (kv.keys - expected).abs().max() > 1e-2, "nothing was rotated"


def test_reading_leaves_the_model_as_it_was(source: Any, inputs: list[SourceInput]) -> None:
    encoded = encode(source, inputs[:1])
    with torch.no_grad():
        before = source.model(**encoded).logits
    base = source.model.base_model
    base.rope_deltas = "left by a user"
    weights = {key: value.clone() for key, value in source.model.state_dict().items()}
    state = {key: value for key, value in vars(base).items() if not key.startswith("_")}
    cache = source.prefill(inputs)
    source.generate(inputs, max_new_tokens=2, do_sample=False)
    assert {key: value for key, value in vars(base).items() if not key.startswith("_")} == state
    base.rope_deltas = None
    for key, value in source.model.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(source.model(**encoded).logits, before, rtol=0, atol=0)
    assert not any(kv.keys.requires_grad or kv.values.requires_grad for kv in cache.layers)


# --- pictures ---------------------------------------------------------------------------------


def test_a_bright_patch_shows_where_the_cache_says_it_lies(source: Any, family: Family) -> None:
    for (height, width), shown in family.shown.items():
        rows, cols = max(shown, key=lambda grid: grid[0] * grid[1])
        high, wide = height // rows, width // cols
        cells = [(row, col) for row in range(rows) for col in range(cols)]
        cells = cells[:: -(-len(cells) // 20)] + cells[-1:]
        part = family.brightened
        boxes = [
            (r * high, int((r + part) * high), c * wide, int((c + part) * wide)) for r, c in cells
        ]
        looks = [SourceInput(images=(painted((height, width), box),)) for box in (None, *boxes)]
        cache, change = features_change(source, looks)
        assert cache.grids == (tuple(PatchGrid(*grid) for grid in shown),) * len(looks)
        for view, grid in enumerate(shown):
            here = (cache.patches[0, :, 0] == view).nonzero().flatten()
            places = cache.patches[0, here, 1:].tolist()
            assert sorted(places) == [[r, c] for r in range(grid[0]) for c in range(grid[1])]
            for index, (row, col) in enumerate(cells):
                found = places[int(change[index, here].argmax())]
                # An overview has larger patches: the one found overlaps the bright one.
                assert found[0] * rows < (row + 1) * grid[0]
                assert found[1] * cols < (col + 1) * grid[1]
                assert (found[0] + 1) * rows > row * grid[0]
                assert (found[1] + 1) * cols > col * grid[1]


def test_image_positions_hold_patches_and_nothing_else_does(
    source: Any, inputs: list[SourceInput], family: Family
) -> None:
    cache = source.prefill(inputs)
    is_patch = cache.patches[..., 0] >= 0
    assert is_patch.any() == bool(family.shown)
    assert (cache.kinds[is_patch] == PositionKind.IMAGE).all()
    assert ((cache.patches == -1) == ~is_patch.unsqueeze(-1)).all()


def test_two_pictures_of_a_row_are_told_apart(source: Any, family: Family) -> None:
    size = next(iter(family.shown), (28, 28))
    if source.one_picture:
        with pytest.raises(InputError, match=r"row 0: tiny/.* takes one picture, got 2"):
            source.prefill([SourceInput(images=(painted(size, None),) * 2)])
        return
    dark, bright = painted(size, None), painted(size, (0, *size[:1], 0, size[1]))
    looks = [SourceInput(images=pair) for pair in ((dark, dark), (dark, bright), (bright, dark))]
    cache, change = features_change(source, looks)
    images = torch.tensor([grid.image for grid in cache.grids[0]])
    assert sorted(set(images.tolist())) == [0, 1]
    views = cache.patches[0, :, 0]
    for row, image in enumerate((1, 0)):
        of_image = images[views.clamp(min=0)] == image
        shows, other = change[row, (views >= 0) & of_image], change[row, (views >= 0) & ~of_image]
        assert 1e-3 * shows.min() > other.max()


def test_pictures_of_unlike_shape_keep_their_own_grids(
    source: Any, inputs: list[SourceInput], name: str
) -> None:
    if source.one_picture:
        pytest.skip("a prompt shows one picture")
    pictures = [picture for item in inputs for picture in item.images]
    (grids,) = source.prefill([SourceInput(images=tuple(pictures))]).grids
    for image, picture in enumerate(pictures):
        (alone,) = source.prefill([SourceInput(images=(picture,))]).grids
        if name == "llava_onevision":
            alone = alone[:1]  # several pictures are shown whole only
        here = tuple(grid for grid in grids if grid.image == image)
        assert here == tuple(grid._replace(image=image) for grid in alone)


# --- words ------------------------------------------------------------------------------------


def test_spans_spell_the_words_of_the_text(
    source: Any, inputs: list[SourceInput], family: Family
) -> None:
    cache = source.prefill(inputs)
    if not family.reads_words:
        assert (cache.spans == -1).all()
        return
    ids = source._encode(inputs, [source.render(item) for item in inputs])["input_ids"]
    tokenizer = source.processor.tokenizer
    # SentencePiece's lone space has the place of the character after it.
    space = tokenizer.convert_tokens_to_ids("▁")
    has_text = cache.spans[..., 1] > cache.spans[..., 0]
    torch.testing.assert_close(cache.kinds == PositionKind.TEXT, has_text)
    for row, text in enumerate(cache.texts):
        covered = ""
        for token, (start, end) in zip(ids[row].tolist(), cache.spans[row].tolist(), strict=True):
            if end > start and token != space:
                assert text[start:end].strip() == tokenizer.decode([token]).strip()
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


# --- fusing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["window", "resampler"])
def test_gradients_reach_the_fuser_and_none_the_source(
    source: Any,
    family: Family,
    inputs: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pooling: str,
) -> None:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="vlm", geometry="slots", rows=2, cols=2, fuser=fuser, pooling=pooling)
    bridge = Bridge(target, {"vlm": source}, BridgeConfig(links=(link,), slot_token="a"))
    cache = source.prefill(inputs)
    if pooling == "window" and not family.shown:
        with pytest.raises(AlignmentError, match="queries that lie nowhere: use pooling='resampl"):
            bridge.fuse_slots({"vlm": cache})
        return
    fused = bridge.fuse(bridge.fuse_slots({"vlm": cache}), list(WORDS))
    tiny_target(**fused).logits.logsumexp(-1).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in bridge.fusers.parameters())
    assert all(p.grad is None for p in source.model.parameters())
    assert all(p.grad is None for p in tiny_target.parameters())


def test_an_answer_streams_and_outlives_a_saved_bridge(
    source: Any,
    inputs: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tmp_path: Path,
) -> None:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(
        source="vlm", geometry="slots", rows=2, cols=2, fuser=fuser, pooling="resampler"
    )
    bridge = Bridge(target, {"vlm": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(std=0.5, generator=generator)
    seen = bridge.perceive(inputs[0].images[0])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    (answer,) = bridge.generate(seen, [WORDS[0]], **options)
    assert "".join(bridge.stream(seen, WORDS[0], **options)) == answer
    bridge.save_pretrained(tmp_path)
    again = Bridge.from_pretrained(tmp_path, target, {"vlm": source})
    assert again.generate(again.perceive(inputs[0].images[0]), [WORDS[0]], **options) == [answer]
    heard = tiny_target(**bridge.fuse(seen, [WORDS[0]])).logits[:, -1]
    for closed in again.fusers.values():
        closed.close()
    unheard = tiny_target(**again.fuse(again.perceive(inputs[0].images[0]), [WORDS[0]]))
    assert not torch.allclose(unheard.logits[:, -1], heard)


@torch.no_grad()
def test_a_family_loads_from_its_folder(
    name: str,
    source: Any,
    inputs: list[SourceInput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source.model.save_pretrained(tmp_path)
    if name in NEED_TORCHVISION:
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: source.processor)
    else:
        source.processor.save_pretrained(tmp_path)
    loaded = load_source(str(tmp_path))
    assert type(loaded) is type(source)
    assert loaded.origin == source.origin._replace(model=str(tmp_path))
    # Where torchvision is installed, what was saved resizes with it, and so a little otherwise.
    again = type(source)(source.model, loaded.processor, "again")
    expected, found = again.prefill(inputs), loaded.prefill(inputs)
    for got, own in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(got, own, rtol=0, atol=0)
    assert found.patches.equal(expected.patches)
    assert found.spans.equal(expected.spans)


@pytest.mark.parametrize("pooling", ["window", "resampler"])
def test_frames_of_a_video_are_pictures_in_order(
    tiny_target: Any, tiny_target_tokenizer: Any, pooling: str
) -> None:
    """A bright corner in the second of three frames shows in that frame's slots."""
    source = build_source("qwen2_5_vl")
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(
        source="vlm", geometry="slots", rows=2, cols=2, images=3, fuser=fuser, pooling=pooling
    )
    bridge = Bridge(target, {"vlm": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    taken: list[Tensor] = []
    bridge.fusers["vlm_slots"].register_forward_pre_hook(
        lambda _module, args: taken.append(args[0])
    )
    dark, bright = painted((48, 48), None), painted((48, 48), (24, 48, 0, 24))
    still = SourceInput(images=(dark, dark, dark))
    seen = bridge.perceive([still, SourceInput(images=(dark, bright, dark))])
    assert len(bridge.generate(seen, list(WORDS), max_new_tokens=2, do_sample=False)) == 2
    # The first layer's values: before any frame has attended to another.
    change = (taken[0][0, 1, :, 1] - taken[0][0, 0, :, 1]).square().sum(-1).view(3, 4)
    assert change[1].min() > 1e3 * change[[0, 2]].max()
    if pooling == "window":
        assert change[1].argmax() == 2  # bottom left


def build_source(name: str) -> Any:
    tiny = FAMILIES[name].build()
    return source_class(name, has_vision=True)(tiny.model, tiny.processor, f"tiny/{name}")


def test_mllama_keeps_the_picture_alone_whatever_the_question(
    pictures: list[Image.Image],
) -> None:
    source = build_source("mllama")
    caches = [
        source.prefill([SourceInput(text=text, images=(pictures[0],))]) for text in ("", *WORDS)
    ]
    assert caches[0].layer_indices == (1, 3)
    for cache in caches[1:]:
        for got, expected in zip(cache.layers, caches[0].layers, strict=True):
            torch.testing.assert_close(got.keys, expected.keys, rtol=0, atol=0)


def test_linear_layers_are_left_out() -> None:
    for name in ("qwen3_5", "lfm2_vl"):
        source = build_source(name)
        cache = source.prefill([SourceInput(images=(painted((16, 16), None),))])
        assert cache.layer_indices == (1, 3)
        assert source.shape.num_layers == 2


def test_gemma4_leaves_out_layers_with_other_heads_and_those_that_share() -> None:
    source = build_source("gemma4")
    cache = source.prefill([SourceInput(images=(painted((16, 16), None),))])
    assert cache.layer_indices == (0, 1)  # 2 has longer heads, 3 to 5 keep no keys


def test_florence2_refuses_a_task_by_its_token(pictures: list[Image.Image]) -> None:
    source = build_source("florence2")
    with pytest.raises(InputError, match="instead of <OD>, such as: Locate the objects"):
        source.prefill([SourceInput(text="<OD>", images=(pictures[0],))])


def test_gemma3_sees_a_picture_both_ways() -> None:
    source = build_source("gemma3")
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

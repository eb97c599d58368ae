"""Several pictures of a row: each has its own slots, and rows do not feel each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_rigs import (
    ATTENTIVE_EYES,
    CLOSE,
    EACH_POOLING,
    EXACT,
    EYES,
    QUESTIONS,
    Rig,
    assert_same_cache,
    close,
    prefix_len,
    read_on,
    target_alone,
)
from PIL import ExifTags, Image
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.cache import LayerKV, PositionKind, SourceCache
from mm_c2c.errors import (
    AlignmentError,
    InputError,
)
from mm_c2c.sources import SourceInput


def two_pictures(rig: Rig) -> SourceCache:
    """Two rows of two pictures, in either order; the shorter words are padded."""
    shown = (rig.pictures, rig.pictures[::-1])
    return rig.sources["eyes"].prefill(
        [
            SourceInput(text=text, images=tuple(pictures))
            for text, pictures in zip(QUESTIONS, shown, strict=True)
        ]
    )


def fuser_inputs(bridge: Bridge, cache: SourceCache) -> Tensor:
    """`(layers, batch, slots, 2, width)`: what the slots take of a cache."""
    seen: list[Tensor] = []
    handle = bridge.fusers["eyes_slots"].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    bridge.fuse_slots({"eyes": cache})
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("training", [True, False])
@EACH_POOLING
def test_a_closed_bridge_of_several_pictures_leaves_the_target_untouched(
    rig: Rig, eyes_link: tuple[str, ...], training: bool
) -> None:
    bridge = rig.bridge([eyes_link], images=2).train(training)
    caches = {"eyes": two_pictures(rig)}
    opened = bridge.fuse(bridge.fuse_slots(caches), QUESTIONS)
    closed = close(bridge).fuse(bridge.fuse_slots(caches), QUESTIONS)
    assert ((closed["input_ids"] == bridge.prompt.slot_id).sum(1) >= 12).all()
    own = target_alone(rig.target.model, closed, prefix_len(bridge, closed))
    assert_same_cache(closed["past_key_values"], own["past_key_values"], **EXACT)
    logits = read_on(rig.target.model, closed)
    torch.testing.assert_close(logits, read_on(rig.target.model, own), **EXACT)
    assert ((read_on(rig.target.model, opened) - logits)[:, -1].abs().amax(1) > 0.01).all()


@torch.no_grad()
def test_a_bridge_perceives_pictures_and_whole_inputs_alike(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    first, second = rig.pictures
    expected = bridge.perceive(rig.pictures, QUESTIONS[0]).past_key_values
    whole = [SourceInput(text=QUESTIONS[0], images=(picture,)) for picture in rig.pictures]
    assert_same_cache(bridge.perceive(whole).past_key_values, expected, **EXACT)
    blind = bridge.perceive([first, SourceInput(images=(second,))])
    assert_same_cache(blind.past_key_values, bridge.perceive(rig.pictures).past_key_values, **EXACT)
    assert bridge.perceive(whole[0]).batch_size == 1
    with pytest.raises(InputError, match=r"row 1 is a SourceInput, .* put 'look' there"):
        bridge.perceive([first, whole[1]], "look")


def test_a_photo_is_perceived_upright(rig: Rig, tmp_path: Path) -> None:
    bridge = rig.bridge([EYES])
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    rig.pictures[0].rotate(180).save(tmp_path / "photo.png", exif=turned)
    expected = bridge.perceive(rig.pictures[0]).past_key_values
    with Image.open(tmp_path / "photo.png") as photo:
        for shown in (photo, SourceInput(images=(photo,))):
            assert_same_cache(bridge.perceive(shown).past_key_values, expected, **EXACT)


def test_gradients_reach_the_fusers_through_what_is_perceived(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    assert not bridge.perceive(rig.pictures).past_key_values.layers[0].keys.requires_grad
    assert bridge.train().perceive(rig.pictures).past_key_values.layers[0].keys.requires_grad


def test_what_stands_where_padding_is_does_not_matter(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    looks = [
        SourceInput(text=text, images=(picture,))
        for text, picture in zip(("", QUESTIONS[0] * 2), rig.pictures, strict=True)
    ]
    cache = rig.sources["eyes"].prefill(looks)
    padding = (cache.kinds == PositionKind.PAD)[:, None, :, None]
    assert padding.any()
    layers = tuple(
        LayerKV(*(states.masked_fill(padding, torch.nan) for states in kv)) for kv in cache.layers
    )
    fused, spoilt = (
        bridge.fuse_slots({"eyes": found}).past_key_values
        for found in (cache, replace(cache, layers=layers))
    )
    assert_same_cache(spoilt, fused, **EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_source_that_overflowed_is_refused(rig: Rig, value: float) -> None:
    bridge = close(rig.bridge([EYES]))
    cache = rig.sources["eyes"].prefill([SourceInput(images=(rig.pictures[0],))])
    cache.layers[1].values[0, 0, (cache.kinds[0] == PositionKind.IMAGE).nonzero()[0]] = value
    with pytest.raises(
        InputError, match="'eyes' holds NaN or infinity; load tiny/llava in float32"
    ):
        bridge.fuse_slots({"eyes": cache})
    bridge.train().fuse_slots({"eyes": cache})  # a training looks at its loss


@EACH_POOLING
def test_each_picture_fills_its_own_slots_in_order(rig: Rig, eyes_link: tuple[str, ...]) -> None:
    cache = two_pictures(rig)
    both = fuser_inputs(rig.bridge([eyes_link], images=2), cache)
    assert both.shape[2] == 12
    for image in range(2):
        elsewhere = (cache.patches[..., :1] != image).expand_as(cache.patches)
        alone = cache.patches.masked_fill(elsewhere, -1)
        alone[..., 0].clamp_(max=0)
        grids = tuple((grids[image]._replace(image=0),) for grids in cache.grids)
        expected = fuser_inputs(rig.bridge([eyes_link]), replace(cache, patches=alone, grids=grids))
        torch.testing.assert_close(both[:, :, 6 * image : 6 * image + 6], expected)
    assert not torch.allclose(both[:, :, :6], both[:, :, 6:])


@EACH_POOLING
def test_rows_of_several_pictures_do_not_feel_each_other(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge, cache = rig.bridge([eyes_link], images=2), two_pictures(rig)
    assert (cache.kinds == 0).any()  # padding
    both = read_on(rig.target.model, bridge.fuse(bridge.fuse_slots({"eyes": cache}), QUESTIONS))
    for rows in ([1, 0], [0], [1]):
        some = bridge.fuse_slots({"eyes": cache.select(torch.tensor(rows))})
        asked = bridge.fuse(some, [QUESTIONS[row] for row in rows])
        found = read_on(rig.target.model, asked)[:, -1]
        torch.testing.assert_close(found, both[rows, -1], **CLOSE)


def test_queries_without_a_grid_are_one_picture(rig: Rig) -> None:
    cache = two_pictures(rig)
    cache = replace(cache, patches=torch.full_like(cache.patches, -1), grids=((), ()))
    one = fuser_inputs(rig.bridge([ATTENTIVE_EYES]), cache)
    two = fuser_inputs(rig.bridge([ATTENTIVE_EYES], images=2), cache)
    torch.testing.assert_close(two[:, :, :6], one)
    assert (two[:, :, 6:] == 0).all()
    with pytest.raises(AlignmentError, match="queries that lie nowhere: use pooling='resampler'"):
        rig.bridge([EYES], images=2).fuse_slots({"eyes": cache})


def unlike_pictures(rig: Rig) -> SourceCache:
    """Rows of two pictures, one and none, in words of unlike length."""
    shown = (rig.pictures, rig.pictures[1:], rig.pictures[:1])
    cache = rig.sources["eyes"].prefill(
        [
            SourceInput(text=text, images=tuple(pictures))
            for text, pictures in zip(("look", *QUESTIONS), shown, strict=True)
        ]
    )
    kinds, patches = cache.kinds.clone(), cache.patches.clone()
    kinds[2][kinds[2] == PositionKind.IMAGE] = PositionKind.TEMPLATE
    patches[2] = -1
    return replace(cache, kinds=kinds, patches=patches, grids=(*cache.grids[:2], ()))


@pytest.mark.parametrize("training", [True, False])
@EACH_POOLING
def test_slots_of_missing_pictures_stay_the_targets_own(
    rig: Rig, eyes_link: tuple[str, ...], training: bool
) -> None:
    """What is there is fused as by a bridge with slots for so many pictures."""
    bridge, cache = rig.bridge([eyes_link], images=3).train(training), unlike_pictures(rig)
    seen = bridge.fuse_slots({"eyes": cache})
    before = seen.input_ids.shape[1] - 18
    with torch.no_grad():
        own = rig.target.model(seen.input_ids[:1]).past_key_values
    for row, count in enumerate((2, 1, 0)):
        end = before + 6 * count
        for got, alone in zip(seen.past_key_values.layers, own.layers, strict=True):
            torch.testing.assert_close(got.keys[row, :, end:], alone.keys[0, :, end:], **EXACT)
            torch.testing.assert_close(got.values[row, :, end:], alone.values[0, :, end:], **EXACT)
        if count:
            fitting = rig.bridge([eyes_link], images=count).train(training)
            one = fitting.fuse_slots({"eyes": cache.select(torch.tensor([row]))})
            for got, expected, alone in zip(
                seen.past_key_values.layers, one.past_key_values.layers, own.layers, strict=True
            ):
                torch.testing.assert_close(got.keys[row, :, :end], expected.keys[0], **CLOSE)
                torch.testing.assert_close(got.values[row, :, :end], expected.values[0], **CLOSE)
                change = (got.values[row] - alone.values[0])[:, before:end].abs()
                assert change.amax((0, 2)).min() > 1e-3


@EACH_POOLING
def test_rows_of_unlike_numbers_of_pictures_do_not_feel_each_other(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge, cache = rig.bridge([eyes_link], images=2), unlike_pictures(rig)
    questions = (*QUESTIONS, "what is it ?")
    all_rows = read_on(rig.target.model, bridge.fuse(bridge.fuse_slots({"eyes": cache}), questions))
    for rows in ([2, 0, 1], [0], [1], [2]):
        some = bridge.fuse_slots({"eyes": cache.select(torch.tensor(rows))})
        asked = bridge.fuse(some, [questions[row] for row in rows])
        found = read_on(rig.target.model, asked)[:, -1]
        torch.testing.assert_close(found, all_rows[rows, -1], **CLOSE)


@torch.no_grad()
@EACH_POOLING
def test_pictures_of_unlike_number_are_perceived_and_asked_about(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link], images=2)
    looks = [SourceInput(images=tuple(rig.pictures)), SourceInput(images=(rig.pictures[1],))]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    seen = bridge.perceive(looks)
    answers = bridge.generate(seen, QUESTIONS, **options)
    for row, look in enumerate(looks):
        alone = bridge.perceive(look)
        for got, expected in zip(
            seen.past_key_values.layers, alone.past_key_values.layers, strict=True
        ):
            torch.testing.assert_close(got.keys[row], expected.keys[0], **CLOSE)
            torch.testing.assert_close(got.values[row], expected.values[0], **CLOSE)
        assert bridge.generate(alone, [QUESTIONS[row]], **options) == [answers[row]]


@EACH_POOLING
@pytest.mark.parametrize("rows", [[0, 1, 2], [2]])
def test_a_missing_picture_gives_the_fuser_nothing_to_learn(
    rig: Rig, eyes_link: tuple[str, ...], rows: list[int]
) -> None:
    """Gradients of a batch are the sum of each row's; those of a row without picture are zero."""
    bridge, cache = rig.bridge([eyes_link], images=2).train(), unlike_pictures(rig)

    def gradients(chosen: list[int]) -> dict[str, Tensor]:
        bridge.zero_grad()
        seen = bridge.fuse_slots({"eyes": cache.select(torch.tensor(chosen))})
        sum(
            (layer.keys + layer.values).square().sum() for layer in seen.past_key_values.layers
        ).backward()
        return {name: weight.grad.clone() for name, weight in bridge.named_parameters()}

    together = gradients(rows)
    alone = [gradients([row]) for row in rows]
    for name, found in together.items():
        assert found.isfinite().all(), name
        expected = sum(part[name] for part in alone)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert rows != [2] or not found.any(), name


@EACH_POOLING
def test_a_saved_bridge_holds_as_many_pictures_as_before(
    rig: Rig, tmp_path: Path, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link], images=2)
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert loaded.config == bridge.config
    assert loaded.config.links[0].images == 2
    caches = {"eyes": two_pictures(rig)}
    seen = [b.fuse_slots(caches).past_key_values for b in (bridge, loaded)]
    assert_same_cache(*seen, **EXACT)
    # What is learned serves any number of pictures.
    one = rig.bridge([eyes_link])
    assert [p.shape for p in one.parameters()] == [p.shape for p in bridge.parameters()]

"""`SourceCache`, and the few functions that touch a transformers cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    LayerKV,
    PatchGrid,
    PositionKind,
    RecurrentLayer,
    SourceCache,
    empty_spans,
    fork,
    join_rows,
    layers_to_hold,
    minds_padding,
    read_layers,
    repeat_rows,
    select_rows,
    with_layers,
)
from mm_c2c.errors import ShapeError, UnsupportedError

BATCH, HEADS, SEQ_LEN, HEAD_DIM = 2, 3, 5, 4


def numbers(*shape: int, start: float = 0.0) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) * 0.1 + start


def source_cache(**changes: Any) -> SourceCache:
    """Two layers, two rows; every entry differs, and the rows' texts and grids do too."""
    layer = LayerKV(
        numbers(BATCH, HEADS, SEQ_LEN, HEAD_DIM), -numbers(BATCH, HEADS, SEQ_LEN, HEAD_DIM)
    )
    fields: dict[str, Any] = {
        "layers": (layer, LayerKV(layer.keys + 50, layer.values - 50)),
        "layer_indices": (0, 2),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]),
        "kinds": torch.tensor([[1, 3, 3, 2, 1], [0, 0, 1, 3, 2]]),
        "patches": numbers(BATCH, SEQ_LEN, 3).long(),
        "grids": ((PatchGrid(1, 2),), (PatchGrid(1, 1),)),
        "spans": torch.stack([empty_spans(1, SEQ_LEN)[0], torch.full((SEQ_LEN, 2), 7)]),
        "texts": ("first", "second"),
        "rope": (None, None),
        "origin": CacheOrigin("tiny/model", None, "llama"),
    }
    return SourceCache(**{**fields, **changes})


@pytest.fixture
def cache() -> DynamicCache:
    """A transformers cache of two layers, two rows and five positions."""
    cache = DynamicCache()
    for index in range(2):
        keys = numbers(BATCH, HEADS, SEQ_LEN, HEAD_DIM, start=index)
        cache.update(keys, -keys, index)
    return cache


def grow(cache: DynamicCache, rows: int = BATCH) -> None:
    for index in range(2):
        more = torch.ones(rows, HEADS, 1, HEAD_DIM)
        cache.update(more, more, index)


def test_geometry_and_size_are_read_off_the_layers() -> None:
    cache = source_cache()
    assert cache.shape == CacheShape(num_layers=2, num_key_value_heads=HEADS, head_dim=HEAD_DIM)
    assert cache.shape.width == HEADS * HEAD_DIM
    assert (cache.batch_size, cache.seq_len) == (BATCH, SEQ_LEN)
    assert cache.num_bytes == 2 * 2 * BATCH * HEADS * SEQ_LEN * HEAD_DIM * 4


def test_size_follows_the_dtype() -> None:
    full = source_cache()
    half = replace(full, layers=tuple(LayerKV(k.half(), v.half()) for k, v in full.layers))
    assert half.num_bytes * 2 == full.num_bytes


def test_padding_counts_as_kind_zero() -> None:
    assert PositionKind.PAD == 0  # the bridge looks for real positions as `kinds != 0`


def test_a_cache_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="tiny/model left no layer with keys and values"):
        source_cache(layers=(), layer_indices=(), rope=())


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((BATCH, HEADS, SEQ_LEN, HEAD_DIM), (BATCH, HEADS, SEQ_LEN, HEAD_DIM + 1)),
        ((BATCH + 1, HEADS, SEQ_LEN, HEAD_DIM), (BATCH + 1, HEADS, SEQ_LEN, HEAD_DIM)),
        ((BATCH, SEQ_LEN, HEADS, HEAD_DIM), (BATCH, SEQ_LEN, HEADS, HEAD_DIM)),
    ],
    ids=["values of another shape", "another batch", "transposed"],
)
def test_layers_that_do_not_fit_the_kinds_name_the_layer(
    keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    good = source_cache().layers[0]
    bad = LayerKV(torch.zeros(keys), torch.zeros(values))
    with pytest.raises(ShapeError, match=r"layer 2: expected keys and values of \(batch=2"):
        source_cache(layers=(good, bad))


def test_every_layer_needs_a_rope_entry() -> None:
    with pytest.raises(ShapeError, match="2 layers but 1 rope entries"):
        source_cache(rope=(None,))


def test_uneven_layers_have_no_common_shape() -> None:
    good = source_cache().layers[0]
    narrow = LayerKV(good.keys[..., :2], good.values[..., :2])
    with pytest.raises(ShapeError, match=r"differ in \(heads, head_dim\): \[\(3, 2\), \(3, 4\)\]"):
        _ = source_cache(layers=(good, narrow)).shape


@pytest.mark.parametrize("rows", [[1], [1, 0], [0, 0, 1]])
def test_select_takes_whole_rows_in_the_order_given(rows: list[int]) -> None:
    cache = source_cache()
    picked = cache.select(torch.tensor(rows))
    assert picked.batch_size == len(rows)
    for new, old in enumerate(rows):
        for got, full in zip(picked.layers, cache.layers, strict=True):
            torch.testing.assert_close(got.keys[new], full.keys[old], rtol=0, atol=0)
            torch.testing.assert_close(got.values[new], full.values[old], rtol=0, atol=0)
        for name in ("position_ids", "kinds", "patches", "spans"):
            torch.testing.assert_close(getattr(picked, name)[new], getattr(cache, name)[old])
        assert picked.texts[new] == cache.texts[old]
        assert picked.grids[new] == cache.grids[old]


def test_select_takes_the_batch_axis_of_three_rows_of_positions() -> None:
    three = torch.arange(3 * BATCH * SEQ_LEN).view(3, BATCH, SEQ_LEN)
    picked = source_cache(position_ids=three).select(torch.tensor([1]))
    torch.testing.assert_close(picked.position_ids, three[:, 1:])


def test_select_refuses_a_mask() -> None:
    with pytest.raises(ShapeError, match=r"got a bool mask; give mask\.nonzero"):
        source_cache().select(torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_ids": torch.zeros(1, 5).long()},
            r"position_ids is \(1, 5\), expected \(2, 5\) o",
        ),
        ({"kinds": torch.ones(2, 5)}, "kinds is of torch.float32, expected int64 or int32"),
        ({"patches": torch.zeros(2, 5, 2).long()}, r"patches is \(2, 5, 2\), expected \(2, 5, 3\)"),
        ({"spans": torch.zeros(2, 5, 2) > 0}, "spans is of torch.bool, expected int64 or int32"),
        ({"grids": ()}, "2 rows, but 0 grids and 2 texts"),
        ({"texts": ("first", 2)}, r"texts should be str, got \('first', 2\)"),
        ({"layer_indices": (2, 2)}, r"layer_indices should be numbers, each once, got \(2, 2\)"),
    ],
)
def test_what_does_not_describe_the_layers_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        source_cache(**changes)


def test_select_leaves_the_original_alone() -> None:
    cache = source_cache()
    before = [kv.keys.clone() for kv in cache.layers]
    cache.select(torch.tensor([1])).layers[0].keys.zero_()
    for kv, keys in zip(cache.layers, before, strict=True):
        torch.testing.assert_close(kv.keys, keys, rtol=0, atol=0)
    assert cache.batch_size == BATCH


def test_read_layers_skips_layers_without_keys(cache: DynamicCache) -> None:
    class LinearAttention:
        recurrent_states = torch.zeros(1)

    cache.layers.insert(1, LinearAttention())  # type: ignore[arg-type]
    layers, indices = read_layers(cache)
    assert indices == (0, 2)
    torch.testing.assert_close(layers[1].keys, cache.layers[2].keys)
    torch.testing.assert_close(layers[1].values, cache.layers[2].values)


def test_a_cache_in_which_nothing_can_be_read_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="no layer of this cache holds keys and values"):
        read_layers(DynamicCache())


@pytest.mark.parametrize(
    "copy",
    [
        fork,
        lambda cache: repeat_rows(cache, 1),
        lambda cache: with_layers(cache, {}),
    ],
    ids=["fork", "repeat_rows", "with_layers"],
)
def test_a_copy_grows_without_the_original(
    cache: DynamicCache, copy: Callable[[DynamicCache], DynamicCache]
) -> None:
    before = [layer.keys.clone() for layer in cache.layers]
    new = copy(cache)
    grow(new)
    assert new.get_seq_length() == SEQ_LEN + 1
    assert cache.get_seq_length() == SEQ_LEN
    for layer, keys in zip(cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys, rtol=0, atol=0)


def test_with_layers_replaces_the_named_layer_only(cache: DynamicCache) -> None:
    before = cache.layers[1].keys.clone()
    new = with_layers(cache, {1: LayerKV(before + 1, before + 2)})
    torch.testing.assert_close(new.layers[1].keys, before + 1)
    torch.testing.assert_close(new.layers[1].values, before + 2)
    torch.testing.assert_close(new.layers[0].keys, cache.layers[0].keys, rtol=0, atol=0)
    torch.testing.assert_close(cache.layers[1].keys, before, rtol=0, atol=0)


def test_with_layers_keeps_the_dtype_of_the_cache(cache: DynamicCache) -> None:
    keys = cache.layers[0].keys
    new = with_layers(cache, {0: LayerKV(keys.double(), keys.double())})
    assert new.layers[0].keys.dtype == new.layers[0].values.dtype == torch.float32


def test_with_layers_refuses_another_shape(cache: DynamicCache) -> None:
    keys = cache.layers[1].keys
    with pytest.raises(ShapeError, match=r"layer 1: expected \(2, 3, 5, 4\), got \(2, 3, 5, 4\)"):
        with_layers(cache, {1: LayerKV(keys, keys[:, :, 1:])})


def test_repeat_rows_puts_copies_of_a_row_side_by_side(cache: DynamicCache) -> None:
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    new = repeat_rows(cache, 3)
    for layer, old, (keys, values) in zip(new.layers, cache.layers, before, strict=True):
        for row in range(3 * BATCH):
            torch.testing.assert_close(layer.keys[row], keys[row // 3], rtol=0, atol=0)
            torch.testing.assert_close(layer.values[row], values[row // 3], rtol=0, atol=0)
        torch.testing.assert_close(old.keys, keys, rtol=0, atol=0)


def recurrent_cache(rows: int) -> DynamicCache:
    """Attention, then a recurrent layer: all that a row holds is its own number."""
    cache = DynamicCache()
    places = torch.arange(rows, dtype=torch.float)[:, None, None, None]
    states = places.expand(rows, HEADS, SEQ_LEN, HEAD_DIM).clone()
    cache.update(states, -states, 0)
    layer = RecurrentLayer()
    layer.update_conv_state(states[:, 0].clone())
    layer.update_recurrent_state(states.clone())
    cache.layers.append(layer)
    return cache


def rows_of(cache: DynamicCache) -> list[list[float]]:
    """The number of each row, in everything that a cache holds."""
    attention, recurrent = cache.layers
    states = (
        attention.keys,
        -attention.values,
        recurrent.conv_states[0],
        recurrent.recurrent_states[0],
    )
    return [state.flatten(1)[:, -1].tolist() for state in states]


def test_rows_are_selected_with_their_recurrent_states() -> None:
    cache = recurrent_cache(3)
    assert rows_of(select_rows(cache, torch.tensor([2, 0, 0]))) == [[2, 0, 0]] * 4
    assert rows_of(repeat_rows(cache, 2)) == [[0, 0, 1, 1, 2, 2]] * 4
    assert rows_of(cache) == [[0, 1, 2]] * 4


def test_rows_of_unlike_length_are_joined_at_their_ends() -> None:
    one, other = recurrent_cache(1), recurrent_cache(2)
    more = torch.full((2, HEADS, 2, HEAD_DIM), 7.0)
    other.update(more, -more, 0)
    joined = join_rows([one, other])
    assert rows_of(joined) == [[0, 7, 7]] * 2 + [[0, 0, 1]] * 2
    keys = joined.layers[0].keys
    assert keys.shape == (3, HEADS, SEQ_LEN + 2, HEAD_DIM)
    assert not keys[0, :, :2].any()
    torch.testing.assert_close(keys[1:], other.layers[0].keys, rtol=0, atol=0)
    assert one.layers[0].keys.shape[2] == SEQ_LEN


def test_a_copy_keeps_its_own_recurrent_states() -> None:
    cache = recurrent_cache(2)
    new = fork(cache)
    new.layers[1].recurrent_states[0].fill_(9)  # as one-token steps do
    new.layers[1].update_conv_state(torch.full((2, SEQ_LEN, 1), 9.0))
    assert rows_of(cache) == [[0, 1]] * 4


def test_recurrent_states_are_replaced_not_written_into() -> None:
    layer = recurrent_cache(1).layers[1]
    kept = layer.recurrent_states[0]
    layer.update_recurrent_state(kept + 1)
    assert not kept.any()
    assert layer.recurrent_states[0].all()


def test_windows_and_recurrent_states_mind_padding() -> None:
    shared = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    full = DynamicCache(config=MistralConfig(**shared, sliding_window=None))
    sliding = DynamicCache(config=MistralConfig(**shared, sliding_window=4))
    assert [minds_padding(c) for c in (full, sliding, recurrent_cache(1))] == [False, True, True]
    assert layers_to_hold(full) == (0, 1)


def test_empty_spans_hold_no_text() -> None:
    spans = empty_spans(2, 3)
    assert spans.shape == (2, 3, 2)
    assert (spans == -1).all()

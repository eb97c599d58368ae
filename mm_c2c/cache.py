"""`SourceCache`: what a frozen source model understood, in one type for all sources.

`Cache.layers` of transformers is read here; `sources.base.full_cache` makes such layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from mm_c2c.errors import ShapeError, UnsupportedError
from mm_c2c.rope import RopeSpec


class PositionKind(IntEnum):
    """What stands at one position of a source's prompt."""

    PAD = 0
    TEMPLATE = 1
    TEXT = 2
    IMAGE = 3
    STATE = 4
    ACTION = 5
    AUDIO = 6


class PatchGrid(NamedTuple):
    """The patches of one view of a picture, after merging; also a grid of slots.

    Models show a picture whole, or finely (its tiles joined to one grid) beside a coarse overview.

    Attributes:
        rows: rows of patches.
        cols: columns of patches.
        image: which of the prompt's pictures the view shows.
    """

    rows: int
    cols: int
    image: int = 0


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Geometry of a model's cache: everything a fuser must know to be built.

    Attributes:
        num_layers: layers that hold K and V (others are left out, see `layer_indices`).
        num_key_value_heads: heads of K and V.
        head_dim: channels of one head.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of K (or V) with the heads flattened."""
        return self.num_key_value_heads * self.head_dim


class LayerKV(NamedTuple):
    """Keys and values of one layer, each `(batch, num_key_value_heads, seq_len, head_dim)`."""

    keys: Tensor
    values: Tensor


def shape_of(layers: Sequence[LayerKV]) -> CacheShape:
    """Geometry of a cache's layers, which must be alike."""
    sizes = {(kv.keys.shape[1], kv.keys.shape[3]) for kv in layers}
    if len(sizes) > 1:
        raise ShapeError(f"layers differ in (heads, head_dim): {sorted(sizes)}")
    heads, head_dim = sizes.pop()
    return CacheShape(num_layers=len(layers), num_key_value_heads=heads, head_dim=head_dim)


class CacheOrigin(NamedTuple):
    """Which model wrote a cache."""

    model: str
    revision: str | None
    model_type: str


@dataclass(frozen=True, kw_only=True)
class SourceCache:
    """K and V of a source's prompt, and what stands at each position.

    Keys are post-RoPE, as the model left them; `rope` says how to take the rotation off.

    Attributes:
        layers: one `LayerKV` a layer that holds K and V.
        layer_indices: the decoder layer each of `layers` came from.
        position_ids: `(batch, seq_len)`, or `(3, batch, seq_len)` for M-RoPE.
        kinds: `(batch, seq_len)` of `PositionKind`.
        patches: `(batch, seq_len, 3)`: index into the row's `grids`, row, column; -1 where no
            patch stands.
        grids: for each row of the batch, one patch grid a view of each of its pictures.
        spans: `(batch, seq_len, 2)`: start and end in `texts`, in characters; -1 without text.
        texts: for each row of the batch, the natural text that `spans` count in.
        rope: one entry a layer; None where the layer does not rotate its keys.
        origin: the model that wrote the cache.
    """

    layers: tuple[LayerKV, ...]
    layer_indices: tuple[int, ...]
    position_ids: Tensor
    kinds: Tensor
    patches: Tensor
    grids: tuple[tuple[PatchGrid, ...], ...]
    spans: Tensor
    texts: tuple[str, ...]
    rope: tuple[RopeSpec | None, ...]
    origin: CacheOrigin

    def __post_init__(self) -> None:
        if not self.layers:
            raise UnsupportedError(f"{self.origin.model} left no layer with keys and values")
        batch, seq_len = self.kinds.shape
        for index, (keys, values) in zip(self.layer_indices, self.layers, strict=True):
            if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[2] != seq_len:
                raise ShapeError(
                    f"layer {index}: expected keys and values of (batch={batch}, heads, "
                    f"seq_len={seq_len}, head_dim), got {tuple(keys.shape)}, {tuple(values.shape)}"
                )
        if len(self.rope) != len(self.layers):
            raise ShapeError(f"{len(self.layers)} layers but {len(self.rope)} rope entries")
        self._check_places()

    def _check_places(self) -> None:
        """Shapes and types of what describes the layers; no value, which a GPU would wait for."""
        batch, seq_len = self.kinds.shape
        expected = {
            "position_ids": ((batch, seq_len), (3, batch, seq_len)),
            "kinds": ((batch, seq_len),),
            "patches": ((batch, seq_len, 3),),
            "spans": ((batch, seq_len, 2),),
        }
        for name, shapes in expected.items():
            places: Tensor = getattr(self, name)
            if tuple(places.shape) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise ShapeError(f"{name} is {tuple(places.shape)}, expected {wanted}")
            if places.dtype not in (torch.int64, torch.int32):
                raise ShapeError(f"{name} is of {places.dtype}, expected int64 or int32")
        if len(self.grids) != batch or len(self.texts) != batch:
            raise ShapeError(
                f"{batch} rows, but {len(self.grids)} grids and {len(self.texts)} texts"
            )
        if not all(isinstance(text, str) for text in self.texts):
            raise ShapeError(f"texts should be str, got {self.texts}")
        indices = self.layer_indices
        if len(set(indices)) < len(indices) or not all(isinstance(i, int) for i in indices):
            raise ShapeError(f"layer_indices should be numbers, each once, got {indices}")

    @property
    def shape(self) -> CacheShape:
        """Geometry of the cache; a cache of uneven layers has none and raises."""
        return shape_of(self.layers)

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.kinds.shape[0]

    @property
    def seq_len(self) -> int:
        """Positions a row, padding included."""
        return self.kinds.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V together."""
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers)

    def to(self, device: torch.device | str) -> SourceCache:
        """The same on another device; itself where it is there already."""
        if self.kinds.device == torch.device(device) == self.layers[0].keys.device:
            return self
        return replace(
            self,
            layers=tuple(LayerKV(kv.keys.to(device), kv.values.to(device)) for kv in self.layers),
            position_ids=self.position_ids.to(device),
            kinds=self.kinds.to(device),
            patches=self.patches.to(device),
            spans=self.spans.to(device),
        )

    def select(self, rows: Tensor) -> SourceCache:
        """Rows of the batch, in the order given.

        Args:
            rows: `(new_batch,)` indices into the batch; repeats are allowed.

        Raises:
            ShapeError: a mask in place of indices.
        """
        if rows.dtype == torch.bool:
            raise ShapeError("expected indices of rows, got a bool mask; give mask.nonzero()[:, 0]")
        order = rows.tolist()
        return replace(
            self,
            layers=tuple(LayerKV(kv.keys[rows], kv.values[rows]) for kv in self.layers),
            position_ids=self.position_ids[..., rows, :],
            kinds=self.kinds[rows],
            patches=self.patches[rows],
            grids=tuple(self.grids[i] for i in order),
            spans=self.spans[rows],
            texts=tuple(self.texts[i] for i in order),
        )


def is_prompt(kinds: Tensor) -> Tensor:
    """Positions of what a model was told: no padding, and not what a policy adds to it."""
    added = (PositionKind.PAD, PositionKind.STATE, PositionKind.ACTION)
    return torch.stack([kinds != kind for kind in added]).all(0)


def zeroed(cache: SourceCache, rows: Sequence[bool] | None = None) -> SourceCache:
    """The same positions with nothing in them, in all rows or where `rows` says so; as if dropped."""
    empty = torch.tensor([True] * cache.batch_size if rows is None else rows)
    empty = empty.to(cache.kinds.device)[:, None, None, None]
    blank = tuple(
        LayerKV(k.masked_fill(empty, 0), v.masked_fill(empty, 0)) for k, v in cache.layers
    )
    return replace(cache, layers=blank)


def join_sources(caches: Sequence[SourceCache]) -> SourceCache:
    """One batch of the rows of several caches of one model, padded on the left.

    Raises:
        ShapeError: they are of other models, or rotate their keys in another way.
    """
    first = caches[0]
    for cache in caches[1:]:
        for name in ("layer_indices", "rope", "origin"):
            if getattr(cache, name) != getattr(first, name):
                raise ShapeError(
                    f"caches that differ in {name} cannot stand in one batch: "
                    f"{getattr(first, name)} and {getattr(cache, name)}"
                )
    width = max(cache.seq_len for cache in caches)

    def join(states: Sequence[Tensor], dim: int, fill: int = 0) -> Tensor:
        """`dim` counts the positions, from the end; the batch is the first, or second of three."""
        padded = [
            F.pad(state, (0, 0) * (-1 - dim) + (width - state.shape[dim], 0), value=fill)
            for state in states
        ]
        return torch.cat(padded, dim=1 if dim == -1 and states[0].ndim == 3 else 0)

    layers = zip(*(cache.layers for cache in caches), strict=True)
    return replace(
        first,
        layers=tuple(
            LayerKV(join([kv.keys for kv in layer], -2), join([kv.values for kv in layer], -2))
            for layer in layers
        ),
        position_ids=join([cache.position_ids for cache in caches], -1),
        kinds=join([cache.kinds for cache in caches], -1),
        patches=join([cache.patches for cache in caches], -2, -1),
        grids=tuple(grids for cache in caches for grids in cache.grids),
        spans=join([cache.spans for cache in caches], -2, -1),
        texts=tuple(text for cache in caches for text in cache.texts),
    )


def without_padding(cache: SourceCache) -> SourceCache:
    """A cache of one row, without the positions that pad it."""
    real = cache.kinds[0] != PositionKind.PAD
    return replace(
        cache,
        layers=tuple(LayerKV(k[:, :, real], v[:, :, real]) for k, v in cache.layers),
        position_ids=cache.position_ids[..., real],
        kinds=cache.kinds[:, real],
        patches=cache.patches[:, real],
        spans=cache.spans[:, real],
    )


def read_layers(cache: Cache) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
    """K and V of each layer that has them, and those layers' indices.

    Layers without keys (linear attention, shared K and V) are left out.
    """
    found = [(kv, index) for index in range(len(cache.layers)) if (kv := _read(cache, index))]
    if not found:
        raise UnsupportedError("no layer of this cache holds keys and values")
    layers, indices = zip(*found, strict=True)
    return layers, indices


def layers_to_hold(cache: Cache) -> tuple[int, ...]:
    """The layers of an empty cache that will hold keys and values once something is read."""
    return tuple(
        index
        for index, layer in enumerate(cache.layers)
        if hasattr(layer, "keys") and not cache.is_dummy[index]
    )


def _read(cache: Cache, index: int) -> LayerKV | None:
    keys = getattr(cache.layers[index], "keys", None)
    values = getattr(cache.layers[index], "values", None)
    if keys is None or values is None or not keys.numel():
        return None
    return LayerKV(keys, values)


class RecurrentLayer(LinearAttentionLayer):
    """Linear attention or a convolution, whose states can be trained through."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keep new states; see `_replace_state`."""
        return _replace_state(self, recurrent_states, state_idx)


class HybridLayer(LinearAttentionAndFullAttentionLayer):
    """Linear attention beside attention, as in Falcon-H1, trained through likewise."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keep new states; see `_replace_state`."""
        return _replace_state(self, recurrent_states, state_idx)


def _replace_state(layer: Any, states: Tensor, index: int) -> Tensor:
    """Keep recurrent states in place of the old ones, which autograd may still need.

    transformers copies into the old tensor, for CUDA graphs.
    """
    layer.recurrent_states[index] = states
    layer.is_recurrent_states_initialized[index] = True
    return states


def full_layer(layer: Any) -> Any:
    """What takes an empty layer's place in a cache that keeps every position and its gradients."""
    kind = type(layer)  # exactly: a subclass keeps something else
    if kind is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if kind is LinearAttentionLayer:
        return RecurrentLayer(layer.number_of_states)
    if kind is LinearAttentionAndFullAttentionLayer:
        return HybridLayer(layer.number_of_states)
    return layer


def fork(cache: Cache) -> Cache:
    """A copy that can grow without touching the original; keys and values are shared."""
    new = copy.copy(cache)
    new.layers = [_fork_layer(layer) for layer in cache.layers]
    return new


def _fork_layer(layer: Any) -> Any:
    """A copy of one layer.

    Attention makes new tensors as it grows; linear attention and convolutions write into those
    that they have, and would spoil the original's.
    """
    new = copy.copy(layer)
    for name, states in _recurrent_states(layer):
        copied = {i: x.clone() if isinstance(x, Tensor) else x for i, x in states.items()}
        setattr(new, name, copied)
    return new


def _recurrent_states(layer: Any) -> list[tuple[str, dict[int, Any]]]:
    """A layer's dicts of states and of flags about them; attention layers have none."""
    return [(name, value) for name, value in vars(layer).items() if isinstance(value, dict)]


def with_layers(cache: Cache, layers: dict[int, LayerKV]) -> Cache:
    """A copy of `cache` in which the named layers hold other keys and values.

    Args:
        cache: the cache to copy; it is not changed.
        layers: by layer index, tensors shaped like the ones they replace.
    """
    new = fork(cache)
    for index, (keys, values) in layers.items():
        old = _read(cache, index)
        if old is None:
            raise ShapeError(f"layer {index} holds no keys and values that could be replaced")
        if keys.shape != old.keys.shape or values.shape != old.values.shape:
            raise ShapeError(
                f"layer {index}: expected {tuple(old.keys.shape)}, got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        layer: Any = new.layers[index]
        layer.keys = keys.to(old.keys.dtype)
        layer.values = values.to(old.values.dtype)
    return new


def minds_padding(cache: Cache) -> bool:
    """Whether a layer feels padding that an attention mask hides.

    A sliding window counts it among the positions it holds; a recurrent state runs through it.
    """
    return any(cache.is_sliding) or keeps_states(cache)


def keeps_states(cache: Cache) -> bool:
    """Whether a layer keeps recurrent states, which cannot forget a position they have read."""
    return any(map(_recurrent_states, cache.layers))


def cut_layers(cache: Cache, layers: dict[int, LayerKV]) -> Cache:
    """A copy of `cache` with fewer positions.

    Args:
        cache: the cache to copy; it is not changed.
        layers: by layer index, what is left of every layer that holds keys and values.

    Raises:
        UnsupportedError: a layer keeps recurrent states.
    """
    if keeps_states(cache):
        raise UnsupportedError("recurrent states cannot forget positions that they have read")
    new = fork(cache)
    for index, (keys, values) in layers.items():
        layer: Any = new.layers[index]
        layer.keys, layer.values = keys, values
    return new


def select_rows(cache: Cache, rows: Tensor) -> Cache:
    """A copy of `cache` with rows of the batch in the order given; repeats are allowed.

    Args:
        cache: the cache to copy; it is not changed.
        rows: `(new_batch,)` int64 indices into the batch.
    """
    new: Any = fork(cache)
    # What beam search calls: the one selection that recurrent layers answer too.
    new.reorder_cache(rows)
    return new


def repeat_rows(cache: Cache, times: int) -> Cache:
    """A copy of `cache` in which each row stands `times` times in succession."""
    batch = next((kv.keys.shape[0] for i in range(len(cache)) if (kv := _read(cache, i))), 0)
    if times == 1 or not batch:  # nothing has been read yet: any batch may follow
        return fork(cache)
    return select_rows(cache, torch.arange(batch).repeat_interleave(times))


def join_rows(caches: Sequence[Cache]) -> Cache:
    """One cache of the rows of several, one after the other.

    Args:
        caches: of one model, each of rows of one length; shorter ones get places without
            meaning on the left, which an attention mask must hide.
    """
    new = fork(caches[0])
    for index, layer in enumerate(new.layers):
        for name, states in _recurrent_states(layer):
            for i, state in states.items():
                if isinstance(state, Tensor):
                    parts = [getattr(cache.layers[index], name)[i] for cache in caches]
                    states[i] = torch.cat(parts)
        kept = [kv for cache in caches if (kv := _read(cache, index))]
        if kept:
            width = max(kv.keys.shape[2] for kv in kept)
            padded = [_pad_left(kv, width) for kv in kept]
            kept_layer: Any = layer
            kept_layer.keys, kept_layer.values = map(torch.cat, zip(*padded, strict=True))
    return new


def _pad_left(kv: LayerKV, width: int) -> LayerKV:
    missing = width - kv.keys.shape[2]
    return LayerKV(*(F.pad(states, (0, 0, missing, 0)) for states in kv))


def empty_spans(batch: int, seq_len: int) -> Tensor:
    """`(batch, seq_len, 2)` of -1: no position holds text."""
    return torch.full((batch, seq_len, 2), -1, dtype=torch.long)

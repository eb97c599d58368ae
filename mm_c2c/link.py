"""A link: one source's way into the target's cache. Align, fuse, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_all, align_pooled, line_up, patch_coordinates
from mm_c2c.align.resampler import Asking, PatchResampler, ResamplerConfig
from mm_c2c.cache import (
    CacheShape,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    read_layers,
    with_layers,
)
from mm_c2c.config import check_at_least_one, check_one_of
from mm_c2c.errors import ConfigError, InputError, ShapeError
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.pretrained import check_origin, check_shape
from mm_c2c.rope import RopeSpec, derotate, rotate
from mm_c2c.sources.base import Source

GEOMETRIES = ("slots", "aligned")
POOLINGS = ("window", "resampler")
KINDS = tuple(kind.name.lower() for kind in PositionKind if kind != PositionKind.PAD)


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """One way from a source into the target.

    Attributes:
        source: name of the source.
        geometry: `slots` gives a picture, or other positions of the source, places of their own
            in the target's prompt; `aligned` adds to the words that both models read.
        fuser: the fuser's shape.
        rows: rows of slots a picture gets; `aligned` has none.
        cols: columns, likewise.
        images: most pictures that a row of the batch shows the source, such as a robot's cameras
            or the frames of a video; the slots of one follow those of the other. A row may show
            fewer: what is missing are the last ones, whose slots stay the target's own. For
            `slots` only.
        pooling: what a slot takes of a picture's patches: `window` averages those of the finest
            view that lie where the slot lies; `resampler` learns, for each slot, what to look for
            in all of them, also where a source's queries have no place. For `slots` only.
        kinds: what the slots draw on in place of patches: positions of these kinds, such as
            `("state", "action")`, as a picture of one row in the prompt's order. With rows 1 and
            cols their number, a position gets a slot; fewer are pooled. For `slots` only.
        asking: positions of these kinds say what the slots of a resampler look for: with
            `("action",)`, a policy's actions say which patches they lead to. For `resampler` only.
    """

    source: str
    geometry: str
    fuser: FuserConfig
    rows: int = 4
    cols: int = 4
    images: int = 1
    pooling: str = "window"
    kinds: tuple[str, ...] = ()
    asking: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "." in self.source:
            raise ConfigError(
                f"source must be a name without a dot, got {self.source!r}: it is part of the "
                f"weights' names; say {self.source.replace('.', '_')!r}"
            )
        for name, known in (("geometry", GEOMETRIES), ("pooling", POOLINGS)):
            check_one_of(name, getattr(self, name), known)
        if self.geometry == "aligned" and self.pooling == "resampler":
            raise ConfigError(
                "pooling 'resampler' shares patches among slots, and geometry 'aligned' has none; "
                "leave pooling at 'window' or set geometry to 'slots'"
            )
        check_at_least_one(self, "rows", "cols", "images")
        if self.geometry == "aligned" and self.images > 1:
            raise ConfigError(
                f"images counts pictures that get slots, and geometry 'aligned' has none, got "
                f"{self.images}; leave images at 1, the source may see any number"
            )
        for name in ("kinds", "asking"):
            given = getattr(self, name)
            if set(given) - set(KINDS) or len(set(given)) != len(given):
                raise ConfigError(
                    f"{name} must be some of {', '.join(KINDS)}, each once, got {', '.join(given)}"
                )
        if self.asking and self.pooling != "resampler":
            raise ConfigError(
                f"asking says what the slots of a resampler look for, got pooling "
                f"{self.pooling!r}; set pooling to 'resampler' or leave asking empty"
            )
        if self.kinds and (self.geometry, self.rows, self.images) != ("slots", 1, 1):
            raise ConfigError(
                f"positions of kind {' and '.join(self.kinds)} stand in one line: expected geometry "
                f"'slots', rows 1 and images 1, got {self.geometry!r}, {self.rows} and "
                f"{self.images}; set cols to the number of slots"
            )

    @property
    def name(self) -> str:
        """What the link's weights are saved under."""
        asked = ["by", *self.asking] if self.asking else []
        return "_".join([self.source, self.geometry, *self.kinds, *asked])

    @property
    def num_slots(self) -> int:
        """Slots a row of the batch gets."""
        return self.images * self.rows * self.cols if self.geometry == "slots" else 0


class FuserInputs(NamedTuple):
    """What a link's fuser is given.

    Attributes:
        source: `(source_layers, batch, target_len, 2, source_width)`: aligned K and V.
        target: `(target_layers, batch, target_len, 2, target_width)`: the target's own.
        alignment: which source positions each of those came from.
    """

    source: Tensor
    target: Tensor
    alignment: Alignment


def check_link(link: LinkConfig, sources: Mapping[str, Source], target: CacheShape) -> None:
    """Refuse a link that the models at hand do not fit.

    Args:
        link: of a bridge's config.
        sources: by name.
        target: geometry of the target's cache.

    Raises:
        ConfigError: its source is not there, or has no picture for slots.
        MismatchError: its fuser was made for a cache of another shape.
    """
    if link.source not in sources:
        raise ConfigError(f"a link names source {link.source!r}; sources given: {sorted(sources)}")
    source = sources[link.source]
    for_pictures = link.geometry == "slots" and not link.kinds
    if for_pictures and not getattr(source, "has_pictures", True):
        raise ConfigError(
            f"source {link.source!r} reads words only and has no picture for slots; set "
            "geometry to 'aligned', or kinds to ('text',)"
        )
    check_shape(f"source {link.source!r}", link.fuser.source, source.shape)
    check_shape("the target", link.fuser.target, target)


def build_fuser(link: LinkConfig) -> CacheFuser:
    """An untrained fuser, with a resampler where the link has one."""
    if link.pooling == "window":
        return CacheFuser(link.fuser)
    shape = link.fuser.source
    width = shape.num_layers * 2 * shape.width
    config = ResamplerConfig(
        num_slots=link.rows * link.cols, source_width=width, asked=bool(link.asking)
    )
    return CacheFuser(link.fuser, PatchResampler(config))


def align_slots(
    link: LinkConfig, fuser: CacheFuser, source: SourceCache, index: Tensor
) -> Alignment:
    """What each slot takes of its row's patches.

    Args:
        link: of geometry `slots`.
        fuser: of the link.
        source: the source's cache.
        index: `(batch, num_slots)`: where in the target's prompt the slots stand.

    Raises:
        AlignmentError: a row has no position of a kind that the link names.
        ShapeError: a row has more pictures than the slots hold.
    """
    asking = None
    if link.asking:
        lined = _line_up(source, link.asking)
        asking = Asking(lined.patches[..., 0] >= 0, patch_coordinates(lined))
    if link.kinds:
        source = _line_up(source, link.kinds)
    _check_pictures(link, source)
    if link.pooling == "window":
        return align_pooled(source, PatchGrid(link.rows, link.cols), index, image=None)
    resampler: Any = fuser.resampler
    states = _source_states(link, source).flatten(2)
    alignment = align_all(source, link.rows * link.cols, index, image=None)
    return resampler(states, patch_coordinates(source), alignment, asking)


def gather_inputs(
    link: LinkConfig,
    source: SourceCache,
    alignment: Alignment,
    cache: Cache,
    positions: Tensor,
    rope: Sequence[RopeSpec | None],
) -> FuserInputs:
    """The source's aligned states, and the target's own at the same positions.

    Args:
        link: whose fuser is to be given them.
        source: the source's cache.
        alignment: of the source to the target.
        cache: the target's.
        positions: `(batch, target_len)`: the position ids of what the cache holds.
        rope: how each of the target's layers rotates its keys.
    """
    states = _source_states(link, source)
    gathered = alignment.gather(states.flatten(2)).unflatten(2, states.shape[2:])
    aligned = gathered.permute(2, 0, 1, 3, 4, 5).flatten(4)
    layers, indices = read_layers(cache)
    index = alignment.target_index
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    # Picked by two indices, a position keeps its heads together, as the fuser wants them.
    keys, values = _stack(
        [LayerKV(kv.keys[rows, :, index], kv.values[rows, :, index]) for kv in layers]
    )
    if not link.fuser.raw_keys:
        at = positions.gather(1, index)
        keys = _per_spec(derotate, keys.transpose(2, 3), at, [rope[i] for i in indices])
        keys = keys.transpose(2, 3)
    own = torch.stack([keys, values], dim=3).flatten(4)
    return FuserInputs(aligned.float(), own.float(), alignment)


def write_link(
    link: LinkConfig,
    fuser: CacheFuser,
    source: SourceCache,
    alignment: Alignment,
    cache: Cache,
    positions: Tensor,
    rope: Sequence[RopeSpec | None],
) -> Cache:
    """A cache in which a fuser has written its differences; arguments as in `gather_inputs`.

    Raises:
        InputError: the source's K or V are not finite where they are read; a training sees that
            by its loss.
    """
    inputs = gather_inputs(link, source, alignment, cache, positions, rope)
    read = inputs.source
    if not (fuser.training or read.is_meta or torch.isfinite(read.sum())):
        raise InputError(
            f"the cache of source {link.source!r} holds NaN or infinity; load {source.origin.model} "
            "in float32 or bfloat16"
        )
    delta = fuser(inputs.source, inputs.target, alignment.mask)
    layers, indices = read_layers(cache)
    index, heads = alignment.target_index, layers[0].keys.shape[1]
    keys, values = delta.unflatten(-1, (heads, -1)).transpose(2, 4).unbind(3)
    if not link.fuser.raw_keys:
        keys = _per_spec(rotate, keys, positions.gather(1, index), [rope[i] for i in indices])
    where = index[:, None, :, None].expand(keys.shape[1:])
    written = {
        layer: LayerKV(
            own.keys.scatter_add(2, where, key.to(own.keys.dtype)),
            own.values.scatter_add(2, where, value.to(own.values.dtype)),
        )
        for layer, own, key, value in zip(indices, layers, keys, values, strict=True)
    }
    return with_layers(cache, written)


def check_caches(
    caches: Mapping[str, SourceCache],
    sources: Mapping[str, Source],
    links: Sequence[LinkConfig],
    geometry: str | None = None,
) -> None:
    """Refuse caches under unknown names, of other models, and those that no link would read.

    Args:
        caches: by source name.
        sources: the bridge's own.
        links: likewise.
        geometry: of the links that read them; None is any.

    Raises:
        ConfigError: a name is unknown, or a cache would be left out without a word.
        InputError: they are no mapping.
        MismatchError: another model, or revision, wrote one.
    """
    known = ", ".join(sorted(sources))
    if not isinstance(caches, Mapping):
        raise InputError(
            f"expected caches by the names of their sources ({known}), got a "
            f"{type(caches).__name__}; write {{name: cache}}"
        )
    if unknown := sorted(set(caches) - set(sources)):
        raise ConfigError(f"no source named {unknown}; known: {known}")
    for name, cache in caches.items():
        check_origin(f"the cache of source {name!r}", sources[name].origin._asdict(), cache.origin)
        found = {link.geometry for link in links if link.source == name}
        if geometry is not None and found and geometry not in found:
            place = "to fuse_slots" if geometry == "aligned" else "beside the questions, in fuse"
            raise ConfigError(f"source {name!r} has no {geometry} link: its cache belongs {place}")


def check_texts(name: str, texts: Sequence[str], questions: Sequence[str]) -> None:
    """Refuse a source that read other texts than the target: their spans would overlap all the same.

    Raises:
        InputError: a text differs.
        ShapeError: their number does.
    """
    if len(texts) != len(questions):
        raise ShapeError(f"source {name!r} has {len(texts)} rows for {len(questions)} questions")
    for text, question in zip(texts, questions, strict=True):
        if text != question.strip():
            raise InputError(f"source {name!r} read {text!r}, not {question!r}")


def _line_up(source: SourceCache, kinds: Sequence[str]) -> SourceCache:
    return line_up(source, [PositionKind[kind.upper()] for kind in kinds])


def _source_states(link: LinkConfig, source: SourceCache) -> Tensor:
    """`(batch, source_len, layers, 2, heads, head_dim)`: K as the fuser wants it, and V."""
    check_shape(f"the cache of source {link.source!r}", link.fuser.source, source.shape)
    keys, values = _stack(source.layers)
    if not link.fuser.raw_keys:
        keys = _per_spec(derotate, keys, source.position_ids, source.rope)
    both = torch.stack([keys, values])
    # A weight of 0 does not silence what is no number, which kernels may leave where padding is.
    both.masked_fill_((source.kinds == PositionKind.PAD)[:, None, :, None], 0)
    return both.permute(2, 4, 1, 0, 3, 5)


def _check_pictures(link: LinkConfig, source: SourceCache) -> None:
    """A row's slots hold so many pictures or fewer, each in any number of views."""
    for row, grids in enumerate(source.grids):
        pictures = len({grid.image for grid in grids})
        if pictures > link.images:
            raise ShapeError(
                f"row {row} of source {link.source!r} has {pictures} pictures, its slots hold "
                f"{link.images}; show it no more, or build the link with images={pictures}"
            )


def _stack(layers: Sequence[LayerKV]) -> tuple[Tensor, Tensor]:
    """K and V of all layers, each with the layers in front."""
    keys, values = (torch.stack(part) for part in zip(*layers, strict=True))
    return keys, values


def _per_spec(
    turn: Any, keys: Tensor, positions: Tensor, specs: Sequence[RopeSpec | None]
) -> Tensor:
    """Rotate or derotate `(layers, batch, heads, len, head_dim)`, layers of one kind at once."""
    if len(set(specs)) == 1:
        turned: Tensor = turn(keys, positions, specs[0])
        return turned
    return torch.stack([turn(k, positions, s) for k, s in zip(keys, specs, strict=True)])

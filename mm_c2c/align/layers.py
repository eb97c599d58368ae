"""Which source layer feeds which target layer.

Layers are counted among those that hold keys and values, as in `SourceCache.layers`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_c2c.errors import AlignmentError, ConfigError, ShapeError

KINDS = ("proportional", "terminal", "explicit")

Pairs = Mapping[int, int] | Iterable[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """For each target layer, the source layer that feeds it.

    Attributes:
        weights: `(target_layers, source_layers)` float32; a row sums to 1, or to 0 where the
            target layer stays as it is.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        if self.weights.ndim != 2:
            raise ShapeError(
                "expected weights of (target_layers, source_layers), got "
                f"{tuple(self.weights.shape)}"
            )
        if not self.weights.is_meta and not self.mask.any():
            raise AlignmentError("no source layer feeds any target layer: nothing would be fused")

    @property
    def mask(self) -> Tensor:
        """`(target_layers,)` bool; False leaves the layer as it is."""
        return (self.weights != 0).any(1)


def layer_pairs(
    kind: str, source_layers: int, target_layers: int, pairs: Pairs | None = None
) -> dict[int, int]:
    """Choose the source layer of each target layer that is fed.

    Args:
        kind: `proportional` spreads the source evenly over the target: target layer t takes
            round(t * (source_layers - 1) / (target_layers - 1)); first meets first, last meets
            last. `terminal` matches from the last layer down; the deeper model's first layers
            are left over (C2C clamps them, so that one layer feeds many). `explicit` takes
            `pairs`; other target layers stay as they are.
        source_layers: layers of the source that hold K and V.
        target_layers: layers of the target that hold K and V.
        pairs: for `explicit` only: `{target: source}` or pairs in that order.

    Returns:
        `{target: source}`, by target layer.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0)
        raise ConfigError(
            f"unknown layer map {kind!r}; known: {', '.join(KINDS)}; closest: {close[0]}"
        )
    if (pairs is not None) != (kind == "explicit"):
        raise ConfigError(f"pairs belong to 'explicit' and only there, got {kind!r} and {pairs!r}")
    if pairs is not None:
        chosen = _check_pairs(pairs, source_layers, target_layers)
    elif kind == "terminal":
        shared = min(source_layers, target_layers)
        chosen = {target_layers - i: source_layers - i for i in range(1, shared + 1)}
    else:
        chosen = _proportional(source_layers, target_layers)
    return dict(sorted(chosen.items()))


def layer_map(
    kind: str, source_layers: int, target_layers: int, pairs: Pairs | None = None
) -> LayerMap:
    """The pairs of `layer_pairs`, which takes the same arguments, as a matrix."""
    weights = torch.zeros(target_layers, source_layers)
    for target, source in layer_pairs(kind, source_layers, target_layers, pairs).items():
        weights[target, source] = 1.0
    return LayerMap(weights=weights)


def mix_init(source_layers: int, target_layers: int) -> Tensor:
    """Where a learned mix of source layers starts: the proportionally nearest weigh most.

    Args:
        source_layers: layers of the source that hold K and V.
        target_layers: layers of the target that hold K and V.

    Returns:
        `(target_layers, source_layers)` float32 logits, minus the distance in source layers; a
        softmax over the last dimension gives the mix.
    """
    if source_layers < 1 or target_layers < 1:
        raise AlignmentError(
            f"nothing would be fused: {source_layers} source, {target_layers} target layers"
        )
    steps = max(target_layers - 1, 1)
    place = torch.tensor(_numerators(source_layers, target_layers))
    return -(torch.arange(source_layers) * steps - place.unsqueeze(1)).abs() / steps


def _numerators(source_layers: int, target_layers: int) -> list[int]:
    """Each target layer's place in the source, times `target_layers - 1`.

    A target of one layer stands at the source's last one, as it does in `terminal`.
    """
    if target_layers == 1:
        return [source_layers - 1]
    return [target * (source_layers - 1) for target in range(target_layers)]


def _proportional(source_layers: int, target_layers: int) -> dict[int, int]:
    """The nearest source layer of each target layer; none if the source has none."""
    if source_layers < 1:
        return {}
    steps = max(target_layers - 1, 1)
    places = _numerators(source_layers, target_layers)
    return {target: round(place / steps) for target, place in enumerate(places)}


def _check_pairs(pairs: Pairs, source_layers: int, target_layers: int) -> dict[int, int]:
    """The pairs as a dict, all of them in range and no target named twice."""
    chosen: dict[int, int] = {}
    for target, source in pairs.items() if isinstance(pairs, Mapping) else pairs:
        if not 0 <= target < target_layers or not 0 <= source < source_layers:
            raise AlignmentError(
                f"target layer {target} from source layer {source}: the target has "
                f"{target_layers} layers, the source {source_layers}"
            )
        if target in chosen:
            raise AlignmentError(
                f"target layer {target} is fed by source layers {chosen[target]} and {source}; "
                "name it once"
            )
        chosen[target] = source
    return chosen

"""The Cache Fuser: the only trained part (Fu et al., arXiv:2510.03215).

For each target layer, `K' = K + gate * weight * projection`, and likewise for V:

    source K, V ─▶ projection ─▶ hidden ─▶ heads ──▶ difference
    target K, V ─┘                  └────▶ weight      * weight * gate

Keys in here are without rotation, but with `raw_keys`. Every stage is one batched product over
stacked layers; the output projection starts at zero, so that an untrained fuser changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_c2c.align.layers import KINDS, layer_map, layer_pairs, mix_init
from mm_c2c.align.resampler import PatchResampler
from mm_c2c.cache import CacheShape
from mm_c2c.config import check_at_least_one, check_one_of
from mm_c2c.errors import ConfigError, ShapeError

PRESETS = ("small", "c2c")
GATES = ("sigmoid", "straight_through", "open")


@dataclass(frozen=True, kw_only=True)
class FuserConfig:
    """Everything needed to rebuild a `CacheFuser` before its weights are loaded.

    Attributes:
        source: geometry of the source's cache.
        target: geometry of the target's cache.
        preset: `small` shares one projection of the source among all target layers and ends in
            low-rank heads; `c2c` has the paper's shape, one wide block a layer for K and for V.
        layers: which source layer feeds which target layer: `proportional`, `terminal`,
            `explicit` (then `pairs` says it), or `mix`, a learned mix of all of them, which
            `c2c` does not have.
        pairs: for `explicit` only: (target layer, source layer), counted among the layers that
            hold keys and values; target layers not named stay as they are. A mapping is taken too,
            and becomes that.
        hidden_size: width of the projection; the paper's is 1024.
        rank: inner width of `small`'s heads.
        gate: `sigmoid` is open by degrees, `straight_through` open or closed. Either is one
            function in training and in inference. `open` is not learned: an ablation.
        weighting: whether each head of a token has a weight of its own; False hands over whole
            differences, an ablation.
        raw_keys: fuse keys with their rotation on, as the paper does; an ablation.
    """

    source: CacheShape
    target: CacheShape
    preset: str = "small"
    layers: str = "mix"
    pairs: tuple[tuple[int, int], ...] | None = None
    hidden_size: int = 256
    rank: int = 96
    gate: str = "sigmoid"
    weighting: bool = True
    raw_keys: bool = False

    def __post_init__(self) -> None:
        for name, known in (("preset", PRESETS), ("layers", (*KINDS, "mix")), ("gate", GATES)):
            check_one_of(name, getattr(self, name), known)
        if self.pairs is not None:
            pairs = self.pairs.items() if isinstance(self.pairs, Mapping) else self.pairs
            object.__setattr__(self, "pairs", tuple((t, s) for t, s in pairs))  # as files have it
        if (self.pairs is not None) != (self.layers == "explicit"):
            raise ConfigError(
                "pairs and layers='explicit' belong together, got "
                f"layers={self.layers!r} and pairs={self.pairs!r}"
            )
        if self.preset == "c2c" and self.layers == "mix":
            raise ConfigError(
                "preset 'c2c' takes one source layer for each target layer and cannot mix them; "
                "set layers to proportional, terminal (the paper's) or explicit"
            )
        check_at_least_one(self, "hidden_size", "rank")

    @classmethod
    def c2c(cls, source: CacheShape, target: CacheShape) -> FuserConfig:
        """The paper's own shape and choices, for comparison; its gate excepted."""
        return cls(
            source=source,
            target=target,
            preset="c2c",
            layers="terminal",
            hidden_size=1024,
            gate="straight_through",
            raw_keys=True,
        )


class Projected(NamedTuple):
    """What a projection makes of aligned K and V.

    Attributes:
        difference: `(target_layers, tokens, 2, target_width)`; 0 is K, 1 is V.
        weight_logits: `(target_layers, tokens, 2, target_heads)`.
    """

    difference: Tensor
    weight_logits: Tensor


class Parts(NamedTuple):
    """A difference before it is weighted, and its weights before the gate.

    Attributes:
        difference: `(target_layers, batch, target_len, 2, target_heads, target_head_dim)`.
        weights: `(target_layers, batch, target_len, 2, target_heads)` in [0, 1].
    """

    difference: Tensor
    weights: Tensor


class Projection(Protocol):
    """The part in which presets differ."""

    def __call__(self, source: Tensor, target: Tensor) -> Projected:
        """Project `(source_layers, tokens, 2, width)` and `(target_layers, tokens, 2, width)`."""


class CacheFuser(nn.Module):
    """Turns a source's aligned K and V into a difference to the target's own.

    Args:
        config: shape and choices.
        resampler: how a picture's patches are shared among slots, where that is learned. It is
            trained and saved with the fuser, but used before it, by whoever aligns.
    """

    def __init__(self, config: FuserConfig, resampler: PatchResampler | None = None) -> None:
        super().__init__()
        self.config = config
        self.resampler = resampler
        self.projection = (
            SharedProjection(config) if config.preset == "small" else LayerwiseProjection(config)
        )
        self.gate_logits = nn.Parameter(
            torch.full((config.target.num_layers, 2), 2.0), requires_grad=config.gate != "open"
        )
        fed = torch.ones(config.target.num_layers, dtype=torch.bool)
        if config.layers != "mix":
            fed = layer_map(*_layers(config)).mask
        self.fed: Tensor
        self.register_buffer("fed", fed, persistent=False)

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def gates(self) -> Tensor:
        """How open each layer is: `(target_layers, 2)` in [0, 1]; column 0 is K, 1 is V."""
        soft = torch.sigmoid(self.gate_logits)
        if self.config.gate == "straight_through":
            # The difference first: it is exactly 0, and the gate exactly 0 or 1.
            soft = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
        elif self.config.gate == "open":
            soft = (soft > 0).to(soft.dtype)  # `close` shuts it all the same
        return soft * self.fed.unsqueeze(1)

    @torch.no_grad()
    def close(self) -> None:
        """Shut all gates: what is fused then equals the target's own, bit for bit."""
        self.gate_logits.fill_(-torch.inf)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Differences to add to the target's K and V.

        Args:
            source: `(source_layers, batch, target_len, 2, source_width)`: aligned K (without
                rotation) and V, heads flattened.
            target: `(target_layers, batch, target_len, 2, target_width)`: the target's own.
            mask: `(batch, target_len)` bool: False leaves a position as it is; None fuses all.

        Returns:
            `(target_layers, batch, target_len, 2, target_width)`; zero where a gate is closed.
        """
        difference, weights = self.parts(source, target)
        # The small factors first: the difference is read and written once.
        opened = weights * self.gates()[:, None, None, :, None]
        if mask is not None:
            opened = opened * mask[None, :, :, None, None]
        return (difference * opened.unsqueeze(-1)).reshape(target.shape)

    def parts(self, source: Tensor, target: Tensor) -> Parts:
        """What `forward` multiplies with each other and with `gates`; for a look inside.

        Args:
            source: as `forward` takes it.
            target: as `forward` takes it.
        """
        self._check(source, "source", self.config.source)
        self._check(target, "target", self.config.target)
        shape = self.config.target
        difference, logits = self.projection(source.flatten(1, 2), target.flatten(1, 2))
        weights = torch.sigmoid(logits) if self.config.weighting else torch.ones_like(logits)
        rows = target.shape[1:3]
        return Parts(
            difference.unflatten(-1, (shape.num_key_value_heads, shape.head_dim)).unflatten(
                1, rows
            ),
            weights.unflatten(1, rows),
        )

    @staticmethod
    def _check(states: Tensor, name: str, shape: CacheShape) -> None:
        expected = (shape.num_layers, 2, shape.width)
        if states.ndim != 5 or (states.shape[0], *states.shape[3:]) != expected:
            raise ShapeError(
                f"{name}: expected (layers={shape.num_layers}, batch, target_len, 2, "
                f"width={shape.width}), got {tuple(states.shape)}; is this fuser made for "
                "other models?"
            )


class Stacked(nn.Module):
    """Linear maps of several layers, stacked: `(layers, tokens, in)` to `(layers, tokens, out)`."""

    def __init__(self, layers: int, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = _draw(layers, inputs, outputs, 0.0 if zero else 1 / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(layers, 1, outputs))

    def forward(self, states: Tensor) -> Tensor:
        """One batched product for all layers."""
        return torch.baddbmm(self.bias, states, self.weight)


class SharedProjection(nn.Module):
    """`small`: the source is projected once a source layer; each target layer has a low-rank head.

    hidden  = FFN(W_source [K; V])                     a source layer
    mixed   = sum over source layers, + W_target [K; V]       a target layer
    inner   = gelu(W_down mixed);  difference = W_up inner;  weight = W_w inner
    """

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        source, target, hidden = config.source, config.target, config.hidden_size
        self.source_in = Stacked(source.num_layers, 2 * source.width, hidden)
        self.up = Stacked(source.num_layers, hidden, 2 * hidden)
        self.down = Stacked(source.num_layers, 2 * hidden, hidden)
        self.target_in = nn.Linear(2 * target.width, hidden, bias=False)
        self.mix_weights: Tensor
        if config.layers == "mix":
            logits = mix_init(source.num_layers, target.num_layers)
            self.mix_logits: nn.Parameter | None = nn.Parameter(logits)
        else:
            self.mix_logits = None
            self.register_buffer(
                "mix_weights", layer_map(*_layers(config)).weights, persistent=False
            )
        self.head_down = Stacked(target.num_layers, hidden, config.rank)
        self.head_up = Stacked(target.num_layers, config.rank, 2 * target.width, zero=True)
        self.head_weight = Stacked(
            target.num_layers, config.rank, 2 * target.num_key_value_heads, zero=True
        ).requires_grad_(config.weighting)

    def mix(self) -> Tensor:
        """`(target_layers, source_layers)`: how much of each source layer a target layer takes."""
        return self.mix_weights if self.mix_logits is None else self.mix_logits.softmax(1)

    def forward(self, source: Tensor, target: Tensor) -> Projected:
        """See `Projection`."""
        hidden = self.source_in(_normalise(source).flatten(2))
        hidden = hidden + self.down(F.gelu(self.up(_normalise(hidden))))
        mixed = torch.einsum("ts,snh->tnh", self.mix(), hidden) + self._read_target(target)
        inner = F.gelu(self.head_down(_normalise(mixed)))
        return Projected(
            self.head_up(inner).unflatten(-1, (2, -1)),
            self.head_weight(inner).unflatten(-1, (2, -1)),
        )

    def _read_target(self, target: Tensor) -> Tensor:
        """`target_in` of normalised K and V; normalised after the product, where there is less."""
        squares = torch.linalg.vector_norm(target, dim=-1, keepdim=True).square()
        scale = torch.rsqrt(squares / target.shape[-1] + torch.finfo(target.dtype).eps)
        weights = self.target_in.weight.unflatten(1, (2, -1))
        keys, values = (F.linear(target[:, :, part], weights[:, part]) for part in range(2))
        return keys * scale[:, :, 0] + values * scale[:, :, 1]


class ResidualFFN(nn.Module):
    """The paper's block, of several layers: `x + W_down gelu(W_up norm(x))`, without biases."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(layers, 1, width))
        self.up_weight, self.down_weight = (
            _draw(layers, width, width, 1 / math.sqrt(width)) for _ in range(2)
        )

    def forward(self, states: Tensor) -> Tensor:
        """`(layers, tokens, width)`, as it came in."""
        inner = F.gelu(torch.bmm(_normalise(states) * self.scale, self.up_weight))
        return torch.baddbmm(states, inner, self.down_weight)


class LayerwiseProjection(nn.Module):
    """`c2c`: the paper's projector for each target layer that is fed, once for K and once for V.

    u = FFN(W_in [source; target]);  P = W_out FFN(u);  weight = W_w FFN(u), each FFN with weights
    of its own. The blocks of all fed layers are stacked, K's first. The paper's own code
    (github.com/thu-nics/C2C, `C2CProjector`) is the same but for dropout and `W_out`'s start at 0.
    """

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        source, target, hidden = config.source, config.target, config.hidden_size
        pairs = layer_pairs(*_layers(config))
        self.num_layers = target.num_layers
        self.target_layers: Tensor
        self.source_layers: Tensor
        for name, layers in (("target_layers", pairs), ("source_layers", pairs.values())):
            self.register_buffer(name, torch.tensor(list(layers)), persistent=False)
        blocks = 2 * len(pairs)
        self.enter = Stacked(blocks, source.width + target.width, hidden)
        self.read = ResidualFFN(blocks, hidden)
        self.project = ResidualFFN(blocks, hidden)
        self.leave = Stacked(blocks, hidden, target.width, zero=True)
        self.weigh = nn.Sequential(
            ResidualFFN(blocks, hidden), Stacked(blocks, hidden, target.num_key_value_heads)
        ).requires_grad_(config.weighting)

    def forward(self, source: Tensor, target: Tensor) -> Projected:
        """See `Projection`."""
        joined = torch.cat([source[self.source_layers], target[self.target_layers]], dim=-1)
        states = self.read(self.enter(torch.cat([joined[:, :, 0], joined[:, :, 1]])))
        return Projected(
            self._place(self.leave(self.project(states))), self._place(self.weigh(states))
        )

    def _place(self, blocks: Tensor) -> Tensor:
        """Of K's and V's blocks, `(target_layers, tokens, 2, ...)`; zero where none is fed."""
        fed = torch.stack(blocks.chunk(2), dim=2)
        return fed.new_zeros(self.num_layers, *fed.shape[1:]).index_copy(0, self.target_layers, fed)


def _layers(config: FuserConfig) -> tuple[str, int, int, tuple[tuple[int, int], ...] | None]:
    """What layers are paired by."""
    return config.layers, config.source.num_layers, config.target.num_layers, config.pairs


def _draw(layers: int, inputs: int, outputs: int, bound: float) -> nn.Parameter:
    """Uniform within `bound`, as `nn.Linear` begins."""
    return nn.Parameter(torch.empty(layers, inputs, outputs).uniform_(-bound, bound))


def _normalise(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])

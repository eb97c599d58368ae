"""Rotary position embeddings: take the rotation off keys, put it on at other positions.

One formula serves every kind of RoPE (Su et al., arXiv:2104.09864). Kinds differ in their
frequencies, in a factor on cos and sin (YaRN, LongRoPE), in which channels form a pair, in how many
channels turn at all and, for M-RoPE (arXiv:2409.12191), in which of three position rows turns which
pair. What a model does is measured by `rope_probe.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_c2c.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """How one layer's keys were rotated: plain data, hashable, fit for a wire.

    Attributes:
        inv_freq: angle in rad a position turns each pair of channels by; float32 values, as the
            model used them. Channels beyond `2 * len(inv_freq)` are not rotated.
        attention_scaling: factor on cos and sin, so on the rotated channels' length.
        mrope_section: how many pairs follow the temporal, row and column positions; None where
            there is one position a token.
        mrope_interleaved: the three rows alternate pair by pair (Qwen3-VL) instead of standing in
            three blocks.
        interleaved: neighbours (0, 1), (2, 3), ... form the pairs (GLM, Cohere) instead of channel
            i and i + rotary_dim / 2.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        # A header read back from JSON brings lists; a spec must hash, and equal the one sent.
        object.__setattr__(self, "inv_freq", tuple(float(f) for f in self.inv_freq))
        if not self.inv_freq or not all(math.isfinite(f) for f in self.inv_freq):
            raise ConfigError(f"inv_freq must be finite and not empty, got {self.inv_freq}")
        if not (math.isfinite(self.attention_scaling) and self.attention_scaling > 0):
            raise ConfigError(f"attention_scaling must be positive, got {self.attention_scaling}")
        if self.mrope_section is None:
            if self.mrope_interleaved:
                raise ConfigError("mrope_interleaved needs an mrope_section")
            return
        object.__setattr__(self, "mrope_section", tuple(int(n) for n in self.mrope_section))
        sections, pairs = self.mrope_section, len(self.inv_freq)
        if len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs:
            raise ConfigError(
                f"mrope_section must be three counts that sum to {pairs} pairs, got {sections}"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels that turn, from the first on."""
        return 2 * len(self.inv_freq)

    @property
    def position_rows(self) -> tuple[int, ...]:
        """For each pair, the row of M-RoPE position ids that turns it; 0 without M-RoPE."""
        if self.mrope_section is None:
            return (0,) * len(self.inv_freq)
        if not self.mrope_interleaved:
            return tuple(row for row, count in enumerate(self.mrope_section) for _ in range(count))
        # The temporal row keeps every pair that the other two do not claim.
        return tuple(
            pair % 3 if pair < 3 * self.mrope_section[pair % 3] else 0
            for pair in range(len(self.inv_freq))
        )


def rotate(keys: Tensor, position_ids: Tensor, spec: RopeSpec | None) -> Tensor:
    """Rotate keys that carry no rotation to the given positions.

    Args:
        keys: `(batch, num_key_value_heads, seq_len, head_dim)`, or several layers of that, stacked
            in front, that share `spec`.
        position_ids: `(batch, seq_len)`; for M-RoPE also `(3, batch, seq_len)`.
        spec: how to rotate; None returns `keys`.

    Returns:
        Shaped like `keys` and in their dtype. Angles are computed in float32.
    """
    return keys if spec is None else _turn(keys, position_ids, spec, inverse=False)


def derotate(keys: Tensor, position_ids: Tensor, spec: RopeSpec | None) -> Tensor:
    """Undo `rotate`: take rotation and scaling off keys that stand at the given positions.

    Args:
        keys: as `rotate` takes them, post-RoPE.
        position_ids: `(batch, seq_len)`; for M-RoPE also `(3, batch, seq_len)`.
        spec: how the keys were rotated; None returns `keys`.

    Returns:
        Shaped like `keys` and in their dtype. Angles are computed in float32.
    """
    return keys if spec is None else _turn(keys, position_ids, spec, inverse=True)


def _turn(keys: Tensor, position_ids: Tensor, spec: RopeSpec, *, inverse: bool) -> Tensor:
    angles = _angles(keys, position_ids, spec)
    scaling = 1 / spec.attention_scaling if inverse else spec.attention_scaling
    cos = angles.cos() * scaling
    sin = angles.sin() * (-scaling if inverse else scaling)

    # Of a pair (a, b) come (a cos - b sin, b cos + a sin): its partner, with a sign, beside it.
    pairs = (-1, 2) if spec.interleaved else (2, -1)
    pair_dim = -1 if spec.interleaved else -2
    cos = torch.stack((cos, cos), dim=pair_dim).flatten(-2)
    sin = torch.stack((-sin, sin), dim=pair_dim).flatten(-2)
    moving = keys[..., : spec.rotary_dim]
    partners = moving.unflatten(-1, pairs).flip(pair_dim).flatten(-2)
    turned = torch.addcmul(moving * cos, partners, sin).to(keys.dtype)
    if keys.shape[-1] == spec.rotary_dim:
        return turned
    return torch.cat((turned, keys[..., spec.rotary_dim :]), dim=-1)


def _angles(keys: Tensor, position_ids: Tensor, spec: RopeSpec) -> Tensor:
    """`(batch, 1, seq_len, rotary_dim / 2)` in float32."""
    if keys.ndim not in (4, 5) or keys.shape[-1] < spec.rotary_dim:
        raise ShapeError(
            "expected keys of (batch, num_key_value_heads, seq_len, head_dim >= "
            f"{spec.rotary_dim}), or layers of such, got {tuple(keys.shape)}"
        )
    batch, seq_len = keys.shape[-4], keys.shape[-2]
    expected: list[tuple[int, ...]] = [(batch, seq_len)]
    if spec.mrope_section is not None:
        expected.append((3, batch, seq_len))
    if position_ids.shape not in expected:
        raise ShapeError(
            f"expected position_ids of {' or '.join(map(str, expected))} for keys of "
            f"{tuple(keys.shape)}, got {tuple(position_ids.shape)}"
        )
    inv_freq, rows = _constants(spec, keys.device)
    positions = position_ids.expand(3, -1, -1)[rows].permute(1, 2, 0)
    return (positions.float() * inv_freq).unsqueeze(1)


@functools.lru_cache(maxsize=256)
def _constants(spec: RopeSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies and position rows on `device`, kept: each upload would stall an accelerator."""
    inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
    return inv_freq, torch.tensor(spec.position_rows, device=device)

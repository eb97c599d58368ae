"""Rotary position embeddings: take the rotation off keys, put it on at other positions.

One formula serves every kind of RoPE (Su et al., arXiv:2104.09864). Kinds differ in their
frequencies, in a factor on cos and sin (YaRN, LongRoPE), in which channels form a pair, in how many
channels turn at all and, for M-RoPE (arXiv:2409.12191), in which of three position rows turns which
pair. `rope_specs` measures what a model does instead of looking it up by the model's name.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_c2c.errors import ConfigError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from mm_c2c.cache import LayerKV


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
        keys: `(batch, num_key_value_heads, seq_len, head_dim)`. The heads of several layers that
            share `spec` may stand side by side.
        position_ids: `(batch, seq_len)`; for M-RoPE also `(3, batch, seq_len)`.
        spec: how to rotate; None returns `keys`.

    Returns:
        Shaped like `keys` and in their dtype. Angles are computed in float32.
    """
    return keys if spec is None else _turn(keys, position_ids, spec, inverse=False)


def derotate(keys: Tensor, position_ids: Tensor, spec: RopeSpec | None) -> Tensor:
    """Undo `rotate`: take rotation and scaling off keys that stand at the given positions.

    Args:
        keys: `(batch, num_key_value_heads, seq_len, head_dim)`, post-RoPE.
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

    moving, still = keys[..., : spec.rotary_dim], keys[..., spec.rotary_dim :]
    split = (-1, 2) if spec.interleaved else (2, -1)
    pair_dim = -1 if spec.interleaved else -2
    first, second = moving.unflatten(-1, split).unbind(pair_dim)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=pair_dim)
    return torch.cat((turned.flatten(-2).to(keys.dtype), still), dim=-1)


def _angles(keys: Tensor, position_ids: Tensor, spec: RopeSpec) -> Tensor:
    """`(batch, 1, seq_len, rotary_dim / 2)` in float32."""
    if keys.ndim != 4 or keys.shape[-1] < spec.rotary_dim:
        raise ShapeError(
            "expected keys of (batch, num_key_value_heads, seq_len, head_dim >= "
            f"{spec.rotary_dim}), got {tuple(keys.shape)}"
        )
    batch, seq_len = keys.shape[0], keys.shape[2]
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


@torch.no_grad()
def rope_specs(model: PreTrainedModel, seq_len: int) -> tuple[RopeSpec | None, ...]:
    """How each decoder layer of a model rotates its keys, measured on the model itself.

    A token alone attends only to itself, so that its keys differ between two positions by nothing
    but the rotation, in every layer. A handful of tokens, each alone and at several positions, thus
    show which layout, frequencies and position rows a layer uses. Frequencies and scaling are those
    of the model's own rotary module.

    Dynamic NTK frequencies depend on what the model was run on before: ask right before or right
    after the prefill, not after decoding. Neither the model nor that state is changed.

    Args:
        model: a causal LM or a vision-language model, of which the text decoder is read.
        seq_len: the prefill's largest position plus one. Dynamic NTK and LongRoPE depend on it.

    Returns:
        One entry a decoder layer; None where keys are not rotated, or a layer keeps none.

    Raises:
        UnsupportedError: no known layout reproduces the keys of some layer.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len must be at least 1, got {seq_len}")
    config = model.config.get_text_config(decoder=True)
    if not any("rope" in name or "rotary" in name for name in config.to_dict()):
        return (None,) * config.num_hidden_layers
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{config.model_type}: an encoder-decoder's RoPE cannot be read")

    decoder = _copy_sharing_weights(model.get_decoder()).eval()
    probe = _run_probe(decoder, config.vocab_size, seq_len)
    candidates = [None, *dict.fromkeys(_candidates(decoder, probe.position_ids))]
    found = {}
    for index, (keys, values) in probe.layers.items():
        name = f"{config.model_type} layer {index}"
        if _misfit(values, probe.position_ids, None) > _tolerance(values):
            raise UnsupportedError(
                f"{name}: its values depend on the position, as in latent caches"
            )
        found[index] = _best_fit(keys, probe.position_ids, candidates, name)
    return tuple(found.get(index) for index in range(config.num_hidden_layers))


class _Probe(NamedTuple):
    """What the probe left: `(tokens * positions, ...)` rows, all positions of a token in a run.

    Attributes:
        layers: K and V by layer index, `(rows, num_key_value_heads, 1, head_dim)`.
        position_ids: `(rows, 1)`, or `(3, rows, 1)`; a token's first row stands at position 0.
    """

    layers: dict[int, LayerKV]
    position_ids: Tensor


# More than one, since a padding token may be embedded as zero and so have no keys to turn.
_NUM_TOKENS = 4


def _copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy with its own buffers and attributes (the state of dynamic RoPE) and shared weights."""
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})


def _run_probe(decoder: nn.Module, vocab_size: int, seq_len: int) -> _Probe:
    # Not at the top: cache.py imports `RopeSpec` from here.
    from mm_c2c.cache import read_layers

    is_mrope = any(getattr(module, "mrope_section", None) for module in decoder.modules())
    num_rows = 3 if is_mrope else 1
    # Each row of positions alone is moved to 1, where fast pairs have not yet turned full circle,
    # and to the end, where slow ones show. At position 0 alone nothing would turn.
    axes = torch.eye(num_rows, dtype=torch.long)
    steps = torch.cat([torch.zeros(num_rows, 1).long(), axes, axes * (max(seq_len, 2) - 1)], dim=1)
    tokens = torch.arange(1, _NUM_TOKENS + 1) * (vocab_size // (_NUM_TOKENS + 1))

    device = next(decoder.parameters()).device
    input_ids = tokens.repeat_interleave(steps.shape[1]).unsqueeze(-1).to(device)
    position_ids = steps.repeat(1, _NUM_TOKENS).unsqueeze(-1).to(device)
    if not is_mrope:
        position_ids = position_ids[0]
    output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=True)
    layers, indices = read_layers(output.past_key_values)
    return _Probe(dict(zip(indices, layers, strict=True)), position_ids)


def _candidates(decoder: nn.Module, position_ids: Tensor) -> Iterator[RopeSpec]:
    """Every reading of the decoder's rotary modules, in the state the probe left them in."""
    for rotary in decoder.modules():
        for name, inv_freq in rotary.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
                continue
            # Gemma 3 and others hold one set a layer type: "sliding_attention_inv_freq".
            layer_type = name.removesuffix("inv_freq").removesuffix("_")
            # Not its `attention_scaling`, since PhiMoE multiplies by something else. The first row
            # stands at position 0, where cos (or the modulus of a complex table) is the factor.
            select = {"layer_type": layer_type} if layer_type else {}
            table = rotary(torch.zeros(1, device=inv_freq.device), position_ids, **select)
            cos = table if isinstance(table, Tensor) else table[0]
            section = getattr(rotary, "mrope_section", None)
            if isinstance(section, dict):
                section = section[layer_type]
            yield from _readings(inv_freq, float(cos[0].abs().max()), section)


def _readings(
    inv_freq: Tensor, scaling: float, section: Sequence[int] | None
) -> Iterator[RopeSpec]:
    """The layouts that one set of frequencies can be laid out in."""
    if section is not None and (len(section) != 3 or sum(section) != len(inv_freq)):
        return
    for interleaved, mrope_interleaved in itertools.product((False, True), repeat=2):
        if mrope_interleaved and section is None:
            continue
        yield RopeSpec(
            inv_freq=tuple(inv_freq.tolist()),
            attention_scaling=scaling,
            mrope_section=None if section is None else tuple(section),
            mrope_interleaved=mrope_interleaved,
            interleaved=interleaved,
        )


def _misfit(states: Tensor, position_ids: Tensor, spec: RopeSpec | None) -> float:
    """How far `spec`, applied to each token's state at position 0, is off its other states."""
    if spec is not None and spec.rotary_dim > states.shape[-1]:
        return math.inf
    states = states.float()
    by_token = states.unflatten(0, (_NUM_TOKENS, -1))
    at_zero = by_token[:, :1].expand_as(by_token).flatten(0, 1)
    bare = derotate(at_zero, torch.zeros_like(position_ids), spec)
    return float((rotate(bare, position_ids, spec) - states).norm() / states.norm())


def _tolerance(states: Tensor) -> float:
    """A model's own rounding leaves 0.2 % in bfloat16; a wrong layout is off by tens of per cent."""
    return max(1e-4, 8 * torch.finfo(states.dtype).eps)


def _best_fit(
    keys: Tensor, position_ids: Tensor, candidates: Sequence[RopeSpec | None], name: str
) -> RopeSpec | None:
    misfits = [_misfit(keys, position_ids, spec) for spec in candidates]
    best = min(range(len(misfits)), key=misfits.__getitem__)
    if not misfits[best] <= _tolerance(keys):  # negated: keys that are all zero give nan
        raise UnsupportedError(
            f"{name}: no known RoPE layout reproduces its keys; the closest is off by "
            f"{misfits[best]:.2%}, accepted is {_tolerance(keys):.2%}"
        )
    return candidates[best]

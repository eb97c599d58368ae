"""How a model rotates its keys, measured on the model instead of looked up by its name."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_c2c.cache import LayerKV, read_layers
from mm_c2c.errors import ConfigError, UnsupportedError
from mm_c2c.rope import RopeSpec, derotate, rotate


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

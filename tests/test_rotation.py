"""Rotating keys and taking the rotation off: against complex numbers, and what is refused."""

import cmath
import json
import math
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_c2c.errors import ConfigError, ShapeError
from mm_c2c.rope import RopeSpec, derotate, rotate

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Keys(NamedTuple):
    keys: Tensor
    position_ids: Tensor
    spec: RopeSpec


@st.composite
def specs(draw: st.DrawFn) -> RopeSpec:
    pairs = draw(st.integers(1, 6))
    cuts = sorted(draw(st.tuples(st.integers(0, pairs), st.integers(0, pairs))))
    section = (cuts[0], cuts[1] - cuts[0], pairs - cuts[1])
    is_mrope = draw(st.booleans())
    return RopeSpec(
        inv_freq=tuple(draw(st.floats(0, 1, width=32)) for _ in range(pairs)),
        attention_scaling=draw(st.floats(0.5, 2)),
        mrope_section=section if is_mrope else None,
        mrope_interleaved=is_mrope and draw(st.booleans()),
        interleaved=draw(st.booleans()),
    )


@st.composite
def keyed(draw: st.DrawFn) -> Keys:
    spec = draw(specs())
    batch, heads, seq_len = (draw(st.integers(1, 3)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    head_dim = spec.rotary_dim + draw(st.integers(0, 3))
    keys = torch.randn(batch, heads, seq_len, head_dim, generator=generator)
    has_rows = spec.mrope_section is not None and draw(st.booleans())
    size = (3, batch, seq_len) if has_rows else (batch, seq_len)
    return Keys(keys, torch.randint(0, 50, size, generator=generator), spec)


def reference(keys: Tensor, position_ids: Tensor, spec: RopeSpec) -> Tensor:
    """Rotation as the papers write it: complex numbers, one pair at a time."""
    pairs = len(spec.inv_freq)
    rows = [0] * pairs
    if spec.mrope_interleaved:
        for row in (1, 2):
            for pair in range(row, min(pairs, 3 * spec.mrope_section[row]), 3):
                rows[pair] = row
    elif spec.mrope_section is not None:
        temporal, by_row, by_column = spec.mrope_section
        rows = [0] * temporal + [1] * by_row + [2] * by_column
    turned = keys.clone()
    for batch, head, place in torch.cartesian_prod(*map(torch.arange, keys.shape[:3])).view(-1, 3):
        vector = keys[batch, head, place]
        for pair, freq in enumerate(spec.inv_freq):
            a, b = (2 * pair, 2 * pair + 1) if spec.interleaved else (pair, pair + pairs)
            ids = position_ids if position_ids.ndim == 2 else position_ids[rows[pair]]
            turn = cmath.rect(spec.attention_scaling, float(ids[batch, place]) * freq)
            z = complex(vector[a], vector[b]) * turn
            turned[batch, head, place, a], turned[batch, head, place, b] = z.real, z.imag
    return turned


@settings(max_examples=40, deadline=None)
@given(keyed())
def test_rotation_is_multiplication_of_complex_numbers(example):
    torch.testing.assert_close(rotate(*example), reference(*example), **CLOSE)


@settings(max_examples=60, deadline=None)
@given(keyed())
def test_derotate_and_rotate_undo_each_other(example):
    keys, position_ids, spec = example
    torch.testing.assert_close(derotate(rotate(*example), position_ids, spec), keys, **CLOSE)
    torch.testing.assert_close(rotate(derotate(*example), position_ids, spec), keys, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(keyed())
def test_scaling_stretches_what_turns_and_leaves_the_rest(example):
    keys, _, spec = example
    rotated = rotate(*example)
    turned, still = rotated.split([spec.rotary_dim, keys.shape[-1] - spec.rotary_dim], dim=-1)
    length = keys[..., : spec.rotary_dim].norm(dim=-1) * spec.attention_scaling
    torch.testing.assert_close(turned.norm(dim=-1), length, **CLOSE)
    torch.testing.assert_close(still, keys[..., spec.rotary_dim :], rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(keyed())
def test_layers_that_are_stacked_turn_as_each_does_alone(example):
    keys, position_ids, spec = example
    layers = torch.stack([keys, 2 * keys, -keys])
    for turn in (rotate, derotate):
        alone = torch.stack([turn(layer, position_ids, spec) for layer in layers])
        assert torch.equal(turn(layers, position_ids, spec), alone)


@settings(max_examples=60, deadline=None)
@given(keyed(), st.integers(0, 50))
def test_scores_depend_on_distance_alone(example, shift):
    keys, position_ids, spec = example
    queries = keys.flip(1)

    def scores(offset: int) -> Tensor:
        turned = rotate(keys, position_ids + offset, spec)
        return rotate(queries, position_ids + offset + 3, spec) @ turned.mT

    torch.testing.assert_close(scores(0), scores(shift), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(specs())
def test_a_spec_comes_back_equal_from_json(spec):
    sent = RopeSpec(**json.loads(json.dumps(asdict(spec))))
    assert sent == spec
    assert hash(sent) == hash(spec)


SPEC = RopeSpec(inv_freq=(1.0, 0.1))
MROPE = RopeSpec(inv_freq=(1.0, 0.1, 0.01), mrope_section=(1, 1, 1), attention_scaling=1.5)


def test_without_a_spec_keys_are_returned_as_they_are():
    keys, position_ids = torch.randn(2, 3, 4, 5), torch.arange(4).repeat(2, 1)
    assert rotate(keys, position_ids, None) is keys
    assert derotate(keys, position_ids, None) is keys


def test_one_row_of_positions_stands_for_three_equal_ones():
    keys, position_ids = torch.randn(2, 3, 4, 6), torch.randint(0, 20, (2, 4))
    expected = rotate(keys, position_ids.repeat(3, 1, 1), MROPE)
    torch.testing.assert_close(rotate(keys, position_ids, MROPE), expected, rtol=0, atol=0)


@pytest.mark.parametrize("turn", [rotate, derotate])
def test_gradients_are_those_of_finite_differences(turn):
    keys = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    position_ids = torch.randint(0, 20, (3, 2, 3))
    assert torch.autograd.gradcheck(lambda x: turn(x, position_ids, MROPE), (keys,))


def test_gradients_flow_after_a_first_use_in_inference_mode():
    spec = RopeSpec(inv_freq=(0.123, 0.0456))
    keys, position_ids = torch.randn(1, 1, 3, 4), torch.arange(3)[None]
    with torch.inference_mode():
        rotate(keys, position_ids, spec)
    keys.requires_grad_()
    rotate(keys, position_ids, spec).sum().backward()
    assert keys.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_keep_their_dtype_and_angles_their_precision(dtype):
    keys = torch.randn(2, 3, 4, 6).to(dtype)
    position_ids = torch.randint(5000, 9000, (2, 4))
    rotated = rotate(keys, position_ids, MROPE)
    assert rotated.dtype == dtype
    # Angles in half precision would be wrong by whole turns at such positions.
    expected = rotate(keys.float(), position_ids, MROPE).to(dtype)
    torch.testing.assert_close(rotated, expected)


def test_nothing_is_read_back_from_the_device():
    # A tensor on the meta device has no data: whatever needs a value of it on the host raises.
    keys = torch.empty(2, 3, 4, 6, device="meta")
    position_ids = torch.empty(3, 2, 4, dtype=torch.long, device="meta")
    assert derotate(keys, position_ids, MROPE).shape == keys.shape


@pytest.mark.parametrize(
    ("keys", "position_ids", "spec", "message"),
    [
        ((2, 3, 4), (2, 4), SPEC, r"head_dim >= 4\), or layers .* got \(2, 3, 4\)"),
        ((2, 3, 4, 2), (2, 4), SPEC, r"head_dim >= 4\), or layers .* got \(2, 3, 4, 2\)"),
        ((2, 3, 4, 6), (3, 2, 4), SPEC, r"position_ids of \(2, 4\) for .* got \(3, 2, 4\)"),
        ((2, 3, 4, 6), (2, 5), SPEC, r"position_ids of \(2, 4\) for .* got \(2, 5\)"),
        ((2, 3, 4, 6), (1, 4), SPEC, r"position_ids of \(2, 4\) for .* got \(1, 4\)"),
        ((2, 3, 4, 6), (4, 2, 4), MROPE, r"\(2, 4\) or \(3, 2, 4\) for .* got \(4, 2, 4\)"),
    ],
)
@pytest.mark.parametrize("turn", [rotate, derotate])
def test_shapes_that_do_not_fit_are_named(turn, keys, position_ids, spec, message):
    with pytest.raises(ShapeError, match=message):
        turn(torch.zeros(keys), torch.zeros(position_ids, dtype=torch.long), spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inv_freq": ()}, "inv_freq must be finite and not empty"),
        ({"inv_freq": (1.0, math.nan)}, "inv_freq must be finite"),
        ({"attention_scaling": 0.0}, "attention_scaling must be positive, got 0.0"),
        ({"attention_scaling": math.inf}, "attention_scaling must be positive, got inf"),
        ({"mrope_interleaved": True}, "mrope_interleaved needs an mrope_section"),
        ({"mrope_section": (1, 1)}, r"three counts that sum to 2 pairs, got \(1, 1\)"),
        ({"mrope_section": (1, 1, 1)}, r"three counts that sum to 2 pairs, got \(1, 1, 1\)"),
        ({"mrope_section": (3, -1, 0)}, r"three counts that sum to 2 pairs, got \(3, -1, 0\)"),
    ],
)
def test_specs_that_describe_no_rotation_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RopeSpec(**{"inv_freq": (1.0, 0.1), **settings})

"""The Cache Fuser: identity when fresh or closed, and equal to a plain reference otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_c2c.cache import CacheShape
from mm_c2c.errors import AlignmentError, ConfigError, ShapeError
from mm_c2c.fuser import GATES, CacheFuser, FuserConfig
from mm_c2c.geometry import find

SHALLOW = CacheShape(num_layers=3, num_key_value_heads=3, head_dim=5)
TARGET = CacheShape(num_layers=4, num_key_value_heads=2, head_dim=6)
DEEP = CacheShape(num_layers=6, num_key_value_heads=3, head_dim=5)
BATCH, LENGTH = 2, 3
PRESETS = ("small", "c2c")
PAIRS = ((2, 0), (0, 2))  # (target, source); layers 1 and 3 of the target are left out


def make_fuser(
    preset: str = "small", *, source: CacheShape = SHALLOW, **changes: Any
) -> CacheFuser:
    base = (
        FuserConfig.c2c(source, TARGET)
        if preset == "c2c"
        else FuserConfig(source=source, target=TARGET)
    )
    fuser_config = replace(base, **{"hidden_size": 16, "rank": 7, **changes})
    return CacheFuser(fuser_config)


def randomise(fuser: CacheFuser) -> CacheFuser:
    """Weights none of which is special: no zeros, gates partly open."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return fuser


def states(shape: CacheShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.num_layers, BATCH, LENGTH, 2, shape.width, generator=generator)


def assert_zero(difference: Tensor) -> None:
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=0)


# --- a plain reference: one token, one layer, one head at a time ------------------------------


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + torch.finfo(x.dtype).eps).sqrt()


def linear(stacked: Any, layer: int, x: Tensor) -> Tensor:
    return F.linear(x, stacked.weight[layer].T, stacked.bias[layer, 0])


def layer_weights(kind: str, fuser: CacheFuser, layer: int) -> dict[int, Tensor | float]:
    """Source layers of one target layer and how much it takes of each."""
    num_source, num_target = fuser.config.source.num_layers, fuser.config.target.num_layers
    if kind == "mix":
        powers = [logit.exp() for logit in fuser.projection.mix_logits[layer]]  # type: ignore[attr-defined]
        return {index: power / sum(powers) for index, power in enumerate(powers)}
    if kind == "explicit":
        pairs = dict(fuser.config.pairs or ())
        return {pairs[layer]: 1.0} if layer in pairs else {}
    if kind == "terminal":
        chosen = layer - num_target + num_source
        return {chosen: 1.0} if chosen >= 0 else {}
    return {round(layer * (num_source - 1) / (num_target - 1)): 1.0}


def slow_small(fuser: CacheFuser, layer: int, source: Tensor, target: Tensor) -> list[Tensor]:
    p: Any = fuser.projection
    mixed = F.linear(torch.cat([rms(target[0]), rms(target[1])]), p.target_in.weight)
    for index, share in layer_weights(fuser.config.layers, fuser, layer).items():
        hidden = linear(
            p.source_in, index, torch.cat([rms(source[index, 0]), rms(source[index, 1])])
        )
        inner = F.gelu(linear(p.up, index, rms(hidden)))
        mixed = mixed + share * (hidden + linear(p.down, index, inner))
    inner = F.gelu(linear(p.head_down, layer, rms(mixed)))
    return [
        *linear(p.head_up, layer, inner).chunk(2),
        *linear(p.head_weight, layer, inner).chunk(2),
    ]


def ffn(block: Any, index: int, states: Tensor) -> Tensor:
    inner = F.gelu((rms(states) * block.scale[index, 0]) @ block.up_weight[index])
    return states + inner @ block.down_weight[index]


def slow_c2c(fuser: CacheFuser, layer: int, source: Tensor, target: Tensor) -> list[Tensor]:
    p: Any = fuser.projection
    differences, logits = [], []
    fed = fuser.fed.nonzero().flatten().tolist()
    for part in (0, 1):
        block = part * len(fed) + fed.index(layer)
        chosen = torch.zeros(fuser.config.source.width)
        for index, share in layer_weights(fuser.config.layers, fuser, layer).items():
            chosen = chosen + share * source[index, part]
        read = ffn(p.read, block, linear(p.enter, block, torch.cat([chosen, target[part]])))
        differences.append(linear(p.leave, block, ffn(p.project, block, read)))
        logits.append(linear(p.weigh[1], block, ffn(p.weigh[0], block, read)))
    return [*differences, *logits]


def slow_forward(fuser: CacheFuser, source: Tensor, target: Tensor) -> Tensor:
    shape, kind = fuser.config.target, fuser.config.layers
    project = slow_small if fuser.config.preset == "small" else slow_c2c
    out = torch.zeros_like(target)
    for layer in range(shape.num_layers):
        if not layer_weights(kind, fuser, layer):
            continue
        for row in range(target.shape[1]):
            for position in range(target.shape[2]):
                token = source[:, row, position], target[layer, row, position]
                *differences, key_logits, value_logits = project(fuser, layer, *token)
                for part, logits in enumerate((key_logits, value_logits)):
                    logit = fuser.gate_logits[layer, part]
                    gate = 1 / (1 + (-logit).exp())
                    if fuser.config.gate == "straight_through":
                        gate = (logit > 0).float()
                    if fuser.config.gate == "open":
                        gate = torch.ones(())
                    for head in range(shape.num_key_value_heads):
                        channels = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
                        weight = 1 / (1 + (-logits[head]).exp())
                        if not fuser.config.weighting:
                            weight = torch.ones(())
                        out[layer, row, position, part, channels] = (
                            gate * weight * differences[part][channels]
                        )
    return out


@pytest.mark.parametrize("gate", ["sigmoid", "straight_through"])
@pytest.mark.parametrize("source", [SHALLOW, DEEP], ids=["shallow", "deep"])
@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        ("small", "mix"),
        ("small", "proportional"),
        ("small", "terminal"),
        ("small", "explicit"),
        ("c2c", "proportional"),
        ("c2c", "terminal"),
        ("c2c", "explicit"),
    ],
)
def test_the_batched_forward_equals_a_plain_loop(
    preset: str, layers: str, source: CacheShape, gate: str
) -> None:
    pairs = PAIRS if layers == "explicit" else None
    fuser = randomise(make_fuser(preset, source=source, layers=layers, pairs=pairs, gate=gate))
    inputs = states(source), states(TARGET, seed=1)
    with torch.no_grad():
        expected = slow_forward(fuser, *inputs)
        assert expected.abs().mean() > 0.01  # the comparison is of something
        torch.testing.assert_close(fuser(*inputs), expected, rtol=1e-4, atol=1e-5)


# --- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_fuser_changes_nothing(preset: str, training: bool) -> None:
    fuser = make_fuser(preset).train(training)
    assert_zero(fuser(states(SHALLOW), states(TARGET, seed=1)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("preset", PRESETS)
def test_closed_gates_change_nothing_whatever_the_weights(
    preset: str, gate: str, training: bool
) -> None:
    fuser = randomise(make_fuser(preset, gate=gate)).train(training)
    inputs = states(SHALLOW), states(TARGET, seed=1)
    assert fuser(*inputs).abs().max() > 0.1
    fuser.close()
    assert_zero(fuser(*inputs))
    assert_zero(fuser.gates())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("preset", PRESETS)
def test_training_and_inference_are_one_function(preset: str, gate: str) -> None:
    fuser = randomise(make_fuser(preset, gate=gate))
    inputs = states(SHALLOW), states(TARGET, seed=1)
    torch.testing.assert_close(fuser.train()(*inputs), fuser.eval()(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_terminal_leaves_target_layers_below_a_shallow_source_alone(preset: str) -> None:
    fuser = randomise(make_fuser(preset, layers="terminal", gate="sigmoid"))
    difference = fuser(states(SHALLOW), states(TARGET, seed=1))
    assert_zero(difference[0])
    assert (difference[1:].abs().amax((1, 2, 4)) > 0).all()
    assert fuser.fed.tolist() == [False, True, True, True]


@pytest.mark.parametrize(("layers", "fed"), [("terminal", 3), ("proportional", 4)])
def test_c2c_has_weights_for_the_layers_that_are_fed_alone(layers: str, fed: int) -> None:
    fuser = make_fuser("c2c", layers=layers)
    block = 16 * (SHALLOW.width + TARGET.width + 1) + 3 * (2 * 16 * 16 + 16)
    heads = (TARGET.width + TARGET.num_key_value_heads) * 17
    gates = 2 * TARGET.num_layers
    assert fuser.num_parameters == gates + 2 * fed * (block + heads)


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_pairs_leave_the_other_target_layers_alone(preset: str) -> None:
    fuser = randomise(make_fuser(preset, layers="explicit", pairs=PAIRS, gate="sigmoid"))
    source = states(SHALLOW)
    difference = fuser(source, states(TARGET, seed=1))
    assert_zero(difference[[1, 3]])
    assert (difference[[0, 2]].abs().amax((1, 2, 4)) > 0).all()
    assert fuser.fed.tolist() == [True, False, True, False]
    source[2] += 1.0  # feeds target layer 0 only
    moved = (fuser(source, states(TARGET, seed=1)) != difference).flatten(1).any(1)
    assert moved.tolist() == [True, False, False, False]


# --- gates and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{"gate": "open"}, {"weighting": False}], ids=str)
def test_ablated_gates_and_weights_equal_the_plain_reference(
    preset: str, changes: dict[str, Any]
) -> None:
    fuser = randomise(make_fuser(preset, **changes))
    inputs = states(SHALLOW), states(TARGET, seed=1)
    torch.testing.assert_close(fuser(*inputs), slow_forward(fuser, *inputs), rtol=1e-5, atol=1e-5)
    fuser(*inputs).sum().backward()
    # Processes wait for the gradients of all that asks for some.
    asking = {name for name, weight in fuser.named_parameters() if weight.requires_grad}
    moved = {name for name, weight in fuser.named_parameters() if weight.grad is not None}
    assert asking == moved
    assert ("gate_logits" in asking) == (fuser.config.gate != "open")
    assert any("weigh." in name or "head_weight" in name for name in asking) == (
        fuser.config.weighting
    )


def test_a_straight_through_gate_is_exactly_open_or_closed() -> None:
    fuser = make_fuser(gate="straight_through")
    with torch.no_grad():
        fuser.gate_logits.copy_(torch.linspace(-3, 3, 8).view(4, 2))
    expected = (fuser.gate_logits > 0).float()
    torch.testing.assert_close(fuser.gates(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gate", ["sigmoid", "straight_through"])
@pytest.mark.parametrize(("preset", "layers"), [("small", "mix"), ("c2c", "proportional")])
def test_gradients_reach_every_layer_of_every_parameter(
    preset: str, layers: str, gate: str
) -> None:
    fuser = randomise(make_fuser(preset, layers=layers, gate=gate))
    with torch.no_grad():
        fuser.gate_logits.fill_(0.5)
    fuser(states(SHALLOW), states(TARGET, seed=1)).pow(2).sum().backward()
    for name, parameter in fuser.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_fuser_can_learn(preset: str) -> None:
    fuser = make_fuser(preset, layers="proportional")
    inputs = states(SHALLOW), states(TARGET, seed=1)
    fuser(*inputs).sum().backward()
    with torch.no_grad():
        for parameter in fuser.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert (fuser(*inputs).abs().amax((1, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_does_not_depend_on_its_neighbours(preset: str) -> None:
    fuser = randomise(make_fuser(preset))
    source, target = states(SHALLOW), states(TARGET, seed=1)
    both = fuser(source, target)
    for row in range(BATCH):
        alone = fuser(source[:, row : row + 1], target[:, row : row + 1])
        # Products of other sizes are summed in another order, which differs from CPU to CPU.
        torch.testing.assert_close(both[:, row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_masked_positions_are_left_and_the_others_fused(preset: str) -> None:
    fuser = randomise(make_fuser(preset))
    source, target = states(SHALLOW), states(TARGET, seed=1)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    whole, some = fuser(source, target), fuser(source, target, mask)
    assert torch.equal(some[:, mask], whole[:, mask])
    assert_zero(some[:, ~mask])


# --- sizes and refusals -----------------------------------------------------------------------


def test_small_stays_small_for_the_reference_pair() -> None:
    fuser = CacheFuser(
        FuserConfig(
            source=CacheShape(num_layers=4, num_key_value_heads=6, head_dim=32),
            target=CacheShape(num_layers=30, num_key_value_heads=3, head_dim=64),
        )
    )
    assert fuser.num_parameters == sum(w.numel() for w in fuser.state_dict().values())
    assert 1_000_000 < fuser.num_parameters <= 6_000_000


@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize("wrong", ["layers", "width", "parts", "dimensions"])
def test_another_geometry_is_refused_by_name(which: str, wrong: str) -> None:
    inputs = {"source": states(SHALLOW), "target": states(TARGET)}
    good = inputs[which]
    inputs[which] = {
        "layers": good[1:],
        "width": good[..., 1:],
        "parts": good[..., :1, :],
        "dimensions": good[:, :, 0],
    }[wrong]
    layers = {"source": 3, "target": 4}[which]
    with pytest.raises(ShapeError, match=rf"{which}: expected \(layers={layers}, .*other models\?"):
        make_fuser()(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "large"}, "preset must be one of small, c2c, got 'large'"),
        ({"layers": "nearest"}, "layers must be one of .*mix, got 'nearest'"),
        ({"layers": "explicit"}, "belong together, got layers='explicit' and pairs=None"),
        ({"pairs": PAIRS}, "belong together, got layers='mix' and pairs="),
        ({"layers": "terminal", "pairs": ()}, r"got layers='terminal' and pairs=\(\)"),
        ({"preset": "c2c"}, "cannot mix them; set layers to proportional, terminal .*or explicit"),
        ({"gate": "hard"}, "gate must be one of sigmoid, straight_through, open, got 'hard'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"rank": -1}, "rank must be at least 1, got -1"),
    ],
)
def test_settings_that_cannot_be_built_from_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FuserConfig(source=SHALLOW, target=TARGET, **changes)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((4, 0),), "target layer 4 from source layer 0: the target has 4 layers"),
        (((0, 3),), "source layer 3: the target has 4 layers, the source 3"),
        (((1, 0), (1, 2)), "target layer 1 is fed by source layers 0 and 2"),
        ((), "nothing would be fused"),
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_pairs_that_do_not_fit_the_models_are_refused(
    preset: str, pairs: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(AlignmentError, match=message):
        make_fuser(preset, layers="explicit", pairs=pairs)


def test_the_c2c_preset_has_the_papers_choices() -> None:
    config = FuserConfig.c2c(SHALLOW, TARGET)
    assert (config.layers, config.hidden_size, config.gate) == (
        "terminal",
        1024,
        "straight_through",
    )
    assert config.raw_keys
    # The fuser between the paper's own pair has 478 M parameters (its section on costs), all layers
    # of the target counted.
    source, target = (find(name).layout.shape for name in ("Qwen2.5-0.5B", "Qwen3-0.6B"))
    paper = replace(FuserConfig.c2c(source, target), layers="proportional")
    with torch.device("meta"):
        assert round(CacheFuser(paper).num_parameters / 1e6) == 478

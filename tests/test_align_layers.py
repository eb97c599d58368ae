import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_c2c.align.layers import LayerMap, layer_map, mix_init
from mm_c2c.errors import AlignmentError, ConfigError, ShapeError

# The first call of a torch operation may take longer than hypothesis allows an example.
unhurried = settings(max_examples=60, deadline=None)
depths = st.integers(1, 40)


def sources_of(found: LayerMap) -> dict[int, int]:
    targets, sources = found.weights.nonzero(as_tuple=True)
    return dict(zip(targets.tolist(), sources.tolist(), strict=True))


@unhurried
@given(depths, depths)
def test_proportional_is_total_monotone_and_even(source_layers, target_layers):
    found = layer_map("proportional", source_layers, target_layers)
    assert found.weights.shape == (target_layers, source_layers)
    assert found.weights.dtype == torch.float32
    assert found.mask.all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(target_layers))
    chosen = list(sources_of(found).values())
    assert chosen == sorted(chosen)
    assert chosen[-1] == source_layers - 1
    if target_layers > 1:
        places = [t * (source_layers - 1) / (target_layers - 1) for t in range(target_layers)]
        assert all(abs(c - place) <= 0.5 for c, place in zip(chosen, places, strict=True))


def test_proportional_meets_at_both_ends():
    assert sources_of(layer_map("proportional", 4, 7)) == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3}
    assert sources_of(layer_map("proportional", 7, 4)) == {0: 0, 1: 2, 2: 4, 3: 6}


@unhurried
@given(depths, depths)
def test_terminal_feeds_each_layer_from_its_own_and_stops(source_layers, target_layers):
    found = layer_map("terminal", source_layers, target_layers)
    shared = min(source_layers, target_layers)
    assert found.mask.tolist() == [False] * (target_layers - shared) + [True] * shared
    offset = source_layers - target_layers
    assert all(source == target + offset for target, source in sources_of(found).items())


@pytest.mark.parametrize("pairs", [{0: 2, 3: 1}, [(0, 2), (3, 1)], iter([(3, 1), (0, 2)])])
def test_explicit_takes_the_pairs_and_masks_the_rest(pairs):
    found = layer_map("explicit", 3, 5, pairs)
    assert sources_of(found) == {0: 2, 3: 1}
    assert found.mask.tolist() == [True, False, False, True, False]


@unhurried
@given(depths, depths)
def test_a_learned_mix_starts_with_the_nearest_layers(source_layers, target_layers):
    logits = mix_init(source_layers, target_layers)
    for target in range(target_layers):
        place = float(source_layers - 1)
        if target_layers > 1:
            place *= target / (target_layers - 1)
        expected = torch.tensor([-abs(layer - place) for layer in range(source_layers)])
        torch.testing.assert_close(logits[target], expected)


def test_the_heaviest_of_a_learned_mix_is_the_proportional_map():
    heaviest = mix_init(5, 8).argmax(1)
    assert heaviest.tolist() == list(sources_of(layer_map("proportional", 5, 8)).values())


def test_an_unknown_kind_names_the_known_and_the_closest():
    with pytest.raises(
        ConfigError, match=r"'terminl'; known: proportional, terminal.*closest: terminal"
    ):
        layer_map("terminl", 3, 5)


@pytest.mark.parametrize(("kind", "pairs"), [("explicit", None), ("terminal", {0: 0})])
def test_pairs_belong_to_explicit_only(kind, pairs):
    with pytest.raises(ConfigError, match="'explicit' and only there"):
        layer_map(kind, 3, 5, pairs)


@pytest.mark.parametrize("pair", [(5, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_pair_out_of_range_is_refused(pair):
    with pytest.raises(AlignmentError, match=f"target layer {pair[0]} from source layer {pair[1]}"):
        layer_map("explicit", 3, 5, [pair])


def test_a_target_layer_named_twice_is_refused():
    with pytest.raises(AlignmentError, match="layer 2 is fed by source layers 0 and 1"):
        layer_map("explicit", 3, 5, [(2, 0), (2, 1)])


@pytest.mark.parametrize(
    ("kind", "source_layers", "target_layers", "pairs"),
    [
        ("explicit", 3, 5, {}),
        ("proportional", 0, 5, None),
        ("proportional", 3, 0, None),
        ("terminal", 0, 5, None),
    ],
)
def test_a_map_that_fuses_nothing_is_an_error(kind, source_layers, target_layers, pairs):
    with pytest.raises(AlignmentError, match="nothing would be fused"):
        layer_map(kind, source_layers, target_layers, pairs)


def test_a_mix_without_layers_is_an_error():
    with pytest.raises(AlignmentError, match="0 source, 5 target layers"):
        mix_init(0, 5)


def test_a_layer_map_is_a_matrix():
    with pytest.raises(ShapeError, match=r"\(target_layers, source_layers\), got \(3,\)"):
        LayerMap(weights=torch.ones(3))

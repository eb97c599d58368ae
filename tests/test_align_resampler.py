import math
from dataclasses import replace

import pytest
import torch
from grids import TWO_IMAGES, TWO_ROWS, by_position, make_cache, slots_of
from torch import Tensor
from torch.nn import functional as F

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_all, align_pooled, line_up, patch_coordinates
from mm_c2c.align.resampler import NUM_FREQUENCIES, Asking, PatchResampler, ResamplerConfig
from mm_c2c.cache import PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import ConfigError, ShapeError


@pytest.fixture
def resampler() -> PatchResampler:
    torch.manual_seed(0)
    return PatchResampler(ResamplerConfig(num_slots=4, source_width=5, width=12))


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + torch.finfo(x.dtype).eps).sqrt()


def weigh_slowly(
    resampler: PatchResampler, states: Tensor, coordinates: Tensor, alignment: Alignment, row: int
) -> Tensor:
    """`(num_slots, source_len)` of one row, slot by slot, over its readable positions only."""
    weights = torch.zeros(resampler.config.num_slots, states.shape[1])
    for slot in range(resampler.config.num_slots):
        readable = alignment.source_index[row, slot][alignment.weights[row, slot] > 0].tolist()
        scores = []
        for position in readable:
            y, x = coordinates[row, position].tolist()
            waves = [[axis * math.pi * 2**i for i in range(NUM_FREQUENCIES)] for axis in (y, x)]
            angles = torch.tensor(waves[0] + waves[1])
            place = resampler.place_in(torch.cat([angles.sin(), angles.cos()]))
            key = rms(resampler.source_in(rms(states[row, position])) + place)
            scores.append(float(resampler.queries[slot] @ key) / math.sqrt(12))
        total = sum(math.exp(score) for score in scores)
        for position, score in zip(readable, scores, strict=True):
            weights[slot, position] = math.exp(score) / total
    return weights


@torch.no_grad()
def test_the_resampler_equals_a_plain_loop(resampler):
    cache = make_cache(TWO_ROWS)
    states, coordinates = torch.randn(2, cache.seq_len, 5), patch_coordinates(cache)
    for readable in (
        align_all(cache, 4, slots_of(cache, 4)),
        align_pooled(cache, PatchGrid(2, 2), slots_of(cache, 4)),
    ):
        found = resampler(states, coordinates, readable)
        for row in range(2):
            expected = weigh_slowly(resampler, states, coordinates, readable, row)
            torch.testing.assert_close(by_position(found, cache.seq_len)[row], expected)


@torch.no_grad()
def test_the_resampler_weighs_every_patch_and_nothing_else(resampler):
    cache = make_cache(TWO_ROWS)
    readable = align_all(cache, 4, slots_of(cache, 4))
    found = resampler(torch.randn(2, cache.seq_len, 5), patch_coordinates(cache), readable)
    assert found.weights.shape == (2, 4, 20)
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.sum(2), torch.ones(2, 4))
    is_patch = (cache.patches[..., 0] == 0).unsqueeze(1).expand(-1, 4, -1)
    assert ((by_position(found, cache.seq_len) > 0) == is_patch).all()
    for name in ("source_index", "target_index", "mask"):
        assert torch.equal(getattr(found, name), getattr(readable, name))


@torch.no_grad()
def test_the_resampler_asks_the_same_of_each_image(resampler):
    cache = make_cache(TWO_IMAGES)
    states, coordinates = torch.randn(2, cache.seq_len, 5), patch_coordinates(cache)
    both = resampler(states, coordinates, align_all(cache, 4, slots_of(cache, 8), image=None))
    for image in range(2):
        alone = align_all(cache, 4, slots_of(cache, 4), image=image)
        expected = by_position(resampler(states, coordinates, alone), cache.seq_len)
        found = by_position(both, cache.seq_len)[:, 4 * image : 4 * image + 4]
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_the_resampler_reads_a_padded_row_as_the_row_alone(resampler, row):
    together, alone = make_cache(TWO_ROWS), make_cache([TWO_ROWS[row]])
    states = torch.randn(2, together.seq_len, 5)
    own = states[row : row + 1, together.seq_len - alone.seq_len :]
    found, expected = (
        resampler(s, patch_coordinates(c), align_all(c, 4, slots_of(c, 4))).gather(s)
        for s, c in ((states, together), (own, alone))
    )
    torch.testing.assert_close(found[row], expected[0])


@torch.no_grad()
def test_the_resampler_reads_a_patch_at_position_0_beside_unused_entries(resampler):
    padded = Alignment(
        source_index=torch.tensor([0, 1, 0]).expand(1, 4, -1),
        weights=torch.tensor([0.5, 0.5, 0.0]).expand(1, 4, -1),
        target_index=torch.arange(4).unsqueeze(0),
        mask=torch.ones(1, 4, dtype=torch.bool),
    )
    states, coordinates = torch.randn(1, 3, 5), torch.rand(1, 3, 2)
    found = resampler(states, coordinates, padded)
    assert (found.weights[..., 2] == 0).all()
    expected = weigh_slowly(resampler, states, coordinates, padded, 0)
    torch.testing.assert_close(by_position(found, 3)[0], expected)


def test_the_resamplers_weights_pass_gradients_to_all_it_is_made_of(resampler):
    cache = make_cache(TWO_ROWS)
    states = torch.randn(2, cache.seq_len, 5, requires_grad=True)
    alignment = align_all(cache, 4, slots_of(cache, 4))
    found = resampler(states, patch_coordinates(cache), alignment)
    found.gather(torch.randn(2, cache.seq_len, 3)).square().sum().backward()
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().amax(-1) > 1e-6).all(), name
    assert (states.grad != 0).any(2).tolist() == (cache.patches[..., 0] == 0).tolist()


@torch.no_grad()
def test_the_resampler_tells_places_apart(resampler):
    cache = make_cache([[PatchGrid(2, 3)]])
    alignment, coordinates = align_all(cache, 4, slots_of(cache, 4)), patch_coordinates(cache)
    states = torch.randn(1, cache.seq_len, 5)
    flipped, moved = states.clone(), coordinates.clone()
    flipped[0, 2:8] = states[0, 2:8].flip(0)
    moved[0, 2:8] = coordinates[0, 2:8].flip(0)
    read = resampler(states, coordinates, alignment).gather(states)
    same_place = resampler(flipped, coordinates, alignment).gather(flipped)
    assert (same_place - read).abs().max() > 1e-3
    moved_along = resampler(flipped, moved, alignment).gather(flipped)
    torch.testing.assert_close(moved_along, read)


def test_a_masked_slot_reads_nothing_and_its_gradients_are_finite(resampler):
    cache = make_cache([[PatchGrid(2, 3)]])
    alignment = align_all(cache, 4, slots_of(cache, 4))
    keep = torch.tensor([[True, False, True, True]])
    alignment = replace(
        alignment,
        source_index=alignment.source_index * keep.unsqueeze(2),
        weights=alignment.weights * keep.unsqueeze(2),
        mask=keep,
    )
    states = torch.randn(1, cache.seq_len, 5)
    found = resampler(states, patch_coordinates(cache), alignment)
    assert ((found.weights != 0).any(2) == keep).all()
    found.gather(states).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in resampler.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_resampler_takes_the_states_of_a_half_precision_model(resampler, dtype):
    cache = make_cache([[PatchGrid(2, 3)]])
    states = torch.randn(1, cache.seq_len, 5).to(dtype)
    inputs = patch_coordinates(cache), align_all(cache, 4, slots_of(cache, 4))
    found = resampler(states, *inputs)
    torch.testing.assert_close(found.weights, resampler(states.float(), *inputs).weights)


def test_the_resampler_refuses_another_number_of_slots(resampler):
    cache = make_cache([[PatchGrid(2, 3)]])
    alignment = align_all(cache, 3, slots_of(cache, 3))
    with pytest.raises(ShapeError, match=r"num_slots=4\), got \(1, 3\)"):
        resampler(torch.randn(1, cache.seq_len, 5), patch_coordinates(cache), alignment)


@pytest.mark.parametrize("name", ["num_slots", "source_width", "width"])
def test_a_resampler_that_cannot_be_built_is_refused(name):
    sizes = {"num_slots": 4, "source_width": 5, "width": 12, name: 0}
    with pytest.raises(ConfigError, match=f"^{name} must be at least 1, got 0"):
        ResamplerConfig(**sizes)


def test_a_batch_without_any_image_takes_nothing(resampler):
    cache = make_cache([[], []])
    states = torch.randn(2, cache.seq_len, 5)
    for align, size in ((align_pooled, PatchGrid(2, 2)), (align_all, 4)):
        found = align(cache, size, slots_of(cache, 8), image=None)
        for alignment in (found, resampler(states, patch_coordinates(cache), found)):
            assert not alignment.mask.any()
            assert (alignment.gather(states) == 0).all()


def test_a_resampler_reads_an_image_alike_whatever_other_rows_show(resampler):
    cache = make_cache([*TWO_ROWS, []])
    states = torch.randn(3, cache.seq_len, 5, requires_grad=True)
    alignment = align_all(cache, 4, slots_of(cache, 8), image=None)
    found = resampler(states, patch_coordinates(cache), alignment).gather(states)
    for row, images in enumerate((1, 2)):
        one = make_cache([TWO_ROWS[row]])
        own = states[row : row + 1, cache.seq_len - one.seq_len :]
        alone = align_all(one, 4, slots_of(one, 4 * images), image=None)
        expected = resampler(own, patch_coordinates(one), alone).gather(own)[0]
        torch.testing.assert_close(found[row, : 4 * images], expected)
    assert (found[0, 4:] == 0).all()
    assert (found[2] == 0).all()
    found.square().sum().backward()
    assert states.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in resampler.parameters())
    assert (states.grad[2] == 0).all()


# --- slots that are told by other positions what to look for -----------------------------------


@pytest.fixture
def asked() -> PatchResampler:
    torch.manual_seed(0)
    config = ResamplerConfig(num_slots=4, source_width=5, width=12, asked=True, hidden_size=6)
    resampler = PatchResampler(config)
    torch.nn.init.normal_(resampler.asker.out.weight)
    return resampler


def asking_words(cache: SourceCache) -> Asking:
    """The last two of the words after the images."""
    words = replace(cache, kinds=cache.kinds.clone())
    words.kinds[:, :-2] = PositionKind.TEMPLATE
    lined = line_up(words, [PositionKind.TEXT])
    return Asking(lined.patches[..., 0] >= 0, patch_coordinates(lined))


@torch.no_grad()
def test_an_asked_resampler_equals_one_whose_queries_are_what_was_asked(asked):
    cache = make_cache(TWO_ROWS)
    states, coordinates = torch.randn(2, cache.seq_len, 5), patch_coordinates(cache)
    alignment = align_all(cache, 4, slots_of(cache, 4))
    found = asked(states, coordinates, alignment, asking_words(cache))
    plain = PatchResampler(replace(asked.config, asked=False))
    plain.load_state_dict(
        {name: value for name, value in asked.state_dict().items() if "asker" not in name}
    )
    for row in range(2):
        read = []
        for number, position in enumerate((-2, -1)):
            place = torch.tensor([0.5, (number + 0.5) / 2])
            angles = torch.cat([axis * math.pi * 2.0 ** torch.arange(8) for axis in place])
            waves = torch.cat([angles.sin(), angles.cos()])
            state = asked.asker.state_in(rms(states[row, position])) + asked.asker.place_in(waves)
            read.append(F.gelu(state))
        inner = F.gelu(asked.asker.middle(sum(read) / 2))
        plain.queries.data = asked.queries + asked.asker.out(inner).view(4, 12)
        expected = plain(states, coordinates, alignment)
        torch.testing.assert_close(found.weights[row], expected.weights[row])


@torch.no_grad()
def test_an_untrained_asker_asks_nothing():
    torch.manual_seed(0)
    config = ResamplerConfig(num_slots=4, source_width=5, width=12, asked=True)
    asked, plain = PatchResampler(config), PatchResampler(replace(config, asked=False))
    plain.load_state_dict({n: v for n, v in asked.state_dict().items() if "asker" not in n})
    cache = make_cache(TWO_ROWS)
    inputs = patch_coordinates(cache), align_all(cache, 4, slots_of(cache, 4))
    states = torch.randn(2, cache.seq_len, 5)
    found = asked(states, *inputs, asking_words(cache))
    torch.testing.assert_close(found.weights, plain(states, *inputs).weights)


@torch.no_grad()
def test_what_is_asked_depends_on_the_asking_positions_and_their_order(asked):
    cache = make_cache([[PatchGrid(2, 3)]])
    states = torch.randn(1, cache.seq_len, 5)
    inputs = patch_coordinates(cache), align_all(cache, 4, slots_of(cache, 4))
    swapped, other = states.clone(), states.clone()
    swapped[0, -2:] = states[0, -2:].flip(0)
    other[0, -3] = torch.randn(5)  # a word that does not ask
    found, turned, same = (
        asked(each, *inputs, asking_words(cache)).weights for each in (states, swapped, other)
    )
    assert (found - turned).abs().max() > 1e-3
    assert torch.equal(found, same)


def test_gradients_reach_all_that_an_asker_is_made_of(asked):
    cache = make_cache(TWO_ROWS)
    states = torch.randn(2, cache.seq_len, 5)
    alignment = align_all(cache, 4, slots_of(cache, 4))
    found = asked(states, patch_coordinates(cache), alignment, asking_words(cache))
    found.gather(torch.randn(2, cache.seq_len, 3)).square().sum().backward()
    for name, parameter in asked.asker.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_a_resampler_and_the_positions_that_ask_belong_together(resampler, asked):
    cache = make_cache(TWO_ROWS)
    states = torch.randn(2, cache.seq_len, 5)
    inputs = states, patch_coordinates(cache), align_all(cache, 4, slots_of(cache, 4))
    with pytest.raises(ShapeError, match=r"asked=True takes the positions that ask"):
        asked(*inputs)
    with pytest.raises(ShapeError, match=r"asked=False takes no positions that ask"):
        resampler(*inputs, asking_words(cache))

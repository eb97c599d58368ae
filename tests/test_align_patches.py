from dataclasses import replace

import pytest
import torch
from grids import TWO_IMAGES, TWO_ROWS, by_position, make_cache, slots_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_all, align_pooled, line_up, patch_coordinates
from mm_c2c.cache import PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import AlignmentError

# The first call of a torch operation may take longer than hypothesis allows an example.
unhurried = settings(max_examples=60, deadline=None)
sides = st.integers(1, 7)
grids = st.builds(PatchGrid, sides, sides)


def image_states(cache: SourceCache, states: Tensor, row: int, image: int) -> Tensor:
    """`(1, channels, rows, cols)`: the states of one image as a picture."""
    grid = cache.grids[row][image]
    return states[row, cache.patches[row, :, 0] == image].T.reshape(1, -1, grid.rows, grid.cols)


def test_gathering_is_the_weighted_sum_of_the_named_positions():
    index = torch.randint(0, 7, (2, 3, 4))
    weights = torch.rand(2, 3, 4)
    weights[0, 1] = 0
    index[0, 1] = 0
    alignment = Alignment(
        source_index=index,
        weights=weights,
        target_index=torch.arange(3).expand(2, -1),
        mask=weights.sum(2) > 0,
    )
    states = torch.randn(2, 7, 5)
    found = alignment.gather(states)
    for row in range(2):
        for slot in range(3):
            expected = sum(
                weights[row, slot, i] * states[row, index[row, slot, i]] for i in range(4)
            )
            torch.testing.assert_close(found[row, slot], expected)


@unhurried
@given(st.lists(grids, min_size=1, max_size=3), grids)
def test_pooled_windows_are_those_of_adaptive_average_pooling(images, slots):
    cache = make_cache([[grid] for grid in images])
    alignment = align_pooled(cache, slots, slots_of(cache, slots.rows * slots.cols))
    assert alignment.mask.all()
    assert (alignment.source_index[alignment.weights == 0] == 0).all()
    torch.testing.assert_close(alignment.weights.sum(2), torch.ones(alignment.mask.shape))
    states = torch.randn(cache.batch_size, cache.seq_len, 3)
    for row in range(cache.batch_size):
        expected = F.adaptive_avg_pool2d(image_states(cache, states, row, 0), slots[:2])
        torch.testing.assert_close(alignment.gather(states)[row], expected.flatten(2)[0].T)


def test_a_named_image_is_pooled_from_its_own_patches():
    cache = make_cache(TWO_IMAGES)
    slots = PatchGrid(2, 2)
    states = torch.randn(2, cache.seq_len, 3)
    found = align_pooled(cache, slots, slots_of(cache, 4), image=1).gather(states)
    for row in range(2):
        expected = F.adaptive_avg_pool2d(image_states(cache, states, row, 1), (2, 2))
        torch.testing.assert_close(found[row], expected.flatten(2)[0].T)


def test_the_slots_of_several_images_follow_each_other():
    cache = make_cache(TWO_IMAGES)
    slots = PatchGrid(2, 2)
    states = torch.randn(2, cache.seq_len, 3)
    together = align_pooled(cache, slots, slots_of(cache, 8), image=None).gather(states)
    for image in range(2):
        alone = align_pooled(cache, slots, slots_of(cache, 4), image=image).gather(states)
        torch.testing.assert_close(together[:, 4 * image : 4 * image + 4], alone)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_in_a_padded_batch_is_the_row_alone(row):
    together, alone = make_cache(TWO_ROWS), make_cache([TWO_ROWS[row]])
    states = torch.randn(2, together.seq_len, 3)
    own = states[row : row + 1, together.seq_len - alone.seq_len :]
    for align, size in ((align_pooled, PatchGrid(2, 2)), (align_all, 4)):
        expected = align(alone, size, slots_of(alone, 4)).gather(own)
        found = align(together, size, slots_of(together, 4)).gather(states)
        torch.testing.assert_close(found[row], expected[0])


def test_patches_need_not_lie_in_reading_order():
    cache = make_cache([[PatchGrid(3, 4)]])
    shuffled = torch.randperm(cache.seq_len)
    cache.patches.copy_(cache.patches[:, shuffled])
    states = torch.randn(1, cache.seq_len, 3)
    found = align_pooled(cache, PatchGrid(3, 4), slots_of(cache, 12)).gather(states)
    for slot in range(12):
        here = (cache.patches[0] == torch.tensor([0, slot // 4, slot % 4])).all(1)
        torch.testing.assert_close(found[0, slot], states[0, here][0])


def test_every_slot_may_read_every_patch_of_its_image_and_nothing_else():
    cache = make_cache(TWO_IMAGES)
    both = by_position(align_all(cache, 3, slots_of(cache, 6), image=None), cache.seq_len)
    for image in range(2):
        alignment = align_all(cache, 3, slots_of(cache, 3), image=image)
        assert alignment.mask.all()
        is_patch = (cache.patches[..., 0] == image).float()
        expected = (is_patch / is_patch.sum(1, keepdim=True)).unsqueeze(1).expand(-1, 3, -1)
        torch.testing.assert_close(by_position(alignment, cache.seq_len), expected)
        torch.testing.assert_close(both[:, 3 * image : 3 * image + 3], expected)


@pytest.mark.parametrize("image", [1, -1])
def test_an_image_out_of_range_is_named(image):
    cache = make_cache(TWO_ROWS)
    for align, size in ((align_pooled, PatchGrid(2, 2)), (align_all, 4)):
        with pytest.raises(AlignmentError, match=f"row 0 has no image {image}: it has 1 patch gri"):
            align(cache, size, slots_of(cache, 4), image=image)


def test_a_row_without_image_is_named():
    cache = make_cache([[PatchGrid(2, 2)], []])
    with pytest.raises(AlignmentError, match="row 1 has no image 0"):
        align_pooled(cache, PatchGrid(2, 2), slots_of(cache, 4))
    with pytest.raises(AlignmentError, match="row 1 has no image"):
        align_all(cache, 4, slots_of(cache, 4))


def test_an_empty_grid_is_refused():
    cache = make_cache([[PatchGrid(0, 3)]])
    with pytest.raises(AlignmentError, match="its patch grid is empty"):
        align_pooled(cache, PatchGrid(1, 1), slots_of(cache, 1))


def test_patches_that_do_not_fill_their_grid_are_refused():
    cache = make_cache([[PatchGrid(2, 3)]])
    cache.patches[0, 2:8, 1] = 0
    cache.patches[0, 2:8, 2] = torch.arange(6)  # one row of six: as many cells, another grid
    with pytest.raises(AlignmentError, match="2 x 3 grid, got 6 that do not fill it"):
        align_pooled(cache, PatchGrid(1, 1), slots_of(cache, 1))


@pytest.mark.parametrize("num_slots", [3, 5])
def test_target_positions_must_be_as_many_as_the_slots(num_slots):
    cache = make_cache([[PatchGrid(2, 3)]])
    with pytest.raises(AlignmentError, match=rf"4 slots, but target_index is \(1, {num_slots}\)"):
        align_pooled(cache, PatchGrid(2, 2), slots_of(cache, num_slots))
    with pytest.raises(AlignmentError, match=rf"4 slots, but target_index is \(1, {num_slots}\)"):
        align_all(cache, 4, slots_of(cache, num_slots))


def test_more_images_than_there_are_slots_for_are_refused():
    cache = make_cache(TWO_ROWS)
    for align, size in ((align_pooled, PatchGrid(2, 2)), (align_all, 4)):
        for num_slots in (4, 10):
            expected = rf"row \d gets \d slots, .* \(2, {num_slots}\); .* a larger multiple of 4"
            with pytest.raises(AlignmentError, match=expected):
                align(cache, size, slots_of(cache, num_slots), image=None)
        with pytest.raises(AlignmentError, match=r"target_index is \(1, 8\); expected \(2, 4,"):
            align(cache, size, slots_of(cache, 8)[:1], image=None)


def test_slots_of_images_that_a_row_lacks_take_nothing():
    cache = make_cache([*TWO_ROWS, []])
    states = torch.randn(3, cache.seq_len, 3)
    for align, size in ((align_pooled, PatchGrid(2, 2)), (align_all, 4)):
        found = align(cache, size, slots_of(cache, 12), image=None)
        assert found.mask.tolist() == [
            [slot < 4 * count for slot in range(12)] for count in (1, 2, 0)
        ]
        assert (found.weights[~found.mask] == 0).all()
        assert (found.source_index[~found.mask] == 0).all()
        for row, images in enumerate((1, 2, 0)):
            expected = torch.zeros(12, 3)
            for image in range(images):
                one = replace(
                    cache, grids=(cache.grids[row],) * 3, patches=cache.patches[[row] * 3]
                )
                alone = align(one, size, slots_of(one, 4), image=image)
                expected[4 * image : 4 * image + 4] = alone.gather(states)[row]
            torch.testing.assert_close(found.gather(states)[row], expected)


def test_the_finest_view_of_an_image_is_pooled_and_all_views_are_read():
    cache = make_cache([[PatchGrid(2, 2), PatchGrid(3, 4), PatchGrid(2, 3)]])
    overview, fine, other = cache.grids[0]
    cache = replace(cache, grids=((overview._replace(image=0), fine._replace(image=0), other),))
    pooled = align_pooled(cache, PatchGrid(1, 1), slots_of(cache, 1))
    read = pooled.source_index[pooled.weights > 0]
    assert cache.patches[0, read, 0].tolist() == [1] * 12
    pooled = align_pooled(cache, PatchGrid(1, 1), slots_of(cache, 2), image=None)
    assert cache.patches[0, pooled.source_index[0, 1, 0], 0] == 2  # the second image's only view
    read = align_all(cache, 1, slots_of(cache, 2), image=None)
    assert (read.weights > 0).sum(2).tolist() == [[4 + 12, 6]]


def test_queries_without_a_grid_are_read_whole_and_cannot_be_pooled():
    cache = make_cache([[PatchGrid(2, 2)], [PatchGrid(2, 2)]])
    cache = replace(cache, patches=torch.full_like(cache.patches, -1), grids=((), ()))
    with pytest.raises(AlignmentError, match=r"tiny sums a picture up in queries .*'resampler'"):
        align_pooled(cache, PatchGrid(2, 2), slots_of(cache, 4))
    found = align_all(cache, 3, slots_of(cache, 3))
    where = (cache.kinds[1] == PositionKind.IMAGE).nonzero().flatten()
    assert found.source_index[1, 2].tolist() == where.tolist()
    assert (patch_coordinates(cache) == 0).all()


def test_positions_of_other_kinds_are_pooled_in_the_prompts_order():
    cache = make_cache(TWO_ROWS)
    cache.kinds[:, -2] = PositionKind.STATE
    cache.kinds[:, 1::3] = PositionKind.ACTION
    lined = line_up(cache, [PositionKind.STATE, PositionKind.ACTION])
    states = torch.randn(2, cache.seq_len, 3)
    chosen = cache.kinds >= PositionKind.STATE
    count = int(chosen[0].sum())
    assert lined.grids == ((PatchGrid(1, count),),) * 2
    for cols in (count, 4, 1):
        found = align_pooled(lined, PatchGrid(1, cols), slots_of(cache, cols)).gather(states)
        for row in range(2):
            line = states[row, chosen[row]]
            expected = F.adaptive_avg_pool1d(line.T, cols).T
            torch.testing.assert_close(found[row], expected)
            if cols == count:  # a slot each
                torch.testing.assert_close(found[row], line)
    read = by_position(align_all(lined, 2, slots_of(cache, 2)), cache.seq_len)
    assert ((read > 0) == chosen.unsqueeze(1)).all()
    along = (torch.arange(count) + 0.5) / count
    torch.testing.assert_close(patch_coordinates(lined)[chosen][:count, 1], along)


def test_a_row_without_such_positions_is_named():
    cache = make_cache(TWO_ROWS)
    cache.kinds[0, 3] = PositionKind.ACTION
    with pytest.raises(AlignmentError, match="row 1 of tiny has no position of kind STATE or ACT"):
        line_up(cache, [PositionKind.STATE, PositionKind.ACTION])


def test_no_slots_are_refused():
    cache = make_cache([[PatchGrid(2, 3)]])
    with pytest.raises(AlignmentError, match="at least one row and column of slots"):
        align_pooled(cache, PatchGrid(0, 2), slots_of(cache, 0))
    with pytest.raises(AlignmentError, match="at least one slot, got 0"):
        align_all(cache, 0, slots_of(cache, 0))


def test_coordinates_are_patch_centres_whatever_the_grid():
    cache = make_cache([[PatchGrid(1, 2)], [PatchGrid(2, 4)]])
    found = patch_coordinates(cache)
    is_patch = cache.patches[..., 0] >= 0
    assert found[0, is_patch[0]].tolist() == [[0.5, 0.25], [0.5, 0.75]]
    assert found[1, is_patch[1]][:5].tolist() == [
        [0.25, 0.125],
        [0.25, 0.375],
        [0.25, 0.625],
        [0.25, 0.875],
        [0.75, 0.125],
    ]
    assert (found[~is_patch] == 0).all()

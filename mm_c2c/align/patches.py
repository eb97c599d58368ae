"""An image's patches to target slots: pooled by window, or all of them for a resampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from mm_c2c.align import Alignment
from mm_c2c.cache import PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import AlignmentError


def align_pooled(
    cache: SourceCache, slots: PatchGrid, target_index: Tensor, image: int | None = 0
) -> Alignment:
    """Pool the finest view of an image to a grid of slots, in reading order.

    The windows are those of `torch.nn.functional.adaptive_avg_pool2d`: they cover every patch and
    may overlap by one; where the grid is smaller than the slots, neighbouring slots repeat a patch.
    Rows of the batch may differ in grid size.

    Args:
        cache: the source's cache; every row must have the image that is named.
        slots: rows and columns of slots an image gets.
        target_index: `(batch, num_slots)` int64, positions of the slots in the target's prompt.
        image: which of a row's images; None takes all of them, one's slots after the other's. A
            row may then have fewer than there are slots for, or none: the last slots get nothing.

    Raises:
        AlignmentError: a row lacks the image, or the source's queries have no patch grid.
    """
    if min(slots.rows, slots.cols) < 1:
        raise AlignmentError(f"expected at least one row and column of slots, got {slots}")
    rows = [
        [_pool(cache, row, each, slots) for each in _images_of_row(cache, row, image)]
        for row in range(cache.batch_size)
    ]
    for row, images in enumerate(rows):
        if not images and (hint := _queries_hint(cache, row)):
            raise AlignmentError(f"row {row} has no image with a patch grid{hint}")
    return _stack_rows(rows, slots.rows * slots.cols, target_index, named=image is not None)


def align_all(
    cache: SourceCache, num_slots: int, target_index: Tensor, image: int | None = 0
) -> Alignment:
    """Let every slot read all that an image left, with equal weights.

    That is every patch of every view; of a source whose queries have no grid, every query.

    Args:
        cache: the source's cache; every row must have the image that is named.
        num_slots: slots an image gets.
        target_index: `(batch, num_slots)` int64, positions of the slots in the target's prompt.
        image: as for `align_pooled`.

    Returns:
        An alignment whose k is the largest number of such positions of an image; the entries
        beyond an image's own weigh 0.

    Raises:
        AlignmentError: a row lacks the image.
    """
    if num_slots < 1:
        raise AlignmentError(f"expected at least one slot, got {num_slots}")
    rows = [
        [
            (positions, torch.full_like(positions, 1 / len(positions), dtype=torch.float32))
            for positions in _positions_by_image(cache, row, image)
        ]
        for row in range(cache.batch_size)
    ]
    return _stack_rows(rows, num_slots, target_index, named=image is not None)


def line_up(cache: SourceCache, kinds: Sequence[PositionKind]) -> SourceCache:
    """Put the positions of some kinds in a grid of one row, in the prompt's order.

    So what lies nowhere in a picture, such as a robot's state and actions, can be pooled or
    resampled as patches are.

    Args:
        cache: a source's cache; every row must have such positions.
        kinds: what to take.

    Returns:
        The cache with this grid in place of its own.

    Raises:
        AlignmentError: a row has no position of these kinds.
    """
    chosen = torch.isin(cache.kinds, torch.tensor(kinds, device=cache.kinds.device))
    counts = chosen.sum(1).tolist()
    if not all(counts):
        names = " or ".join(kind.name for kind in kinds)
        raise AlignmentError(
            f"row {counts.index(0)} of {cache.origin.model} has no position of kind {names}"
        )
    zeros, places = torch.zeros_like(cache.kinds), chosen.cumsum(1) - 1
    patches = torch.stack([zeros, zeros, places], dim=2)
    return replace(
        cache,
        patches=patches.masked_fill(~chosen.unsqueeze(2), -1),
        grids=tuple((PatchGrid(1, count),) for count in counts),
    )


def patch_coordinates(cache: SourceCache) -> Tensor:
    """Where each patch lies in its image, whatever the grid of the view.

    Returns:
        `(batch, seq_len, 2)` float32: row and column of the patch's centre in (0, 1), from the
        top left; 0 where no patch stands.
    """
    coordinates = torch.zeros((*cache.patches.shape[:2], 2), device=cache.patches.device)
    for row, grids in enumerate(cache.grids):
        for view, grid in enumerate(grids):
            positions = _patch_positions(cache, row, view)
            size = torch.tensor(grid[:2], device=coordinates.device)
            coordinates[row, positions] = (cache.patches[row, positions, 1:] + 0.5) / size
    return coordinates


def finest_patches(cache: SourceCache, row: int, image: int = 0) -> Tensor:
    """Where the patches of an image's finest view stand in the source's prompt.

    Args:
        cache: the source's cache.
        row: of the batch.
        image: which of the row's images.

    Returns:
        `(rows, cols)` int64 positions, laid out as the patches are.

    Raises:
        AlignmentError: the row lacks the image, or the source's queries have no patch grid.
    """
    view = _finest_view(cache, row, image)
    grid = cache.grids[row][view]
    return _patch_positions(cache, row, view).view(grid.rows, grid.cols)


def _images_of_row(cache: SourceCache, row: int, image: int | None) -> list[int]:
    """The images of a row that have a patch grid, in order; or the one that is named."""
    return sorted({grid.image for grid in cache.grids[row]}) if image is None else [image]


def _finest_view(cache: SourceCache, row: int, image: int) -> int:
    """The view of an image that has the most patches; the first of several."""
    grids = cache.grids[row]
    views = _views(cache, row, image)
    return max(views, key=lambda view: grids[view].rows * grids[view].cols)


def _views(cache: SourceCache, row: int, image: int) -> list[int]:
    """The views of an image, as indices into the row's grids."""
    grids = cache.grids[row]
    views = [view for view, grid in enumerate(grids) if grid.image == image]
    if not views:
        raise AlignmentError(
            f"row {row} has no image {image}: it has {len(grids)} patch grids"
            f"{_queries_hint(cache, row)}"
        )
    return views


def _queries_hint(cache: SourceCache, row: int) -> str:
    """What to do about image positions that stand for no patch, where a row has such."""
    if not (cache.kinds[row] == PositionKind.IMAGE).any():
        return ""
    return (
        f"; {cache.origin.model_type} sums a picture up in queries that lie nowhere: use "
        "pooling='resampler'"
    )


def _patch_positions(cache: SourceCache, row: int, view: int) -> Tensor:
    """Positions of one view's patches in reading order: `(rows * cols,)`."""
    grid, patches = cache.grids[row][view], cache.patches[row]
    if min(grid.rows, grid.cols) < 1:
        raise AlignmentError(f"row {row}, image {grid.image}: its patch grid is empty, {grid}")
    positions = (patches[:, 0] == view).nonzero().flatten()
    cells = patches[positions, 1] * grid.cols + patches[positions, 2]
    positions = positions[cells.argsort()]
    axes = (torch.arange(size, device=patches.device) for size in grid[:2])
    if not torch.equal(patches[positions, 1:], torch.cartesian_prod(*axes)):
        raise AlignmentError(
            f"row {row}, image {grid.image}: expected one position for each patch of a "
            f"{grid.rows} x {grid.cols} grid, got {len(positions)} that do not fill it"
        )
    return positions


def _positions_by_image(cache: SourceCache, row: int, image: int | None) -> list[Tensor]:
    """Positions of each image's patches, view by view; without a grid, those of all queries."""
    if not cache.grids[row]:
        positions = (cache.kinds[row] == PositionKind.IMAGE).nonzero().flatten()
        if not len(positions) and image is not None:
            raise AlignmentError(f"row {row} has no image")
        return [positions] if len(positions) else []
    return [
        torch.cat([_patch_positions(cache, row, view) for view in _views(cache, row, each)])
        for each in _images_of_row(cache, row, image)
    ]


def _pool(cache: SourceCache, row: int, image: int, slots: PatchGrid) -> tuple[Tensor, Tensor]:
    """Positions and weights of the windows of one of a row's images, `(num_slots, k)` each."""
    view = _finest_view(cache, row, image)
    positions = _patch_positions(cache, row, view)
    cells, weights = (t.to(positions.device) for t in _windows(cache.grids[row][view], slots))
    return positions[cells].masked_fill(weights == 0, 0), weights


@lru_cache(maxsize=256)
def _windows(grid: PatchGrid, slots: PatchGrid) -> tuple[Tensor, Tensor]:
    """Cells of each slot's window and their weights, `(num_slots, k)` each. Do not modify them."""
    windows = [
        [row * grid.cols + col for row in rows for col in cols]
        for rows in _bins(grid.rows, slots.rows)
        for cols in _bins(grid.cols, slots.cols)
    ]
    k = max(map(len, windows))
    cells = torch.tensor([window + [0] * (k - len(window)) for window in windows])
    sizes = torch.tensor([len(window) for window in windows]).unsqueeze(1)
    return cells, torch.where(torch.arange(k) < sizes, 1 / sizes, 0.0)


def _bins(size: int, num_bins: int) -> list[range]:
    """One axis of adaptive average pooling: floor of a bin's start to ceiling of its end."""
    return [range(i * size // num_bins, -(-(i + 1) * size // num_bins)) for i in range(num_bins)]


def _stack_rows(
    rows: Sequence[Sequence[tuple[Tensor, Tensor]]],
    num_slots: int,
    target_index: Tensor,
    *,
    named: bool,
) -> Alignment:
    """One alignment of what the slots of each image of each row read.

    Args:
        rows: positions and weights of each image, `(num_slots, k)`, or `(k,)` for all its slots.
        num_slots: slots an image gets.
        target_index: `(batch, num_slots)` of all images.
        named: whether there is one image, rather than as many as have slots, or fewer.
    """
    fits = target_index.ndim == 2 and len(target_index) == len(rows)
    for row, images in enumerate(rows):
        count = len(images) * num_slots
        spare = target_index.shape[1] - count if fits else -1
        if spare < 0 or spare % num_slots or (named and spare):
            more = "" if named else f", or a larger multiple of {num_slots}"
            raise AlignmentError(
                f"row {row} gets {count} slots, but target_index is {tuple(target_index.shape)}; "
                f"expected ({len(rows)}, {count}{more})"
            )
    k = max((index.shape[-1] for images in rows for index, _ in images), default=0)
    source_index = target_index.new_zeros((*target_index.shape, k))
    weights = torch.zeros(source_index.shape, device=source_index.device)
    for row, images in enumerate(rows):
        for image, (index, shares) in enumerate(images):
            here = slice(image * num_slots, (image + 1) * num_slots)
            source_index[row, here, : index.shape[-1]] = index
            weights[row, here, : shares.shape[-1]] = shares
    return Alignment(
        source_index=source_index,
        weights=weights,
        target_index=target_index,
        mask=weights.sum(2) > 0,
    )

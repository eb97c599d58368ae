"""Views of a picture: which patch lies at which position of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_c2c.cache import PatchGrid
from mm_c2c.errors import ShapeError
from mm_c2c.sources.base import SourceInput


class View(NamedTuple):
    """One view of a picture: the grid of its patches, and which patch each image position holds.

    Attributes:
        rows: rows of patches; 0 for learned queries, which lie nowhere in the picture.
        cols: columns of patches.
        cells: row and column at each image position, in the order of the prompt; -1 where the
            model puts something else there, such as the end of a row.
    """

    rows: int
    cols: int
    cells: tuple[tuple[int, int], ...]


def whole_view(rows: int, cols: int) -> View:
    """Patches in reading order."""
    return View(rows, cols, tuple((row, col) for row in range(rows) for col in range(cols)))


def queries(count: int) -> View:
    """Positions that sum the picture up."""
    return View(0, 0, ((-1, -1),) * count)


def tiled_view(tile_rows: int, tile_cols: int, rows: int, cols: int) -> View:
    """Tiles of `rows` x `cols` patches, one after the other, joined to one grid."""
    cells = [
        (tile_row * rows + row, tile_col * cols + col)
        for tile_row in range(tile_rows)
        for tile_col in range(tile_cols)
        for row in range(rows)
        for col in range(cols)
    ]
    return View(tile_rows * rows, tile_cols * cols, tuple(cells))


def view_of_marks(marks: Tensor) -> View:
    """A view of rows that each end in a mark: 1 there, 0 at each patch."""
    cells = []
    row = col = cols = 0
    for is_end in marks.bool().tolist():
        cells.append((-1, -1) if is_end else (row, col))
        row, col = (row + 1, 0) if is_end else (row, col + 1)
        cols = max(cols, col)
    return View(row if cols else 0, cols, tuple(cells))


def by_row(
    inputs: Sequence[SourceInput],
    views: Sequence[tuple[View, ...]],
    videos: Sequence[Sequence[tuple[View, ...]]] = (),
) -> list[list[tuple[View, ...]]]:
    """The views of each picture of each row, then those of its videos' groups of frames."""
    remaining, more = iter(views), iter(videos)
    return [
        [next(remaining) for _ in item.images]
        + [group for _ in item.videos for group in next(more)]
        for item in inputs
    ]


def place(
    is_image: Tensor, rows: Sequence[Sequence[tuple[View, ...]]]
) -> tuple[Tensor, tuple[tuple[PatchGrid, ...], ...]]:
    """`patches` and `grids` of a `SourceCache`.

    Args:
        is_image: `(batch, seq_len)`: where the views' positions stand.
        rows: from `by_row`.
    """
    patches = torch.full((*is_image.shape, 3), -1, device=is_image.device)
    grids = []
    for row, pictures in enumerate(rows):
        in_row: list[PatchGrid] = []
        cells = []
        for image, view in (
            (image, view) for image, shown in enumerate(pictures) for view in shown
        ):
            index = len(in_row)
            cells += [(index, *c) if min(c) >= 0 else (-1, -1, -1) for c in view.cells]
            if view.rows:
                in_row.append(PatchGrid(view.rows, view.cols, image))
        found = int(is_image[row].sum())
        if found != len(cells):
            raise ShapeError(
                f"row {row}: the prompt has {found} image positions, its grids {in_row} "
                f"fill {len(cells)}"
            )
        patches[row, is_image[row]] = torch.tensor(cells, device=is_image.device).view(-1, 3)
        grids.append(tuple(in_row))
    return patches, tuple(grids)

"""Caches of which nothing is told but where their patches lie, for tests of what aligns them."""

import torch
from torch import Tensor

from mm_c2c.align import Alignment
from mm_c2c.cache import (
    CacheOrigin,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    empty_spans,
)

TWO_IMAGES = [[PatchGrid(2, 3), PatchGrid(3, 3)], [PatchGrid(4, 5), PatchGrid(2, 2)]]
TWO_ROWS = [[PatchGrid(2, 3)], [PatchGrid(4, 5), PatchGrid(3, 3)]]


def row_patches(images: list[PatchGrid]) -> list[tuple[int, int, int]]:
    """A prompt: two template tokens before each image, three text tokens at the end."""
    row = []
    for image, grid in enumerate(images):
        row += [(-1, -1, -1)] * 2
        row += [(image, r, c) for r in range(grid.rows) for c in range(grid.cols)]
    return row + [(-1, -1, -1)] * 3


def make_cache(images: list[list[PatchGrid]]) -> SourceCache:
    """A left-padded batch; each row has its own images."""
    rows = [row_patches(row) for row in images]
    seq_len = max(map(len, rows))
    patches = torch.tensor([[(-1, -1, -1)] * (seq_len - len(row)) + row for row in rows])
    batch = len(rows)
    states = torch.zeros(batch, 1, seq_len, 2)
    return SourceCache(
        layers=(LayerKV(states, states),),
        layer_indices=(0,),
        position_ids=torch.arange(seq_len).expand(batch, -1),
        kinds=torch.where(patches[..., 0] >= 0, PositionKind.IMAGE, PositionKind.TEXT),
        patches=patches,
        grids=tuple(
            tuple(PatchGrid(grid.rows, grid.cols, image) for image, grid in enumerate(row))
            for row in images
        ),
        spans=empty_spans(batch, seq_len),
        texts=("",) * batch,
        rope=(None,),
        origin=CacheOrigin("tiny", None, "tiny"),
    )


def slots_of(cache: SourceCache, num_slots: int) -> Tensor:
    return torch.arange(4, 4 + num_slots).expand(cache.batch_size, -1)


def by_position(alignment: Alignment, source_len: int) -> Tensor:
    """The weights of an alignment as `(batch, target_len, source_len)`."""
    weights = torch.zeros(*alignment.mask.shape, source_len)
    return weights.scatter_add(2, alignment.source_index, alignment.weights)

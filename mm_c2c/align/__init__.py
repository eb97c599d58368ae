"""Which source positions feed which target positions. Every aligner returns an `Alignment`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm_c2c.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """For each fused target position, the source positions that feed it and their weights.

    Attributes:
        source_index: `(batch, target_len, k)` int64, positions of the source's prompt; entries
            whose weight is 0 point at 0.
        weights: `(batch, target_len, k)` float32 in [0, 1]; a row sums to 1, or to 0 where `mask`
            is False.
        target_index: `(batch, target_len)` int64, positions of the target's prompt, none twice in
            a row.
        mask: `(batch, target_len)` bool; False leaves the target's own K and V as they are.
    """

    source_index: Tensor
    weights: Tensor
    target_index: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.source_index.shape != self.weights.shape:
            raise ShapeError(
                f"source_index is {tuple(self.source_index.shape)}, weights "
                f"{tuple(self.weights.shape)}; they must agree"
            )
        expected = self.source_index.shape[:2]
        if self.target_index.shape != expected or self.mask.shape != expected:
            raise ShapeError(
                f"expected target_index and mask of {tuple(expected)}, got "
                f"{tuple(self.target_index.shape)} and {tuple(self.mask.shape)}"
            )

    def gather(self, states: Tensor) -> Tensor:
        """Weighted sum of the source positions that feed each target position.

        Args:
            states: `(batch, source_len, channels)`.

        Returns:
            `(batch, target_len, channels)`; zero where `mask` is False.
        """
        # As one product: picking k positions for each target position first would hold every
        # channel k times, too much where a resampler's k is all patches.
        return self.shares(states.shape[1]).to(states.dtype) @ states

    def shares(self, source_len: int) -> Tensor:
        """`(batch, target_len, source_len)`: `weights`, each at its place in the source's prompt."""
        blank = self.weights.new_zeros(*self.mask.shape, source_len)
        return blank.scatter_add(2, self.source_index, self.weights)

"""Samples that do not depend on which rows share a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mm_c2c.errors import UnsupportedError


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into sampling, each row by a generator of its own.

    The largest of logits with Gumbel noise is a sample of their softmax (Maddison et al.,
    arXiv:1411.0030). `generate(do_sample=True)` draws all rows from one generator, so that a row's
    sample would change with the batch that a process happens to read it in.

    Args:
        seeds: one for each row of the batch.
        temperature: of the softmax, above 0.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits `(batch, vocab_size)`.

        Raises:
            UnsupportedError: the source reads its rows one by one.
        """
        if len(scores) != len(self.rows):
            raise UnsupportedError(
                f"expected the source to write {len(self.rows)} rows at once, it wrote "
                f"{len(scores)}: set phases.generate.temperature to 0"
            )
        waits = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=row) for row in self.rows]
        )
        return scores / self.temperature - waits.log().to(scores.device)

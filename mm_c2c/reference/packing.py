"""Several questions about one picture in one sequence: the picture is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PAD, _PREFIX = -1, -2


class Turn(NamedTuple):
    """A question and its answer, as tokens.

    Attributes:
        prompt: what stands between the picture and the answer.
        answer: the answer and the token that ends it.
    """

    prompt: list[int]
    answer: list[int]


class Packed(NamedTuple):
    """Several questions in a row; each sees the prefix and itself only.

    Attributes:
        input_ids: `(batch, text_len)`, after the prefix; right-padded with 0.
        segments: `(batch, text_len)`: which question a token belongs to; -1 pads.
        position_ids: `(batch, text_len)`, as if each question came right after the prefix.
        labels: `(batch, text_len)`: the next token where it is part of an answer, else -100.
    """

    input_ids: Tensor
    segments: Tensor
    position_ids: Tensor
    labels: Tensor


def pack(batch: Sequence[Sequence[Turn]], prefix_len: int) -> Packed:
    """Lay out the questions of each picture behind a prefix of `prefix_len` positions."""
    rows = []
    for turns in batch:
        ids: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        for index, (prompt, answer) in enumerate(turns):
            ids += prompt + answer[:-1]
            labels += [-100] * (len(prompt) - 1) + answer
            length = len(prompt) + len(answer) - 1
            segments += [index] * length
            positions += range(prefix_len, prefix_len + length)
        rows.append((ids, segments, positions, labels))
    width = max(len(row[0]) for row in rows)
    fill = (0, _PAD, 0, -100)
    columns = [
        torch.tensor([row[i] + [fill[i]] * (width - len(row[i])) for row in rows]) for i in range(4)
    ]
    return Packed(*columns)


def block_mask(segments: Tensor, prefix_len: int) -> Tensor:
    """Attention mask `(batch, 1, length, length)`: the prefix is causal, segments are apart.

    Args:
        segments: of `Packed`.
        prefix_len: positions before them.

    Returns:
        0 where a position may look, the lowest float32 elsewhere.
    """
    batch = segments.shape[0]
    owner = torch.cat([segments.new_full((batch, prefix_len), _PREFIX), segments], dim=1)
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = owner[:, :, None] == owner[:, None, :]
    shared = (owner == _PREFIX)[:, None, :]
    allowed = (same | shared) & causal
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]

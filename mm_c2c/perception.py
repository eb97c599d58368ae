"""What a bridge hands on: what was seen, what was read, and what the target goes on from."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor
from transformers import Cache


class Perception(NamedTuple):
    """What the sources saw, in the target's cache: ask it any number of questions.

    Attributes:
        input_ids: `(batch, prefix_len)`: the prompt up to the last slot.
        past_key_values: the target's fused cache of those positions.
    """

    input_ids: Tensor
    past_key_values: Cache

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.input_ids.shape[0]


class Reading(NamedTuple):
    """Questions as the target alone reads them.

    Attributes:
        input_ids: `(batch, seq_len)`.
        attention_mask: `(batch, seq_len)`.
        past_key_values: the target's cache.
        spans: `(batch, seq_len, 2)`: characters of the question that each token covers, or -1.
        questions: one for each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    past_key_values: Cache
    spans: Tensor
    questions: tuple[str, ...]

    @property
    def inputs(self) -> FusedInputs:
        """What `target.generate` takes; nothing more is fused."""
        return FusedInputs(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            past_key_values=self.past_key_values,
        )


class FusedInputs(TypedDict):
    """Everything that `target.generate` takes; the cache covers all but the last few tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    past_key_values: Cache

"""Forced choice: an answer can only be one of the question's options.

A model that was never shown how answers look writes a sentence, and exact match calls that wrong.
Among options every arm answers in the right form, and what is left is whether it knows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import FloatTensor, LongTensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from mm_c2c.errors import UnsupportedError

Trie = Mapping[tuple[int, ...], set[int]]
"""Which tokens may follow what was written so far."""


class AmongOptions(LogitsProcessor):
    """Lets each row write one of its options and the end of the answer, and nothing else.

    Made anew for each `generate`, whose first step tells where its prompt ends; that is 0 where
    `generate` is given embeddings. A row without options is left as it is.

    Args:
        options: of each row.
        reader: a source or target, whose tokenizer spells the options as in training: without a
            space before the answer.
        free_tokens: what a row without options may write at most.
    """

    def __init__(self, options: Sequence[Sequence[str]], reader: Any, free_tokens: int) -> None:
        tokenizer = getattr(reader, "tokenizer", None) or reader.processor.tokenizer
        own = reader.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if own is None else own
        self._ends = set(ends if isinstance(ends, list) else [ends])
        tries = {row: spell(tokenizer, row, self._ends) for row in set(map(tuple, options)) if row}
        self._tries = [tries.get(tuple(row)) for row in options]
        self._free_tokens = free_tokens
        self._start: int | None = None
        longest = max((len(ids) for trie in tries.values() for ids in trie), default=0)
        self.max_new_tokens = max(free_tokens, longest + 1)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """See `LogitsProcessor`."""
        if len(input_ids) != len(self._tries):
            raise UnsupportedError(
                f"a choice among the options of {len(self._tries)} rows was made for "
                f"{len(input_ids)}: it wants a model that answers a batch as a whole, without beams"
            )
        if self._start is None:
            self._start = input_ids.shape[1]
        allowed: Any = scores.clone()
        for row, written in enumerate(input_ids[:, self._start :].tolist()):
            following = self._following(row, written)
            if following is not None:
                kept = list(following)
                allowed[row] = -math.inf
                allowed[row, kept] = scores[row, kept]
        return allowed

    def _following(self, row: int, written: Sequence[int]) -> set[int] | None:
        """The tokens that may come next; None allows all."""
        if not self._ends.isdisjoint(written):
            return self._ends
        trie = self._tries[row]
        if trie is None:
            # Rows beside it may have longer options than a free answer has tokens.
            return self._ends if len(written) >= self._free_tokens else None
        if tuple(written) not in trie:
            raise UnsupportedError(
                f"row {row}: tokens {list(written)} start no option; the model's generation config "
                "forces or forbids tokens, which leaves no choice among options"
            )
        return trie[tuple(written)]


def spell(tokenizer: PreTrainedTokenizerBase, options: Sequence[str], ends: set[int]) -> Trie:
    """A trie of options; behind each stands the end.

    Args:
        tokenizer: of the model that answers.
        options: texts, without the white space around them.
        ends: tokens that end an answer.
    """
    following: dict[tuple[int, ...], set[int]] = defaultdict(set)
    texts = [option.strip() for option in options]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        for length, token in enumerate(ids):
            following[tuple(ids[:length])].add(token)
        following[tuple(ids)] |= ends
    return dict(following)

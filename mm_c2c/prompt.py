"""`Prompt`: what the target reads, `before · slots · question · tail`, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_c2c.align.tokens import locate_text, token_spans
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.sources.text import adds_its_own, render_chat

# Stands for the slots while the chat template is rendered; no tokenizer ever sees it.
_SLOTS_MARK = "\ufffc"


class QuestionTokens(NamedTuple):
    """What stands behind the slots, padded on the left.

    Attributes:
        input_ids: `(batch, question_len)`.
        attention_mask: `(batch, question_len)`.
        spans: `(batch, question_len, 2)`: characters of the question that each token covers, or -1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    spans: Tensor


class Prompt:
    """The target's chat template around slots and question.

    Args:
        tokenizer: the target's.
        system: the system message; None leaves it to the chat template.
        slot_token: one token of the vocabulary, for each slot.

    Attributes:
        before: tokens in front of the slots.
        slot_id: the token of a slot.
        tail: the text behind the question.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None, slot_token: str
    ) -> None:
        self.tokenizer = tokenizer
        rendered = render_chat(tokenizer, f"{_SLOTS_MARK}?", system)
        before, _, after = rendered.partition(_SLOTS_MARK)
        own = adds_its_own(tokenizer)
        self.before: list[int] = tokenizer(before, add_special_tokens=own)["input_ids"]
        self.tail = after[1:]
        ids = tokenizer(slot_token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(
                f"slot_token {slot_token!r} is {len(ids)} tokens of the target; choose one that is "
                "a single token"
            )
        self.slot_id: int = ids[0]

    def tokens(self, question: str) -> list[int]:
        """What follows the slots: a question, and what the chat template puts behind it."""
        return self.tokenizer(self._text(question), add_special_tokens=False)["input_ids"]

    def read(self, questions: Sequence[str]) -> QuestionTokens:
        """The tokens of several questions.

        Raises:
            InputError: there is none, one is empty, or something else stands in their place.
        """
        if isinstance(questions, str) or not isinstance(questions, Sequence):
            raise InputError(
                f"expected a list of questions, got {questions!r} ({type(questions).__name__})"
            )
        if not questions:
            raise InputError("expected at least one question, got none")
        if wrong := [question for question in questions if not isinstance(question, str)]:
            raise InputError(f"a question must be a text, got {wrong[0]!r}")
        if not all(question.strip() for question in questions):
            raise InputError("the question is empty; ask something")
        rows = [self.tokens(question) for question in questions]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        spans = torch.full((len(rows), width, 2), -1)
        for row, (tokens, question) in enumerate(zip(rows, questions, strict=True)):
            text, start = self._text(question), width - len(tokens)
            ids[row, start:] = torch.tensor(tokens)
            mask[row, start:] = 1
            spans[row, start:] = locate_text(
                token_spans(self.tokenizer, text), text, question.strip(), start=1
            )
        return QuestionTokens(ids, mask, spans)

    def _text(self, question: str) -> str:
        return f"\n{question.strip()}{self.tail}"

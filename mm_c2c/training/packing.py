"""Several questions about one picture in one sequence: the picture is read once for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from mm_c2c.errors import UnsupportedError
from mm_c2c.target import Target

_PAD, _PREFIX = -1, -2
# Tokens that tell whether a model's logits are what its output layer makes of its states.
_PROBE = 8


class Turn(NamedTuple):
    """A question and its answer, as tokens.

    Attributes:
        prompt: what stands between the picture and the answer.
        answer: the answer and the token that ends it.
    """

    prompt: list[int]
    answer: list[int]


class Packed(NamedTuple):
    """Several questions in a row; each sees what is before all of them and itself only.

    Attributes:
        input_ids: `(batch, text_len)`, after the prefix; right-padded with 0.
        segments: `(batch, text_len)`: which question a token belongs to; -1 pads, -2 is a beginning
            that all questions of a row see.
        position_ids: `(batch, text_len)`, as if each question came right after what it sees.
        labels: `(batch, text_len)`: the next token where it is part of an answer, else -100.
    """

    input_ids: Tensor
    segments: Tensor
    position_ids: Tensor
    labels: Tensor


def pack(
    batch: Sequence[Sequence[Turn]],
    prefix_len: int,
    beginnings: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """Lay out the questions of each picture behind a prefix of `prefix_len` positions.

    Args:
        batch: questions of each row; a prompt has at least one token.
        prefix_len: positions that were read already.
        beginnings: of each row, tokens that come before each of its questions, and are read once;
            None where there are none.
    """
    rows = []
    for row, turns in enumerate(batch):
        ids = list(beginnings[row]) if beginnings else []
        begun = prefix_len + len(ids)
        segments = [_PREFIX] * len(ids)
        positions = list(range(prefix_len, begun))
        labels = [-100] * len(ids)
        for index, (prompt, answer) in enumerate(turns):
            ids += prompt + answer[:-1]
            labels += [-100] * (len(prompt) - 1) + answer
            length = len(prompt) + len(answer) - 1
            segments += [index] * length
            positions += range(begun, begun + length)
        rows.append((ids, segments, positions, labels))
    width = max(len(row[0]) for row in rows)
    fill = (0, _PAD, 0, -100)
    columns = [
        torch.tensor([row[i] + [fill[i]] * (width - len(row[i])) for row in rows]) for i in range(4)
    ]
    return Packed(*columns)


def split_beginning(prompts: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """What all prompts begin with, and the rest of each, which keeps at least its last token."""
    columns = zip(*(ids[:-1] for ids in prompts), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    beginning = [column[0] for column in same]
    return beginning, [ids[len(beginning) :] for ids in prompts]


def read_packed(model: Any, packed: Packed, cache: Cache, done: int) -> Tensor:
    """Logits `(labels, vocab_size)` where a label is, row after row; gradients reach the cache.

    Args:
        model: a causal LM of transformers that `check_packs` accepts.
        packed: of `pack`, on the model's device.
        cache: what each question of a row reads on from; it grows.
        done: positions in the cache.
    """
    mask = block_mask(packed.segments, done)[:, :, done:]
    states = model.base_model(
        packed.input_ids,
        attention_mask=mask.to(model.dtype),
        position_ids=packed.position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    # Most positions have no label: the vocabulary is asked for at those that have one.
    return model.get_output_embeddings()(states[packed.labels != -100])


@torch.no_grad()
def check_packs(target: Target) -> None:
    """Refuse a model that reads several questions in one sequence otherwise than each alone.

    Raises:
        UnsupportedError: some of its layers see a window or are recurrent, or its logits are more
            than its output layer makes of its last states.
    """
    wanted = "leave packed at false, which reads each question by itself"
    if target.minds_padding:
        raise UnsupportedError(
            f"{target} has layers that see a window or are recurrent, and cannot tell questions in "
            f"one sequence apart; {wanted}"
        )
    model = target.model
    ids = torch.arange(1, _PROBE + 1, device=model.device).unsqueeze(0)
    whole = model(ids).logits.float()
    plain = model.get_output_embeddings()(model.base_model(ids).last_hidden_state).float()
    misfit = float((plain - whole).norm() / whole.norm())
    accepted = max(1e-4, 8 * torch.finfo(model.dtype).eps)
    if not misfit <= accepted:
        raise UnsupportedError(
            f"{target} scales or caps its logits: what its output layer gives is {misfit:.2%} off "
            f"them, accepted is {accepted:.2%}; {wanted}"
        )


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
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    same = owner[:, :, None] == owner[:, None, :]
    shared = (owner == _PREFIX)[:, None, :]
    allowed = (same | shared) & causal
    mask = torch.zeros(allowed.shape, device=owner.device)
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]

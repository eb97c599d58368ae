"""Text to text: match two tokenizers' tokens by the characters they cover.

Each model reads its own natural token stream; nothing is decoded and encoded again. The spans of
both count in the same text, so overlapping spans are the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_c2c.align import Alignment
from mm_c2c.errors import AlignmentError, ShapeError, UnsupportedError


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> Tensor:
    """Characters of `text` that each of its tokens covers.

    Tokenizers disagree on who owns the space before a word: byte-level BPE has " cat", WordPiece
    "cat", SentencePiece either "▁cat" or "▁" and "cat". A span therefore leaves out the white
    space around a word, so that all of them agree; a token of white space only keeps its span.
    The bytes of one character (an emoji in byte-level BPE) each cover that whole character.

    Args:
        tokenizer: a fast tokenizer.
        text: what to tokenize, such as a rendered chat template.
        add_special_tokens: whether the tokenizer adds its own; a rendered template has them.

    Returns:
        `(len, 2)` int64: start and end; -1 where a token covers nothing.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets; "
            "load a fast one (AutoTokenizer with `tokenizers` installed)"
        )
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)[
        "offset_mapping"
    ]
    spans = [_trim(text, start, end) for start, end in offsets]
    return torch.tensor(spans, dtype=torch.long).reshape(-1, 2)


def locate_text(spans: Tensor, rendered: str, text: str, start: int | None = None) -> Tensor:
    """Spans in a rendered prompt, counted in the text it was rendered from.

    Tokens outside `text` (the template's) get -1; one that straddles its edge is cut to it.

    Args:
        spans: `(len, 2)` int64, in characters of `rendered`; -1 where a token covers nothing.
        rendered: the prompt, such as a chat template gives.
        text: what the user wrote; it must stand in `rendered` word for word. An empty text is
            nowhere: all spans become -1.
        start: where in `rendered` the text begins. Without it the last occurrence is taken, for
            the newest turn stands last. Give it for texts so short that they may also occur in
            the template's tail ("ant" in "assistant").

    Returns:
        `(len, 2)` int64, in characters of `text`.
    """
    begin = rendered.rfind(text) if start is None else start
    if begin < 0 or not rendered.startswith(text, begin):
        where = "" if start is None else f" at character {start}"
        raise AlignmentError(
            f"the text does not occur verbatim in the rendered prompt{where} (templates often "
            f"strip white space: strip it first); text {_excerpt(text)}, "
            f"prompt {_excerpt(rendered)}"
        )
    cut = spans.clamp(begin, begin + len(text))
    inside = cut[:, 1] > cut[:, 0]
    return torch.where(inside.unsqueeze(1), cut - begin, -1)


def align_tokens(
    source_spans: Tensor,
    target_spans: Tensor,
    source_anchors: Tensor | None = None,
    target_anchors: Tensor | None = None,
) -> Alignment:
    """Feed each target token from the source tokens that cover the same characters.

    A source token weighs as many characters as it shares with the target token. A target token
    whose anchor the source has too takes that partner (several partners: their mean) instead.
    Rows may be padded on either side, and each is matched by its own spans.

    Args:
        source_spans: `(batch, source_len, 2)` int64: start and end in characters of a text; -1
            where a token holds none of it. As `token_spans` gives them.
        target_spans: `(batch, target_len, 2)`, in characters of the same text.
        source_anchors: `(batch, source_len)` int64: 0, or the role of a template token (1 might
            be the start of the answer). Given for both models or for neither.
        target_anchors: `(batch, target_len)`; equal roles match.

    Returns:
        The target positions that hold text or have an anchored partner, in order; those that no
        source token overlaps are masked. Where a row has fewer of them than the longest, the
        rest are masked positions of that row that hold neither, so that no position comes twice.
    """
    _check_shapes(source_spans, target_spans, source_anchors, target_anchors)
    share = _overlap(target_spans, source_spans)
    wanted = target_spans[..., 1] > target_spans[..., 0]
    if source_anchors is not None and target_anchors is not None:
        partner = target_anchors.unsqueeze(2) == source_anchors.unsqueeze(1)
        partner &= (target_anchors != 0).unsqueeze(2)
        anchored = partner.any(2)
        share = torch.where(anchored.unsqueeze(2), partner.long(), share)
        wanted = wanted | anchored

    matched = (share > 0).any(2).any(1)
    if not matched.all():
        rows = (~matched).nonzero().flatten().tolist()
        raise AlignmentError(f"rows {rows} of the batch: no target token overlaps a source token")

    # A stable sort puts the wanted positions first and keeps them in reading order.
    target_len = int(wanted.sum(1).max())
    target_index = (~wanted).long().argsort(stable=True, dim=1)[:, :target_len]
    share = share.gather(1, target_index.unsqueeze(2).expand(-1, -1, share.shape[2]))
    source_index, weights = _sparsify(share)
    return Alignment(
        source_index=source_index,
        weights=weights,
        target_index=target_index,
        mask=weights.sum(2) > 0,
    )


def answer_start(real: Tensor) -> Tensor:
    """Where an answer begins, as an anchor that two tokenizers share.

    Args:
        real: `(batch, seq_len)` bool: positions that are no padding.

    Returns:
        `(batch, seq_len)`: 1 at the last real position of each row, 0 elsewhere.
    """
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = (real * places).argmax(1)
    anchors = torch.zeros(real.shape, dtype=torch.long, device=real.device)
    return anchors.scatter(1, last.unsqueeze(1), 1)


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the white space around its word."""
    piece = text[start:end]
    if not piece:
        return -1, -1
    word = piece.strip()
    if not word:
        return start, end
    start += len(piece) - len(piece.lstrip())
    return start, start + len(word)


def _excerpt(text: str, limit: int = 120) -> str:
    """The text, or its end where templates put the newest turn."""
    return repr(text) if len(text) <= limit else f"...{text[-limit:]!r}"


def _check_shapes(
    source_spans: Tensor,
    target_spans: Tensor,
    source_anchors: Tensor | None,
    target_anchors: Tensor | None,
) -> None:
    """Refuse spans and anchors that do not belong together."""
    for name, spans in (("source_spans", source_spans), ("target_spans", target_spans)):
        if spans.ndim != 3 or spans.shape[2] != 2:
            raise ShapeError(f"expected {name} of (batch, len, 2), got {tuple(spans.shape)}")
    if source_spans.shape[0] != target_spans.shape[0]:
        raise ShapeError(
            f"source_spans has {source_spans.shape[0]} rows, target_spans {target_spans.shape[0]}"
        )
    if (source_anchors is None) != (target_anchors is None):
        raise AlignmentError("anchors match in pairs: give them for both models or for neither")
    for name, anchors, spans in (
        ("source_anchors", source_anchors, source_spans),
        ("target_anchors", target_anchors, target_spans),
    ):
        if anchors is not None and anchors.shape != spans.shape[:2]:
            raise ShapeError(
                f"expected {name} of {tuple(spans.shape[:2])}, got {tuple(anchors.shape)}"
            )


def _overlap(target_spans: Tensor, source_spans: Tensor) -> Tensor:
    """Characters each pair shares: `(batch, target_len, source_len)`; 0 for spans of -1."""
    target, source = target_spans.unsqueeze(2), source_spans.unsqueeze(1)
    start = torch.maximum(target[..., 0], source[..., 0])
    end = torch.minimum(target[..., 1], source[..., 1])
    return (end - start).clamp_min(0)


def _sparsify(share: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and normalised weights of the non-zero sources, in reading order."""
    hits = share > 0
    k = int(hits.sum(2).max())
    reading_order = torch.arange(share.shape[2], 0, -1, device=share.device)
    source_index = (hits * reading_order).topk(k, dim=2).indices
    picked = share.gather(2, source_index)
    weights = picked / picked.sum(2, keepdim=True).clamp_min(1)
    return source_index.masked_fill(picked == 0, 0), weights

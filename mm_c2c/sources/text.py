"""Any causal LM as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mm_c2c.align.tokens import locate_text, token_spans
from mm_c2c.cache import PositionKind, SourceCache
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.sources.base import TEXT_MARK, FrozenReader, SourceInput, count_positions


class TextSource(FrozenReader):
    """Reads a question in the model's own chat template; without a template, as it stands."""

    # Slots of its pictures would stay empty without a word.
    has_pictures = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise UnsupportedError(
                f"{name}: a text model of encoder and decoder ({model.config.model_type}) cannot "
                "be read; take a causal LM"
            )
        super().__init__(model, name, revision)
        self.tokenizer = tokenizer

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of texts; shorter ones are padded on the left.

        Raises:
            InputError: a text is empty, or a picture was given.
        """
        encoded, spans = self._encode(inputs)
        mask = encoded["attention_mask"]
        position_ids = count_positions(mask)
        layers, indices, rope = self.read(encoded, position_ids)
        kinds = torch.full_like(mask, PositionKind.TEMPLATE)
        kinds[spans[..., 1] > spans[..., 0]] = PositionKind.TEXT
        kinds[mask == 0] = PositionKind.PAD
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=position_ids,
            kinds=kinds,
            patches=torch.full((*mask.shape, 3), -1, device=mask.device),
            grids=((),) * len(inputs),
            spans=spans,
            texts=tuple(item.text.strip() for item in inputs),
            rope=rope,
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The model's own answers."""
        encoded, _ = self._encode(inputs)
        out = self.model.generate(**encoded, **kwargs)
        return self.tokenizer.batch_decode(
            out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def _encode(self, inputs: Sequence[SourceInput]) -> tuple[dict[str, Tensor], Tensor]:
        for item in inputs:
            if not item.text.strip():
                raise InputError(
                    "a text source needs a question, got an empty text; in a training of slots, "
                    "drop.questions=0 lets it read each"
                )
            if item.images or item.videos:
                raise InputError(f"{self.origin.model} reads text only, but got a picture")
        return encode_chats(self.tokenizer, [item.text for item in inputs], self.model.device)


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    device: torch.device,
    system: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Left-padded chat prompts, one user turn each, and the characters each token covers.

    Returns:
        `input_ids` and `attention_mask`, `(batch, seq_len)`; and spans `(batch, seq_len, 2)` in
        characters of each text, stripped.
    """
    begin = render_chat(tokenizer, TEXT_MARK, system).index(TEXT_MARK)
    rendered = [render_chat(tokenizer, text, system) for text in texts]
    own = adds_its_own(tokenizer)
    rows = [tokenizer(line, add_special_tokens=own)["input_ids"] for line in rendered]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    spans = torch.full((len(rows), width, 2), -1)
    for row, (ids, line, text) in enumerate(zip(rows, rendered, texts, strict=True)):
        start = width - len(ids)
        input_ids[row, start:] = torch.tensor(ids)
        mask[row, start:] = 1
        covered = token_spans(tokenizer, line, add_special_tokens=own)
        spans[row, start:] = locate_text(covered, line, text.strip(), begin)
    encoded = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    return encoded, spans.to(device)


def adds_its_own(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt gets the tokenizer's special tokens: a chat template writes them itself.

    A base model has none, and may read badly without its first token (Gemma's `<bos>`).
    """
    return not tokenizer.chat_template


def render_chat(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> str:
    """One user turn in the chat template, up to where the answer starts."""
    if not tokenizer.chat_template:
        return f"{system}\n{text.strip()}" if system else text.strip()
    turns = [{"role": "user", "content": text.strip()}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

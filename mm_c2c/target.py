"""`Target`: the frozen text LLM that answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from mm_c2c.cache import fork, minds_padding, repeat_rows
from mm_c2c.errors import UnsupportedError
from mm_c2c.hub import load_pretrained
from mm_c2c.sources.base import FrozenReader, count_positions, full_cache

# Tokens of each half of the prompt that tells whether a model goes on from its cache.
_PIECE = 8
# Known to give wrong output over a prefilled cache in transformers 5.23, without an error.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Target(FrozenReader):
    """The frozen text LLM that answers.

    Args:
        model: a causal LM.
        tokenizer: its fast tokenizer.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, name, revision)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Target:
        """The LLM of a folder or of the Hub.

        Args:
            name: Hub id or folder.
            revision: the Hub's commit.
            dtype: of the weights.

        Raises:
            FetchError: it could not be had.
        """
        model = load_pretrained("AutoModelForCausalLM", name, revision, dtype)
        return cls(model, load_pretrained("AutoTokenizer", name, revision), name, revision)

    @cached_property
    def minds_padding(self) -> bool:
        """Whether padding amid a prompt is felt: a window counts it, a recurrent state reads it."""
        return minds_padding(DynamicCache(config=self.model.config))

    def next_logits(self, inputs: Mapping[str, Any], model: Any = None) -> Tensor:
        """Logits `(batch, vocab_size)` of the token that follows each prompt.

        Args:
            inputs: `input_ids`, `attention_mask` and, where some of it has been read, its
                `past_key_values`, which are not changed.
            model: in place of the target's own, such as one with an adapter.
        """
        cache, mask = inputs.get("past_key_values"), inputs["attention_mask"]
        done = 0 if cache is None else cache.get_seq_length()
        out = (self.model if model is None else model)(
            input_ids=inputs["input_ids"][:, done:],
            attention_mask=mask,
            position_ids=count_positions(mask)[:, done:],
            past_key_values=None if cache is None else fork(cache),
            **self.spared,
        )
        return out.logits[:, -1]

    def generate(self, inputs: Mapping[str, Any], **kwargs: Any) -> Tensor:
        """Prompts and answers, by `model.generate(**kwargs)`, over a cache that stays as it is.

        Args:
            inputs: `input_ids`, `attention_mask` and `past_key_values` of what has been read.
            **kwargs: of `generate`.

        Returns:
            `(batch * sequences, seq_len)`; several sequences a prompt follow each other.

        Raises:
            UnsupportedError: a setting that goes wrong over a prefilled cache, or gives no tokens.
        """

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            # What a config leaves open, transformers takes from the model's own.
            given = getattr(kwargs.get("generation_config"), name, None)
            own = getattr(self.model.generation_config, name, None)
            return own if given is None else given

        if setting("return_dict_in_generate"):
            raise UnsupportedError(
                "return_dict_in_generate: a bridge answers with texts only; for scores and the "
                "like, call bridge.target.model.generate(**bridge.fuse(...), "
                "return_dict_in_generate=True)"
            )
        for name in _REFUSED:
            if setting(name) is not None:
                raise UnsupportedError(
                    f"{name}: assisted decoding over a prefilled cache gives wrong output in "
                    "transformers 5.23; leave it out"
                )
        rows = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        cache = repeat_rows(inputs["past_key_values"], rows)
        # For several sequences a row, generate would repeat the index too.
        spared = self.spared if rows == 1 else {}
        return self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            **{**spared, **kwargs},
        )

    def stream(self, inputs: Mapping[str, Any], **kwargs: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is decoded; as `generate`."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[Exception] = []

        def run() -> None:
            try:
                with torch.no_grad():
                    self.generate(inputs, streamer=streamer, **kwargs)
            except Exception as error:  # noqa: BLE001, raised again in the caller's thread
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        yield from streamer
        worker.join()
        if failure:
            raise failure[0]

    @torch.no_grad()
    def check_continues(self) -> None:
        """Refuse a model that reads a prompt in two pieces otherwise than in one.

        Slots are read before the question. Some models with recurrent layers start afresh with the
        second piece, and transformers does not say so.
        """
        ids = torch.arange(1, 2 * _PIECE + 1, device=self.model.device).unsqueeze(0)
        whole = self.model(ids).logits[:, -1].float()
        cache = full_cache(self.model)
        self.model(ids[:, :_PIECE], past_key_values=cache)
        pieces = self.model(ids[:, _PIECE:], past_key_values=cache).logits[:, -1].float()
        misfit = float((pieces - whole).norm() / whole.norm())
        accepted = max(1e-4, 8 * torch.finfo(self.model.dtype).eps)
        if not misfit <= accepted:
            raise UnsupportedError(
                f"{self} does not go on where its cache ends: a prompt read in two pieces gives "
                f"logits {misfit:.2%} off those of one piece, accepted is {accepted:.2%}; it can "
                "be a source, not a target"
            )

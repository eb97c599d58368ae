"""`Target`: the frozen text LLM that answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from mm_c2c.cache import fork, minds_padding, repeat_rows
from mm_c2c.errors import UnsupportedError
from mm_c2c.hub import load_pretrained, pin_revision
from mm_c2c.sources.base import (
    FrozenReader,
    count_positions,
    full_cache,
)

# Tokens of each half of the prompt that tells whether a model goes on from its cache, and of the
# padding between them that tells whether it is felt.
_PIECE, _PADDING = 8, 3
# What transformers adds to a prompt where no length is set.
_NEW_TOKENS = 20
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
            revision: branch, tag or commit of the Hub; the origin names the commit.
            dtype: of the weights.

        Raises:
            FetchError: it could not be had.
        """
        revision = pin_revision(name, revision)
        model = load_pretrained("AutoModelForCausalLM", name, revision, dtype)
        return cls(model, load_pretrained("AutoTokenizer", name, revision), name, revision)

    @cached_property
    def minds_padding(self) -> bool:
        """Whether padding amid a prompt is felt: a window counts it, a recurrent state reads it."""
        # GPT-Neo's windows are in its masks, and wider than a prompt that could tell.
        local = "local" in getattr(self.model.config, "attention_layers", ())
        known = local or minds_padding(DynamicCache(config=self.model.config))
        return known or not self._misfits[1] <= self._accepted

    def next_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits `(batch, vocab_size)` of the token that follows each prompt.

        Args:
            inputs: `input_ids`, `attention_mask` and, where some of it has been read, its
                `past_key_values`, which are not changed.
        """
        cache, mask = inputs.get("past_key_values"), inputs["attention_mask"]
        if cache is not None:
            self._check_length(mask.shape[1], mask.shape[1])
        done = 0 if cache is None else cache.get_seq_length()
        out = self.model(
            input_ids=inputs["input_ids"][:, done:],
            attention_mask=mask,
            position_ids=count_positions(mask)[:, done:],
            past_key_values=None if cache is None else fork(cache),
            **self.spared,
        )
        return out.logits[:, -1]

    def score(
        self, inputs: Mapping[str, Any], rows: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """As `FrozenReader.score`.

        Raises:
            UnsupportedError: prompt and answer are longer than what has been read can follow.
        """
        if inputs.get("past_key_values") is not None:
            prompt = inputs["input_ids"].shape[1]
            self._check_length(prompt, prompt + max(map(len, answers), default=0))
        return super().score(inputs, rows, answers)

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
                "return_dict_in_generate=True), with one beam and one sequence"
            )
        for name in _REFUSED:
            if setting(name) is not None:
                raise UnsupportedError(
                    f"{name}: assisted decoding over a prefilled cache gives wrong output in "
                    "transformers 5.23; leave it out"
                )
        if setting("token_healing"):
            raise UnsupportedError(
                "token_healing: it changes the end of the prompt, which the cache holds already; "
                "leave it out"
            )
        if setting("use_cache") is False:
            raise UnsupportedError(
                "use_cache=False: what is fused lies in the cache, and nowhere else; leave it out"
            )
        prompt = inputs["input_ids"].shape[1]
        new = setting("max_new_tokens")
        self._check_length(prompt, setting("max_length") if new is None else prompt + new)
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
        """The answer to one prompt, piece by piece as it is decoded; as `generate`.

        Decoding ends with the loop over the pieces, also where that is left early.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[Exception] = []
        is_left = threading.Event()

        def stop(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), is_left.is_set(), device=ids.device)

        own = kwargs.pop("stopping_criteria", None) or []
        criteria = StoppingCriteriaList([*own, stop])

        def run() -> None:
            try:
                with torch.no_grad():
                    self.generate(inputs, streamer=streamer, stopping_criteria=criteria, **kwargs)
            except Exception as error:  # noqa: BLE001, raised again in the caller's thread
                failure.append(error)
                streamer.on_finalized_text("", stream_end=True)  # `end` would decode once more

        # No daemon: torch aborts a process that ends while one is decoding.
        worker = threading.Thread(target=run)
        worker.start()
        try:
            yield from streamer
        finally:
            is_left.set()
            worker.join()
        if failure:
            raise failure[0]

    def check_continues(self) -> None:
        """Refuse a model that reads a prompt in two pieces otherwise than in one.

        Slots are read before the question. Some models start afresh with the second piece, or leave
        out some of the first, and transformers does not say so.

        Raises:
            UnsupportedError: its logits differ.
        """
        misfit, accepted = self._misfits[0], self._accepted
        if not misfit <= accepted:
            raise UnsupportedError(
                f"{self} does not go on where its cache ends: a prompt read in two pieces gives "
                f"logits {misfit:.2%} off those of one piece, accepted is {accepted:.2%}; it can "
                "be a source, not a target"
            )

    @property
    def _accepted(self) -> float:
        """How far apart logits may be that differ by rounding only.

        SmolLM2-135M's are 1 to 5 % apart in bfloat16, by prompt; its eps is 0.8 %.
        """
        return max(1e-4, 32 * torch.finfo(self.model.dtype).eps)

    @cached_property
    def _misfits(self) -> tuple[float, float]:
        """How far a prompt read in two pieces is off one piece; the same with padding between."""
        device = self.model.device
        # From all over the vocabulary: the first tokens are often special and hardly trained, and
        # SmolLM2's logits of them in bfloat16 are little but rounding.
        last = self.model.get_input_embeddings().num_embeddings - 1
        ids = torch.linspace(1, last, 2 * _PIECE, device=device).long().unsqueeze(0)
        first, second = ids.split(_PIECE, dim=1)
        mask = torch.ones(1, 2 * _PIECE + _PADDING, dtype=torch.long, device=device)
        mask[:, _PIECE : _PIECE + _PADDING] = 0
        with torch.no_grad():
            whole = self.model(ids).logits[:, -1].float()
            cache = full_cache(self.model)
            self.model(first, past_key_values=cache)
            padded = self.model(
                torch.cat([torch.zeros_like(ids[:, :_PADDING]), second], dim=1),
                attention_mask=mask,
                position_ids=count_positions(mask)[:, _PIECE:],
                past_key_values=fork(cache),
            )
            plain = self.model(second, past_key_values=cache)
        misfits = [
            float((out.logits[:, -1].float() - whole).norm() / whole.norm())
            for out in (plain, padded)
        ]
        return misfits[0], misfits[1]

    def _check_length(self, prompt: int, longest: int | None) -> None:
        """Refuse to decode past where a model turns all of its keys by other angles.

        The fused ones keep their angles; Phi-3 throws the whole cache away there, with all that was
        fused.

        Args:
            prompt: tokens of the prompt, padding included.
            longest: tokens of prompt and answer; None where transformers chooses.
        """
        limit = self.turns_until
        if limit is None:
            return
        if longest is None:
            most = self.model.config.get_text_config(decoder=True).max_position_embeddings
            longest = min(prompt + _NEW_TOKENS, most)
        if longest > limit:
            raise UnsupportedError(
                f"{self} turns its keys otherwise beyond {limit} tokens (RoPE that depends on the "
                "length), where what is fused would be lost: expected prompt and "
                f"answer to be no longer, got {prompt} tokens and {longest - prompt} new ones; set "
                f"max_new_tokens to at most {max(limit - prompt, 0)}, or ask less"
            )

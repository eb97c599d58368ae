"""What a source is, and the prefill that all of them share."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    LayerKV,
    SourceCache,
    full_layer,
    read_layers,
    select_rows,
    shape_of,
)
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.rope import RopeSpec
from mm_c2c.rope_probe import rope_specs

logger = logging.getLogger(__name__)

# Only these kinds of RoPE turn by other angles in a longer prompt.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Stands for the user's words while a template is rendered, to see where they go.
TEXT_MARK = "\ufffc"


# Not compared field by field: tensors have no truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class SourceInput:
    """What one row of a batch shows a source; a source takes the parts it knows.

    Attributes:
        text: a question or an instruction; empty when the source only looks.
        images: pictures, upright as `mm_c2c.images.load_image` reads them, in the order the prompt
            shows them; a robot's cameras in the policy's own order.
        videos: each the frames of one, alike in size, behind the pictures; for models that know
            videos. Elsewhere give frames as `images`.
        fps: frames that a video shows in a second.
        state: `(state_dim,)` float, the robot's joints and gripper in the units of the policy's
            statistics, which normalise it.
        noise: `(action_horizon, action_dim)` float, where a flow-matching policy starts its action
            chunk, both as wide as the model pads them; None takes the source's own, which is the
            same in every call.
        audio: `(samples,)` float32 in [-1, 1], mono at 16 kHz.
        action_tokens: `(action_dim,)` int64, what a policy that writes its actions as tokens did
            here; None lets it act.
    """

    text: str = ""
    images: tuple[Image.Image, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    fps: float = 2.0
    state: Tensor | None = None
    noise: Tensor | None = None
    audio: Tensor | NDArray[np.float32] | None = None
    action_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"text must be a text, got {self.text!r}")
        if isinstance(self.images, Image.Image):
            raise InputError("images must be a tuple, got one picture; write images=(picture,)")
        for picture in self.images:
            if not isinstance(picture, Image.Image):
                raise InputError(
                    f"images must hold PIL pictures, got a {type(picture).__name__}; open files "
                    "by mm_c2c.images.load_image"
                )


def with_request(look: SourceInput, request: str) -> SourceInput:
    """The same with a question or another request after its own text."""
    return replace(look, text="\n".join(part for part in (look.text, request) if part))


def for_source(
    sources: Mapping[str, Any], name: str, looks: Sequence[SourceInput]
) -> Sequence[SourceInput]:
    """What one of several sources is given of what is shown to all.

    A reader of words beside a source that sees is not given the pictures; alone it refuses them.
    """
    sees = {key: getattr(source, "has_pictures", True) for key, source in sources.items()}
    if sees[name] or not any(sees.values()):
        return looks
    return [replace(look, images=(), videos=()) for look in looks]


class Source(Protocol):
    """A frozen model whose cache can be read."""

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches it writes."""

    @property
    def origin(self) -> CacheOrigin:
        """Which model it is."""

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of inputs in the model's own natural form."""

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The source's own answers, by `model.generate(**kwargs)`."""


class FrozenReader:
    """Runs a frozen model over a prompt and keeps what its cache holds.

    Of an encoder-decoder, that is what its decoder looks at: K and V of the encoder's positions,
    without rotation.

    Args:
        model: any transformers model with a text decoder; put in evaluation mode and without
            gradients, and from then on only read.
        name: Hub id or folder, for the origin.
        revision: the Hub's commit, where there is one.
    """

    def __init__(self, model: PreTrainedModel, name: str, revision: str | None = None) -> None:
        # `generate` and the like are untyped in transformers.
        self.model: Any = model.eval().requires_grad_(requires_grad=False)
        self.origin = CacheOrigin(str(name), revision, model.config.model_type)
        # PaliGemma's processor gives labels too; a reader wants no loss.
        self._known_arguments = frozenset(inspect.signature(model.forward).parameters) - {"labels"}
        # Nobody reads the logits of a prefill, which are the largest tensor of it. An index, not a
        # number: a slice is not contiguous, and over it torch's CPU product copies the vocabulary.
        self._last = torch.tensor([-1])
        self._specs: dict[Any, tuple[RopeSpec | None, ...]] = {}

    @property
    def spared(self) -> dict[str, Tensor]:
        """Arguments that leave all logits out but the last token's; none where there are none."""
        if "logits_to_keep" not in self._known_arguments:
            return {}
        self._last = self._last.to(self.model.device)  # else each step would send it there
        return {"logits_to_keep": self._last}

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches the model writes, read off a prefill of one token.

        Raises:
            UnsupportedError: the model keeps no keys and values, or not alike in every layer.
        """
        return self._layout[0]

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The decoder layers that hold keys and values; all others are left out."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[CacheShape, tuple[int, ...]]:
        embed = self.model.get_input_embeddings()
        token = torch.zeros(1, 1, dtype=torch.long, device=embed.weight.device)
        with torch.no_grad():
            cache = self._fill(self.model.get_decoder(), 1, inputs_embeds=embed(token))
        layers, indices = self._kept(cache)
        if len(indices) < len(cache):
            logger.info(
                "%s: %d of %d decoder layers hold keys and values (%s); the others are left out",
                self,
                len(indices),
                len(cache),
                ", ".join(map(str, indices)),
            )
        return shape_of(layers), indices

    @torch.no_grad()
    def score(
        self, inputs: Mapping[str, Any], rows: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of answers, each after one of the prompts.

        Args:
            inputs: `input_ids`, `attention_mask`, padded on the left, and, where some of it has
                been read, its `past_key_values`, which are not changed.
            rows: which prompt each answer follows; a prompt may have several, or none.
            answers: tokens of each answer.

        Returns:
            `(answers,)` float32, sums of log-probabilities; and `(answers,)` bool, whether greedy
            decoding would say the same.
        """
        index = torch.tensor(rows, device=inputs["input_ids"].device)
        prompt, mask = inputs["input_ids"][index], inputs["attention_mask"][index]
        ids = pad_sequence(
            [torch.tensor(answer, dtype=torch.long) for answer in answers],
            batch_first=True,
            padding_value=-1,
        ).to(prompt.device)
        asked = ids >= 0
        mask = torch.cat([mask, asked.to(mask.dtype)], dim=1)
        cache = inputs.get("past_key_values")
        done = 0 if cache is None else cache.get_seq_length()
        # The last token of the prompt predicts the first of the answer.
        wanted = torch.arange(-ids.shape[1] - 1, -1, device=prompt.device)
        logits = self.model(
            input_ids=torch.cat([prompt, ids.clamp(min=0)], dim=1)[:, done:],
            attention_mask=mask,
            position_ids=count_positions(mask)[:, done:],
            past_key_values=None if cache is None else select_rows(cache, index),
            **dict.fromkeys(self.spared, wanted),
        ).logits
        chances = logits[:, -ids.shape[1] - 1 :][:, : ids.shape[1]].float().log_softmax(-1)
        found = chances.gather(2, ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        is_greedy = ((chances.argmax(-1) == ids) | ~asked).all(1)
        return (found * asked).sum(1), is_greedy

    def _fill(self, model: Any, batch_size: int, **inputs: Any) -> Cache:
        """What a prompt leaves in an empty cache."""
        if not self.model.config.is_encoder_decoder:
            cache = full_cache(self.model)
            model(**inputs, past_key_values=cache, use_cache=True)
            return cache
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Any one token makes the decoder project the encoder's states, in every layer.
        start = torch.zeros(batch_size, 1, dtype=torch.long, device=self.model.device)
        model(**inputs, decoder_input_ids=start, past_key_values=both, use_cache=True)
        return both.cross_attention_cache

    def _kept(self, cache: Cache) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
        """What `select_layers` hands on; layers that cannot be fused are refused by name."""
        try:
            layers, indices = self.select_layers(*read_layers(cache))
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{self} keeps no keys and values in any layer (a state-space model?): there is "
                "nothing to fuse"
            ) from error
        for index, (keys, values) in zip(indices, layers, strict=True):
            if keys.shape != values.shape:
                raise UnsupportedError(
                    f"{self} layer {index} keeps {tuple(keys.shape[1::2])} (heads, head_dim) as "
                    f"keys and {tuple(values.shape[1::2])} as values: a latent (MLA), not keys "
                    "and values that could be fused"
                )
        sizes = {tuple(keys.shape[1::2]) for keys, _ in layers}
        if len(sizes) > 1:
            raise UnsupportedError(
                f"{self}: layers differ in (heads, head_dim): {sorted(sizes)}; only models whose "
                "layers are alike can be fused"
            )
        return layers, indices

    def __str__(self) -> str:
        return f"{self.origin.model} ({self.origin.model_type})"

    @torch.no_grad()
    def read(
        self, inputs: Mapping[str, Tensor], position_ids: Tensor
    ) -> tuple[tuple[LayerKV, ...], tuple[int, ...], tuple[RopeSpec | None, ...]]:
        """K and V of every position, the layers they come from, and how each rotates its keys.

        Args:
            inputs: what the model's processor or tokenizer made; arguments that the model's
                `forward` does not know are left out.
            position_ids: `(batch, seq_len)` or `(3, batch, seq_len)`.
        """
        known = {key: value for key, value in inputs.items() if key in self._known_arguments}
        if not self.model.config.is_encoder_decoder:  # their positions are the model's own
            known["position_ids"] = position_ids
        cache = self._fill(self.model, position_ids.shape[-2], **known, **self.spared)
        layers, indices = self._kept(cache)
        specs = self.rope(int(position_ids.max()) + 1)
        return layers, indices, tuple(specs[index] for index in indices)

    def select_layers(
        self, layers: tuple[LayerKV, ...], indices: tuple[int, ...]
    ) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
        """The layers that are handed on, with their indices: all that hold K and V."""
        return layers, indices

    def rope(self, seq_len: int) -> tuple[RopeSpec | None, ...]:
        """How each decoder layer rotates its keys in a prompt of `seq_len` positions."""
        if self.model.config.is_encoder_decoder:
            return (None,) * (self.layer_indices[-1] + 1)
        key = self._rope_state(seq_len)
        if key not in self._specs:
            self._specs[key] = rope_specs(self.model, seq_len)
        return self._specs[key]

    @property
    def turns_until(self) -> int | None:
        """The prompt's length beyond which all keys turn by other angles; None has no such."""
        limits = [limit for kind, limit in self._rope_limits() if kind in LENGTH_DEPENDENT]
        return min(limits, default=None)

    def _rope_limits(self) -> list[tuple[str | None, int]]:
        """The type of RoPE, and the length up to which it is the original, of each kind of layer."""
        config = self.model.config.get_text_config(decoder=True)
        found = getattr(config, "rope_parameters", None) or {}
        kinds = [found, *(part for part in found.values() if isinstance(part, dict))]
        most = getattr(config, "max_position_embeddings", 0)
        most = getattr(config, "original_max_position_embeddings", None) or most
        return [
            (kind.get("rope_type"), kind.get("original_max_position_embeddings") or most)
            for kind in kinds
        ]

    def _rope_state(self, seq_len: int) -> Any:
        """What the rotation of a prompt's keys depends on, beside the model."""
        kinds = [kind for kind, _ in self._rope_limits()]
        if "dynamic" in kinds:
            # Transformers keeps the frequencies of a longer prompt that was read before.
            buffers = self.model.get_decoder().named_buffers()
            turns = [tuple(freq.tolist()) for name, freq in buffers if name.endswith("inv_freq")]
            return seq_len, tuple(turns)
        limits = [limit for kind, limit in self._rope_limits() if kind == "longrope"]
        return tuple(seq_len > limit for limit in limits)


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps every position, in sliding-window layers too.

    The window is in the attention mask; a sliding layer would only forget what lies before it.

    Raises:
        UnsupportedError: a layer would keep its window only.
    """
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    cache.layers = [full_layer(layer) for layer in cache.layers]
    if any(cache.is_sliding):
        raise UnsupportedError(
            f"{config.model_type} layer {cache.is_sliding.index(True)} keeps only its window, in "
            "a kind of cache that is not known here"
        )
    return cache


def count_positions(attention_mask: Tensor, first: int = 0) -> Tensor:
    """Position ids `(batch, seq_len)` that count real tokens only, from `first`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + first

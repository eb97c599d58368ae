"""What a source is, and the prefill that all of them share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mm_c2c.cache import CacheOrigin, CacheShape, LayerKV, SourceCache, read_layers
from mm_c2c.rope import RopeSpec, rope_specs

# Only these kinds of RoPE turn by other angles in a longer prompt.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
# Stands for the user's words while a template is rendered, to see where they go.
TEXT_MARK = "\ufffc"


@dataclass(frozen=True, kw_only=True)
class SourceInput:
    """What one row of a batch shows a source; a source takes the parts it knows.

    Attributes:
        text: a question or an instruction; empty when the source only looks.
        images: pictures, in the order the prompt shows them.
    """

    text: str = ""
    images: tuple[Image.Image, ...] = ()


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

    Args:
        model: any transformers model with a text decoder; put in evaluation mode and without
            gradients, and from then on only read.
        name: Hub id or folder, for the origin.
        revision: the Hub's commit, where there is one.
    """

    def __init__(self, model: PreTrainedModel, name: str, revision: str | None = None) -> None:
        # `generate` and the like are untyped in transformers.
        self.model: Any = model.eval().requires_grad_(requires_grad=False)
        self.origin = CacheOrigin(name, revision, model.config.model_type)
        self._known_arguments = frozenset(inspect.signature(model.forward).parameters)
        self._specs: dict[int, tuple[RopeSpec | None, ...]] = {}
        self._shape: CacheShape | None = None

    @property
    def shape(self) -> CacheShape:
        """Geometry of the caches the model writes, read off a prefill of one token."""
        if self._shape is None:
            embed = self.model.get_input_embeddings()
            decoder = self.model.get_decoder()
            cache = DynamicCache(config=decoder.config)
            token = torch.zeros(1, 1, dtype=torch.long, device=embed.weight.device)
            with torch.no_grad():
                decoder(inputs_embeds=embed(token), past_key_values=cache, use_cache=True)
            layers, _ = self.select_layers(*read_layers(cache))
            keys = layers[0].keys
            self._shape = CacheShape(
                num_layers=len(layers),
                num_key_value_heads=keys.shape[1],
                head_dim=keys.shape[3],
            )
        return self._shape

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
        cache = full_cache(self.model)
        self.model(**known, position_ids=position_ids, past_key_values=cache, use_cache=True)
        layers, indices = self.select_layers(*read_layers(cache))
        specs = self.rope(int(position_ids.max()) + 1)
        return layers, indices, tuple(specs[index] for index in indices)

    def select_layers(
        self, layers: tuple[LayerKV, ...], indices: tuple[int, ...]
    ) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
        """The layers that are handed on, with their indices: all that hold K and V."""
        return layers, indices

    def rope(self, seq_len: int) -> tuple[RopeSpec | None, ...]:
        """How each decoder layer rotates its keys in a prompt of `seq_len` positions."""
        parameters = getattr(self.model.config.get_text_config(decoder=True), "rope_parameters", {})
        depends = any(kind in str(parameters) for kind in _LENGTH_DEPENDENT)
        key = seq_len if depends else 0
        if key not in self._specs:
            self._specs[key] = rope_specs(self.model, seq_len)
        return self._specs[key]


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps every position, in sliding-window layers too.

    The window is in the attention mask; a sliding layer would only forget what lies before it.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def count_positions(attention_mask: Tensor, first: int = 0) -> Tensor:
    """Position ids `(batch, seq_len)` that count real tokens only, from `first`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + first

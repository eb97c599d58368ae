"""Models of random weights and published geometry: no weights, tokenizer or vision tower is needed.

Narrow ones have six layers of little width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mm_c2c.cache import CacheOrigin, CacheShape, PatchGrid, PositionKind, SourceCache, read_layers
from mm_c2c.config import DTYPES
from mm_c2c.errors import UnsupportedError
from mm_c2c.geometry import Geometry, build_decoder
from mm_c2c.link import LinkConfig
from mm_c2c.sources import source_class
from mm_c2c.sources.base import Source, SourceInput, full_cache
from mm_c2c.sources.speech import SpeechSource
from mm_c2c.target import Target

ANSWER = 8
"""Characters of what a blank source answers."""
INNER = 64
"""Width of what is inside a narrow model, and of a narrow fuser's projection."""
_LAYERS, _VOCAB, _PICTURE = 6, 512, 64
_NARROW = 32
_CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n' }}"


class BlankSource:
    """A text decoder of random weights, over random embeddings in the place of what it is shown.

    Args:
        geometry: the published model.
        links: what its positions must be good for.
        dtype: of its weights.
        true_width: whether to keep the published width.
    """

    def __init__(
        self, geometry: Geometry, links: Sequence[LinkConfig], dtype: str, *, true_width: bool
    ) -> None:
        self.model: Any = _build_blank(build, build_decoder, geometry, dtype, true_width=true_width)
        self.links = links
        tokens = geometry.picture_tokens or 0
        self.side = math.isqrt(tokens if true_width else min(tokens, _PICTURE))
        self.has_pictures = bool(self.side)
        kind = source_class(geometry.model_type, has_vision=False)
        self.answers_in_words = getattr(kind, "answers_in_words", True)
        self.origin = CacheOrigin(geometry.name, None, geometry.model_type)

    @property
    def shape(self) -> CacheShape:
        """Geometry of its caches."""
        return self.prefill([SourceInput()]).shape

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Positions of each kind that the links read: patches, others by their kind, words."""
        images = max(link.images for link in self.links)
        patches = [
            (image, row, col)
            for image in range(images if self.side else 0)
            for row in range(self.side)
            for col in range(self.side)
        ]
        named = {
            PositionKind[kind.upper()]
            for link in self.links
            for kind in (*link.kinds, *link.asking)
        }
        others = [kind for kind in sorted(named) for link in self.links for _ in range(link.cols)]
        words = max(len(item.text) for item in inputs)
        batch, before = len(inputs), 1 + len(patches) + len(others)
        kinds = torch.full((batch, before + words), PositionKind.TEMPLATE)
        where = torch.full((batch, before + words, 3), -1)
        spans = torch.full((batch, before + words, 2), -1)
        kinds[:, 1 : before - len(others)] = PositionKind.IMAGE
        where[:, 1 : 1 + len(patches)] = torch.tensor(patches).reshape(-1, 3)
        kinds[:, before - len(others) : before] = torch.tensor(others, dtype=torch.long)
        for row, item in enumerate(inputs):
            count = len(item.text)
            spans[row, before : before + count, 0] = torch.arange(count)
            spans[row, before : before + count, 1] = torch.arange(count) + 1
            kinds[row, before : before + count] = PositionKind.TEXT
        device, dtype = self.model.device, self.model.dtype
        size = (batch, kinds.shape[1], self.model.config.hidden_size)
        cache = full_cache(self.model)
        self.model(
            inputs_embeds=torch.randn(size, device=device, dtype=dtype),
            past_key_values=cache,
            use_cache=True,
        )
        layers, indices = read_layers(cache)
        grids = tuple(PatchGrid(self.side, self.side, image) for image in range(images))
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=torch.arange(kinds.shape[1]).expand(batch, -1).to(device),
            kinds=kinds.to(device),
            patches=where.to(device),
            grids=(grids if self.side else (),) * batch,
            spans=spans.to(device),
            texts=tuple(item.text.strip() for item in inputs),
            rope=(None,) * len(layers),  # what is random is so however it is turned
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """Nothing, as long as an answer."""
        return ["x" * ANSWER] * len(inputs)


class BlankSpeech(SpeechSource):
    """A speech model of random weights, over random sound as long as it hears.

    Args:
        geometry: the published model.
        dtype: of its weights.
        true_width: whether to keep the published width.
    """

    def __init__(self, geometry: Geometry, dtype: str, *, true_width: bool) -> None:
        no_processor: Any = None
        model = _build_blank(build, build_decoder, geometry, dtype, true_width=true_width)
        super().__init__(model, no_processor, geometry.name)

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """Nothing, as long as an answer."""
        return ["x" * ANSWER] * len(inputs)

    def _encode(self, inputs: Sequence[SourceInput]) -> tuple[Tensor, list[int]]:
        config, weight = self.model.config, next(self.model.parameters())
        positions = config.max_source_positions
        # The encoder's second convolution halves the frames of the spectrogram.
        size = (len(inputs), config.num_mel_bins, 2 * positions)
        return torch.randn(size, device=weight.device, dtype=weight.dtype), [positions] * size[0]


def blank_source(
    geometry: Geometry, links: Sequence[LinkConfig], dtype: str, *, true_width: bool
) -> Source:
    """The blank source of a model's kind; arguments as for `BlankSource`.

    Raises:
        UnsupportedError: a model that looks by cross-attention and is no speech model.
    """
    if issubclass(source_class(geometry.model_type, has_vision=False), SpeechSource):
        return BlankSpeech(geometry, dtype, true_width=true_width)
    if geometry.text.is_encoder_decoder or getattr(geometry.text, "cross_attention_layers", ()):
        raise UnsupportedError(
            f"{geometry.name} ({geometry.model_type}) reads what it is shown by cross-attention; "
            "of such models a dry run knows those of speech only; leave --dry-run out"
        )
    return BlankSource(geometry, links, dtype, true_width=true_width)


def narrow(text: Any) -> Any:
    """A config of the same family, of few layers of little width."""
    small = _cut(text, min(text.num_hidden_layers, _LAYERS))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    small.num_key_value_heads = min(heads, 2)
    small.num_attention_heads = 2 * small.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Of a tiny model no channels are left to take away.
    part = 4 if head_dim >= _NARROW else 1
    small.head_dim = head_dim // part
    # As some families have it, whatever head_dim says.
    small.hidden_size = small.num_attention_heads * small.head_dim
    if hasattr(text, "word_embed_proj_dim"):  # OPT, whose embeddings may be narrower
        small.word_embed_proj_dim = small.hidden_size
    small.intermediate_size, small.vocab_size = INNER, _VOCAB
    for key, token in vars(text).items():
        if key.endswith("token_id"):
            setattr(small, key, _in_vocabulary(token))
    # A speech model, whose encoder and decoder say some of this apart.
    if text.is_encoder_decoder:
        small.decoder_layers = min(text.decoder_layers, _LAYERS)
        small.decoder_attention_heads = small.num_attention_heads
        small.encoder_ffn_dim = small.decoder_ffn_dim = INNER
        small.max_source_positions = min(text.max_source_positions, _PICTURE)
    sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    if sections:
        small.rope_parameters = {
            **text.rope_parameters,
            "mrope_section": [section // part for section in sections],
        }
    return small


def _in_vocabulary(token: Any) -> Any:
    """A special token, or several, or none, among those of a narrow model."""
    if isinstance(token, list):
        return [_in_vocabulary(each) for each in token]
    return None if token is None else min(token, _VOCAB - 1)


def blank_target(
    geometry: Geometry,
    dtype: str,
    slot_token: str = "@",
    *,
    true_width: bool,
    shared: bool = False,
) -> Target:
    """A causal LM of random weights that reads a token a byte.

    Args:
        geometry: the published model.
        dtype: of its weights, where it has its true width.
        slot_token: as in `BridgeConfig`.
        true_width: whether to keep the published width.
        shared: all layers have the first one's weights, which are then kept once: the work is the
            same, and an 8 B model fits in the memory of a laptop.
    """
    make = _build_shared if shared else build
    kind = AutoModelForCausalLM.from_config
    model = _build_blank(make, kind, geometry, dtype, true_width=true_width)
    return Target(model, byte_tokenizer(slot_token), geometry.name)


def _build_blank(
    make: Callable[..., Any],
    kind: Callable[..., Any],
    geometry: Geometry,
    dtype: str,
    *,
    true_width: bool,
) -> Any:
    """A model of the published width in its precision, or a narrow one in float32.

    Raises:
        UnsupportedError: no narrow model of the family can be made.
    """
    if true_width:
        return make(kind, geometry.text, dtype)
    try:
        return make(kind, narrow(geometry.text), "float32")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{geometry.name} ({geometry.model_type}): no narrow model of this family can be made "
            f"({error}); --true-width makes one of the published width"
        ) from error


def build(kind: Callable[..., Any], text: Any, dtype: str) -> Any:
    """A frozen model by its config, the same whenever it is built."""
    torch.manual_seed(0)
    model = kind(text, dtype=DTYPES[dtype])
    return model.eval().requires_grad_(requires_grad=False)


def _build_shared(kind: Callable[..., Any], text: Any, dtype: str) -> Any:
    """As `build`, but every layer has the first one's weights."""
    one = _cut(text, 1)
    model = build(kind, one, dtype)
    layers = model.model.layers
    for index in range(1, text.num_hidden_layers):
        memo = {id(weight): weight for weight in layers[0].parameters()}
        layers.append(copy.deepcopy(layers[0], memo))
        layers[index].self_attn.layer_idx = index
    model.config.num_hidden_layers = text.num_hidden_layers
    if getattr(text, "layer_types", None):
        model.config.layer_types = text.layer_types
    return model


def _cut(text: Any, count: int) -> Any:
    """The config of the first layers."""
    few = copy.deepcopy(text)
    few.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        few.layer_types = text.layer_types[:count]
    return few


def byte_tokenizer(slot_token: str) -> PreTrainedTokenizerFast:
    """A token a byte, and one for the slots."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.add_tokens([slot_token])
    tokenizer.chat_template = _CHAT
    return tokenizer

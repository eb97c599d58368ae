"""Geometry of models by name, and what a fuser between two of them costs.

`geometry.yaml` holds the published numbers of the models that this project names, and where each
number came from; of any other model, the config is read. No weights are needed for either.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, NamedTuple

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    MllamaTextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextModel

from mm_c2c.cache import CacheShape, layers_to_hold
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.fuser import CacheFuser, FuserConfig

# A name is also known without what its Hub id adds to it.
_SUFFIXES = ("-instruct", "-it", "-pt-224", "_base")
# Decoders that AutoModel does not know by their own configs.
_DECODERS = {"mllama_text_model": MllamaTextModel, "kosmos_2_text_model": Kosmos2TextModel}
# Models that take pictures of any size are described by one of this many pixels a side.
_PIXELS = 448


class CacheLayout(NamedTuple):
    """Which layers of a text decoder hold keys and values, and of what shape.

    Attributes:
        shape: geometry of the layers that do.
        layer_indices: those layers; the others are left out of what is fused.
        num_hidden_layers: all layers of the decoder.
        num_sliding: layers that attend to a window only.
    """

    shape: CacheShape
    layer_indices: tuple[int, ...]
    num_hidden_layers: int
    num_sliding: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model without its weights.

    Attributes:
        name: Hub id or folder.
        model_type: as in the model's config.
        text: config of its text decoder.
        picture_tokens: positions that one picture takes, or a recording as long as a speech model
            hears; None for text models.
        picture_pixels: width and height of that picture, or length of the recording, in words.
    """

    name: str
    model_type: str
    # Any: transformers' configs have the attributes of their family.
    text: Any
    picture_tokens: int | None = None
    picture_pixels: str | None = None

    @cached_property
    def layout(self) -> CacheLayout:
        """Layers and shape of its cache."""
        return cache_layout(self.text)

    @cached_property
    def num_parameters(self) -> int:
        """Weights of the text decoder with its output layer, counted without making them."""
        head = 0 if self.text.tie_word_embeddings else self.text.vocab_size * self.text.hidden_size
        return int(self._decoder.num_parameters()) + head

    @property
    def num_reading(self) -> int:
        """Weights that each position passes which is read.

        Of an encoder-decoder, those of the encoder and of the keys and values that are made of it.
        """
        if not self.text.is_encoder_decoder:
            return self.num_parameters
        encoder: Any = self._decoder.get_encoder()
        return int(encoder.num_parameters()) + self.text.hidden_size * self.cache_values

    @cached_property
    def _decoder(self) -> PreTrainedModel:
        """The text decoder on the meta device, with the encoder of one that has it."""
        with torch.device("meta"):
            return build_decoder(self.text)

    @property
    def cache_values(self) -> int:
        """Numbers that one position leaves in the cache, K and V together."""
        return 2 * self.layout.shape.num_layers * self.layout.shape.width


def build_decoder(text: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A text decoder of random weights by its config, with the encoder of one that has it."""
    if own := _DECODERS.get(text.model_type):
        return own(text).to(dtype)
    model: PreTrainedModel = AutoModel.from_config(text, dtype=dtype)
    return model


def cache_layout(config: PreTrainedConfig) -> CacheLayout:
    """Read the geometry of a model's cache off its config.

    Raises:
        UnsupportedError: it keeps no keys and values, or not alike in every layer.
    """
    text = _text(config)
    if text.is_encoder_decoder:
        return _decoder_layout(text)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{text.model_type} keeps a latent (MLA), not keys and values that could be fused"
        )
    cache = DynamicCache(config=text)
    # Where the decoder looks at the picture by cross-attention, those layers are what is read.
    indices = tuple(getattr(text, "cross_attention_layers", ())) or layers_to_hold(cache)
    if not indices:
        raise UnsupportedError(f"{text.model_type} keeps no keys and values in any layer")
    layers = text.per_layer_config
    sizes = {_heads(layers[index]) for index in indices}
    if len(sizes) > 1:
        raise UnsupportedError(
            f"{text.model_type}: layers differ in (heads, head_dim): {sorted(sizes)}; only models "
            "whose layers are alike can be fused"
        )
    heads, head_dim = sizes.pop()
    return CacheLayout(
        shape=CacheShape(num_layers=len(indices), num_key_value_heads=heads, head_dim=head_dim),
        layer_indices=indices,
        num_hidden_layers=len(cache),
        num_sliding=sum(cache.is_sliding),
    )


def _text(config: PreTrainedConfig) -> Any:
    """The config of a model's decoder; an encoder-decoder without parts is its own."""
    alone = config.is_encoder_decoder and not config.sub_configs
    return config if alone else config.get_text_config(decoder=True)


def _decoder_layout(text: Any) -> CacheLayout:
    """An encoder-decoder's: what each layer of its decoder keeps of the encoder's positions."""
    layers = getattr(text, "num_decoder_layers", None) or text.decoder_layers
    heads = getattr(text, "decoder_attention_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "d_kv", None) or text.d_model // heads
    return CacheLayout(
        shape=CacheShape(num_layers=layers, num_key_value_heads=heads, head_dim=head_dim),
        layer_indices=tuple(range(layers)),
        num_hidden_layers=layers,
        num_sliding=0,
    )


def _heads(config: Any) -> tuple[int, int]:
    """KV heads and their channels."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


@functools.cache
def table() -> Mapping[str, Any]:
    """The published geometries, by Hub id, as `geometry.yaml` has them."""
    text = (files("mm_c2c") / "geometry.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def find(name: str) -> Geometry:
    """A model by its name in the table, its Hub id or its folder.

    Args:
        name: a name in the table may leave out the owner and an ending like `-Instruct`.

    Raises:
        InputError: nothing of that name is known or can be found.
    """
    aliases = {alias: known for known in table() for alias in _aliases(known)}
    known = aliases.get(name.lower())
    if known:
        entry = table()[known]
        text = dict(entry["text"])
        picture = entry.get("picture") or {}
        return Geometry(
            name=known,
            model_type=entry["model_type"],
            text=AutoConfig.for_model(text.pop("model_type"), **text),
            picture_tokens=picture.get("tokens"),
            picture_pixels=picture.get("pixels"),
        )
    from mm_c2c.reference.tower import register

    register()
    try:
        # A bare word is a misspelt name of the table: no use asking the Hub for it.
        config = AutoConfig.from_pretrained(name, local_files_only="/" not in name)
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(name.lower(), aliases, n=1, cutoff=0)
        raise InputError(
            f"no model {name!r}: it is not in the table, nor a folder or Hub id that can be read; "
            f"closest: {aliases[close[0]]}; known: {', '.join(table())}"
        ) from error
    # pi0 keeps the prefix's model in a part of its own; its action expert has the same cache.
    prefix = getattr(config, "vlm_config", config)
    tokens, pixels = _picture(prefix)
    text = _text(prefix)
    # Whether the output layer is apart the whole model's config says, not its decoder's; Mllama's
    # always is, since it knows fewer tokens than the embedding.
    tied = getattr(prefix, "tie_word_embeddings", True)
    text.tie_word_embeddings = tied and prefix.model_type != "mllama"
    return Geometry(
        name=name,
        model_type=config.model_type,
        text=text,
        picture_tokens=tokens,
        picture_pixels=pixels,
    )


def _aliases(known: str) -> set[str]:
    """Names in lower case that mean one entry of the table."""
    whole = known.lower()
    short = whole.rpartition("/")[2]
    # Without an ending of its own, a short name stays as it is.
    return {whole, *(short.removesuffix(suffix) for suffix in _SUFFIXES)}


def _picture(config: Any) -> tuple[int | None, str | None]:
    """Positions that one picture takes, and its size, as far as a config tells."""
    if config.model_type == "whisper":
        positions = config.max_source_positions  # of 20 ms each
        return positions, f"{positions / 50:g} s"
    vision: Any = getattr(config, "vision_config", None)
    merge: Any = getattr(vision, "spatial_merge_size", None)
    for name in ("downsample_factor", "spatial_merge_size"):
        merge = merge or getattr(config, name, None)
    side = _PIXELS if merge else getattr(vision, "image_size", None)
    if side is None:
        return None, None
    # Some say height and width.
    side = side if isinstance(side, int) else side[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    pixels = f"{side} x {side}"
    for name in ("num_query_tokens", "latent_query_num", "mm_tokens_per_image", "image_seq_length"):
        if getattr(config, name, None):
            return getattr(config, name), pixels
    tokens = (side // (patch * (merge or getattr(config, "scale_factor", 1)))) ** 2
    # A summary stands before the patches of each tile.
    return tokens + (config.model_type == "mllama"), pixels


class TrainingMemory(NamedTuple):
    """Bytes that training a fuser needs, by what they hold; see `training_memory`."""

    fuser: int
    gradients: int
    optimizer: int
    frozen: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def training_memory(
    fuser_parameters: int,
    sources: Sequence[Geometry],
    target: Geometry,
    rows: int = 8,
    positions: int = 128,
) -> TrainingMemory:
    """Estimate the memory that training a fuser needs.

        fuser        4 bytes a weight: float32 master weights
        gradients    4 bytes a weight
        optimizer    8 bytes a weight: Adam's two moments in float32
        frozen       2 bytes a weight of all text decoders (bfloat16); the sources' are not
                     needed where its caches are kept on disk, and vision towers come on top
        activations  of the target, which gradients run through: a position leaves 34 * hidden
                     bytes in each layer (Korthikanti et al., arXiv:2205.05198, without the
                     attention matrix, which fused kernels do not keep) and 8 * vocabulary bytes of
                     logits and their gradient; frozen weights need a little less

    Args:
        fuser_parameters: trained weights.
        sources: the models that are read.
        target: the model that answers.
        rows: rows of a batch.
        positions: positions a row that gradients run through: slots, question and answer.
    """
    text = target.text
    a_position = 34 * text.hidden_size * text.num_hidden_layers + 8 * text.vocab_size
    return TrainingMemory(
        fuser=4 * fuser_parameters,
        gradients=4 * fuser_parameters,
        optimizer=8 * fuser_parameters,
        frozen=2 * sum(model.num_parameters for model in (*sources, target)),
        activations=rows * positions * a_position,
    )


def pair_costs(source: Geometry, target: Geometry) -> dict[str, Any]:
    """What a pair of models costs, in plain values fit for JSON; sizes in bytes."""
    read, fed = source.layout.shape, target.layout.shape
    presets = {
        "small": FuserConfig(source=read, target=fed),
        "c2c": FuserConfig.c2c(read, fed),
    }
    fusers = {}
    for preset, config in presets.items():
        with torch.device("meta"):
            count = CacheFuser(config).num_parameters
        memory = training_memory(count, [source], target)
        fusers[preset] = {
            "parameters": count,
            "fp16_bytes": 2 * count,
            "fp32_bytes": 4 * count,
            "training_bytes": {**memory._asdict(), "total": memory.total},
        }
    return {"source": _costs(source), "target": _costs(target), "fusers": fusers}


def _costs(model: Geometry) -> dict[str, Any]:
    layout, text = model.layout, model.text
    cache = {
        f"{dtype}_bytes_a_token": size * model.cache_values
        for dtype, size in (("fp16", 2), ("fp32", 4))
    }
    if model.picture_tokens:
        cache["picture_tokens"] = model.picture_tokens
        cache["fp16_bytes_a_picture"] = 2 * model.picture_tokens * model.cache_values
        cache["fp32_bytes_a_picture"] = 4 * model.picture_tokens * model.cache_values
    return {
        "name": model.name,
        "model_type": model.model_type,
        "num_hidden_layers": layout.num_hidden_layers,
        "layer_indices": list(layout.layer_indices),
        "sliding_layers": layout.num_sliding,
        "sliding_window": getattr(text, "sliding_window", None) if layout.num_sliding else None,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": layout.shape.num_key_value_heads,
        "head_dim": layout.shape.head_dim,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "parameters": model.num_parameters,
        "picture_pixels": model.picture_pixels,
        "cache": cache,
    }

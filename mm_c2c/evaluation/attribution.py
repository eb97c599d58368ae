"""What an answer drew on: which parts of a picture a fuser wrote from, and which the target read.

    seen = attribute(bridge, picture, question, answer, "stickers")
    overlay(picture, seen.attention).show()

A fuser writes before there is a question, so `weights` and `norms` are the same for all questions.
Attention says where the target looked, not why it answered so (Jain and Wallace, arXiv:1902.10186).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mm_c2c.align import Alignment
from mm_c2c.align.patches import finest_patches
from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache, fork, read_layers
from mm_c2c.errors import ConfigError, InputError, ShapeError, UnsupportedError
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs, Perception
from mm_c2c.sources.base import SourceInput, count_positions

# Nine colours of viridis (CC0, by van der Walt, Smith and Firing): lightness rises evenly.
_COLOURS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
_OPACITY = 0.5
_BRIGHTEST = 0.98


class Attribution(NamedTuple):
    """Maps over the patch grid of a picture's finest view, `(rows, cols)`, from the top left.

    Attributes:
        weights: `(2, rows, cols)` in [0, 1], K and V: the fuser's dynamic weight times its gate,
            mean over layers and heads.
        norms: `(2, rows, cols)`, K and V: length of the difference that is added, mean over layers.
        attention: `(rows, cols)`: share of the target's attention while it chose the answer's
            tokens, mean over layers, heads and tokens; what is missing to 1 went to words.
    """

    weights: Tensor
    norms: Tensor
    attention: Tensor


class SlotWriting(NamedTuple):
    """What a fuser writes at the slots of pictures.

    Attributes:
        weights: `(target_layers, batch, num_slots, 2, target_heads)` in [0, 1]: dynamic weight
            times gate; index 0 is K, 1 is V.
        norms: `(target_layers, batch, num_slots, 2)`: length of the difference that is added.
        alignment: what each slot takes of which patches.
    """

    weights: Tensor
    norms: Tensor
    alignment: Alignment


@torch.no_grad()
def attribute(
    bridge: Bridge, picture: Image.Image, question: str, answer: str, source: str
) -> Attribution:
    """Say where in a picture an answer came from.

    Args:
        bridge: it is not changed.
        picture: what is asked about.
        question: what is asked.
        answer: what the target answered, such as `bridge.generate` gave.
        source: name of the source that looks; it must have one link, with slots.
    """
    slots_link(bridge, source)  # before the picture is looked at
    cache = bridge.sources[source].prefill([SourceInput(images=(picture,))])
    return attribute_cache(bridge, cache, question, answer, source)


@torch.no_grad()
def attribute_cache(
    bridge: Bridge, cache: SourceCache, question: str, answer: str, source: str
) -> Attribution:
    """As `attribute`, of a picture that the source has looked at already.

    Args:
        bridge: it is not changed.
        cache: what the source saw in one picture.
        question: what is asked.
        answer: what the target answered.
        source: as in `attribute`.
    """
    link = slots_link(bridge, source)
    written = slot_writing(bridge, link, cache)
    attention = answer_attention(bridge, bridge.fuse_slots({source: cache}), question, answer)
    shares = attention[..., -link.num_slots :].mean((0, 1, 2))
    alignment = written.alignment
    # A patch that several slots read gets their mean; attention is shared out instead.
    readers = to_patches(cache, alignment, torch.ones_like(shares))
    readers = readers.clamp(min=torch.finfo(readers.dtype).tiny)
    return Attribution(
        weights=to_patches(cache, alignment, written.weights.mean((0, 4))[0].T) / readers,
        norms=to_patches(cache, alignment, written.norms.mean(0)[0].T) / readers,
        attention=to_patches(cache, alignment, shares),
    )


def slots_link(bridge: Bridge, source: str) -> LinkConfig:
    """The link of a source that has one link, with slots.

    Raises:
        ConfigError: it has none, several, or one without slots.
    """
    links = [link for link in bridge.config.links if link.source == source]
    if len(links) != 1 or links[0].geometry != "slots":
        raise ConfigError(
            f"source {source!r} must have one link, with slots; this bridge links "
            f"{[(link.source, link.geometry) for link in bridge.config.links]}"
        )
    return links[0]


@torch.no_grad()
def slot_writing(bridge: Bridge, link: LinkConfig, cache: SourceCache) -> SlotWriting:
    """What a link's fuser writes at the slots, and how strongly.

    Args:
        bridge: it is not changed.
        link: one of its links, with slots.
        cache: what the link's source saw.
    """
    source, target, alignment = bridge.slot_inputs(link, cache)
    fuser = bridge.fusers[link.name]
    difference, weights = fuser.parts(source, target)  # type: ignore[operator]
    weights = weights * fuser.gates()[:, None, None, :, None]  # type: ignore[operator]
    written = (difference * weights.unsqueeze(-1)).flatten(-2).norm(dim=-1)
    mask = alignment.mask[None, :, :, None]
    return SlotWriting(weights * mask.unsqueeze(-1), written * mask, alignment)


def answer_attention(bridge: Bridge, perception: Perception, question: str, answer: str) -> Tensor:
    """The target's attention while it chose each token of an answer.

    Args:
        bridge: it is not changed.
        perception: of one picture.
        question: what is asked.
        answer: the answer's text, without the end token.

    Returns:
        `(target_layers, heads, answer_tokens, prefix_len)`: to the prompt up to the last slot; the
        last positions are the slots.

    Raises:
        InputError: the answer is empty.
    """
    tokens = bridge.target.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    if not tokens:
        raise InputError("the answer is empty; give the text that the target answered")
    fused = bridge.fuse(perception, [question])
    # A token is chosen at the position before it.
    attention, _ = _attend(bridge, fused, tokens[:-1])
    return attention[:, :, -len(tokens) :, : perception.input_ids.shape[1]]


def attention_outputs(bridge: Bridge, fused: FusedInputs, count: int) -> Tensor:
    """What each layer's attention returns at the last positions of a prompt, before `o_proj`.

    Args:
        bridge: it is not changed.
        fused: one row, from `bridge.fuse`.
        count: how many positions; no more than follow those that the cache covers.

    Returns:
        `(target_layers, count, heads * head_dim)`.
    """
    attention, cache = _attend(bridge, fused, [])
    layers, _ = read_layers(cache)
    values = torch.stack([kv.values[0] for kv in layers])
    values = values.repeat_interleave(attention.shape[1] // values.shape[1], dim=1)
    return (attention[:, :, -count:] @ values).transpose(1, 2).flatten(2)


def to_patches(cache: SourceCache, alignment: Alignment, values: Tensor, row: int = 0) -> Tensor:
    """Share out the slots' values among the patches that the slots took from.

    Args:
        cache: what the source saw.
        alignment: what each slot takes of which patches.
        values: `(..., num_slots)`.
        row: of the batch.

    Returns:
        `(..., rows, cols)`: of the picture's finest view. Its sum is that of the values, less what
        slots took from coarser views.
    """
    shares = alignment.shares(cache.kinds.shape[1])[row]
    return (values.to(shares.dtype) @ shares)[..., finest_patches(cache, row)]


def overlay(picture: Image.Image, heat: ArrayLike | Tensor) -> Image.Image:
    """Lay a map on a picture: from violet, the least, over green to yellow, the most.

    Args:
        picture: any size and mode; it is shown in grey.
        heat: `(rows, cols)`, finite: of the whole picture, from the top left. Colours run from its
            least value to its 98th percentile: the first slot often draws attention whatever it
            shows, and would leave all others dark.

    Returns:
        RGB, as large as the picture.

    Raises:
        ShapeError: the map is not two-dimensional, or empty.
        InputError: the map is not finite.
    """
    values = np.asarray(heat.detach().cpu() if isinstance(heat, Tensor) else heat, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ShapeError(f"expected a map of (rows, cols), got {values.shape}")
    if not np.isfinite(values).all():
        raise InputError("expected a map of finite numbers, got NaN or infinity")
    low, high = values.min(), np.quantile(values, _BRIGHTEST)
    scaled = ((values - low) / (high - low if high > low else 1)).clip(0, 1)
    # Smoothed as numbers, not as colours, which would pass through tones the scale does not have.
    smooth = Image.fromarray(scaled.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    colours = np.array([list(bytes.fromhex(colour)) for colour in _COLOURS.split()])
    stops = np.linspace(0, 1, len(colours))
    painted = np.stack(
        [np.interp(np.asarray(smooth), stops, channel) for channel in colours.T], axis=-1
    )
    layer = Image.fromarray(painted.round().astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), layer, _OPACITY)


@torch.no_grad()
def _attend(bridge: Bridge, fused: FusedInputs, tokens: list[int]) -> tuple[Tensor, Cache]:
    """Attention `(layers, heads, len, whole_len)` of the row's last positions, and the cache."""
    if len(fused["input_ids"]) != 1:
        raise ShapeError(f"expected one row, got {len(fused['input_ids'])}")
    model = bridge.target.model
    cache = fork(fused["past_key_values"])
    done = cache.get_seq_length()
    more = fused["input_ids"].new_tensor([tokens])
    input_ids = torch.cat([fused["input_ids"], more], dim=1)
    mask = torch.ones_like(input_ids)
    with eager(model):
        attentions = model(
            input_ids[:, done:],
            attention_mask=mask,
            position_ids=count_positions(mask)[:, done:],
            past_key_values=cache,
            output_attentions=True,
            **bridge.target.spared,
        ).attentions
    held = len(read_layers(cache)[0])
    if len(attentions) != held:
        raise UnsupportedError(
            f"{bridge.target} returns the attention of {len(attentions)} layers, {held} hold keys "
            "and values"
        )
    return torch.cat(attentions), cache


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that can be returned; afterwards the model has its own again."""
    config = model.config
    parts = {name: getattr(config, name) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    own[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)

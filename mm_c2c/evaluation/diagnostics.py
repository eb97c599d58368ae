"""Where in the cache the meaning lies: parts of a fuser switched off, and what it writes.

`mm-c2c diagnose` asks the same questions with keys only, values only, the first layers only, each
fifth of the layers left out, and other numbers of slots; and measures gates and effective ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.cache import read_layers
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import Asked, Setting
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.results import write_json
from mm_c2c.evaluation.statistics import accuracy, draw_resamples, hits_of
from mm_c2c.evaluation.tasks import Item, is_right, load_items
from mm_c2c.fuser import CacheFuser

_PARTS = 5


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Settings.

    Attributes:
        items: JSONL of questions, pictures beside it.
        source: name of the source in the bridge; it must have one link, with slots.
        limit: ask so many, spread evenly over the file.
        batch_size: items at once.
        grids: other numbers of slots, as rows and columns.
        rank_pictures: pictures over which effective ranks are averaged.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    items: Path
    source: str = "stickers"
    limit: int = 210
    batch_size: int = 48
    grids: tuple[tuple[int, int], ...] = ((3, 3), (5, 5), (7, 7))
    rank_pictures: int = 16
    resamples: int = 2000
    seed: int = 0


def diagnose(
    bridge: Bridge, config: DiagnosticsConfig, out: Path | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Switch off parts and ask again.

    Args:
        bridge: a trained bridge; it is not changed.
        config: settings.
        out: where to write the result as JSON.
        progress: whether to show a bar.

    Returns:
        Plain values: `variants`, name to [accuracy, low, high]; `gates`, `(layers, 2)`, K and V;
        `effective_rank` of the slots' K and V, `(layers, 2)` each, `before` and `after` fusing.
    """
    items = load_items(config.items, config.limit)
    name = _slots_link(bridge, config.source)
    variants = _variants(bridge, name, config)
    draws = draw_resamples(len(items), config.resamples, config.seed)
    results = {}
    for label, variant in tqdm(variants.items(), desc="variants", disable=not progress):
        results[label] = accuracy(hits_of(_ask(variant, items, config)), draws)
    pictures = [item.picture() for item in items[:: max(1, len(items) // config.rank_pictures)]]
    closed = _with_gates(bridge, name, torch.zeros_like(_fuser(bridge, name).gate_logits))
    result = {
        "n": len(items),
        "variants": {label: list(found) for label, found in results.items()},
        "gates": _fuser(bridge, name).gates().tolist(),
        "effective_rank": {
            "before": _ranks(closed, pictures[0]).tolist(),
            "after": torch.stack([_ranks(bridge, p) for p in pictures]).mean(0).tolist(),
        },
    }
    if out is not None:
        write_json(out, result)
    return result


def effective_rank(states: Tensor) -> Tensor:
    """How many directions a set of vectors fills: the exponential of its spectrum's entropy.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007); of the
    states as they are, without taking their mean off.

    Args:
        states: `(..., vectors, channels)`.

    Returns:
        `(...)`, from 1 to the smaller of both sizes; 0 where all states are 0.
    """
    values = torch.linalg.svdvals(states.float())
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -(shares * shares.clamp(min=torch.finfo(values.dtype).tiny).log()).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


def text_table(result: dict[str, Any]) -> str:
    """For a terminal."""
    width = max(map(len, result["variants"]))
    lines = [f"{'variant'.ljust(width)}     all  95 %"]
    for label, (value, low, high) in result["variants"].items():
        lines.append(
            f"{label.ljust(width)}  {100 * value:6.1f}  {100 * low:.1f} to {100 * high:.1f}"
        )
    lines.append(f"\nn = {result['n']}\n\nlayer   gate K  gate V   rank K before, after   rank V")
    rows = zip(
        result["gates"],
        result["effective_rank"]["before"],
        result["effective_rank"]["after"],
        strict=True,
    )
    for layer, ((gate_k, gate_v), before, after) in enumerate(rows):
        lines.append(
            f"{layer:5}   {gate_k:6.2f}  {gate_v:6.2f}   {before[0]:13.1f}, {after[0]:5.1f}   "
            f"{before[1]:.1f}, {after[1]:.1f}"
        )
    return "\n".join(lines)


def _slots_link(bridge: Bridge, source: str) -> str:
    links = [link for link in bridge.config.links if link.source == source]
    if len(links) != 1 or links[0].geometry != "slots":
        raise ConfigError(
            f"source {source!r} must have one link, with slots; this bridge links "
            f"{[(link.source, link.geometry) for link in bridge.config.links]}"
        )
    return links[0].name


def _fuser(bridge: Bridge, name: str) -> CacheFuser:
    return cast(CacheFuser, bridge.fusers[name])


def _variants(bridge: Bridge, name: str, config: DiagnosticsConfig) -> dict[str, Bridge]:
    open_gates = torch.ones_like(_fuser(bridge, name).gate_logits, dtype=torch.bool)
    layers = len(open_gates)
    bounds = sorted({round(part * layers / _PARTS) for part in range(_PARTS + 1)})
    masks = {}
    for column, what in enumerate(("keys only", "values only")):
        masks[what] = open_gates & (torch.arange(2) == column)
    for end in bounds[1:-1]:
        masks[f"first {end} layers only"] = open_gates & (torch.arange(layers) < end)[:, None]
    for start, end in itertools.pairwise(bounds):
        inside = (torch.arange(layers) >= start) & (torch.arange(layers) < end)
        masks[f"without layers {start} to {end - 1}"] = open_gates & ~inside[:, None]
    variants = {"whole": bridge}
    variants |= {label: _with_gates(bridge, name, mask) for label, mask in masks.items()}
    # A resampler has learned one number of slots.
    pooled = _fuser(bridge, name).resampler is None
    for rows, cols in config.grids if pooled else ():
        variants[f"{rows} x {cols} slots"] = _with_grid(bridge, name, rows, cols)
    return variants


def _with_gates(bridge: Bridge, name: str, mask: Tensor) -> Bridge:
    """A copy with gates shut wherever `mask`, `(layers, 2)`, is 0; the models are shared."""
    new = Bridge(bridge.target, bridge.sources, bridge.config)
    new.load_state_dict(bridge.state_dict())
    with torch.no_grad():
        _fuser(new, name).gate_logits.masked_fill_(~mask.bool(), -torch.inf)
    return new.eval()


def _with_grid(bridge: Bridge, name: str, rows: int, cols: int) -> Bridge:
    """A copy with another number of slots: the fuser works position by position."""
    links = tuple(
        dataclasses.replace(link, rows=rows, cols=cols) if link.name == name else link
        for link in bridge.config.links
    )
    new = Bridge(bridge.target, bridge.sources, dataclasses.replace(bridge.config, links=links))
    new.load_state_dict(bridge.state_dict())
    return new.eval()


def _ask(bridge: Bridge, items: list[Item], config: DiagnosticsConfig) -> list[bool]:
    arm = Fused(Setting(bridge=bridge, source_name=config.source, request=""))
    right = []
    for start in range(0, len(items), config.batch_size):
        batch = items[start : start + config.batch_size]
        replies = arm.answer([Asked(item.picture(), item.question) for item in batch])
        right += [is_right(r.answer, item.answer) for r, item in zip(replies, batch, strict=True)]
    return right


def _ranks(bridge: Bridge, picture: Image.Image) -> Tensor:
    """`(layers, 2)`: effective rank of K and V at one picture's slots, heads side by side."""
    perception = bridge.perceive(picture)
    (slot,) = bridge.target.tokenizer(bridge.config.slot_token, add_special_tokens=False)[
        "input_ids"
    ]
    slots = perception.input_ids[0] == slot
    layers, _ = read_layers(perception.past_key_values)
    both = torch.stack([torch.stack([k[0, :, slots], v[0, :, slots]]) for k, v in layers])
    return effective_rank(both.transpose(2, 3).flatten(3))

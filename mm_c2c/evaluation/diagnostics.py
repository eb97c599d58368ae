"""Where in the cache the meaning lies: parts of a fuser switched off, and what it writes.

`mm-c2c diagnose` asks the same questions with keys only, values only, the first layers only, each
fifth of the layers left out, every other slot and other numbers of slots; and measures gates,
effective ranks, and how near the target's attention comes to that over a true description.

A folder keeps `config.json` and `answers.jsonl` (one line an item and variant): what was stopped
goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from mm_c2c.bridge import Bridge
from mm_c2c.cache import (
    LayerKV,
    SourceCache,
    cut_layers,
    keeps_states,
    read_layers,
    repeat_rows,
)
from mm_c2c.config import check_at_least_one
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.attribution import attention_outputs, slots_link
from mm_c2c.evaluation.results import JsonLines, claim, hold
from mm_c2c.evaluation.run import (
    check_model_places,
    fingerprint_files,
    portable,
    source_name,
    to_asked,
    weights_of,
)
from mm_c2c.evaluation.statistics import Hits, accuracy, draw_resamples, hits_of, retention
from mm_c2c.evaluation.tasks import Item, is_right, load_items
from mm_c2c.fuser import CacheFuser
from mm_c2c.link import LinkConfig
from mm_c2c.perception import Perception
from mm_c2c.pretrained import fingerprint
from mm_c2c.rope import derotate, rotate

_PARTS = 5


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Settings.

    Attributes:
        items: JSONL of questions, pictures beside it.
        bridge: as in `EvaluationConfig`.
        source_model: likewise.
        target_model: likewise.
        source: name of the source in the bridge, which must have one link, with slots; None takes
            the only one.
        each_layer: also let each layer be the only one that is fused.
        limit: ask so many, spread evenly over the file.
        batch_size: items at once.
        grids: other numbers of slots, as rows and columns; a link that has learned what each slot
            looks for keeps its own.
        rank_pictures: pictures over which effective ranks are averaged.
        cosine_items: questions over which cosines are averaged; needs true descriptions
            (`caption` in the file).
        map_pictures: pictures that a report lays maps on.
        resamples: of the bootstrap, over episodes, or over pictures where there are none.
        seed: of the bootstrap.
    """

    items: Path
    bridge: str | None = None
    source_model: str | None = None
    target_model: str | None = None
    source: str | None = None
    each_layer: bool = False
    limit: int = 210
    batch_size: int = 48
    grids: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (3, 3), (5, 5), (7, 7))
    rank_pictures: int = 16
    cosine_items: int = 16
    map_pictures: int = 3
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "limit", "batch_size", "resamples")
        check_model_places(self.bridge, self.source_model, self.target_model)


def diagnose(
    bridge: Bridge, config: DiagnosticsConfig, out: Path | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Switch off parts and ask again.

    Args:
        bridge: a trained bridge; it is not changed.
        config: settings.
        out: folder of the run; what was answered there is not asked again. None keeps nothing.
        progress: whether to show a bar.

    Returns:
        Plain values. Values with an interval are [value, low, high].
        `variants`: accuracy by name.
        `slots`: a row for each number of slots that the target sees, with `slots`, `how` (`pooled`:
        the picture in so many; `taken out`: of as many as before the others are taken out of the
        cache), `accuracy`, and `retention`, (accuracy - no slots) / (whole - no slots), None where
        that divides by 0.
        `gates`: `(layers, 2)`, K and V.
        `effective_rank`: of the slots' K and V, `(layers, 2)` each, `before` and `after` fusing.
        `attention_cosine`: a value a layer, `before` and `after` fusing: between what attention
        returns at the question's words and what it returns where the target reads a true
        description; None without descriptions.

    Raises:
        ConfigError: the folder holds a run with other settings, or another process writes in it.
    """
    with hold(out):
        return _run(bridge, config, out, progress=progress)


def _run(
    bridge: Bridge, config: DiagnosticsConfig, out: Path | None, *, progress: bool
) -> dict[str, Any]:
    items = load_items(config.items, config.limit)
    link = slots_link(bridge, source_name(bridge, config.source))
    name = link.name
    variants = _variants(bridge, name, config)
    if out is not None:
        claim(
            out,
            {
                **portable(config),
                "items_fingerprint": fingerprint_files(config.items),
                "fuser": fingerprint(bridge.fusers.state_dict()),
                "models": weights_of(bridge),
            },
            DiagnosticsConfig,
        )
    hits = _ask_all(variants, items, config, out, progress=progress)
    clusters = [item.sampled_with for item in items]
    draws = draw_resamples(len(items), config.resamples, config.seed, clusters)
    results = {label: list(accuracy(found, draws)) for label, found in hits.items()}
    kept = {
        label: [
            None if math.isnan(value) else value
            for value in retention(found, hits["no slots"], hits["whole"], draws)
        ]
        for label, found in hits.items()
    }
    pictures = [item.picture() for item in spread_items(items, config.rank_pictures)]
    closed = variants["nothing written"]
    return {
        "n": len(items),
        "variants": results,
        "slots": [
            {"slots": count, "how": how, "accuracy": results[label], "retention": kept[label]}
            for label, count, how in _slot_counts(link, variants)
        ],
        "gates": _fuser(bridge, name).gates().tolist(),
        "effective_rank": {
            "before": slot_ranks(closed, closed.perceive(pictures[0])).tolist(),
            "after": torch.stack([slot_ranks(bridge, bridge.perceive(p)) for p in pictures])
            .mean(0)
            .tolist(),
        },
        "attention_cosine": _cosines(bridge, closed, items, config),
    }


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
    for layer in range(layers) if config.each_layer else ():
        masks[f"layer {layer} only"] = open_gates & (torch.arange(layers) == layer)[:, None]
    for start, end in itertools.pairwise(bounds):
        inside = (torch.arange(layers) >= start) & (torch.arange(layers) < end)
        masks[f"without layers {start} to {end - 1}"] = open_gates & ~inside[:, None]
    variants = {
        "whole": bridge,
        "no slots": _copied(bridge, _NoSlots),
        "nothing written": scale_gates(bridge, name, torch.tensor(0.0)),
    }
    if not keeps_states(DynamicCache(config=bridge.target.model.config)):
        variants["every other slot"] = _copied(bridge, _EveryOtherSlot)
    variants |= {label: scale_gates(bridge, name, mask.float()) for label, mask in masks.items()}
    # A resampler has learned one number of slots.
    pooled = _fuser(bridge, name).resampler is None
    for rows, cols in config.grids if pooled else ():
        variants[f"{rows} x {cols} slots"] = _with_grid(bridge, name, rows, cols)
    return variants


@torch.no_grad()
def scale_gates(bridge: Bridge, name: str, factor: Tensor) -> Bridge:
    """A copy whose gates are open by a share of what they were; the models are shared.

    Args:
        bridge: it is not changed.
        name: of the link.
        factor: in [0, 1], one number or `(layers, 2)`: 1 leaves a gate as it is, bit for bit, and
            0 shuts it. A straight-through gate knows no degrees: below a half it is shut.
    """
    new = _copied(bridge)
    logits = _fuser(new, name).gate_logits
    scaled = torch.logit(torch.sigmoid(logits) * factor)
    logits.copy_(torch.where(factor == 1, logits, scaled))
    return new


def _copied(bridge: Bridge, kind: type[Bridge] = Bridge, **changes: Any) -> Bridge:
    """A bridge of the same weights over the same models."""
    new = kind(bridge.target, bridge.sources, dataclasses.replace(bridge.config, **changes))
    new.load_state_dict(bridge.state_dict())
    return new.eval()


class _NoSlots(Bridge):
    """The prompt without slots."""

    def fuse_slots(
        self, caches: Mapping[str, SourceCache], keep: Mapping[str, Tensor] | None = None
    ) -> Perception:
        blank = super().fuse_slots({})
        (rows,) = {cache.batch_size for cache in caches.values()}
        cache = repeat_rows(blank.past_key_values, rows)
        return Perception(blank.input_ids.expand(rows, -1), cache)


class _EveryOtherSlot(Bridge):
    """Half of the slots, in reading order, are taken out of the cache; the others close up.

    A slot that is only left unwritten would still be seen, as the target's own.
    """

    def fuse_slots(
        self, caches: Mapping[str, SourceCache], keep: Mapping[str, Tensor] | None = None
    ) -> Perception:
        seen = super().fuse_slots(caches, keep)
        count = sum(link.num_slots for link in self.config.links if link.source in caches)
        places = torch.arange(seen.input_ids.shape[1], device=self.device)
        start = len(places) - count
        old = torch.cat([places[:start], places[start::2]])
        moved, new = old.expand(seen.batch_size, -1), places[: len(old)].expand(seen.batch_size, -1)
        rope = self.target.rope(len(places))
        layers, indices = read_layers(seen.past_key_values)
        left = {}
        for index, (keys, values) in zip(indices, layers, strict=True):
            plain = derotate(keys[:, :, old], moved, rope[index])
            left[index] = LayerKV(rotate(plain, new, rope[index]), values[:, :, old])
        return Perception(seen.input_ids[:, old], cut_layers(seen.past_key_values, left))


def _slot_counts(link: LinkConfig, variants: dict[str, Bridge]) -> list[tuple[str, int, str]]:
    """Label, slots that the target sees, and how they came about; by number of slots."""
    rows = [("no slots", 0, "taken out"), ("whole", link.num_slots, "pooled")]
    if "every other slot" in variants:
        rows.append(("every other slot", -(-link.num_slots // 2), "taken out"))
    for label, variant in variants.items():
        (new,) = (other for other in variant.config.links if other.name == link.name)
        if new.num_slots != link.num_slots:
            rows.append((label, new.num_slots, "pooled"))
    return sorted(rows, key=lambda row: row[1])


def _with_grid(bridge: Bridge, name: str, rows: int, cols: int) -> Bridge:
    """A copy with another number of slots: the fuser works position by position."""
    links = tuple(
        dataclasses.replace(link, rows=rows, cols=cols) if link.name == name else link
        for link in bridge.config.links
    )
    return _copied(bridge, links=links)


def spread_items(items: list[Item], count: int) -> list[Item]:
    """So many of the items, or all, spread evenly."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@torch.no_grad()
def _cosines(
    bridge: Bridge, closed: Bridge, items: list[Item], config: DiagnosticsConfig
) -> dict[str, list[float]] | None:
    """What attention returns at the question's words against that over a true description."""
    described = [item for item in items if item.description is not None]
    if not described or config.cosine_items < 1:
        return None
    source = source_name(bridge, config.source)
    found: dict[str, list[Tensor]] = {"before": [], "after": []}
    for item in spread_items(described, config.cosine_items):
        # Without the line break, which may be one token with what stands before it.
        count = len(bridge.question_tokens([item.question])[0]) - 1
        told = f"The picture shows: {item.description}\n{item.question}"
        wanted = attention_outputs(bridge, bridge.fuse(None, [told]), count)
        cache = bridge.sources[source].prefill([item.look()])
        for label, way in (("before", closed), ("after", bridge)):
            fused = way.fuse(way.fuse_slots({source: cache}), [item.question])
            outputs = attention_outputs(way, fused, count)
            found[label].append(torch.cosine_similarity(outputs, wanted, dim=-1).mean(1))
    return {label: torch.stack(rows).mean(0).tolist() for label, rows in found.items()}


def _ask_all(
    variants: dict[str, Bridge],
    items: list[Item],
    config: DiagnosticsConfig,
    out: Path | None,
    *,
    progress: bool,
) -> dict[str, Hits]:
    """Which items each variant answers right; a batch at a time is kept."""
    starts = range(0, len(items), config.batch_size)
    todo = [(label, items[i : i + config.batch_size]) for label in variants for i in starts]
    ends = list(itertools.accumulate(len(batch) for _, batch in todo))
    answers = JsonLines(out / "answers.jsonl" if out else None, ends)
    source = source_name(variants["whole"], config.source)
    bar = tqdm(todo, desc="variants", disable=not progress)
    for (label, batch), end in zip(bar, ends, strict=True):
        if end > len(answers.rows):
            answers.append(_answer_rows(label, variants[label], batch, source))
    hits: dict[str, list[bool]] = {label: [] for label in variants}
    for row in answers.rows:
        hits[row["variant"]].append(is_right(row["answer"], row["gold"]))
    return {label: hits_of(found) for label, found in hits.items()}


def _answer_rows(
    label: str, bridge: Bridge, batch: list[Item], source: str
) -> list[dict[str, Any]]:
    arm = Fused(Setting(bridge=bridge, source_name=source, request=""))
    replies = arm.answer([to_asked(item) for item in batch])
    return [
        {
            "variant": label,
            "image": item.image.name,
            "question": item.question,
            "gold": item.answer,
            "answer": reply.answer,
        }
        for reply, item in zip(replies, batch, strict=True)
    ]


def slot_ranks(bridge: Bridge, perception: Perception) -> Tensor:
    """Effective rank of K and V at the slots of the first row, heads side by side.

    Args:
        bridge: it is not changed.
        perception: of the sources of all its links with slots.

    Returns:
        `(target_layers, 2)`: K at 0, V at 1.
    """
    # By place, for the slot's token may also stand in the system message.
    count = sum(link.num_slots for link in bridge.config.links)
    layers, _ = read_layers(perception.past_key_values)
    both = torch.stack([torch.stack([k[0, :, -count:], v[0, :, -count:]]) for k, v in layers])
    return effective_rank(both.transpose(2, 3).flatten(3))

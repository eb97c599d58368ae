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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.run import (
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
from mm_c2c.run_folder import JsonLines, claim, hold

_PARTS = 5


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig(PairConfig):
    """Settings, beside those of the pair, whose source must have one link, with slots.

    Attributes:
        items: JSONL of questions, pictures beside it.
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
        super().__post_init__()
        check_at_least_one(self, "limit", "batch_size", "rank_pictures", "resamples")


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
    variants = _variants(bridge, link, config)
    pictures = [item.look() for item in spread_items(items, config.rank_pictures)]
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
    hits = _ask_all(bridge, variants, items, config, out, progress=progress)
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
    closed = variants["nothing written"].build()
    return {
        "n": len(items),
        "variants": results,
        "slots": [
            {"slots": v.slots, "how": v.how, "accuracy": results[label], "retention": kept[label]}
            for label, v in sorted(variants.items(), key=lambda named: named[1].slots)
            if v.how
        ],
        "gates": _fuser(bridge, link.name).gates().tolist(),
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


class _Variant(NamedTuple):
    """A way to ask.

    Attributes:
        build: makes the bridge when its turn comes: each has a fuser of its own.
        slots: how many the target sees.
        how: how these came about, where a row of `slots` tells of them.
    """

    build: Callable[[], Bridge]
    slots: int
    how: str | None = None


def _variants(bridge: Bridge, link: LinkConfig, config: DiagnosticsConfig) -> dict[str, _Variant]:
    name, slots = link.name, link.num_slots
    open_gates = torch.ones_like(_fuser(bridge, name).gate_logits, dtype=torch.bool)
    layers = len(open_gates)
    columns = torch.arange(2, device=open_gates.device)
    places = torch.arange(layers, device=open_gates.device)[:, None]
    bounds = sorted({round(part * layers / _PARTS) for part in range(_PARTS + 1)})
    masks = {}
    for column, what in enumerate(("keys only", "values only")):
        masks[what] = open_gates & (columns == column)
    for end in bounds[1:-1]:
        masks[f"first {end} layers only"] = open_gates & (places < end)
    for layer in range(layers) if config.each_layer else ():
        masks[f"layer {layer} only"] = open_gates & (places == layer)
    for start, end in itertools.pairwise(bounds):
        masks[f"without layers {start} to {end - 1}"] = open_gates & (
            (places < start) | (places >= end)
        )
    variants = {
        "whole": _Variant(lambda: bridge, slots, "pooled"),
        "no slots": _Variant(partial(_copied, bridge, _NoSlots), 0, "taken out"),
        "nothing written": _Variant(partial(scale_gates, bridge, name, 0.0 * open_gates), slots),
    }
    if not keeps_states(DynamicCache(config=bridge.target.model.config)):
        half = partial(_copied, bridge, _EveryOtherSlot)
        variants["every other slot"] = _Variant(half, -(-slots // 2), "taken out")
    for label, mask in masks.items():
        variants[label] = _Variant(partial(scale_gates, bridge, name, mask.float()), slots)
    # A resampler has learned one number of slots.
    pooled = _fuser(bridge, name).resampler is None
    for rows, cols in config.grids if pooled else ():
        resized = dataclasses.replace(link, rows=rows, cols=cols)
        how = "pooled" if resized.num_slots != slots else None
        build = partial(_with_link, bridge, resized)
        variants[f"{rows} x {cols} slots"] = _Variant(build, resized.num_slots, how)
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


def _with_link(bridge: Bridge, resized: LinkConfig) -> Bridge:
    """A copy with another number of slots: the fuser works position by position."""
    links = [resized if link.name == resized.name else link for link in bridge.config.links]
    return _copied(bridge, links=tuple(links))


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
    bridge: Bridge,
    variants: Mapping[str, _Variant],
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
    source = source_name(bridge, config.source)
    bar = tqdm(todo, desc="variants", disable=not progress)
    built: tuple[str, Bridge] = ("whole", bridge)  # one at a time
    for (label, batch), end in zip(bar, ends, strict=True):
        if end > len(answers.rows):
            if built[0] != label:
                built = (label, variants[label].build())
            answers.append(_answer_rows(*built, batch, source))
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

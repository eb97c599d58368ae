"""Where an answer came from, and what becomes of it when the cache is tampered with."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.cache import PositionKind, SourceCache, zeroed
from mm_c2c.demo.compare import MODELS, Look, check_question
from mm_c2c.demo.pair import picture_html
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import options
from mm_c2c.evaluation.attribution import Attribution, attribute_cache, overlay, slots_link
from mm_c2c.evaluation.diagnostics import scale_gates, slot_ranks
from mm_c2c.perception import Perception
from mm_c2c.sources.base import SourceInput

HANDED = {
    "own": "the picture's own cache",
    "other": "another picture's cache",
    "shuffled": "its own cache, patches in other places",
    "zeroed": "an empty cache",
}
"""What the target can be handed."""
_MAPS = {
    "attention": "What the text LLM looked at as it chose its words",
    "weights": "How strongly the fuser wrote (weight times gate)",
    "norms": "How much the fuser wrote (length of the difference)",
}
_WIDTH, _HEIGHT, _MARGIN = 640, 180, 34


class Inside(NamedTuple):
    """What a look inside finds.

    Attributes:
        answer: the fused answer.
        maps: over the picture's patches.
        gates: `(layers, 2)`, K and V.
        ranks_before: `(layers, 2)`: effective rank at the slots, before fusing.
        ranks_after: after it.
    """

    answer: str
    maps: Attribution
    gates: Tensor
    ranks_before: Tensor
    ranks_after: Tensor


class Tampered(NamedTuple):
    """An answer beside the one to a cache that was tampered with.

    Attributes:
        answer: as it is.
        altered: with what was handed over instead.
        source_answer: what the source says about the picture whose cache that was; None where it
            was no picture's.
    """

    answer: str
    altered: str
    source_answer: str | None


@torch.no_grad()
def look_inside(look: Look, question: str | None) -> Inside:
    """Ask, and say what the answer drew on.

    Args:
        look: the picture; the source of its pair must have one link, with slots.
        question: what is asked.

    Raises:
        InputError: the question cannot be asked, or the answer is empty, so that nothing was drawn on.
        ConfigError: the source has several links, or none with slots.
    """
    question = check_question(question)
    setting = look.setting
    bridge, name = setting.bridge, setting.source_name
    link = slots_link(bridge, name)
    with MODELS:
        answer = _answer(bridge, look.slots, question)
        if not answer:
            raise InputError("The answer is empty, so it drew on nothing: ask something else.")
        closed = scale_gates(bridge, link.name, torch.tensor(0.0))
        return Inside(
            answer,
            attribute_cache(bridge, look.cache, question, answer, name),
            bridge.fusers[link.name].gates(),  # type: ignore[operator]
            slot_ranks(closed, closed.fuse_slots({name: look.cache})),
            slot_ranks(bridge, look.slots),
        )


@torch.no_grad()
def tamper(
    look: Look,
    question: str | None,
    *,
    handed: str = "own",
    gate: float = 1.0,
    other: Image.Image | None = None,
) -> Tampered:
    """Ask twice: as it is, and with another cache or gates less open.

    Args:
        look: the picture; the source of its pair must have one link, with slots.
        question: what is asked.
        handed: a key of `HANDED`.
        gate: share of each gate's own opening, in [0, 1]; 0 closes the fuser.
        other: the other picture, for `handed="other"`.

    Raises:
        InputError: the question cannot be asked, or one of the settings cannot be.
        ConfigError: the source has several links, or none with slots.
    """
    question = check_question(question)
    if handed not in HANDED:
        raise InputError(f"expected one of {', '.join(HANDED)} to be handed over, got {handed!r}")
    if not 0 <= gate <= 1:
        raise InputError(f"the gate is open by a share from 0 to 1, got {gate}")
    if handed == "other" and other is None:
        raise InputError("There is no other picture: choose one whose cache to hand over.")
    setting = look.setting
    name = setting.source_name
    link = slots_link(setting.bridge, name)
    with MODELS:
        answer = _answer(setting.bridge, look.slots, question)
        given, seen = look.cache, look.picture
        if handed == "other" and other is not None:
            given, seen = setting.source.prefill([SourceInput(images=(other,))]), other
        elif handed == "shuffled":
            given = shuffle_patches(look.cache)
        elif handed == "zeroed":
            given = zeroed(look.cache)
        altered = scale_gates(setting.bridge, link.name, torch.tensor(gate))
        said = _answer(altered, altered.fuse_slots({name: given}), question)
        own = None
        if handed != "zeroed":
            asked = [SourceInput(text=question, images=(seen,))]
            own = setting.source.generate(asked, **options(None))[0].strip()
    return Tampered(answer, said, own)


def shuffle_patches(cache: SourceCache) -> SourceCache:
    """The same patches, said to lie elsewhere: what is in the picture stays, where is lost."""
    patches = cache.patches.clone()
    for row, kinds in enumerate(cache.kinds):
        places = (kinds == PositionKind.IMAGE).nonzero().flatten().cpu()
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        patches[row, places] = cache.patches[row, places[order]]
    return replace(cache, patches=patches)


def _answer(bridge: Bridge, seen: Perception, question: str) -> str:
    return bridge.generate(seen, [question], **options(None))[0].strip()


def inside_html(found: Inside, picture: Image.Image) -> str:
    """Maps over the picture, and charts of gates and ranks a layer."""
    maps = found.maps
    shown = {
        "attention": maps.attention,
        "weights": maps.weights.mean(0),
        "norms": maps.norms.mean(0),
    }
    figures = "".join(
        f"<figure>{picture_html(overlay(picture, heat), _MAPS[key])}"
        f"<figcaption>{_MAPS[key]}</figcaption></figure>"
        for key, heat in shown.items()
    )
    share = 100 * float(maps.attention.sum())
    return (
        f'<p class="seen">Fused answer: <b>{html.escape(found.answer)}</b>. {share:.0f} % of the '
        "text LLM's attention went to the picture's slots, the rest to words. From violet, the "
        "least, to yellow, the most.</p>"
        f'<div class="figures">{figures}</div>'
        f"<h3>Gates a layer</h3>{gates_svg(found.gates)}"
        f"<h3>Effective rank of the slots, before and after fusing</h3>"
        f"{ranks_svg(found.ranks_before, found.ranks_after)}"
    )


def tampered_html(found: Tampered, look: Look, handed: str, gate: float, other: Image.Image) -> str:
    """Both answers beside each other."""
    what = HANDED[handed] + ("" if gate == 1 else f", gates open by {100 * gate:.0f} %")
    seen = other if handed == "other" else look.picture
    changed = found.altered != found.answer
    verdict = "The answer changed." if changed else "The answer stayed the same."
    source = ""
    if found.source_answer is not None:
        source = (
            '<p class="caption">Asked about this picture, the source itself says: '
            f"“{html.escape(found.source_answer) or '(nothing)'}”</p>"
        )
    picture = (
        "" if handed == "zeroed" else picture_html(seen, "The picture whose cache was handed over")
    )
    return (
        f'<p class="seen" role="status">{verdict}</p><div class="cards figures">'
        f'<section class="card own"><h3>As it is</h3>{picture_html(look.picture, "The picture")}'
        f'<p class="answer">{html.escape(found.answer) or "(nothing)"}</p></section>'
        f'<section class="card"><h3>Handed: {what}</h3>{picture}'
        f'<p class="answer">{html.escape(found.altered) or "(nothing)"}</p>{source}</section></div>'
    )


def gates_svg(gates: Tensor) -> str:
    """Bars, K and V beside each other, from 0 to 1."""
    rows = gates.tolist()
    step = (_WIDTH - _MARGIN) / len(rows)
    bars = "".join(
        f'<rect class="{"kv"[kind]}" x="{_MARGIN + step * (layer + 0.1 + 0.4 * kind):.1f}" '
        f'y="{_HEIGHT * (1 - gate):.1f}" width="{0.4 * step:.1f}" height="{_HEIGHT * gate:.1f}"/>'
        for layer, row in enumerate(rows)
        for kind, gate in enumerate(row)
    )
    mean_k, mean_v = gates.mean(0).tolist()
    said = f"Gates of {len(rows)} layers, on average {mean_k:.2f} for keys, {mean_v:.2f} for values"
    return _chart(bars, said, len(rows), 1.0)


def ranks_svg(before: Tensor, after: Tensor) -> str:
    """Lines, K and V, dashed before fusing."""
    top = float(torch.stack([before, after]).max())
    step = (_WIDTH - _MARGIN) / len(after)
    lines = ""
    for when, ranks in (("before", before), ("after", after)):
        for kind in range(2):
            points = " ".join(
                f"{_MARGIN + step * (layer + 0.5):.1f},{_HEIGHT * (1 - rank / top):.1f}"
                for layer, rank in enumerate(ranks[:, kind].tolist())
            )
            lines += f'<polyline class="rank {"kv"[kind]} {when}" points="{points}"/>'
    said = (
        f"Effective rank, mean over {len(after)} layers: keys {before[:, 0].mean():.1f} before and "
        f"{after[:, 0].mean():.1f} after fusing, values {before[:, 1].mean():.1f} and "
        f"{after[:, 1].mean():.1f}; dashed is before"
    )
    return _chart(lines, said, len(after), top)


def _chart(drawn: str, said: str, layers: int, top: float) -> str:
    """A chart over layers from 0 to `top`, told also in words."""
    ticks: Sequence[int] = range(0, layers, max(1, layers // 6))
    step = (_WIDTH - _MARGIN) / layers
    labels = "".join(
        f'<text x="{_MARGIN + step * (tick + 0.5):.1f}" y="{_HEIGHT + 14}" text-anchor="middle">'
        f"{tick}</text>"
        for tick in ticks
    )
    return (
        f'<figure><svg class="chart" viewBox="0 -8 {_WIDTH} {_HEIGHT + 28}" role="img" '
        f'aria-label="{said}"><line class="axis" x1="{_MARGIN}" y1="{_HEIGHT}" x2="{_WIDTH}" '
        f'y2="{_HEIGHT}"/><text x="{_MARGIN - 4}" y="4" text-anchor="end">{top:.3g}</text>'
        f'<text x="{_MARGIN - 4}" y="{_HEIGHT}" text-anchor="end">0</text>{labels}{drawn}</svg>'
        f'<figcaption><span class="key k">■</span> keys <span class="key v">■</span> values, by '
        f"layer of the text LLM. {said}.</figcaption></figure>"
    )

"""A diagnosis as Markdown, and as a page with plots and with maps laid on pictures.

    python -m mm_c2c.evaluation.diagnosis_report RUN --readme FILE --section NAME

RUN is the folder of a finished `mm-c2c diagnose --out RUN`.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.errors import InputError, run_main
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.attribution import attribute_cache, overlay
from mm_c2c.evaluation.command import run_section
from mm_c2c.evaluation.diagnostics import DiagnosticsConfig, spread_items
from mm_c2c.evaluation.render import (
    AXIS_POINTS,
    html_page,
    html_table,
    interval_text,
    new_figure,
    pipe_table,
    quieten,
    svg,
)
from mm_c2c.evaluation.run import source_name, to_asked
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.run_folder import write_json

_COMMAND = "mm-c2c diagnose"
_SIDE = 288  # pixels of a map's longer side, where the picture is smaller
_KV = ("K", "V")
_MAPS = (
    "From violet (a map's least) to yellow (its 98th percentile and more); the range of its values "
    "stands below it. *Written*: length of the difference that the fuser adds, mean over layers. "
    "*Weight*: dynamic weight times gate, mean over layers and heads. *Read*: share of the target's attention while it chose the "
    "answer's tokens, mean over layers and heads; it says where the target looked, not why it "
    "answered so."
)
_SLOTS = (
    "Retention: (accuracy - no slots) / (all slots - no slots). *Pooled*: the whole picture in so "
    "many slots. *Taken out*: so many of all its slots; the others are taken out of the cache, and "
    "those that stay close up."
)
_COSINE = (
    "Between what the target's attention returns at the question's words and what it returns "
    "where the target reads a true description."
)


class Look(NamedTuple):
    """Maps on one picture.

    Attributes:
        question: what was asked.
        answer: what the target answered.
        picture: as it was shown.
        maps: name to overlay and the least and greatest value of the map.
    """

    question: str
    answer: str
    picture: Image.Image
    maps: dict[str, tuple[Image.Image, float, float]]


def look(bridge: Bridge, config: DiagnosticsConfig) -> list[Look]:
    """Lay what was written and read on a few pictures; recordings have none.

    Args:
        bridge: it is not changed.
        config: which items, which source, how many pictures.
    """
    source = source_name(bridge, config.source)
    arm = Fused(Setting(bridge=bridge, source_name=source, request=""))
    looks = []
    for item in spread_items(load_items(config.items, config.limit), config.map_pictures):
        shown = item.look()
        if not shown.images:
            continue
        picture = _enlarged(shown.images[0])
        answer = arm.answer([to_asked(item)])[0].answer
        maps: dict[str, Tensor] = {}
        if answer:
            cache = bridge.sources[source].prefill([shown])
            seen = attribute_cache(bridge, cache, item.question, answer, source)
            maps |= {f"written, {k}": heat for k, heat in zip(_KV, seen.norms, strict=True)}
            maps |= {f"weight, {k}": heat for k, heat in zip(_KV, seen.weights, strict=True)}
            maps["read"] = seen.attention
        laid = {
            name: (overlay(picture, heat), float(heat.min()), float(heat.max()))
            for name, heat in maps.items()
        }
        looks.append(Look(item.question, answer, picture, laid))
    return looks


def write_report(result: dict[str, Any], looks: list[Look], folder: Path) -> None:
    """Write `diagnosis.json`, `report.md`, `report.html` and the maps' pictures.

    Args:
        result: from `diagnose`.
        looks: from `look`.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "diagnosis.json", result)
    for number, seen in enumerate(looks):
        for name, picture in _pictures(seen).items():
            picture.save(folder / _file_name(number, name))
    (folder / "report.md").write_text(markdown(result, looks), encoding="utf-8")
    (folder / "report.html").write_text(page(result, looks), encoding="utf-8")


def diagnosis_section(run: Path) -> str:
    """What stands in a README: the parts, the slots, and of the layers their means.

    Raises:
        InputError: `run` holds no finished diagnosis.
    """
    path = run / "diagnosis.json"
    if not path.exists():
        raise InputError(f"{run} holds no diagnosis; make one with {_COMMAND} --out {run}")
    result = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"n = {result['n']:,}, exact match in %, 95 % bootstrap intervals."]
    for _, note, rows in _tables(result)[:2]:
        parts += [*([note] if note else []), pipe_table(rows)]
    ranks, gates = result["effective_rank"], _means(result["gates"])
    keys, values = zip(_means(ranks["before"]), _means(ranks["after"]), strict=True)
    means = "Means over layers: gates of keys {:.2f}, of values {:.2f}; ".format(*gates)
    means += "effective rank of the slots' keys {:.1f} before and {:.1f} after fusing, ".format(
        *keys
    )
    means += "of their values {:.1f} and {:.1f}".format(*values)
    if cosine := result["attention_cosine"]:
        before, after = (sum(cosine[w]) / len(cosine[w]) for w in ("before", "after"))
        note = _COSINE[0].lower() + _COSINE[1:].removesuffix(".")
        means += f"; cosine {note}: {before:.2f} and {after:.2f}"
    return "\n\n".join([*parts, f"{means}."])


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def markdown(result: dict[str, Any], looks: list[Look]) -> str:
    """For a page that renders Markdown; pictures lie beside it, as `write_report` puts them."""
    parts = [f"# Diagnosis\n\nn = {result['n']:,}, exact match, 95 % bootstrap intervals."]
    for title, note, rows in _tables(result):
        parts += [f"## {title}", *([note] if note else []), pipe_table(rows)]
    if looks:
        parts += ["## Maps", _MAPS]
    for number, seen in enumerate(looks):
        names = list(_pictures(seen))
        cells = [f"![{name}]({_file_name(number, name)})" for name in names]
        ranges = [_range(seen, name) for name in names]
        parts += [f"*{seen.question}* {seen.answer}", pipe_table([names, cells, ranges])]
    return "\n\n".join(parts) + "\n"


def page(result: dict[str, Any], looks: list[Look]) -> str:
    """One HTML file with its plots and pictures inside."""
    body = [f"<p>n = {result['n']:,}, exact match, 95 % bootstrap intervals.</p>"]
    plots = {
        "Parts": [plot_variants(result)],
        "Slots": [plot_slots(result)],
        "Layers": plot_layers(result),
    }
    for title, note, rows in _tables(result):
        body.append(f"<h2>{title}</h2>")
        body += [f"<p>{html.escape(note.replace('*', ''))}</p>"] if note else []
        panels = "".join(f"<figure>{plot}</figure>" for plot in plots[title])
        body.append(f'<div class="plots">{panels}</div>' if len(plots[title]) > 1 else panels)
        body.append(html_table(rows))
    if looks:
        body.append(f"<h2>Maps</h2><p>{html.escape(_MAPS.replace('*', ''))}</p>")
    for seen in looks:
        cells = "".join(
            f'<figure><img alt="{html.escape(name)}" src="{_data_url(picture)}">'
            f"<figcaption>{html.escape(name)}<br>{_range(seen, name)}</figcaption></figure>"
            for name, picture in _pictures(seen).items()
        )
        asked = f"<em>{html.escape(seen.question)}</em> {html.escape(seen.answer)}"
        body.append(f'<p>{asked}</p><div class="maps">{cells}</div>')
    return html_page("Diagnosis", "".join(body))


def plot_variants(result: dict[str, Any]) -> str:
    """SVG: what is right with parts of the fuser switched off, with intervals."""
    rows = result["variants"]
    figure = new_figure(4.6, 0.5 + 0.18 * len(rows))
    axes = figure.subplots()
    for place, (value, low, high) in enumerate(rows.values()):
        error = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(100 * value, place, xerr=error, fmt="o", markersize=4, color="C0")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("right, %", fontsize=AXIS_POINTS)
    axes.grid(axis="x", color="0.9")
    quieten(axes)
    told = "; ".join(f"{label} {100 * row[0]:.1f}" for label, row in rows.items())
    return svg(figure, f"Right, in percent: {told}")


def plot_slots(result: dict[str, Any]) -> str:
    """SVG: what is left of the gain with fewer slots, with intervals."""
    figure = new_figure(4.6, 2.8)
    axes = figure.subplots()
    rows = [row for row in result["slots"] if None not in row["retention"]]
    for how, mark in (("pooled", "o-"), ("taken out", "s")):
        shown = [row for row in rows if row["how"] == how]
        if not shown:
            continue
        values = [[100 * v for v in row["retention"]] for row in shown]
        axes.errorbar(
            [row["slots"] for row in shown],
            [v[0] for v in values],
            yerr=[[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]],
            fmt=mark,
            markersize=4,
            label=how,
        )
    axes.axhline(100, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("slots that the target sees", fontsize=AXIS_POINTS)
    axes.set_ylabel("retention, %", fontsize=AXIS_POINTS)
    quieten(axes)
    if rows:
        axes.legend(frameon=False, fontsize=AXIS_POINTS)
    told = "; ".join(
        f"{row['slots']} {row['how']}: {100 * row['retention'][0]:.0f}" for row in rows
    )
    return svg(figure, f"Retention in percent, by slots that the target sees: {told}")


def plot_layers(result: dict[str, Any]) -> list[str]:
    """SVGs: gates, effective ranks and cosines, a layer each."""
    ranks, cosine = result["effective_rank"], result["attention_cosine"]
    gates = {k: [row[i] for row in result["gates"]] for i, k in enumerate(_KV)}
    both = ("before", "after")
    rank = {f"{k}, {w}": [row[i] for row in ranks[w]] for i, k in enumerate(_KV) for w in both}
    plots = [_plot_lines("gate", gates), _plot_lines("effective rank of the slots", rank)]
    return plots + ([_plot_lines("cosine to a true description", cosine)] if cosine else [])


def _plot_lines(title: str, lines: dict[str, list[float]]) -> str:
    """One value a layer; what was before fusing is dotted."""
    figure = new_figure(3.4, 2.8)
    axes = figure.subplots()
    for name, values in lines.items():
        colour = "C1" if name.startswith("V") else "C0"
        axes.plot(values, ":" if name.endswith("before") else "-", color=colour, label=name)
    axes.set_title(title, fontsize=AXIS_POINTS + 1)
    axes.set_xlabel("target layer", fontsize=AXIS_POINTS)
    axes.set_ylim(min(0, axes.get_ylim()[0]), None)
    quieten(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=AXIS_POINTS)
    told = "; ".join(f"{n} from {min(v):.2f} to {max(v):.2f}" for n, v in lines.items())
    return svg(figure, f"{title}, a layer: {told}")


def _tables(result: dict[str, Any]) -> list[tuple[str, str, list[list[str]]]]:
    """Title, note and rows of each table; the first row is its head."""
    variants = [
        [label, f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        for label, (value, low, high) in result["variants"].items()
    ]
    slots = [
        [str(row["slots"]), row["how"], f"{100 * row['accuracy'][0]:.1f}", _kept(row["retention"])]
        for row in result["slots"]
    ]
    ranks, cosine = result["effective_rank"], result["attention_cosine"]
    head = ["layer", *(f"gate {k}" for k in _KV), *(f"rank {k}, before, after" for k in _KV)]
    layers = [
        [
            str(layer),
            *(f"{gate:.2f}" for gate in gates),
            *(f"{b:.1f}, {a:.1f}" for b, a in zip(before, after, strict=True)),
        ]
        for layer, (gates, before, after) in enumerate(
            zip(result["gates"], ranks["before"], ranks["after"], strict=True)
        )
    ]
    if cosine:
        head.append("cosine, before, after")
        for row, before, after in zip(layers, cosine["before"], cosine["after"], strict=True):
            row.append(f"{before:.3f}, {after:.3f}")
    return [
        ("Parts", "", [["variant", "accuracy", "95 %"], *variants]),
        ("Slots", _SLOTS, [["slots", "how", "accuracy", "retention"], *slots]),
        ("Layers", f"Cosine: {_COSINE}" if cosine else "", [head, *layers]),
    ]


def _kept(retention: list[float | None]) -> str:
    known = [value for value in retention if value is not None]
    return interval_text(known) if known else "n/a"


def _pictures(seen: Look) -> dict[str, Image.Image]:
    return {"picture": seen.picture, **{name: laid[0] for name, laid in seen.maps.items()}}


def _range(seen: Look, name: str) -> str:
    return "{:.3g} to {:.3g}".format(*seen.maps[name][1:]) if name in seen.maps else ""


def _file_name(number: int, name: str) -> str:
    return f"map-{number}-{name.replace(', ', '-')}.png"


def _enlarged(picture: Image.Image) -> Image.Image:
    scale = max(1.0, _SIDE / max(picture.size))
    size = tuple(round(scale * side) for side in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _data_url(picture: Image.Image) -> str:
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write the section."""
    run_section(diagnosis_section, _COMMAND, __doc__, argv)


if __name__ == "__main__":
    run_main(main)

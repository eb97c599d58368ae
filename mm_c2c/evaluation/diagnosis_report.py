"""A diagnosis as Markdown, and as a page with plots and with maps laid on pictures."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.evaluation.arms import Asked, Setting
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.attribution import attribute, overlay
from mm_c2c.evaluation.diagnostics import DiagnosticsConfig, spread_items
from mm_c2c.evaluation.report import STYLE, new_figure, pipe_table, svg
from mm_c2c.evaluation.results import write_json
from mm_c2c.evaluation.tasks import load_items

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
    "Retention: (accuracy - nothing written) / (all slots - nothing written). *Pooled*: the "
    "picture gets so many slots. *Masked*: it gets all of them, the others stay as the target's "
    "own."
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
    """Lay what was written and read on a few pictures.

    Args:
        bridge: it is not changed.
        config: which items, which source, how many pictures.
    """
    arm = Fused(Setting(bridge=bridge, source_name=config.source, request=""))
    looks = []
    for item in spread_items(load_items(config.items, config.limit), config.map_pictures):
        picture = _enlarged(item.picture())
        answer = arm.answer([Asked(item.picture(), item.question)])[0].answer
        maps: dict[str, Tensor] = {}
        if answer:
            seen = attribute(bridge, item.picture(), item.question, answer, config.source)
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
    plots = {"Slots": plot_slots(result), "Layers": plot_layers(result)}
    for title, note, rows in _tables(result):
        body.append(f"<h2>{title}</h2>")
        body += [f"<p>{html.escape(note.replace('*', ''))}</p>"] if note else []
        body += [f"<figure>{plots[title]}</figure>"] if title in plots else []
        body.append(_html_table(rows))
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
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Diagnosis</title>'
        f"<style>{STYLE}{_MAP_STYLE}</style><h1>Diagnosis</h1>{''.join(body)}</html>"
    )


def plot_slots(result: dict[str, Any]) -> str:
    """SVG: what is left of the gain with fewer slots, with intervals."""
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    rows = [row for row in result["slots"] if None not in row["retention"]]
    for how, mark in (("pooled", "o-"), ("masked", "s")):
        shown = [row for row in rows if row["how"] == how]
        if not shown:
            continue
        values = [[100 * v for v in row["retention"]] for row in shown]
        axes.errorbar(
            [row["slots"] for row in shown],
            [v[0] for v in values],
            yerr=[[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]],
            fmt=mark,
            capsize=3,
            label=how,
        )
    axes.axhline(100, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("slots that are written")
    axes.set_ylabel("retention, %")
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(frameon=False)
    return svg(figure)


def plot_layers(result: dict[str, Any]) -> str:
    """SVG: gates, effective ranks and cosines, a layer each."""
    cosine = result["attention_cosine"]
    figure = new_figure(10, 3.2)
    gates, ranks, *rest = figure.subplots(1, 2 + bool(cosine))
    layers = range(len(result["gates"]))
    for index, name in enumerate(_KV):
        colour = f"C{index}"
        gates.plot(layers, [row[index] for row in result["gates"]], color=colour, label=name)
        for when, style in (("before", ":"), ("after", "-")):
            values = [row[index] for row in result["effective_rank"][when]]
            ranks.plot(layers, values, style, color=colour, label=f"{name}, {when}")
    gates.set_title("gate")
    gates.set_ylim(0, 1)
    ranks.set_title("effective rank of the slots")
    ranks.set_ylim(0, None)
    for axes in rest:
        for when, style in (("before", ":"), ("after", "-")):
            axes.plot(layers, cosine[when], style, color="C2", label=when)
        axes.set_title("cosine to a true description")
    for axes in (gates, ranks, *rest):
        axes.set_xlabel("target layer")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


_MAP_STYLE = (
    ".maps{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem}.maps figure{margin:0}"
    ".maps img{width:100%}figcaption{font-size:.85rem}"
)


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
        ("Slots", _SLOTS, [["slots", "others", "accuracy", "retention"], *slots]),
        ("Layers", f"Cosine: {_COSINE}" if cosine else "", [head, *layers]),
    ]


def _kept(retention: list[float | None]) -> str:
    known = [value for value in retention if value is not None]
    return "{:.2f} ({:.2f} to {:.2f})".format(*known) if known else "n/a"


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


def _html_table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll"><table><tr>{top}</tr>'
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )

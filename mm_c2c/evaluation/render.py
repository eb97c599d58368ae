"""Tables, plots and pages, whatever they show."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import InputError, UnsupportedError

AXIS_POINTS = 8
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.6rem;overflow-wrap:anywhere}h2{font-size:1.25rem;margin-top:2rem}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}"
    "td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:pre}"
    "th{vertical-align:bottom}th[scope=row],th:first-child{font-weight:400;text-align:left;"
    "white-space:normal;vertical-align:top;min-width:6rem;position:sticky;left:0;background:#fff}"
    "figure{margin:1rem 0}svg,img{max-width:100%;height:auto}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));"
    "gap:0 1rem}.maps{display:grid;gap:0 1rem;"
    "grid-template-columns:repeat(auto-fill,minmax(max(9rem,30%),1fr))}"
    ".plots svg,.maps img{width:100%}figcaption{font-size:.85rem}"
)


def pipe_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(share: float | None) -> str:
    """A share in %, without the sign."""
    return "n/a" if share is None else f"{100 * share:.1f}"


def span(values: Sequence[float | None]) -> str:
    """A share and the two ends of its interval, in %."""
    return "{} ({} to {})".format(*map(percent, values))


def share_text(share: Sequence[float | None]) -> str:
    """`94.6 % (93.0 to 96.2)`; runs of older versions have no interval of some shares."""
    value, low, high = map(percent, share)
    if share[0] is None:
        return value
    return f"{value} %" if share[1] is None else f"{value} % ({low} to {high})"


def interval_text(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """A number and the two ends of its interval; `sign="+"` writes that of positive ones too."""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in values)
    return f"{value} ({low} to {high})"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain cells, of which any may have several lines; the first row is its head."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = [
        f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:])
        for row in body
    ]
    return (
        f'<div class="scroll" tabindex="0"><table><tr>{top}</tr>'
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )


def html_page(title: str, body: str) -> str:
    """A page that reads on a phone too; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{body}</html>"
    )


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, sizes in inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "plots need matplotlib; install it with: pip install 'mm-c2c[evaluate]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def quieten(axes: Any) -> None:
    """Small labels, and no frame where there is no scale."""
    axes.tick_params(labelsize=AXIS_POINTS, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: Any, alt: str) -> str:
    """A figure as an SVG element, the same for the same figure.

    Args:
        figure: of matplotlib.
        alt: what it shows, in words, for those who cannot see it.
    """
    from matplotlib import rc_context

    # No date and no random ids: the same summary gives the same file. Letters stay letters.
    settings = rc_context({"svg.hashsalt": "mm_c2c", "svg.fonttype": "none"})
    with io.StringIO() as file, settings:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    return f'<svg role="img" aria-label="{html.escape(alt)}"' + text[text.index("<svg") + 4 :]


def write_readme(path: Path, text: str, section: str) -> None:
    """Replace what stands between the two comments of a section.

    Raises:
        InputError: the file has no such comments.
    """
    old = path.read_text(encoding="utf-8")
    begin, end = f"<!-- results: {section} -->", "<!-- end of results -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(old):
        raise InputError(f"{path} has no lines {begin!r} and {end!r} to write results between")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old), encoding="utf-8")

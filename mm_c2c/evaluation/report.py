"""A run's summary as tables: in the terminal, in Markdown, and as a page with plots.

python -m mm_c2c.evaluation.report RUN_FOLDER [--readme README.md]

writes `report.md` and `report.html` beside the run's `summary.json`; `--readme` also replaces what
stands between the two `results` comments of that file.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mm_c2c.errors import InputError, UnsupportedError

_NAMES = {
    "fused": "**fused** (question-blind slots)",
    "fused_and_caption": "fused, and the caption as words",
    "blind": "blind target",
    "caption_relay": "caption relay, generic",
    "caption_relay_options": "caption relay, options shown",
    "question_aware_relay": "caption relay, best prompt of a search",
    "tuned_relay": "caption relay, target tuned with LoRA",
    "soft_prompt": "soft-prompt connector",
    "answer_relay": "answer relay: the target repeats the source's answer",
    "true_description": "the target reads a true description",
    "source": "source answers itself",
    "shuffled": "control: another picture's cache",
    "zeroed": "control: empty cache",
}
_CONTROLS = ("shuffled", "zeroed")
_AXIS = "right, wordy or not, %"
_MARKS = ("<!-- results: mm-c2c evaluate -->", "<!-- end of results -->")


def text_table(summary: dict[str, Any]) -> str:
    """For a terminal."""
    kinds = list(summary["kinds"])
    rows = [
        ["arm", "all", "95 %", "wordy", *kinds, "first token", "total"],
        *([name, *_arm_cells(summary, name, kinds)] for name in summary["arms"]),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    leads = [
        f"Fused ahead of {name}, wordy answers counted as right: {lead} points (McNemar)."
        for name in summary["arms"]
        if (lead := _lead(summary, name))
    ]
    return "\n".join([*lines, "", *(_plain(line) for line in _findings(summary)), *leads])


def brief(summary: dict[str, Any]) -> str:
    """For a README: the table of arms, and what follows from it."""
    times = next(iter(summary["time"].values()), {"n": 0})["n"]
    arms = ", ".join(summary["config"]["arms"])
    command = f'mm-c2c evaluate "arms=[{arms}]"' if arms else "mm-c2c evaluate"
    head = (
        f"`{command}`: {summary['n']:,} questions of `{summary['config']['items']}`, exact match after "
        "normalising, 95 % bootstrap intervals; *wordy* also accepts a sentence that names the "
        "right option and no other; *fused ahead by* counts wordy answers as right, in points "
        "(McNemar's p < 0.001 where not said)."
    )
    if times:
        head += f" Times: median of {times} warm runs, raw picture and question in."
    rows = [["", "accuracy", "95 %", "wordy", "fused ahead by", "first token", "total"]]
    for name in summary["arms"]:
        cells = _arm_cells(summary, name, ())
        rows.append([_NAMES.get(name, name), *cells[:3], _lead(summary, name), *cells[3:]])
    found = "\n".join(f"- {line}" for line in _findings(summary))
    return f"{head}\n\n{pipe_table(rows)}\n\n{found}\n"


def markdown(summary: dict[str, Any]) -> str:
    """For a page that renders Markdown: what `brief` says, and accuracy by kind of question."""
    kinds = list(summary["kinds"])
    by_kind = [
        ["", *(f"{kind} ({count})" for kind, count in summary["kinds"].items())],
        *(
            [name.replace("_", " "), *_arm_cells(summary, name, kinds)[3:-2]]
            for name in summary["arms"]
        ),
    ]
    return f"{brief(summary)}\n{pipe_table(by_kind)}\n"


def page(summary: dict[str, Any], title: str) -> str:
    """One HTML file with its plots inside."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{report_body(summary)}</html>"
    )


def report_body(summary: dict[str, Any]) -> str:
    """What `page` shows beneath its title, for a page that has its own style."""
    kinds = list(summary["kinds"])
    head = ["arm", "accuracy", "95 %", "wordy", *kinds, "first token", "total", "fused ahead by"]
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells, _lead(summary, name)))
        + "</tr>"
        for name, cells in ((n, _arm_cells(summary, n, kinds)) for n in summary["arms"])
    )
    found = "".join(f"<li>{html.escape(_plain(line))}</li>" for line in _findings(summary))
    return (
        f"<p>n = {summary['n']:,}, exact match after normalising, 95 % bootstrap intervals.</p>"
        f"<figure>{plot_kinds(summary)}</figure><figure>{plot_times(summary)}</figure>"
        '<div class="scroll" tabindex="0" role="region" aria-label="All arms"><table><tr>'
        + "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        + f"</tr>{body}</table></div><ul>{found}</ul>"
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


def plot_kinds(summary: dict[str, Any]) -> str:
    """SVG: what each arm got right by kind of question, in whatever words, with intervals."""
    kinds = list(summary["kinds"])
    arms = summary["arms"]
    figure = new_figure(10, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for index, (name, row) in enumerate(arms.items()):
        values = [row["in_a_sentence"], *(row["kinds_in_a_sentence"][kind] for kind in kinds)]
        places = [i + (index - (len(arms) - 1) / 2) * width for i in range(len(values))]
        axes.bar(
            places,
            [100 * v[0] for v in values],
            width,
            yerr=[[100 * (v[0] - v[1]) for v in values], [100 * (v[2] - v[0]) for v in values]],
            error_kw={"linewidth": 0.8},
            label=name.replace("_", " "),
            color=f"C{index}",
        )
    axes.set_xticks(range(len(kinds) + 1), ["all", *kinds])
    axes.set_ylabel(_AXIS)
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return svg(figure)


def plot_times(summary: dict[str, Any]) -> str:
    """SVG: what each arm got right, in whatever words, against the time to its first token.

    Empty where nothing was timed; controls are left out.
    """
    if not summary["time"]:
        return ""
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    for index, (name, row) in enumerate(summary["time"].items()):
        if name in _CONTROLS:
            continue
        value, low, high = (100 * v for v in summary["arms"][name]["in_a_sentence"])
        axes.errorbar(
            row["ttft_ms"],
            value,
            yerr=[[value - low], [high - value]],
            fmt="o",
            color=f"C{index}",
            label=name.replace("_", " "),
        )
    axes.set_xlabel("first token, ms (median)")
    axes.set_ylabel(_AXIS)
    axes.set_ylim(0, 100)
    axes.set_xlim(0, None)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return svg(figure)


def write_readme(path: Path, text: str) -> None:
    """Replace what stands between the two comments.

    Raises:
        InputError: the file has no such comments.
    """
    old = path.read_text(encoding="utf-8")
    begin, end = _MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(old):
        raise InputError(f"{path} has no lines {begin!r} and {end!r} to write results between")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old), encoding="utf-8")


def write_report(run: Path, readme: Path | None = None) -> None:
    """Write `report.md` and `report.html` of a run, and a README's results."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{run} holds no finished run ({error.strerror}: summary.json); "
            "make one with mm-c2c evaluate --out"
        ) from error
    text = markdown(summary)
    (run / "report.md").write_text(text, encoding="utf-8")
    (run / "report.html").write_text(page(summary, summary["config"]["items"]), encoding="utf-8")
    if readme is not None:
        write_readme(readme, brief(summary))


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:.85rem}.scroll{overflow-x:auto}"
    "td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}figure{margin:1rem 0}svg{width:100%;height:auto}"
)


def _arm_cells(summary: dict[str, Any], name: str, kinds: Iterable[str]) -> list[str]:
    """Accuracy, interval, wordy, each kind, first token, total."""
    row = summary["arms"][name]
    value, low, high = row["accuracy"]
    time = summary["time"].get(name)
    return [
        _percent(value),
        f"{_percent(low)} to {_percent(high)}",
        _percent(row["in_a_sentence"][0]),
        *(_percent(row["kinds"][kind][0]) for kind in kinds),
        f"{time['ttft_ms']:.0f} ms" if time else "",
        f"{time['total_ms']:.0f} ms" if time else "",
    ]


def _findings(summary: dict[str, Any]) -> list[str]:
    """What the arms come to, one sentence each."""
    lines = []
    for floor, kept in summary.get("retention", {}).items():
        over = {"over_blind": "blind", "over_zeroed": "empty cache"}[floor]
        shown = "n/a" if None in kept else "{:.2f} ({:.2f} to {:.2f})".format(*kept)
        lines.append(f"Retention, (fused - {over}) / (source - {over}): {shown}.")
    if recovered := summary.get("recovered"):
        value, low, high = recovered["share"]
        lines.append(
            f"Know but cannot tell: of {recovered['n']} questions that the source answers right "
            f"and its caption relay does not, fused answers {_percent(value)} % "
            f"({_percent(low)} to {_percent(high)})."
        )
    if swap := summary.get("swap"):
        truth, known = swap["truth"], swap["source_right"]
        lines.append(
            f"Swapped picture, of {truth['n']} questions that two pictures answer differently: "
            f"{_percent(truth['follow'])} % of the answers are true of the swapped one, "
            f"{_percent(truth['stay'])} % of the own one; of the {known['n']} that the source "
            f"answers right for both, {_percent(known['follow'])} % and "
            f"{_percent(known['stay'])} %."
        )
    time = summary["time"]
    if {"fused", "caption_relay"} <= time.keys():
        ratio = time["caption_relay"]["ttft_ms"] / time["fused"]["ttft_ms"]
        lines.append(f"First token: fused {ratio:.1f} times as fast as the caption relay.")
    return lines


def _lead(summary: dict[str, Any], name: str) -> str:
    """By how much the fused arm is ahead of another, wordy answers counted as right."""
    test = summary.get("against", {}).get(name)
    if test is None:
        return ""
    value, low, high = (100 * x for x in test["in_a_sentence"]["difference"])
    p = test["in_a_sentence"]["p_value"]
    chance = "" if p < 0.001 else f", p = {p:.3f}"
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}{chance})"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}"


def _plain(line: str) -> str:
    return line.replace("`", "").replace("*", "")


def pipe_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def svg(figure: Any) -> str:
    """A figure as an SVG element, the same for the same figure."""
    from matplotlib import rc_context

    # No date and no random ids: the same summary gives the same file.
    with io.StringIO() as file, rc_context({"svg.hashsalt": "mm_c2c"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    return text[text.index("<svg") :]


def main() -> None:
    """Read the command line and write a run's report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--readme", type=Path, help="also replace this file's results")
    args = parser.parse_args()
    write_report(args.run, args.readme)


if __name__ == "__main__":
    main()

"""A run's summary as tables: in the terminal, in Markdown, and as a page with plots.

python -m mm_c2c.evaluation.report RUN_FOLDER [--choice RUN_FOLDER] [--readme README.md]

writes `report.md` and `report.html` beside the run's `summary.json`; `--choice` sets a run of the
same with `decoding=choice` beside it, as one column and what follows from it; `--readme` also replaces what
stands between the comments `results: NAME` and `end of results` of that file, where NAME is
`mm-c2c evaluate` unless `--section` says otherwise.
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path
from typing import Any

from mm_c2c.errors import MismatchError, run_main
from mm_c2c.evaluation.arms import FILES
from mm_c2c.evaluation.findings import BESIDE, decoding, findings, short_name
from mm_c2c.evaluation.render import (
    AXIS_POINTS,
    html_page,
    html_table,
    new_figure,
    percent,
    pipe_table,
    quieten,
    span,
    svg,
    write_readme,
)
from mm_c2c.evaluation.run import fingerprint_files, portable, reference_config
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.run_folder import read_summary

_NAMES = {
    "fused": "**fused** (question-blind slots)",
    "fused_aligned": "fused, the source reads the question (aligned words)",
    "fused_and_caption": "fused, and the caption as words",
    "blind": "blind target",
    "caption_relay": "caption relay, generic",
    "caption_relay_options": "caption relay, options shown",
    "question_aware_relay": "caption relay, best prompt of a search",
    "tuned_relay": "caption relay, target tuned with LoRA",
    "soft_prompt": "soft-prompt connector",
    "answer_relay": "answer relay: the target repeats the source's answer",
    "prefix_only": "fused, without the policy's state and actions",
    "action_only": "fused, the policy's state and actions alone",
    "instruction_only": "the target reads the instruction",
    "instruction_only_options": "the target reads the instruction, options shown",
    "true_description": "the target reads a true description",
    "true_description_options": "the target reads a true description, options shown",
    "description_and_instruction": "the target reads a true description and the instruction",
    "description_and_instruction_options": "... and the options",
    "tuned_description": "a target tuned with LoRA reads description and instruction",
    "source": "source answers itself",
    "shuffled": "control: another picture's cache",
    "zeroed": "control: empty cache",
    "own_source": "control: the target as its own source",
}
_CONTROLS = ("shuffled", "zeroed", "own_source")
_ACCENT, _PLAIN, _FAINT = "C0", "0.25", "0.6"
_AXIS = "right, wordy or not, %"
_SECTION = "mm-c2c evaluate"


def text_table(summary: dict[str, Any]) -> str:
    """For a terminal."""
    kinds = list(summary["kinds"])
    rows = [
        ["arm", *_head(summary), *kinds, "first token", "total"],
        *(
            [
                name,
                *_accuracy_cells(summary, name),
                *_kind_cells(summary, name),
                *_time_cells(summary, name),
            ]
            for name in summary["arms"]
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    leads = [
        f"Fused ahead of {name}, wordy answers counted as right: {lead} points ({_test(summary)})."
        for name in summary["arms"]
        if (lead := _lead(summary, name))
    ]
    leads += [f"Lie test, {name}: {told}." for name, told in _lie_shares(summary).items()]
    found = [decoding(summary), *findings(summary)]
    return "\n".join([*lines, "", *(_plain(line) for line in found), *leads])


def brief(summary: dict[str, Any]) -> str:
    """For a README: the table of arms, and what follows from it."""
    times = next(iter(summary["time"].values()), {"n": 0})["n"]
    head = (
        f"`{_command(summary['config'])}`: {summary['n']:,} questions of `{summary['config']['items']}`, exact match after "
        f"normalising, 95 % bootstrap intervals{_over(summary)}; *wordy* also accepts a sentence that names the "
        "right option and no other; *fused ahead by* counts wordy answers as right, in points "
        f"({_test(summary)}, p < 0.001 where not said)."
    )
    if _VQA in _head(summary):
        head += f" *{_VQA}*: VQA accuracy, how many of those asked agree."
    if "choice" in summary:
        head += f" {decoding(summary)}"
    if BESIDE in summary:
        head += f" *{_AMONG}*: the same with `decoding=choice`. {decoding(summary[BESIDE])}"
    if times:
        head += f" Times: median of {times} warm runs, raw picture and question in."
    rows = [["", *_head(summary), "fused ahead by", "first token", "total"]]
    rows += [[_NAMES.get(name, name), *_row(summary, name)] for name in summary["arms"]]
    found = "\n".join(f"- {line}" for line in findings(summary))
    parts = [head, pipe_table(rows), found]
    if "lie" in summary:
        parts.append(lie_table(summary))
    return "\n\n".join(part for part in parts if part) + "\n"


def lie_table(summary: dict[str, Any]) -> str:
    """What each arm reports of a policy whose instruction was swapped, in Markdown."""
    return f"{_lie_head(summary)}\n\n{pipe_table(_lie_rows(summary))}"


def markdown(summary: dict[str, Any]) -> str:
    """For a page that renders Markdown: what `brief` says, and accuracy by kind of question."""
    by_kind = [
        ["", *(f"{kind} ({count})" for kind, count in summary["kinds"].items())],
        *([short_name(name), *_kind_cells(summary, name)] for name in summary["arms"]),
    ]
    # What `brief` says of other decodings already.
    free = "" if "choice" in summary else f"\n{decoding(summary)}\n"
    return f"{brief(summary)}\n{pipe_table(by_kind)}\n{free}"


def page(summary: dict[str, Any], title: str) -> str:
    """One HTML file with its plots inside."""
    return html_page(title, report_body(summary))


def report_body(summary: dict[str, Any]) -> str:
    """What `page` shows beneath its title, for a page that has a style of its own."""
    arms = summary["arms"]
    shown = {name: _plain(_NAMES.get(name, name)) for name in arms}
    overall = [["", *_head(summary), "fused ahead by", "first token", "total"]]
    overall += [[shown[name], *_row(summary, name)] for name in arms]
    by_kind = [["", *(f"{kind}\nn = {count:,}" for kind, count in summary["kinds"].items())]]
    by_kind += [[shown[name], *_kind_cells(summary, name, spans=True)] for name in arms]
    found = "".join(f"<li>{html.escape(_plain(line))}</li>" for line in findings(summary))
    panels = "".join(f"<figure>{plot_kind(summary, k)}</figure>" for k in (None, *summary["kinds"]))
    times = plot_times(summary)
    beside = ""
    if BESIDE in summary:
        told = _plain(decoding(summary[BESIDE]))
        beside = f" <em>{_AMONG[0].upper()}{_AMONG[1:]}</em>: decoding=choice. {told}"
    return (
        f"<p>n = {summary['n']:,}, exact match after normalising, 95 % bootstrap intervals"
        f"{_over(summary)}. "
        "<em>Wordy</em> also accepts a sentence that names the right option and no other. "
        f"{_plain(decoding(summary))}{beside}</p>"
        f"{html_table(overall)}<ul>{found}</ul>"
        + (
            f"<p>{html.escape(_lie_head(summary))}</p>{html_table(_lie_rows(summary))}"
            if "lie" in summary
            else ""
        )
        + f'<h2>By kind of question</h2><p>Right, wordy or not.</p><div class="plots">{panels}</div>'
        f"<p>Exact match:</p>{html_table(by_kind)}"
        + (f"<h2>Accuracy against time</h2><figure>{times}</figure>" if times else "")
    )


def plot_kind(summary: dict[str, Any], kind: str | None = None) -> str:
    """SVG: what each arm got right of one kind of question, or of all, with intervals."""
    rows = {
        name: row["in_a_sentence"] if kind is None else row["kinds_in_a_sentence"][kind]
        for name, row in summary["arms"].items()
    }
    count = summary["n"] if kind is None else summary["kinds"][kind]
    figure = new_figure(3.4, 0.55 + 0.18 * len(rows))
    axes = figure.subplots()
    for place, (name, values) in enumerate(rows.items()):
        value, low, high = (100 * x for x in values)
        axes.errorbar(
            value,
            place,
            xerr=[[value - low], [high - value]],
            fmt="o",
            markersize=4,
            color=_ACCENT if name == "fused" else _FAINT if name in _CONTROLS else _PLAIN,
        )
    axes.set_yticks(range(len(rows)), map(short_name, rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"{kind or 'all'} (n = {count:,})", fontsize=AXIS_POINTS + 1)
    quieten(axes)
    told = "; ".join(f"{short_name(name)} {span(values)}" for name, values in rows.items())
    return svg(figure, f"{kind or 'All'} questions, {_AXIS}: {told}")


def plot_times(summary: dict[str, Any]) -> str:
    """SVG: what each arm got right, in whatever words, against the time to its first token.

    Empty where nothing was timed; controls are left out.
    """
    rows = {name: row for name, row in summary["time"].items() if name not in _CONTROLS}
    if not rows:
        return ""
    figure = new_figure(4.6, 2.8 + 0.1 * len(rows))
    axes = figure.subplots()
    told = []
    for index, (name, row) in enumerate(rows.items()):
        values = summary["arms"][name]["in_a_sentence"]
        value, low, high = (100 * v for v in values)
        axes.errorbar(
            row["ttft_ms"],
            value,
            yerr=[[value - low], [high - value]],
            fmt="o^s"[index // 5 % 3],  # colours alone are hard to tell apart
            color=f"C{index}",
            label=short_name(name),
        )
        told.append(f"{short_name(name)} {span(values)} after {row['ttft_ms']:.0f} ms")
    axes.set_xlabel("first token, ms (median)", fontsize=AXIS_POINTS)
    axes.set_ylabel(_AXIS, fontsize=AXIS_POINTS)
    axes.set_ylim(0, 100)
    axes.set_xlim(0, None)
    quieten(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=AXIS_POINTS)
    return svg(figure, f"{_AXIS}, against the time to the first token: {'; '.join(told)}")


def set_beside(summary: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """A summary that also shows what the same arms get right among options.

    Args:
        summary: of a run with free decoding.
        choice: of a run of the same on the same items with `decoding=choice`.

    Raises:
        MismatchError: it is a run of something else.
    """
    if "choice" in summary or "choice" not in choice:
        raise MismatchError("expected a run with decoding=free, and beside it one with choice")
    own, other = summary["config"], choice["config"]
    # A file that only one of them was given serves an arm that the other has not; an older run does
    # not say which weights its models had.
    told = (*FILES.values(), "models")
    lone = {key for key in told if None in (own.get(key), other.get(key))}
    keys = (own.keys() | other.keys()) - _MAY_DIFFER - lone
    apart = sorted(key for key in keys if own.get(key) != other.get(key))
    if summary["kinds"] != choice["kinds"]:
        apart.append("numbers of items")
    if apart:
        raise MismatchError(
            f"the run with decoding=choice is of something else ({', '.join(apart)} differ)"
        )
    return {**summary, BESIDE: choice}


def write_report(
    run: Path, readme: Path | None = None, section: str = _SECTION, choice: Path | None = None
) -> None:
    """Write `report.md` and `report.html` of a run, and a section of a README.

    Args:
        run: folder of the run.
        readme: the file whose section it is.
        section: which.
        choice: folder of a run of the same with `decoding=choice`, to show beside it.
    """
    summary = read_summary(run)
    if choice is not None:
        summary = set_beside(summary, read_summary(choice))
    text = markdown(summary)
    (run / "report.md").write_text(text, encoding="utf-8")
    (run / "report.html").write_text(
        page(summary, f"Evaluation: {summary['config']['items']}"), encoding="utf-8"
    )
    if readme is not None:
        write_readme(readme, brief(summary), section)


_VQA = "VQA"
_AMONG = "among options"
# What questions may have in common, as `clusters_of` names it.
_UNITS = ("episodes", "pictures", "recordings")
# In the order in which a command names them.
_COMMAND = (
    *("arms", "bridge", "items", "source", "kinds", "limit", "request", *FILES.values()),
    *("answer_tokens", "batch_size", "timed", "resamples", "seed", "dtype", "decoding"),
)
# Of two runs that are shown together: what says nothing of what was asked, and of whom.
_MAY_DIFFER = {"arms", "bridge", "decoding", "timed", "resamples", "seed"}


def _command(config: dict[str, Any]) -> str:
    """What makes such a run: every setting that is not the command's own."""
    usual = reference_config()
    given = {key: getattr(usual, key) for key in FILES.values()}
    files = {key: path and fingerprint_files(path) for key, path in given.items()}
    plain = portable(usual) | {"source": SOURCE_NAME, **files}
    if config.get("bridge") is not None:
        plain |= dict.fromkeys(("items", "source", *files))
    words = ["mm-c2c evaluate"]
    for key in _COMMAND:
        value = config.get(key)
        if value in (None, plain[key]):
            continue
        if key in ("bridge", *FILES.values()):
            # A run keeps what is in these, not where they lay.
            value = "FILE" if key == "prompts" else "FOLDER"
        elif isinstance(value, list):
            value = f"[{', '.join(value)}]"
        word = f"{key}={value}"
        words.append(word if re.fullmatch(r"[\w./=-]+", word) else f'"{word}"')
    return " ".join(words)


def _head(summary: dict[str, Any]) -> list[str]:
    """What `_accuracy_cells` are; VQA accuracy and accuracy among options where counted."""
    counted = all("vqa_accuracy" in row for row in summary["arms"].values())
    beside = [_AMONG] if BESIDE in summary else []
    return ["accuracy", "95 %", "wordy", *([_VQA] if counted else []), *beside]


def _row(summary: dict[str, Any], name: str) -> list[str]:
    """An arm's accuracy, the lead over it, and its times."""
    cells = _accuracy_cells(summary, name)
    return [*cells, _lead(summary, name), *_time_cells(summary, name)]


def _accuracy_cells(summary: dict[str, Any], name: str) -> list[str]:
    row = summary["arms"][name]
    value, low, high = row["accuracy"]
    cells = [percent(value), f"{percent(low)} to {percent(high)}"]
    cells.append(percent(row["in_a_sentence"][0]))
    if _VQA in _head(summary):
        cells.append(percent(row["vqa_accuracy"][0]))
    if BESIDE in summary:
        other = summary[BESIDE]["arms"].get(name)
        cells.append(span(other["accuracy"]) if other else "")
    return cells


def _kind_cells(summary: dict[str, Any], name: str, *, spans: bool = False) -> list[str]:
    """Accuracy in each kind of question, with its interval in a line of its own or without."""
    cells = []
    for value, low, high in summary["arms"][name]["kinds"].values():
        below = f"\n{percent(low)} to {percent(high)}" if spans else ""
        cells.append(percent(value) + below)
    return cells


def _time_cells(summary: dict[str, Any], name: str) -> list[str]:
    """Time to the first token and to the last."""
    time = summary["time"].get(name)
    return [f"{time[key]:.0f} ms" if time else "" for key in ("ttft_ms", "total_ms")]


def _lead(summary: dict[str, Any], name: str) -> str:
    """By how much the fused arm is ahead of another, wordy answers counted as right."""
    test = summary.get("against", {}).get(name)
    if test is None:
        return ""
    value, low, high = (100 * x for x in test["in_a_sentence"]["difference"])
    p = test["in_a_sentence"]["p_value"]
    chance = "" if p < 0.001 else f", p = {p:.3f}"
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}{chance})"


def _over(summary: dict[str, Any]) -> str:
    """What the intervals are over, where that is not the questions."""
    return "".join(f" over {summary[unit]:,} {unit}" for unit in _UNITS if unit in summary)


def _test(summary: dict[str, Any]) -> str:
    return next((f"sign flips of {unit}" for unit in _UNITS if unit in summary), "McNemar")


def _lie_head(summary: dict[str, Any]) -> str:
    return (
        f"Instruction swapped after the fact, {summary['lie']['n']:,} questions: share of answers, "
        "wordy or not, that report what the policy does, what it was told, or neither, in % "
        f"(95 %{_over(summary)})."
    )


def _lie_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["", "what it does", "what it was told", "neither"]]
    for name, shares in summary["lie"]["arms"].items():
        cells = [span(shares[key]) for key in ("does", "told", "neither")]
        rows.append([_plain(_NAMES.get(name, name)), *cells])
    return rows


def _lie_shares(summary: dict[str, Any]) -> dict[str, str]:
    arms = summary.get("lie", {}).get("arms", {})
    return {
        name: ", ".join(f"{key} {span(values)}" for key, values in shares.items())
        for name, shares in arms.items()
    }


def _plain(line: str) -> str:
    return line.replace("`", "").replace("*", "")


def main() -> None:
    """Read the command line and write a run's report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--choice", type=Path, help="a run of the same with decoding=choice")
    parser.add_argument("--readme", type=Path, help="also replace this file's results")
    parser.add_argument("--section", default=_SECTION, help="which of its sections")
    args = parser.parse_args()
    write_report(args.run, args.readme, args.section, args.choice)


if __name__ == "__main__":
    run_main(main)

"""The log of a training, a CSV of one row each few steps, and its curves.

python -m mm_c2c.training.log LOG.csv [LOG.csv ...] --out curves.png
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path

from mm_c2c.errors import ConfigError, InputError, run_main
from mm_c2c.run_folder import make_room

_COLUMNS = 3
_NO_LOSSES = ("step", "seconds", "tokens_per_s", "open_gates")


def append_log(path: Path, row: Mapping[str, float]) -> None:
    """Add a row; a new file gets the names of its columns first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(row)
        # A step is read back as a whole number: no exponent, however large it is.
        writer.writerow([v if isinstance(v, int) else f"{v:.6g}" for v in row.values()])


def cut_log(path: Path, last_step: int) -> None:
    """Drop the rows after a step: a training that goes on from it goes through those steps again."""
    if not path.exists():
        return
    head, *rows = _whole_lines(path) or [""]
    kept = [row for row in rows if int(row.partition(",")[0]) <= last_step]
    if not kept:
        path.unlink()
        return
    scratch = path.with_suffix(".part")
    scratch.write_text(head + "".join(kept), encoding="utf-8")
    scratch.replace(path)


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a log, by name; the first is the step.

    Raises:
        ConfigError: it holds no steps yet.
        InputError: it is no log, or damaged.
    """
    try:
        rows = list(csv.DictReader(_whole_lines(path)))
        columns = {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a log ({error})") from error
    if not rows:
        raise ConfigError(f"{path} holds no steps yet")
    if "step" not in columns:
        raise InputError(f"{path} is no log: expected a column step, got {', '.join(columns)}")
    return columns


def _whole_lines(path: Path) -> list[str]:
    """The last line is left out where a killed training has written part of it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def plot(logs: list[Path], out: Path) -> None:
    """One panel a log, its losses over steps, on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    columns = min(len(logs), _COLUMNS)
    rows = -(-len(logs) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for panel in grid.flat[len(logs) :]:
        panel.set_axis_off()
    for panel, path in zip(grid.flat, logs, strict=False):
        log = read_log(path)
        for name, values in log.items():
            if name not in _NO_LOSSES:
                panel.plot(log["step"], values, label=name.replace("_", " "), linewidth=1.2)
        part = path.stem.removeprefix("log").replace("_", " ")
        panel.set(title=f"{path.parent.name}{part}", xlabel="step", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(frameon=False)
    figure.savefig(out, dpi=120)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    make_room(args.out)
    plot(args.logs, args.out)


if __name__ == "__main__":
    run_main(main)

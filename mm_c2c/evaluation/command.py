"""Command lines that several modules of this folder have alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mm_c2c.bridge import Bridge
from mm_c2c.config import parse_overrides
from mm_c2c.evaluation.pair import PairConfig, load_pair
from mm_c2c.evaluation.render import write_readme
from mm_c2c.run_folder import make_room, write_json

C = TypeVar("C", bound=PairConfig)


def run_measurement(
    kind: type[C],
    measure: Callable[[Bridge, C], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    about: str | None,
    argv: Sequence[str] | None,
) -> None:
    """`key=value ... [--out FILE]`: measure something of a bridge and print it.

    `about` is what `--help` says.

    Raises:
        InputError: the folder of `--out` cannot be made; nothing was measured then.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("overrides", nargs="+", metavar="key=value")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args(argv)
    config = parse_overrides(kind, args.overrides)
    if args.out:
        make_room(args.out)
    result = measure(load_pair(config), config)
    print(table(result))  # noqa: T201
    if args.out:
        write_json(args.out, result)


def run_section(
    report: Callable[[Path], str], program: str, about: str | None, argv: Sequence[str] | None
) -> None:
    """`RUN --readme FILE --section NAME`: write what a report says of a folder of `program`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("run", type=Path, help=f"folder of a run of {program}")
    parser.add_argument("--readme", type=Path, required=True, help="the file to write into")
    parser.add_argument("--section", required=True, help="which of its sections")
    args = parser.parse_args(argv)
    write_readme(args.readme, report(args.run), args.section)

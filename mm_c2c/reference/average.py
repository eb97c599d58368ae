"""Write the average of two saved bridges, half of either, rounded to float16.

    python -m mm_c2c.reference.average FIRST SECOND --out FOLDER

What a bridge loses of the old when a training goes on from it towards something new, it has largely
kept half way (Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mm_c2c.errors import MismatchError, run_main
from mm_c2c.pretrained import OWN_WEIGHTS, WEIGHTS_NAME, read_header, read_tensors, write_bridge


def average(first: Path, second: Path, out: Path) -> None:
    """Write `out`, a saved bridge as the first one is.

    Raises:
        MismatchError: one is no saved bridge or damaged, or their links or models differ.
    """
    headers = [read_header(folder) for folder in (first, second)]
    own, other = ({**header, OWN_WEIGHTS: None} for header in headers)
    differ = [key for key in own if own[key] != other.get(key)]
    if differ:
        raise MismatchError(
            f"{first} and {second} differ in {', '.join(differ)}; expected one bridge before and "
            "after a training"
        )
    ours, theirs = (read_tensors(folder / WEIGHTS_NAME) for folder in (first, second))
    mean = {name: ((ours[name].float() + theirs[name].float()) / 2).half() for name in ours}
    write_bridge(out, headers[0], mean)


def main(argv: Sequence[str] | None = None) -> None:
    """Read two folders and write a third."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    average(args.first, args.second, args.out)


if __name__ == "__main__":
    run_main(main)

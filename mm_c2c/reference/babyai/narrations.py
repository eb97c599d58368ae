"""How much of a reader's sentences about the policy is true, part by part.

    python -m mm_c2c.reference.babyai.narrations RUN

RUN is the folder of a finished `mm-c2c evaluate items=.../narration.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_c2c.evaluation.statistics import accuracy, draw_resamples
from mm_c2c.reference.babyai.questions import THING_KINDS

_THING = rf"the (\w+) ({'|'.join(THING_KINDS)})\b"
_PARTS = {
    "move": r"\b(turns left|turns right|goes forward|reaches out|opens its hands)\b",
    "intent": r"\bto (go to|pick up|put)\b",
    "colour": _THING,
    "kind": _THING,
    "side": r"\b(on its left|on its right|straight ahead|behind it)\b",
}
_RESAMPLES = 2000


def parts(sentence: str) -> dict[str, str | None]:
    """What a sentence, such as `narrate` makes them, says: None where it says nothing of it.

    Of several things it is the last, which is the goal; what is put down stands before it.
    """
    found: dict[str, str | None] = {}
    for name, pattern in _PARTS.items():
        *_, last = [None, *re.finditer(pattern, sentence.lower())]
        found[name] = last and last.group(2 if name == "kind" else 1)
    return found


def score(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, tuple[float, float, float]]:
    """Share of sentences whose part is true, in %, with its 95 % interval over episodes.

    Args:
        rows: of `answers.jsonl`.
        arm: whose answers.
    """
    said = [parts(row["answers"][arm]) for row in rows]
    true = [parts(row["gold"]) for row in rows]
    hits = {name: [a[name] == b[name] for a, b in zip(said, true, strict=True)] for name in _PARTS}
    hits["all"] = [a == b for a, b in zip(said, true, strict=True)]
    draws = draw_resamples(len(rows), _RESAMPLES, 0, [row["episode"] for row in rows])
    shares = {name: accuracy(np.array(found), draws) for name, found in hits.items()}
    return {name: (100 * s.value, 100 * s.low, 100 * s.high) for name, s in shares.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    lines = (parser.parse_args(argv).run / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = (*_PARTS, "all")
    table = [f"| {len(rows)} sentences | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for arm in rows[0]["answers"]:
        found = score(rows, arm)
        cells = ["{:.1f} ({:.1f} to {:.1f})".format(*found[name]) for name in names]
        table.append(f"| {arm} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

"""How much of a reader's sentences about the policy is true, part by part.

    python -m mm_c2c.reference.narrations {babyai,metaworld} RUN

RUN is the folder of a finished `mm-c2c evaluate` of narrations.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_c2c.errors import run_main
from mm_c2c.evaluation.render import interval_text
from mm_c2c.evaluation.statistics import accuracy, draw_resamples
from mm_c2c.reference.babyai import questions as babyai
from mm_c2c.reference.metaworld import questions as metaworld
from mm_c2c.run_folder import read_rows

POLICIES = {"babyai": babyai.SENTENCE_PARTS, "metaworld": metaworld.SENTENCE_PARTS}
"""Of each policy's sentences, the parts and a pattern whose only group is what is said there."""

_RESAMPLES = 2000


def parts(sentence: str, patterns: Mapping[str, str]) -> dict[str, str | None]:
    """What a sentence says in its parts: None where it says nothing of one.

    Of several things it is the last, which is the goal; what is put down stands before it.

    Args:
        sentence: such as the policies' `questions` make them.
        patterns: one of `POLICIES`.
    """
    found: dict[str, str | None] = {}
    for name, pattern in patterns.items():
        *_, last = [None, *re.findall(pattern, sentence.lower())]
        found[name] = last
    return found


def score(
    rows: Sequence[dict[str, Any]], arm: str, patterns: Mapping[str, str]
) -> dict[str, tuple[float, float, float]]:
    """Share of sentences whose part is true, in %, with its 95 % interval over episodes.

    Args:
        rows: of `answers.jsonl`.
        arm: whose answers.
        patterns: one of `POLICIES`.
    """
    said = [parts(row["answers"][arm], patterns) for row in rows]
    true = [parts(row["gold"], patterns) for row in rows]
    hits = {
        name: [a[name] == b[name] for a, b in zip(said, true, strict=True)] for name in patterns
    }
    hits["all"] = [a == b for a, b in zip(said, true, strict=True)]
    draws = draw_resamples(len(rows), _RESAMPLES, 0, [row["episode"] for row in rows])
    shares = {name: accuracy(np.array(found), draws) for name, found in hits.items()}
    return {name: (100 * s.value, 100 * s.low, 100 * s.high) for name, s in shares.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("policy", choices=POLICIES)
    parser.add_argument("run", type=Path)
    args = parser.parse_args(argv)
    patterns = POLICIES[args.policy]
    rows = read_rows(args.run / "answers.jsonl")
    names = (*patterns, "all")
    table = [f"| {len(rows)} sentences | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for arm in rows[0]["answers"]:
        found = score(rows, arm, patterns)
        cells = [interval_text(found[name], digits=1) for name in names]
        table.append(f"| {arm} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    run_main(main)

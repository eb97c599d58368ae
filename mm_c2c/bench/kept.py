"""How much faster a training is once its source caches are kept on disk.

python -m mm_c2c.bench.kept CONFIG [key.sub=value ...] [--true-width] [--rounds N]

Both ways take turns on the same examples within one process, on random weights as in `--dry-run`,
so that whatever slows the machine slows both. Pictures are neither read nor hashed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_c2c.bench.rounds import ratio
from mm_c2c.config import load_config
from mm_c2c.errors import run_main
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.dry_run import blank_trainer
from mm_c2c.training.kept import KeptCaches
from mm_c2c.training.run import Trainer


def bench(config: TrainingConfig, *, true_width: bool = False, rounds: int = 5) -> dict[str, Any]:
    """Time steps of the generate phase, forward and backward.

    Returns:
        Plain values: `ms` a step, the median of each way, and `speed` of the kept way against the
        other as [median, low, high] of the rounds' ratios.
    """
    trainer = blank_trainer(replace(config, kept=None), true_width=true_width)
    step = trainer.config.phases.steps - 1
    taken: dict[str, list[float]] = {"plain": [], "kept": []}
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptCaches(Path(folder), budget=10**12)
        for turn in tqdm(range(rounds + 1), desc="rounds"):
            for name in taken:
                trainer.kept = kept if name == "kept" else None
                seconds = _run_step(trainer, step)
                if turn:  # the first fills the folder
                    taken[name].append(seconds)
    return {
        "ms": {name: 1000 * statistics.median(times) for name, times in taken.items()},
        "speed": ratio(taken["plain"], taken["kept"]),
        "rounds": rounds,
        "true_width": true_width,
    }


def _run_step(trainer: Trainer, step: int) -> float:
    """Seconds that a step takes."""
    started = time.perf_counter()
    pieces = trainer.config.accumulation
    for piece in range(pieces):
        with trainer.accelerator.autocast():
            cost = trainer.loss(step * pieces + piece, random.Random(0))
        cost.backward()
    trainer.bridge.fusers.zero_grad()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--true-width", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    config = load_config(TrainingConfig, args.config, args.overrides)
    result = bench(config, true_width=args.true_width, rounds=args.rounds)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_main(main)

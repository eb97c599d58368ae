"""Write the policy's episodes as pictures and questions, as `mm-c2c train` and `evaluate` read them.

python -m mm_c2c.reference.metaworld.make_items --rollouts FOLDER --split reader --out FOLDER

Of steered episodes (`--steered`) `text` is what the policy was told, and the answers say what it did;
`told` is what a reader would answer that believes the instruction. What goes wrong there is not
asked: that it was told something else.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mm_c2c.errors import run_main
from mm_c2c.reference.metaworld.demonstrations import read_shard, shards_of
from mm_c2c.reference.metaworld.questions import (
    HORIZON,
    KINDS,
    OPTIONS,
    Moment,
    caption,
    failure,
    questions,
)
from mm_c2c.reference.metaworld.rollouts import steer
from mm_c2c.reference.metaworld.tasks import SPLITS, TASKS, read_truth, state_of


def moment_of(task: str, episode: dict[str, Tensor], look: int) -> Moment:
    """A look of an episode that `rollouts` kept."""
    raw, step = episode["raw"].double().numpy(), int(episode["frame_steps"][look])
    end = len(raw) - 1
    later = raw[min(step + HORIZON, end)]
    return Moment(
        task=task,
        reason=failure(task, raw, done=bool(episode["success"][-1])),
        truth=read_truth(task, raw[step]),
        touching=bool(episode["touching"][look]),
        moved=later[:3] - raw[step, :3],
        gripper_change=float(later[3] - raw[step, 3]),
        progress=step / end,
    )


def pick_looks(
    steps: Sequence[int], count: int, every: int | None, rng: random.Random
) -> list[int]:
    """Looks of an episode, in order: so many at random, or those at multiples of so many steps.

    Looks at random are spread over all of an episode, so that their steps tell its length.

    Args:
        steps: at which the policy looked.
        count: looks at random, at most.
        every: steps; takes the place of `count`.
        rng: picks which.
    """
    if every is None:
        return sorted(rng.sample(range(len(steps)), min(count, len(steps))))
    return [look for look, step in enumerate(steps) if step % every == 0]


def share_out(rows: Sequence[dict[str, Any]], per_kind: int) -> list[dict[str, Any]]:
    """At most so many rows of a kind, of each answer the same number as far as they go.

    Narrations are all different, and are taken as they come.
    """
    kept = []
    for kind in KINDS:
        waiting: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["kind"] == kind:
                waiting.setdefault("" if kind == "narration" else row["answer"], []).append(row)
        taken = 0
        while taken < per_kind and any(waiting.values()):
            for queue in waiting.values():
                if queue and taken < per_kind:
                    kept.append(queue.pop())
                    taken += 1
    return kept


def main() -> None:
    """Take looks of every episode at random."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--looks", type=int, default=6, help="of an episode, at random")
    parser.add_argument(
        "--every", type=int, help="instead, looks at every so many steps, the same in all episodes"
    )
    parser.add_argument("--until", type=int, help="no look later than this step")
    parser.add_argument("--per-kind", type=int, help="at most so many questions of a kind")
    parser.add_argument("--steered", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SPLITS[args.split])
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        told = TASKS[steer(task) if args.steered else task]
        believed = {"task": told.doing, "object": told.object} if args.steered else {}
        for number, path in enumerate(shards_of(args.rollouts, args.split, task)):
            (episode,) = read_shard(path)
            steps = [
                step
                for step in episode["frame_steps"].tolist()
                if args.until is None or step <= args.until
            ]
            for look in pick_looks(steps, args.looks, args.every, rng):
                moment, step = moment_of(task, episode, look), steps[look]
                file = f"{task}-{number:04d}-{step:03d}.png"
                Image.fromarray(episode["images"][look].numpy()).save(args.out / file)
                state = state_of(np.asarray(episode["raw"][step]))
                shown = {
                    "image": file,
                    "text": told.instruction,
                    "state": [round(float(value), 5) for value in state],
                    "caption": caption(moment),
                    "instruction": told.instruction,
                    "episode": f"{task}-{number:04d}",
                    "step": step,
                    "success": moment.done,
                }
                for question in questions(moment, rng):
                    if args.steered and question.kind == "why":
                        continue
                    options = OPTIONS.get(question.kind)
                    row = {**shown, **question._asdict()}
                    if options:
                        row["options"] = options
                    if question.kind in believed:
                        row["told"] = believed[question.kind]
                    rows.append(row)
    if args.per_kind is not None:
        rng.shuffle(rows)
        rows = share_out(rows, args.per_kind)
        rows.sort(key=lambda row: row["image"])
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (args.out / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)

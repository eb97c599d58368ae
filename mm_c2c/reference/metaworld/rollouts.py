"""Let the policy act, keep its episodes, and count its successes; goes on where it was stopped.

MUJOCO_GL=egl python -m mm_c2c.reference.metaworld.rollouts --policy FOLDER --out FOLDER

`--steered` tells the policy the next task's instruction in each scene.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mm_c2c.errors import run_main
from mm_c2c.evaluation.statistics import accuracy, draw_resamples, wilson
from mm_c2c.reference.metaworld.demonstrations import read_shard, save_shard, shards_of
from mm_c2c.reference.metaworld.policy import EXECUTED, load_policy, to_actions
from mm_c2c.reference.metaworld.tasks import (
    MAX_STEPS,
    SPLITS,
    STATE_KEY,
    TASKS,
    MetaWorldEnv,
    picture_of,
)
from mm_c2c.sources.action import PI0Source
from mm_c2c.sources.base import SourceInput

logger = logging.getLogger(__name__)

_RESAMPLES = 10_000


def steer(task: str) -> str:
    """The task whose instruction is given in the scene of another: the next one."""
    names = list(TASKS)
    return names[(names.index(task) + 1) % len(names)]


def input_of(observation: dict[str, Any], instruction: str) -> SourceInput:
    """What the policy is shown of an observation."""
    return SourceInput(
        text=instruction,
        images=(picture_of(observation),),
        state=torch.from_numpy(observation[STATE_KEY]),
    )


def act_together(
    policy: PI0Source, envs: dict[str, MetaWorldEnv], told: dict[str, str], seed: int
) -> dict[str, dict[str, NDArray[Any]]]:
    """One episode of each task, side by side; the policy looks again after half a chunk.

    Args:
        policy: the trained policy.
        envs: by task.
        told: the instruction of each task.
        seed: of the episodes.

    Returns:
        By task: `images` `(looks, 96, 96, 3)` uint8 of the steps `frame_steps` `(looks,)`, the
        `chunks` `(looks, action_horizon, 4)` planned there, and whether the robot was `touching`
        `(looks,)`; of all steps `raw` `(steps, 39)` and `success` `(steps,)`, the last ones after
        the last action, and `actions` `(steps, 4)` as carried out, the last one zero.
    """
    shown = {task: env.reset(seed=seed)[0] for task, env in envs.items()}
    kept: dict[str, dict[str, list[Any]]] = {
        task: {
            key: []
            for key in ("images", "frame_steps", "chunks", "touching", "raw", "success", "actions")
        }
        for task in envs
    }
    for step in range(0, MAX_STEPS, EXECUTED):
        acting = [task for task, env in envs.items() if not env.success]
        if not acting:
            break
        if step:
            shown = {task: envs[task].observe() for task in acting}
        planned = policy.act([input_of(shown[task], told[task]) for task in acting])
        chunks = to_actions(planned, policy.processor)
        for task, chunk in zip(acting, chunks, strict=True):
            env, episode = envs[task], kept[task]
            episode["images"].append(np.asarray(picture_of(shown[task])))
            episode["frame_steps"].append(step)
            episode["chunks"].append(chunk)
            episode["touching"].append(env.touching)
            for action in chunk[:EXECUTED]:
                episode["raw"].append(env.raw)
                episode["success"].append(env.success)
                episode["actions"].append(action)
                env.advance(action)
                if env.success:
                    break
    for task, env in envs.items():
        kept[task]["raw"].append(env.raw)
        kept[task]["success"].append(env.success)
        kept[task]["actions"].append(np.zeros(4))
    return {
        task: {
            key: np.stack(values).astype(np.float32)
            if key in ("raw", "actions", "chunks")
            else np.stack(values)
            for key, values in episode.items()
        }
        for task, episode in kept.items()
    }


def count_successes(
    folder: Path, split: str, tasks: Iterable[str] = TASKS, *, policy: str, steered: bool
) -> dict[str, Any]:
    """Share of episodes that ended in success, of each task and over all, with 95 % intervals.

    Wilson's for a task; for the mean of the tasks, a bootstrap over the numbers of the episodes.
    """
    hits = {
        task: np.array(
            [
                bool(episode["success"][-1])
                for path in shards_of(folder, split, task)
                for episode in read_shard(path)
            ]
        )
        for task in tasks
    }
    rows: dict[str, Any] = {"policy": policy, "split": split, "steered": steered, "tasks": {}}
    for task, found in hits.items():
        low, high = wilson(int(found.sum()), len(found))
        rows["tasks"][task] = {
            "episodes": len(found),
            "success": float(found.mean()),
            "low": low,
            "high": high,
        }
    together = np.stack(list(hits.values())).mean(0)
    mean = accuracy(together, draw_resamples(len(together), _RESAMPLES, seed=0))
    rows["mean"] = {"success": mean.value, "low": mean.low, "high": mean.high}
    return rows


def main() -> None:
    """Write the shards that are not there yet, then the counts."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, default="unseen")
    parser.add_argument("--episodes", type=int, default=50, help="of each task")
    parser.add_argument("--first", type=int, default=0, help="number of the first episode")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steered", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    policy = load_policy(args.policy)
    envs = {task: MetaWorldEnv(task) for task in args.tasks}
    told = {task: TASKS[steer(task) if args.steered else task].instruction for task in envs}
    for number in range(args.first, args.first + args.episodes):
        paths = {task: args.out / f"{args.split}-{task}-{number:04d}.safetensors" for task in envs}
        if all(path.exists() for path in paths.values()):
            continue
        episodes = act_together(policy, envs, told, SPLITS[args.split] + number)
        for task, episode in episodes.items():
            save_shard(paths[task], [episode])
        ended = {task: (len(e["raw"]) - 1, bool(e["success"][-1])) for task, e in episodes.items()}
        logger.info("episode %d: %s", number, ended)
    counts = count_successes(
        args.out, args.split, args.tasks, policy=args.policy.name, steered=args.steered
    )
    (args.out / "success.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", counts)


if __name__ == "__main__":
    run_main(main)

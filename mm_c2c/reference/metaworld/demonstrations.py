"""Episodes of Meta-World's scripted experts, in shards; goes on where it was stopped.

MUJOCO_GL=egl python -m mm_c2c.reference.metaworld.demonstrations --out runs/metaworld/demonstrations

An expert's action is the label of each step. What is carried out is that action with noise, and at
the start of about half of the episodes a random push: the labels then also show the way back.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_c2c.errors import InputError, run_main
from mm_c2c.reference.metaworld.tasks import ACTION_DIM, MAX_STEPS, SPLITS, TASKS, MetaWorldEnv

logger = logging.getLogger(__name__)

# Standard deviation of the noise on the hand's motion, by turns one for an episode.
NOISE = (0.0, 0.15, 0.3)
# Steps between pictures; actions are kept of all steps.
STRIDE = 3
# Steps after success, which show what to do when all is done.
EXTRA_STEPS = 6
EPISODES_PER_SHARD = 8
# What an episode has of each picture; it has the rest of each step.
_PER_FRAME = ("images", "frame_steps", "chunks", "touching")


def expert_of(task: str) -> Any:
    """The scripted policy of a task: `(39,)` observation to `(4,)` action in [-1, 1]."""
    from metaworld.policies import ENV_POLICY_MAP

    kind: Any = ENV_POLICY_MAP[TASKS[task].environment]
    policy = kind()
    # Some experts write into what they are given.
    return lambda raw: np.clip(policy.get_action(raw.copy()), -1, 1)


def demonstrate(env: MetaWorldEnv, expert: Any, seed: int) -> dict[str, NDArray[Any]]:
    """One episode.

    Returns:
        `images` `(frames, 96, 96, 3)` uint8 of the steps `frame_steps` `(frames,)`; of all steps
        `raw` `(steps, 39)`, the expert's `labels` `(steps, 4)`, and `success` `(steps,)` before
        each of them.
    """
    rng = np.random.default_rng(seed)
    noise = np.array([NOISE[seed % len(NOISE)]] * 3 + [0.0])  # a loose grip loses the puck
    push, push_steps = rng.uniform(-1, 1, ACTION_DIM), int(rng.integers(2) * rng.integers(4, 16))
    env.reset(seed=seed)
    images, frame_steps, raws, labels, success = [], [], [], [], []
    left = EXTRA_STEPS
    for step in range(MAX_STEPS):
        if step % STRIDE == 0:
            images.append(env.render())
            frame_steps.append(step)
        label = expert(env.raw)
        raws.append(env.raw)
        labels.append(label)
        success.append(env.success)
        left -= env.success
        if left < 0:
            break
        env.advance(push if step < push_steps else label + noise * rng.standard_normal(ACTION_DIM))
    return {
        "images": np.stack(images),
        "frame_steps": np.array(frame_steps),
        "raw": np.stack(raws).astype(np.float32),
        "labels": np.stack(labels).astype(np.float32),
        "success": np.array(success),
    }


def save_shard(path: Path, episodes: list[dict[str, NDArray[Any]]]) -> None:
    """Write episodes one after the other, with `lengths` and `frames`, their numbers of each."""
    joined = {
        key: torch.from_numpy(np.concatenate([episode[key] for episode in episodes]))
        for key in episodes[0]
    }
    joined["lengths"] = torch.tensor([len(episode["raw"]) for episode in episodes])
    joined["frames"] = torch.tensor([len(episode["images"]) for episode in episodes])
    scratch = path.with_suffix(".part")
    save_file(joined, scratch)
    scratch.replace(path)


def read_shard(path: Path) -> list[dict[str, Tensor]]:
    """The episodes of a shard."""
    joined = load_file(path)
    lengths, frames = joined.pop("lengths").tolist(), joined.pop("frames").tolist()
    parts = {
        key: value.split(frames if key in _PER_FRAME else lengths) for key, value in joined.items()
    }
    return [dict(zip(parts, episode, strict=True)) for episode in zip(*parts.values(), strict=True)]


def shards_of(folder: Path, split: str, task: str) -> list[Path]:
    """The shards of a task, in order."""
    found = sorted(folder.glob(f"{split}-{task}-*.safetensors"))
    if not found:
        raise InputError(f"{folder} holds no shard {split}-{task}-*; run `demonstrations` first")
    return found


def main() -> None:
    """Write the shards that are not there yet, all tasks in turn."""
    warnings.filterwarnings("ignore", message=".*Box.*precision.*")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--shards", type=int, default=8, help="a task, of 8 episodes each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    envs = {task: MetaWorldEnv(task) for task in TASKS}
    for number in range(args.shards):
        for task, env in envs.items():
            path = args.out / f"{args.split}-{task}-{number:04d}.safetensors"
            if path.exists():
                continue
            first = SPLITS[args.split] + number * EPISODES_PER_SHARD
            seeds = range(first, first + EPISODES_PER_SHARD)
            episodes = [demonstrate(env, expert_of(task), seed) for seed in seeds]
            save_shard(path, episodes)
            done = sum(bool(episode["success"][-1]) for episode in episodes)
            frames = sum(len(episode["images"]) for episode in episodes)
            logger.info("%s: %d of %d done, %d frames", path.name, done, len(seeds), frames)


if __name__ == "__main__":
    run_main(main)

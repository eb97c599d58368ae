"""Demonstrations by BabyAI's own bot, which is asked at every step what it would do.

    python -m mm_c2c.reference.babyai.demonstrations --out FOLDER [--steps N]

What is executed is sometimes a random move in place of the bot's, so that the policy learns the way
back; what is learned is always the bot's advice.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mm_c2c.reference.babyai.levels import ACTIONS, EASY, LEVELS, SEEDS, make_env, reset
from mm_c2c.reference.babyai.policy import CHUNK

# Shares of random moves, one drawn for each episode.
_NOISE = (0.0, 0.15, 0.4)
_MOVES = tuple(ACTIONS.index(name) for name in ("left", "right", "forward"))
_DONE = ACTIONS.index("done")
_MASKED = -1


@dataclass(frozen=True)
class Demonstrations:
    """Steps of episodes, one episode after the other.

    Attributes:
        views: `(steps, columns, rows, 3)` uint8, symbols of the partial view.
        advised: `(steps,)` uint8: what the bot would do.
        executed: `(steps,)` uint8: what was done.
        starts: `(episodes + 1,)` int64: the first step of each, and the end.
        missions: of each episode.
    """

    views: NDArray[np.uint8]
    advised: NDArray[np.uint8]
    executed: NDArray[np.uint8]
    starts: NDArray[np.int64]
    missions: list[str]

    def chunks(self) -> NDArray[np.int64]:
        """`(steps, CHUNK)`: the bot's next actions.

        `done` after the end; -1 from where a random move makes what comes later another plan.
        """
        owner = np.repeat(np.arange(len(self.missions)), np.diff(self.starts))
        end = self.starts[owner + 1]
        step = np.arange(len(owner))
        labels = np.empty((len(owner), CHUNK), dtype=np.int64)
        intact = np.ones(len(owner), dtype=bool)
        for ahead in range(CHUNK):
            at = step + ahead
            inside = at < end
            index = np.minimum(at, len(owner) - 1)
            labels[:, ahead] = np.where(inside, self.advised[index], _DONE)
            labels[~intact, ahead] = _MASKED
            intact &= ~inside | (self.advised[index] == self.executed[index])
        return labels

    def save(self, path: Path) -> None:
        """Write an `.npz`."""
        scratch = path.with_suffix(".part.npz")
        np.savez_compressed(
            scratch,
            views=self.views,
            advised=self.advised,
            executed=self.executed,
            starts=self.starts,
            missions=np.array(self.missions),
        )
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(
                data["views"],
                data["advised"],
                data["executed"],
                data["starts"],
                data["missions"].tolist(),
            )


def collect(env_ids: Sequence[str], steps: int, first_seed: int) -> Demonstrations:
    """Ask the bot about at least so many steps, the levels in turn, a seed an episode."""
    envs = [make_env(env_id) for env_id in env_ids]
    views, advised, executed, starts, missions = [], [], [], [0], []
    with tqdm(total=steps, desc=", ".join(env_ids), mininterval=10) as bar:
        for number, seed in enumerate(range(first_seed, SEEDS["train"].stop)):
            if len(advised) >= steps:
                break
            env = envs[number % len(envs)]
            for view, advice, action in _episode(env, seed):
                views.append(view)
                advised.append(advice)
                executed.append(action)
            missions.append(env.mission)
            bar.update(len(advised) - starts[-1])
            starts.append(len(advised))
    return Demonstrations(
        np.stack(views),
        np.array(advised, dtype=np.uint8),
        np.array(executed, dtype=np.uint8),
        np.array(starts, dtype=np.int64),
        missions,
    )


def _episode(env: Any, seed: int) -> Iterator[tuple[NDArray[np.uint8], int, int]]:
    """View, advice and action of each step."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    rng = random.Random(seed)
    noise = rng.choice(_NOISE)
    observation = reset(env, seed)
    bot = BabyAIBot(env)
    action: int | None = None
    done = False
    while not done:
        advice = int(bot.replan(action))
        action = rng.choice(_MOVES) if rng.random() < noise else advice
        yield observation["image"], advice, action
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated


def main() -> None:
    """Collect easy and full demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/babyai"))
    parser.add_argument("--steps", type=int, default=250_000, help="of the levels; a fifth as easy")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    full = tuple(level.env for level in LEVELS.values())
    for name, env_ids, steps, first in (
        ("easy", EASY, args.steps // 5, 500_000),
        ("full", full, args.steps, 0),
    ):
        path = args.out / f"{name}.npz"
        if not path.exists():
            collect(env_ids, steps, first).save(path)


if __name__ == "__main__":
    main()

"""Demonstrations by BabyAI's own bot, which is asked at every step what it would do.

    python -m mm_c2c.reference.babyai.demonstrations --out FOLDER [--steps N]

What is executed is sometimes a random move in place of the bot's, so that the policy learns the way
back; what is learned is always the bot's advice. At every step bots are also asked for their first
action towards other objects in view, so that a picture comes with several instructions: what is to
be done then hangs on the words.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mm_c2c.errors import run_main
from mm_c2c.reference.babyai.levels import (
    ACTIONS,
    EASY,
    LEVELS,
    SEEDS,
    make_env,
    reset,
)
from mm_c2c.reference.babyai.policy import CHUNK

# Shares of random moves, one drawn for each episode.
_NOISE = (0.0, 0.15, 0.4)
_MOVES = tuple(ACTIONS.index(name) for name in ("left", "right", "forward"))
_DONE = ACTIONS.index("done")
_MASKED = -1
# Other instructions a step.
_OTHERS = 3


@dataclass(frozen=True)
class Demonstrations:
    """Steps of episodes, one episode after the other.

    Attributes:
        views: `(steps, columns, rows, 3)` uint8, symbols of the partial view.
        advised: `(steps,)` uint8: what the bot would do.
        executed: `(steps,)` uint8: what was done.
        starts: `(episodes + 1,)` int64: the first step of each, and the end.
        missions: of each episode.
        other_starts: `(steps + 1,)` int64: the first other instruction of each step, and the end.
        other_missions: of each other instruction.
        other_advised: `(others,)` uint8: the first action of a bot that has it.
    """

    views: NDArray[np.uint8]
    advised: NDArray[np.uint8]
    executed: NDArray[np.uint8]
    starts: NDArray[np.int64]
    missions: list[str]
    other_starts: NDArray[np.int64]
    other_missions: list[str]
    other_advised: NDArray[np.uint8]

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
            other_starts=self.other_starts,
            other_missions=np.array(self.other_missions),
            other_advised=self.other_advised,
        )
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Read what `save` wrote."""
        with np.load(path) as data:
            lists = ("missions", "other_missions")
            return cls(**{k: data[k].tolist() if k in lists else data[k] for k in data})


class Advice(NamedTuple):
    """One step of an episode.

    Attributes:
        view: the partial view.
        action: what the bot would do.
        executed: what was done.
        others: other instructions, each with a bot's first action.
    """

    view: NDArray[np.uint8]
    action: int
    executed: int
    others: list[tuple[str, int]]


def collect(env_ids: Sequence[str], steps: int, first_seed: int) -> Demonstrations:
    """Ask the bot about at least so many steps, the levels in turn, a seed an episode."""
    envs = [make_env(env_id) for env_id in env_ids]
    advices: list[Advice] = []
    starts, missions = [0], []
    with tqdm(total=steps, desc=", ".join(env_ids), mininterval=10) as bar:
        for number, seed in enumerate(range(first_seed, SEEDS["train"].stop)):
            if len(advices) >= steps:
                break
            env = envs[number % len(envs)]
            advices.extend(_episode(env, seed))
            missions.append(env.mission)
            bar.update(len(advices) - starts[-1])
            starts.append(len(advices))
    others = [other for advice in advices for other in advice.others]
    return Demonstrations(
        views=np.stack([advice.view for advice in advices]),
        advised=np.array([advice.action for advice in advices], dtype=np.uint8),
        executed=np.array([advice.executed for advice in advices], dtype=np.uint8),
        starts=np.array(starts),
        missions=missions,
        other_starts=np.cumsum([0, *(len(advice.others) for advice in advices)]),
        other_missions=[mission for mission, _ in others],
        other_advised=np.array([action for _, action in others], dtype=np.uint8),
    )


def _episode(env: Any, seed: int) -> Iterator[Advice]:
    from minigrid.utils.baby_ai_bot import BabyAIBot

    rng = random.Random(seed)
    noise = rng.choice(_NOISE)
    observation = reset(env, seed)
    bot = BabyAIBot(env)
    action: int | None = None
    done = False
    while not done:
        advice = int(bot.replan(action))
        others = _ask_others(env, observation["image"], rng)
        action = rng.choice(_MOVES) if rng.random() < noise else advice
        yield Advice(observation["image"], advice, action, others)
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated


def _ask_others(env: Any, view: NDArray[np.uint8], rng: random.Random) -> list[tuple[str, int]]:
    """Instructions about objects in view, each with the first action of a bot of its own.

    None while something is carried: a bot that has seen only what is in view may then look without
    end for a place to drop it.
    """
    if env.carrying:
        return []
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT
    from minigrid.envs.babyai.core.verifier import GoToInstr, ObjDesc, PickupInstr
    from minigrid.utils.baby_ai_bot import BabyAIBot

    things = {
        (IDX_TO_OBJECT[kind], IDX_TO_COLOR[colour]) for kind, colour, _ in view.reshape(-1, 3)
    }
    known = sorted(thing for thing in things if thing[0] in ("ball", "box", "key"))
    own, asked = env.instrs, []
    for kind, colour in rng.sample(known, min(_OTHERS, len(known))):
        build = GoToInstr if rng.random() < 0.5 else PickupInstr
        env.instrs = build(ObjDesc(kind, colour))
        env.instrs.reset_verifier(env)
        asked.append((env.instrs.surface(env), int(BabyAIBot(env).replan())))
    env.instrs = own
    return asked


def main() -> None:
    """Collect easy and full demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/babyai"))
    parser.add_argument(
        "--steps", type=int, default=50_000, help="of the levels; a quarter as easy"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    full = tuple(level.env for level in LEVELS.values())
    for name, env_ids, steps, first in (
        ("easy", EASY, args.steps // 4, 500_000),
        ("full", full, args.steps, 0),
    ):
        path = args.out / f"{name}.npz"
        if not path.exists():
            collect(env_ids, steps, first).save(path)


if __name__ == "__main__":
    run_main(main)

"""Episodes of the policy, with the simulator's truth of every step.

    python -m mm_c2c.reference.babyai.rollouts --split unseen --episodes 250 --out FILE [--policy FOLDER]

writes one episode a line, and prints the success rate of each level with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mm_c2c.errors import run_main
from mm_c2c.evaluation.statistics import wilson
from mm_c2c.reference.babyai.levels import (
    LEVELS,
    VIEW_CELLS,
    Camera,
    instruction_text,
    make_env,
    reset,
    seeds,
)
from mm_c2c.sources import load_source
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.sources.base import SourceInput

logger = logging.getLogger(__name__)

POLICY = Path(__file__).parent / "policy"
_PARALLEL = 48


class Thing(NamedTuple):
    """An object.

    Attributes:
        colour: such as `red`.
        kind: `ball`, `box` or `key`.
        x: column of the room; that of the agent where it is carried.
        y: row, counted downwards.
    """

    colour: str
    kind: str
    x: int
    y: int

    @property
    def name(self) -> str:
        """Such as `red ball`."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was there before an action, and the action.

    Attributes:
        view: symbols of the partial view, `columns x rows x 3` bytes in hexadecimal.
        text: what the policy read.
        chunk: numbers of the actions it decided on.
        action: the one that was executed, the chunk's first.
        carrying: name of what it holds; None for nothing.
        x: of the agent.
        y: of the agent.
        direction: 0 right, 1 down, 2 left, 3 up.
        things: all objects that lie in the room.
    """

    view: str
    text: str
    chunk: tuple[int, ...]
    action: int
    carrying: str | None
    x: int
    y: int
    direction: int
    things: tuple[Thing, ...]

    def symbols(self) -> NDArray[np.uint8]:
        """The view as an observation has it."""
        flat = np.frombuffer(bytes.fromhex(self.view), dtype=np.uint8)
        return flat.reshape(VIEW_CELLS, VIEW_CELLS, 3)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One run of the policy.

    Attributes:
        level: key of `LEVELS`.
        seed: of the environment.
        mission: the instruction.
        steps: until it succeeded, ran out of time, or read and saw the same twice in a row, from
            where on a greedy policy without memory does the same until time is out.
        end: the room after the last action; its action is -1 and its chunk empty.
        success: whether the environment says so.
    """

    level: str
    seed: int
    mission: str
    steps: tuple[Step, ...]
    end: Step
    success: bool

    @property
    def name(self) -> str:
        """Such as `GoToLocal-2000000`."""
        return f"{self.level}-{self.seed}"


@dataclass
class _Running:
    """An episode under way."""

    level: str
    seed: int
    env: Any
    observation: dict[str, Any]
    past: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def roll_out(
    policy: TokenActionSource, level: str, episode_seeds: Iterable[int]
) -> Iterator[Episode]:
    """Let the policy act; it looks again after the first action of each chunk.

    Args:
        policy: acts greedily.
        level: key of `LEVELS`.
        episode_seeds: one an episode; episodes come as they end.
    """
    camera, waiting = Camera(), iter(episode_seeds)
    running: list[_Running] = []
    free = [make_env(LEVELS[level].env) for _ in range(_PARALLEL)]
    while True:
        while free and (seed := next(waiting, None)) is not None:
            env = free.pop()
            running.append(_Running(level, seed, env, reset(env, seed)))
        if not running:
            return
        texts = [instruction_text(run.env.mission, run.past) for run in running]
        pictures = [camera.picture(run.observation["image"]) for run in running]
        looks = [
            SourceInput(text=text, images=(picture,))
            for text, picture in zip(texts, pictures, strict=True)
        ]
        chunks = policy.act(looks).actions.round().long().tolist()
        going = []
        for run, text, chunk in zip(running, texts, chunks, strict=True):
            run.steps.append(_observe(run, text, chunk))
            run.past.append(chunk[0])
            run.observation, reward, terminated, truncated, _ = run.env.step(chunk[0])
            if terminated or truncated or _is_stuck(run.steps):
                end = _observe(run, "", ())
                yield Episode(
                    level=level,
                    seed=run.seed,
                    mission=run.env.mission,
                    steps=tuple(run.steps),
                    end=end,
                    success=bool(reward > 0),
                )
                free.append(run.env)
            else:
                going.append(run)
        running = going


def _observe(run: _Running, text: str, chunk: Iterable[int]) -> Step:
    env, chunk = run.env, tuple(chunk)
    lying = []
    for index, cell in enumerate(env.grid.grid):
        if cell is not None and cell.type in ("ball", "box", "key"):
            lying.append(
                Thing(cell.color, cell.type, index % env.grid.width, index // env.grid.width)
            )
    held = env.carrying
    return Step(
        view=run.observation["image"].astype(np.uint8).tobytes().hex(),
        text=text,
        chunk=chunk,
        action=chunk[0] if chunk else -1,
        carrying=f"{held.color} {held.type}" if held else None,
        x=int(env.agent_pos[0]),
        y=int(env.agent_pos[1]),
        direction=int(env.agent_dir),
        things=tuple(lying),
    )


def _is_stuck(steps: list[Step]) -> bool:
    """Whether it read and saw the same twice in a row: it will do the same for ever."""
    return len(steps) > 1 and (steps[-1].text, steps[-1].view) == (steps[-2].text, steps[-2].view)


def save_episodes(episodes: Iterable[Episode], path: Path) -> None:
    """Write one episode a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    with scratch.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(asdict(episode)) + "\n")
    scratch.replace(path)


def load_episodes(path: Path) -> list[Episode]:
    """Read what `save_episodes` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_episode(json.loads(line)) for line in lines]


def _episode(row: dict[str, Any]) -> Episode:
    def step(data: dict[str, Any]) -> Step:
        things = tuple(Thing(*thing) for thing in data["things"])
        return Step(**{**data, "chunk": tuple(data["chunk"]), "things": things})

    steps = tuple(step(data) for data in row["steps"])
    return Episode(**{**row, "steps": steps, "end": step(row["end"])})


def success_rates(episodes: Iterable[Episode]) -> dict[str, dict[str, float]]:
    """Of each level: episodes, success rate and its 95 % interval (Wilson), mean length."""
    by_level = defaultdict(list)
    for episode in episodes:
        by_level[episode.level].append(episode)
    table = {}
    for level, group in by_level.items():
        hits = sum(episode.success for episode in group)
        low, high = wilson(hits, len(group))
        steps = sum(len(episode.steps) for episode in group) / len(group)
        table[level] = {
            "episodes": len(group),
            "success": hits / len(group),
            "low": low,
            "high": high,
            "mean_steps": steps,
        }
    return table


def look_again(
    policy: TokenActionSource, camera: Camera, step: Step, text: str | None = None
) -> SourceInput:
    """What the policy saw, read and wrote at a step; `text` in place of what it read."""
    return SourceInput(
        text=step.text if text is None else text,
        images=(camera.picture(step.symbols()),),
        action_tokens=policy.bins.tokens(torch.tensor(step.chunk)),
    )


def load_policy(folder: Path) -> TokenActionSource:
    """The policy of a folder."""
    policy = load_source(str(folder))
    if not isinstance(policy, TokenActionSource):
        raise TypeError(f"{folder} holds a {type(policy).__name__}, expected a policy")
    return policy


def main() -> None:
    """Roll out every level and write the episodes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="unseen")
    parser.add_argument("--first", type=int, default=0, help="seed of the split to begin with")
    parser.add_argument("--episodes", type=int, default=250, help="of each level")
    parser.add_argument("--policy", type=Path, default=POLICY)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    policy = load_policy(args.policy)
    episodes: list[Episode] = []
    for level in LEVELS:
        episodes += roll_out(policy, level, seeds(args.split, args.first, args.episodes))
        logger.info("%s: %s", level, success_rates(episodes)[level])
    save_episodes(episodes, args.out)
    rates = json.dumps(success_rates(episodes), indent=2)
    args.out.with_suffix(".rates.json").write_text(rates + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)

"""Teach the slots that a policy's actions ask to look at what the policy goes for."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache
from mm_c2c.link import LinkConfig, align_slots
from mm_c2c.reference.babyai.levels import AGENT_CELL, Camera
from mm_c2c.reference.babyai.questions import goals, in_view, offset, swapped_mission
from mm_c2c.reference.babyai.rollouts import Episode, Step, look_again
from mm_c2c.sources.action import TokenActionSource

logger = logging.getLogger(__name__)

_LEARNING_RATE = 1e-3
_HELD_OUT = 0.1


class Aim(NamedTuple):
    """A step whose goal the camera shows.

    Attributes:
        step: of an episode.
        cell: row and column of the goal in the view.
        texts: what the policy could have read: its own instruction first, then such that name
            another thing in view.
    """

    step: Step
    cell: tuple[int, int]
    texts: tuple[str, ...]


def aims(episodes: Sequence[Episode]) -> list[Aim]:
    """All such steps."""
    found = []
    for episode in episodes:
        reached = goals(episode)
        for number, step in enumerate(episode.steps):
            goal = next((goal for goal in reached if goal.step >= number), None)
            if goal is None:
                continue
            forward, right = offset(step, goal.thing)
            seen = in_view(step)
            if (goal.thing.name, forward, right) not in seen:
                continue
            rest = step.text[len(episode.mission) :]
            others = sorted({name for name, _, _ in seen} - {goal.thing.name})
            missions = [swapped_mission(episode, number, name) for name in others]
            texts = [step.text, *(f"{mission}{rest}" for mission in missions if mission)]
            cell = (AGENT_CELL[1] - forward, AGENT_CELL[0] + right)
            found.append(Aim(step, cell, tuple(texts)))
    return found


def teach(
    bridge: Bridge,
    link: LinkConfig,
    policy: TokenActionSource,
    episodes: Sequence[Episode],
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Train a link's resampler alone, by what its slots look at.

    Half of the instructions name another thing than the policy went for, so that the slots learn
    to believe the actions.

    Args:
        bridge: whose fusers hold the resampler.
        link: with `asking`.
        policy: who is read.
        episodes: of the policy; the last tenth is kept to measure on.
        steps: of the training.
        batch_size: of a step.
        seed: of the order and of which instructions are false.

    Returns:
        Share of slots that look most at the goal, under true and under false instructions.
    """
    fuser: Any = bridge.fusers[link.name]
    cut = int(len(episodes) * (1 - _HELD_OUT))
    order = random.Random(seed).sample(list(episodes), len(episodes))
    known, unknown = aims(order[:cut]), aims(order[cut:])
    rng, camera = random.Random(seed), Camera()

    def look(batch: Sequence[Aim], *, false: float) -> tuple[Tensor, Tensor]:
        """Weights of what each slot reads, `(batch, slots, k)`, and which of that is the goal."""
        texts = [
            rng.choice(aim.texts[1:]) if aim.texts[1:] and rng.random() < false else aim.texts[0]
            for aim in batch
        ]
        cache = _read(policy, camera, batch, texts)
        index = torch.arange(link.num_slots).expand(len(batch), -1)
        alignment = align_slots(link, fuser, cache, index)
        goal = (cache.patches[..., 1:] == torch.tensor([aim.cell for aim in batch])[:, None]).all(2)
        is_goal = goal[:, None].expand(-1, link.num_slots, -1).gather(2, alignment.source_index)
        return alignment.weights, is_goal

    optimizer = torch.optim.AdamW(fuser.resampler.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    bar = tqdm(range(steps), desc=f"{link.name} looks")
    for _ in bar:
        weights, is_goal = look(rng.sample(known, batch_size), false=0.5)
        loss = -(weights * is_goal).sum(2).clamp(min=1e-9).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    found = {}
    with torch.no_grad():
        for name, false in (("true", 0.0), ("false", 1.0)):
            hits = []
            asked = [aim for aim in unknown if not false or aim.texts[1:]]
            for first in range(0, len(asked), batch_size):
                weights, is_goal = look(asked[first : first + batch_size], false=false)
                hits.append(is_goal.gather(2, weights.argmax(2, keepdim=True)).flatten().float())
            found[name] = float(torch.cat(hits).mean())
    logger.info("%s looks at the goal: %s (n = %d)", link.name, found, len(unknown))
    return found


def _read(
    policy: TokenActionSource, camera: Camera, batch: Sequence[Aim], texts: Sequence[str]
) -> SourceCache:
    looks = [
        look_again(policy, camera, aim.step, text) for aim, text in zip(batch, texts, strict=True)
    ]
    with torch.no_grad():
        return policy.prefill(looks)

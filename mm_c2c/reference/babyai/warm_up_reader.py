"""Before `mm-c2c train`: every slot of a reader begins as the target's own words for what it holds.

    python -m mm_c2c.reference.babyai.warm_up_reader configs/babyai_reader_words.yaml [key=value ...]

A slot of a cell learns what the target holds after reading `On the left: red ball`, that of a word
of the instruction the word, and that of an action token the move. It costs no pass through the target but
one for each phrase; its result is `start` of the reader's training.
"""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm_c2c.bridge import Bridge
from mm_c2c.cache import PositionKind, SourceCache, read_layers
from mm_c2c.config import load_config
from mm_c2c.link import LinkConfig, align_slots
from mm_c2c.reference.babyai.levels import ACTIONS, AGENT_CELL, Camera
from mm_c2c.reference.babyai.questions import MOTIONS, in_view
from mm_c2c.reference.babyai.rollouts import Step, load_episodes
from mm_c2c.reference.train_fuser import last_states
from mm_c2c.sources.base import SourceInput, count_positions
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.loop import Loop, cosine_rate
from mm_c2c.training.models import build_bridge, load_source, load_target
from mm_c2c.training.optimizers import build_optimizers

logger = logging.getLogger(__name__)

_NOTHING = "nothing"
# What stands before a move, by its place in the chunk.
_TURNS = ("Next move:", "Second move:", "Third move:", "Fourth move:")
# Between the mission and the past moves, in the words that a policy reads.
_PAST = "past"


@dataclass(frozen=True, kw_only=True)
class WarmUpConfig:
    """Settings of a warm-up.

    Attributes:
        reader: config of the training that follows; its links and models are taken.
        rollouts: episodes of the policy, as `rollouts` writes them.
        out: where checkpoints, the log and the bridge (`out/bridge`) go.
        target: Hub id or folder in place of the reader's own, where that is given.
        steps: optimiser steps.
        batch_size: moments of a step.
        learning_rate: after the warm-up of 10 steps; falls to zero along a cosine.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        seed: of weights and order.
    """

    reader: Path
    rollouts: Path
    out: Path
    target: str | None = None
    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 4e-3
    save_every: int = 20
    log_every: int = 5
    seed: int = 0


def phrases(cache: SourceCache, steps: Sequence[Step]) -> list[list[str | None]]:
    """What each position of a policy's cache stands for, in the target's words; None for the rest.

    A phrase ends in what its position alone knows, so that its last token holds all of it: the
    thing in a cell after the side on which the cell lies, a word of the mission after those before
    it, a move of the past after the one before it.
    """
    rows = []
    for row, step in enumerate(steps):
        seen = {(AGENT_CELL[1] - f, AGENT_CELL[0] + r): name for name, f, r in in_view(step)}
        if step.carrying:
            seen[AGENT_CELL[1], AGENT_CELL[0]] = step.carrying
        moves = zip(_TURNS, step.chunk, strict=False)
        found: list[str | None] = []
        told: list[str] = []
        for kind, (start, end), (_, y, x) in zip(
            cache.kinds[row].tolist(),
            cache.spans[row].tolist(),
            cache.patches[row].tolist(),
            strict=True,
        ):
            if kind == PositionKind.IMAGE:
                found.append(f"{_place(y, x)}: {seen.get((y, x), _NOTHING)}")
            elif kind == PositionKind.TEXT:
                told.append(cache.texts[row][start:end].strip())
                if _PAST in told:
                    found.append(f"The robot's past moves: {' '.join(told[told.index(_PAST) :][-2:])}")
                else:
                    found.append(f"The robot was told: {' '.join(told)}")
            elif kind == PositionKind.ACTION:
                turn, action = next(moves)
                found.append(f"{turn} {MOTIONS.get(ACTIONS[action], 'stop')}")
            else:
                found.append(None)
        rows.append(found)
    return rows


def _place(row: int, column: int) -> str:
    """Where a cell of the view lies."""
    aside = column - AGENT_CELL[0]
    if not aside:
        return "In its hands" if row == AGENT_CELL[1] else "Straight ahead"
    return "On the right" if aside > 0 else "On the left"


class Phrases:
    """The target's own K (without rotation) and V at the last token of phrases.

    Args:
        bridge: whose target reads them.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._states: dict[str, Tensor] = {}

    def states(self, rows: Sequence[Sequence[str | None]]) -> Tensor:
        """`(batch, positions, layers, 2, width)`; zero for None."""
        missing = sorted({p for row in rows for p in row if p} - self._states.keys())
        for first in range(0, len(missing), 32):
            batch = missing[first : first + 32]
            self._states |= dict(zip(batch, self._read(batch), strict=True))
        blank = torch.zeros_like(next(iter(self._states.values())))
        return torch.stack(
            [torch.stack([self._states[p] if p else blank for p in row]) for row in rows]
        )

    @torch.no_grad()
    def _read(self, texts: list[str]) -> Tensor:
        target = self.bridge.target
        encoded = target.tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        positions = count_positions(encoded["attention_mask"])
        layers, _, rope = target.read(encoded, positions)
        return last_states(layers, positions, rope).float()


def slot_loss(bridge: Bridge, words: Phrases, cache: SourceCache, steps: Sequence[Step]) -> Tensor:
    """Squared distance of the slots from the target's own words, in units of a layer's spread.

    Each link weighs the same, and in a link each phrase, however many slots hold it: most cells
    show nothing.
    """
    perception = bridge.fuse_slots({bridge.config.links[0].source: cache})
    layers, _ = read_layers(perception.past_key_values)
    batch, length = perception.input_ids.shape
    links = bridge.config.links
    total = sum(link.num_slots for link in links)
    positions = torch.arange(length).expand(batch, -1)
    found = last_states(layers, positions, bridge.target.rope(length), total).float()
    told = phrases(cache, steps)
    truth = words.states(told)
    counts = Counter(phrase for row in told for phrase in row)
    rarity = torch.tensor([[1 / counts[phrase] for phrase in row] for row in told])
    losses = []
    for link, part in zip(links, _split(found.unflatten(0, (batch, total)), links), strict=True):
        index = torch.arange(link.num_slots).expand(batch, -1)
        alignment = align_slots(link, bridge.fusers[link.name], cache, index)  # type: ignore[arg-type]
        wanted = alignment.gather(truth.flatten(2)).unflatten(2, truth.shape[2:])
        weight = alignment.gather(rarity.unsqueeze(2))[:, :, :, None, None]
        weight = weight / weight.sum()
        mean = (wanted * weight).sum((0, 1))
        spread = ((wanted - mean).pow(2) * weight).sum((0, 1)).mean(2, keepdim=True)
        losses.append((((part - wanted).pow(2) / (spread + 1e-6)) * weight).sum((0, 1)).mean())
    return torch.stack(losses).mean()


def _split(states: Tensor, links: Sequence[LinkConfig]) -> tuple[Tensor, ...]:
    return states.split([link.num_slots for link in links], dim=1)


def warm_up(config: WarmUpConfig) -> None:
    """Run, or go on with, one warm-up."""
    overrides = [] if config.target is None else [f"target.model={config.target}"]
    reader = load_config(TrainingConfig, config.reader, [*overrides, "start=null"])
    ((name, model),) = reader.sources.items()
    source = load_source(model)
    bridge = build_bridge(reader, load_target(reader.target), {name: source})
    steps = [step for episode in load_episodes(config.rollouts) for step in episode.steps[:40]]
    words, camera = Phrases(bridge), Camera()
    highest = source.bins.vocab_size - 1  # type: ignore[attr-defined]

    def loss(_: int, rng: random.Random) -> Tensor:
        chosen = rng.sample(steps, config.batch_size)
        looks = [
            SourceInput(
                text=step.text,
                images=(camera.picture(step.symbols()),),
                action_tokens=highest - torch.tensor(step.chunk),
            )
            for step in chosen
        ]
        return slot_loss(bridge, words, source.prefill(looks), chosen)

    Loop(
        out=config.out,
        steps=config.steps,
        save_every=config.save_every,
        log_every=config.log_every,
        seed=config.seed,
    ).run(
        bridge.fusers,
        build_optimizers(bridge.fusers, config.learning_rate),
        lambda step: cosine_rate(step, 10, config.steps),
        loss,
        lambda weights: bridge.save_pretrained(config.out / "bridge", weights=weights),
    )


def main() -> None:
    """Read the config named on the command line and warm up."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    warm_up(load_config(WarmUpConfig, Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()

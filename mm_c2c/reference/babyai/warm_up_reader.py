"""Before `mm-c2c train`: every slot of a reader begins as the target's own words for what it holds.

    python -m mm_c2c.reference.babyai.warm_up_reader configs/babyai_reader_words.yaml [key=value ...]

A slot of a cell begins as what the target holds after reading `On the left: red ball`, that of a
word of the instruction as the word, and that of an action token as the move: the heads of the
fusers are fitted to that by least squares, in one pass over some moments. Slots that actions ask,
two of them, are taught before that to look at what the policy goes for, and begin as what a trained
reader's slots hold for the colour and the kind of a thing that an instruction names. It costs no
pass through the target but one for each phrase; its result is `start` of the reader's training.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_c2c.align import Alignment
from mm_c2c.bridge import Bridge
from mm_c2c.cache import PositionKind, SourceCache, read_layers
from mm_c2c.config import load_config
from mm_c2c.errors import ConfigError
from mm_c2c.fuser import CacheFuser, SharedProjection
from mm_c2c.link import LinkConfig, align_slots
from mm_c2c.reference.babyai.levels import ACTIONS, AGENT_CELL, Camera
from mm_c2c.reference.babyai.point import teach
from mm_c2c.reference.babyai.questions import MOTIONS, NAMES, in_view
from mm_c2c.reference.babyai.rollouts import Step, load_episodes, look_again
from mm_c2c.reference.train_fuser import last_states, read_phrases
from mm_c2c.reference.trainer import run
from mm_c2c.run_folder import write_json
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.models import build_bridge, load_source, load_target

logger = logging.getLogger(__name__)

_NOTHING = "nothing"
# What stands before a move, by its place in the chunk.
_TURNS = ("Next move:", "Second move:", "Third move:", "Fourth move:")
# Where a GELU is all but straight, and how widely a head's inner values may lie around it.
_STRAIGHT, _SPREAD = 3.0, 0.7
# Between the mission and the past moves, in the words that a policy reads.
_PAST = "past"


@dataclass(frozen=True, kw_only=True)
class WarmUpConfig:
    """Settings of a warm-up.

    Attributes:
        reader: config of the training that follows; its links and models are taken.
        rollouts: episodes of the policy, as `rollouts` writes them.
        out: where the bridge (`out/bridge`) and its distance from the words (`out/loss.json`) go.
        start: folder of a saved bridge whose fusers are taken as they are; only the links that it
            lacks are fitted.
        target: Hub id or folder in place of the reader's own, where that is given.
        moments: to fit on.
        held_out: to measure on.
        batch_size: moments at once.
        ridge: of the regression, as a share of the features' mean square.
        look_steps: by which slots that are asked learn where to look, of 64 moments each.
        seed: of the fusers' other weights and of which moments.
    """

    reader: Path
    rollouts: Path
    out: Path
    start: Path | None = None
    target: str | None = None
    moments: int = 128
    held_out: int = 32
    batch_size: int = 8
    ridge: float = 1e-3
    look_steps: int = 700
    seed: int = 0


def phrases(cache: SourceCache, steps: Sequence[Step]) -> list[list[str | None]]:
    """What each position of a policy's cache stands for, in the target's words; None for the rest.

    A phrase ends in what its position alone knows, so that its last token holds all of it: the
    thing in a cell after the side on which the cell lies, a word after the one before it. There are
    few of them, for each costs a pass through the target.
    """
    rows = []
    for row, step in enumerate(steps):
        seen = _things(step)
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
                found.append(f"{_lead(told)} {' '.join(told[-2:])}")
            elif kind == PositionKind.ACTION:
                turn, action = next(moves)
                found.append(f"{turn} {MOTIONS.get(ACTIONS[action], 'stop')}")
            else:
                found.append(None)
        rows.append(found)
    return rows


def _things(step: Step) -> dict[tuple[int, int], str]:
    """What lies in view, by row and column."""
    return {(AGENT_CELL[1] - f, AGENT_CELL[0] + r): name for name, f, r in in_view(step)}


def _lead(told: Sequence[str]) -> str:
    """What stands before the last two of the words that a policy reads."""
    if _PAST in told:
        return "The robot's past moves:"
    return "The robot was told: next to" if "next" in told[:-2] else "The robot was told:"


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
            self._states |= dict(zip(batch, read_phrases(self.bridge.target, batch), strict=True))
        blank = torch.zeros_like(next(iter(self._states.values())))
        return torch.stack(
            [torch.stack([self._states[p] if p else blank for p in row]) for row in rows]
        )


class ToldThings:
    """What a reader's slots of an instruction's words hold, for each thing that one can name.

    So that slots which look for what the policy goes for are read as those are.

    Args:
        bridge: with a link of kind `text` that has been trained.
        policy: who reads instructions.
        steps: moments to show beside them; the states are means over these.
    """

    def __init__(self, bridge: Bridge, policy: TokenActionSource, steps: Sequence[Step]) -> None:
        self._states = {name: _word_states(bridge, policy, steps, name.split()) for name in NAMES}
        self._mean = torch.stack(list(self._states.values())).mean(0)

    def wanted(self, cache: SourceCache, steps: Sequence[Step], alignment: Alignment) -> Tensor:
        """What the slots should hold that read a cache so: the first a colour, the second a kind.

        Returns:
            `(batch, 2, layers, 2, width)`.
        """
        rows = []
        for row, step in enumerate(steps):
            seen = _things(step)
            cells = [(y, x) for _, y, x in cache.patches[row].tolist()]
            rows.append(torch.stack([self._states.get(seen.get(c, ""), self._mean) for c in cells]))
        truth = torch.stack(rows)
        return torch.einsum("bsp,bps...->bs...", alignment.shares(truth.shape[1]), truth)


def _word_states(
    bridge: Bridge, policy: TokenActionSource, steps: Sequence[Step], words: Sequence[str]
) -> Tensor:
    """`(words, layers, 2, width)`: what slots hold that read just these words of an instruction."""
    camera = Camera()
    texts = [
        f"{verb} the {' '.join(words)}{step.text[step.text.index(f'. {_PAST}') :]}"
        for step, verb in zip(steps, itertools.cycle(("go to", "pick up")))
    ]
    looks = [
        look_again(policy, camera, step, text) for text, step in zip(texts, steps, strict=True)
    ]
    cache = policy.prefill(looks)
    for link, found in _read_slots(bridge, cache):
        if link.kinds != ("text",):
            continue
        index = torch.arange(link.num_slots).expand(len(steps), -1)
        fuser: Any = bridge.fusers[link.name]
        alignment = align_slots(link, fuser, cache, index)
        states = []
        for word in words:
            chosen = []
            for row, text in enumerate(texts):
                start = text.index(word)
                at = (cache.spans[row] == torch.tensor([start, start + len(word)])).all(1).nonzero()
                weight = (alignment.weights[row] * (alignment.source_index[row] == at)).sum(1)
                chosen.append(found[row, weight.argmax()])
            states.append(torch.stack(chosen).mean(0))
        return torch.stack(states)
    raise ConfigError("expected a link of kinds ('text',), whose slots hold the instruction")


def _read_slots(bridge: Bridge, cache: SourceCache) -> list[tuple[LinkConfig, Tensor]]:
    """What the slots of each link hold: `(batch, slots, layers, 2, width)`, K without rotation."""
    links = bridge.config.links
    perception = bridge.fuse_slots({links[0].source: cache})
    layers, _ = read_layers(perception.past_key_values)
    batch, length = perception.input_ids.shape
    sizes = [link.num_slots for link in links]
    positions = torch.arange(length).expand(batch, -1)
    states = last_states(layers, positions, bridge.target.rope(length), sum(sizes)).float()
    return list(zip(links, states.unflatten(0, (batch, -1)).split(sizes, 1), strict=True))


class SlotStates(NamedTuple):
    """What the slots of a link hold and should hold.

    Attributes:
        found: `(batch, slots, layers, 2, width)`: K without rotation and V.
        wanted: likewise: the target's own words.
        weight: `(batch, slots)`: each phrase weighs the same, however many slots hold it (most
            cells show nothing); sums to 1.
    """

    found: Tensor
    wanted: Tensor
    weight: Tensor


def slot_states(
    bridge: Bridge,
    words: Phrases,
    cache: SourceCache,
    steps: Sequence[Step],
    things: ToldThings | None = None,
) -> dict[str, SlotStates]:
    """By link; of those that are asked, if it is known what named things are told as."""
    told = phrases(cache, steps)
    truth = words.states(told)
    counts = Counter(phrase for row in told for phrase in row)
    rarity = torch.tensor([[1 / counts[phrase] for phrase in row] for row in told])
    states = {}
    for link, part in _read_slots(bridge, cache):
        index = torch.arange(link.num_slots).expand(len(steps), -1)
        alignment = align_slots(link, bridge.fusers[link.name], cache, index)  # type: ignore[arg-type]
        if link.asking:
            if things:
                wanted = things.wanted(cache, steps, alignment)
                weight = torch.ones(part.shape[:2])
                states[link.name] = SlotStates(part, wanted, weight / weight.sum())
            continue
        wanted = alignment.gather(truth.flatten(2)).unflatten(2, truth.shape[2:])
        weight = alignment.gather(rarity.unsqueeze(2)).squeeze(2)
        states[link.name] = SlotStates(part, wanted, weight / weight.sum())
    return states


def slot_loss(states: SlotStates) -> Tensor:
    """Squared distance from the words, in units of their spread in a layer: 1 knows their mean."""
    weight = states.weight[:, :, None, None, None]
    mean = (states.wanted * weight).sum((0, 1))
    spread = ((states.wanted - mean).pow(2) * weight).sum((0, 1)).mean(2, keepdim=True)
    error = ((states.found - states.wanted).pow(2) * weight).sum((0, 1))
    return (error / (spread + 1e-6)).mean()


class HeadFit:
    """Fits the heads of an untrained `small` fuser by least squares, of the heads' rank.

    Args:
        fuser: whose heads are zero still, so that its slots hold the target's own.
        ridge: as in `WarmUpConfig`.
    """

    def __init__(self, fuser: CacheFuser, ridge: float) -> None:
        self.fuser, self.ridge = fuser, ridge
        self._features: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._hook = self._projection.head_down.register_forward_pre_hook(
            lambda _, inputs: self._features.append(inputs[0])
        )

    @property
    def _projection(self) -> SharedProjection:
        if not isinstance(self.fuser.projection, SharedProjection):
            raise ConfigError(f"expected preset 'small', got {self.fuser.config.preset!r}")
        return self.fuser.projection

    @torch.no_grad()
    def add(self, states: SlotStates) -> None:
        """Take up a batch, right after its slots were fused."""
        features = self._features.pop()
        # What the head must give, before it is weighted and gated.
        factors = self.fuser.gates()[:, None, :, None] * 0.5
        missing = (states.wanted - states.found).flatten(0, 1).transpose(0, 1) / factors
        ones = torch.ones_like(features[..., :1])
        known, wanted = torch.cat([features, ones], 2), missing.flatten(2)
        weighted = known * states.weight.flatten()[:, None]
        sums = [weighted.mT @ known, weighted.mT @ wanted]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    @torch.no_grad()
    def finish(self) -> None:
        """Put the solution into the heads.

        The map to all that is wanted is cut to the heads' rank where that loses least of what it
        gives, and passes the GELU where it is all but straight.
        """
        self._hook.remove()
        gram, cross = (part.double() for part in self._sums)
        total = gram[:, -1:, -1:]
        mean, wanted_mean = gram[:, -1:, :-1] / total, cross[:, -1:] / total
        spread = gram[:, :-1, :-1] - total * mean.mT @ mean
        shared = cross[:, :-1] - total * mean.mT @ wanted_mean
        size = spread.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        full = torch.linalg.solve(
            spread + self.ridge * size * torch.eye(spread.shape[1]).to(spread), shared
        )
        axes = torch.linalg.eigh(full.mT @ spread @ full).eigenvectors
        axes = axes[:, :, -self.fuser.config.rank :]
        down = full @ axes
        scale = (down * (spread @ down)).sum(1, keepdim=True).div(total).clamp(
            min=0
        ).sqrt() / _SPREAD + 1e-6
        projection = self._projection
        projection.head_down.weight.copy_(down / scale)
        projection.head_down.bias.copy_(_STRAIGHT - mean @ down / scale)
        up = (axes * scale).mT
        projection.head_up.weight.copy_(up)
        projection.head_up.bias.copy_(wanted_mean - _STRAIGHT * up.sum(1, keepdim=True))


def warm_up(config: WarmUpConfig) -> None:
    """Fit the fusers and save them."""
    overrides = [] if config.target is None else [f"target.model={config.target}"]
    reader = load_config(TrainingConfig, config.reader, [*overrides, "start=null"])
    ((name, model),) = reader.sources.items()
    source = load_source(model)
    if not isinstance(source, TokenActionSource):
        raise ConfigError(f"expected a policy that writes action tokens, got {model.model}")
    bridge = build_bridge(reader, load_target(reader.target), {name: source})
    taken = take(bridge, config.start)
    fitted = [link for link in bridge.config.links if link.name not in taken]
    episodes = load_episodes(config.rollouts)
    looks = {
        link.name: teach(
            bridge, link, source, episodes, steps=config.look_steps, batch_size=64, seed=config.seed
        )
        for link in fitted
        if link.asking
    }
    steps = [step for episode in episodes for step in episode.steps[:40]]
    chosen = random.Random(config.seed).sample(steps, config.moments + config.held_out)
    words, camera = Phrases(bridge), Camera()
    with torch.no_grad():
        beside = chosen[: config.batch_size]
        things = ToldThings(bridge, source, beside) if looks else None

    def read(batch: Sequence[Step]) -> dict[str, SlotStates]:
        looks = [look_again(source, camera, step) for step in batch]
        with torch.no_grad():
            return slot_states(bridge, words, source.prefill(looks), batch, things)

    batches = map(read, batched(chosen[config.held_out :], config.batch_size))
    fit_heads(bridge, fitted, batches, config.ridge)
    losses = [
        {link: float(slot_loss(states)) for link, states in read(batch).items()}
        for batch in batched(chosen[: config.held_out], config.batch_size)
    ]
    mean = {link.name: sum(row[link.name] for row in losses) / len(losses) for link in fitted}
    logger.info("squared distance from the words, 1 knows their mean: %s", mean)
    bridge.save_pretrained(config.out / "bridge")
    write_json(config.out / "loss.json", {"distance": mean, "looks_at_goal": looks})


def take(bridge: Bridge, start: Path | None) -> set[str]:
    """Put the fusers of a saved bridge into the links that are alike; returns those."""
    if start is None:
        return set()
    saved = Bridge.from_pretrained(start, bridge.target, bridge.sources)
    alike = {link.name for link in saved.config.links if link in bridge.config.links}
    for name in alike:
        bridge.fusers[name].load_state_dict(saved.fusers[name].state_dict())
    return alike


def fit_heads(
    bridge: Bridge,
    links: Iterable[LinkConfig],
    batches: Iterable[dict[str, SlotStates]],
    ridge: float,
) -> None:
    """Fit the heads of some links; each batch must be fused as it is asked for."""
    fits = {
        link.name: HeadFit(bridge.fusers[link.name], ridge)  # type: ignore[arg-type]
        for link in links
    }
    for states in batches:
        for link, fit in fits.items():
            fit.add(states[link])
    for fit in fits.values():
        fit.finish()


def batched(steps: Sequence[Step], size: int) -> Iterator[Sequence[Step]]:
    """So many at a time."""
    for first in range(0, len(steps), size):
        yield steps[first : first + size]


if __name__ == "__main__":
    run(WarmUpConfig, warm_up)

"""What a batch of examples costs, in both phases.

Each example weighs the same, however many questions it has and however long their answers are; so
the mean over a step does not depend on how it is cut into pieces and processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache, fork, read_layers, select_rows, zeroed
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs, Perception
from mm_c2c.rope import derotate
from mm_c2c.sources.base import SourceInput, count_positions, full_cache
from mm_c2c.training import packing
from mm_c2c.training.config import DropConfig
from mm_c2c.training.data import Example, Turn

Prefill = Callable[[str, Sequence[SourceInput]], SourceCache]
"""Reads inputs by the source of a name: runs it, or fetches what is kept."""


class Asked(NamedTuple):
    """The questions of a batch of examples.

    Attributes:
        turns: of all examples, one after the other.
        owners: for each, which example it is about.
        weights: for each; an example's questions share its weight, and all sum to 1.
    """

    turns: list[Turn]
    owners: list[int]
    weights: list[float]


class Read(NamedTuple):
    """The target after reading questions and answers.

    Attributes:
        logits: `(questions, answer_len, vocab_size)`, where the next token is one of the answer.
        labels: `(questions, answer_len)`: those tokens; -100 pads.
        cache: of all that was read.
        mask: `(questions, seq_len)`: 1 where it holds a token.
    """

    logits: Tensor
    labels: Tensor
    cache: Cache
    mask: Tensor


def draw_questions(examples: Sequence[Example], rngs: Sequence[random.Random], count: int) -> Asked:
    """At most so many questions about each example, which has a generator of its own."""
    asked = Asked([], [], [])
    for owner, (example, rng) in enumerate(zip(examples, rngs, strict=True)):
        picked = rng.sample(example.turns, min(count, len(example.turns)))
        asked.turns.extend(picked)
        asked.owners.extend([owner] * len(picked))
        asked.weights.extend([1 / (len(picked) * len(examples))] * len(picked))
    return asked


@dataclass(frozen=True)
class Objective:
    """The losses of a bridge's fusers.

    Attributes:
        bridge: with the fusers in training.
        prefill: how sources are read.
        drop: what is left out at random.
    """

    bridge: Bridge
    prefill: Prefill
    drop: DropConfig

    def generate(self, fused: FusedInputs, asked: Asked) -> Tensor:
        """Cross-entropy of the answers and their end."""
        read = self.read(fused, asked)
        costs = F.cross_entropy(read.logits.mT.float(), read.labels, reduction="none")
        return _weigh(costs.sum(1) / (read.labels != -100).sum(1), asked)

    def generate_packed(self, perception: Perception, asked: Asked) -> tuple[Tensor, int]:
        """As `generate`, with the questions of an example behind its slots in one sequence.

        They do not see each other; nothing is padded to the longest answer, and no slot is held
        once for each question.

        Returns:
            The loss, and the tokens that were read, each example's slots once among them.
        """
        prefix = perception.input_ids.shape[1]
        prompts = self.bridge.question_tokens([turn.question for turn in asked.turns])
        rows: list[list[packing.Turn]] = [[] for _ in range(perception.batch_size)]
        shares: list[list[float]] = [[] for _ in rows]
        for prompt, answer, owner, weight in zip(
            prompts, self._answers(asked), asked.owners, asked.weights, strict=True
        ):
            rows[owner].append(packing.Turn(prompt, answer))
            shares[owner] += [weight / len(answer)] * len(answer)
        packed = packing.Packed(
            *(part.to(self.bridge.device) for part in packing.pack(rows, prefix))
        )
        logits = packing.read_packed(
            self.bridge.target.model, packed, fork(perception.past_key_values), prefix
        )
        labels = packed.labels[packed.labels != -100]
        costs = F.cross_entropy(logits.float(), labels, reduction="none")
        weights: Any = torch.tensor([share for row in shares for share in row], device=costs.device)
        tokens = int((packed.segments >= 0).sum()) + prefix * perception.batch_size
        return (costs * weights).sum(), tokens

    def reconstruct(
        self,
        fused: FusedInputs,
        asked: Asked,
        examples: Sequence[Example],
        match: str = "cache",
    ) -> Tensor:
        """Distance of how question and answer are read from how they are after a true description.

        Squared, keys without rotation, each layer in units of its own spread over those tokens.

        Args:
            fused: the questions over what the sources saw.
            asked: the questions.
            examples: that they are about.
            match: as in `ReconstructConfig`.

        Raises:
            InputError: an example has no description.
        """
        described = self.tell(asked, examples)
        questions = self.bridge.question_tokens(self._questions(examples, asked))
        spans = [
            len(question) + len(answer) - 1
            for question, answer in zip(questions, self._answers(asked), strict=True)
        ]
        states = self._last_returned if match == "attention" else self._last_states
        with torch.no_grad():
            wanted, _ = states(described, asked, spans)
        found, real = states(fused, asked, spans)
        count = real.sum((2, 3, 4), keepdim=True)
        mean = (wanted * real).sum(2, keepdim=True) / count
        spread = ((wanted - mean).pow(2) * real).sum(2, keepdim=True) / count
        error = ((found - wanted).pow(2) * real).sum(2, keepdim=True) / count
        scale = spread.mean(4, keepdim=True) + 1e-6
        return _weigh((error / scale).mean((0, 2, 3, 4)), asked)

    # --- what is read ---------------------------------------------------------------------

    def fuse(
        self, examples: Sequence[Example], asked: Asked, rngs: Sequence[random.Random]
    ) -> FusedInputs:
        """The questions over what the sources saw; what is dropped is left out.

        Args:
            examples: of one piece of a step.
            asked: questions about them.
            rngs: one for each example.
        """
        perception, heard = self.perceive(examples, asked, rngs)
        return self.bridge.fuse(perception, self._questions(examples, asked), heard)

    def perceive(
        self,
        examples: Sequence[Example],
        asked: Asked,
        rngs: Sequence[random.Random],
        *,
        once: bool = False,
    ) -> tuple[Perception | None, dict[str, SourceCache]]:
        """What slots hold, and what sources of aligned links read; arguments as for `fuse`.

        Args:
            examples: see `fuse`.
            asked: see `fuse`.
            rngs: see `fuse`.
            once: a row for each example, whatever it is asked; else for each question.
        """
        # A row for each example, or for each question where the sources of slots may hear it.
        rows = [(owner, "") for owner in range(len(examples))]
        place = asked.owners
        if self.drop.questions < 1:
            place = list(range(len(asked.turns)))
            rows = [
                (owner, "" if rngs[owner].random() < self.drop.questions else turn.question)
                for owner, turn in zip(asked.owners, asked.turns, strict=True)
            ]
        seen: dict[str, SourceCache] = {}
        heard: dict[str, SourceCache] = {}
        keep: dict[str, Tensor] = {}
        names = dict.fromkeys(link.source for link in self.bridge.config.links)
        dropped = {name: [rng.random() < self.drop.sources for rng in rngs] for name in names}
        for link in self.bridge.config.links:
            empty = dropped[link.source]
            if link.geometry == "aligned":
                if link.source in heard:
                    continue
                looks = [
                    examples[owner].look(turn.question)
                    for owner, turn in zip(asked.owners, asked.turns, strict=True)
                ]
                cache = self.prefill(link.source, looks)
                heard[link.source] = zeroed(cache, [empty[owner] for owner in asked.owners])
                continue
            if link.source not in seen:
                looks = [examples[owner].look(question) for owner, question in rows]
                cache = self.prefill(link.source, looks)
                seen[link.source] = zeroed(cache, [empty[owner] for owner, _ in rows])
            if self.drop.slots or self.drop.share_of(link.name):
                keep[link.name] = torch.tensor(
                    [self._kept_slots(link, rngs[owner]) for owner, _ in rows],
                    device=self.bridge.device,
                )
        perception = None
        if seen:
            perception = self.bridge.fuse_slots(seen, keep)
        if perception and not once:
            order = torch.tensor(place, device=self.bridge.device)
            perception = Perception(
                perception.input_ids[order], select_rows(perception.past_key_values, order)
            )
        return perception, heard

    def _kept_slots(self, link: LinkConfig, rng: random.Random) -> list[bool]:
        """Which slots of a link are written in a row."""
        share = self.drop.share_of(link.name)
        if share and rng.random() < share:
            return [False] * link.num_slots
        return [rng.random() >= self.drop.slots for _ in range(link.num_slots)]

    def _questions(self, examples: Sequence[Example], asked: Asked) -> list[str]:
        """What the target is asked; words that are aligned must be the source's own."""
        aligned = any(link.geometry == "aligned" for link in self.bridge.config.links)
        return [
            examples[owner].look(turn.question).text.strip() if aligned else turn.question.strip()
            for owner, turn in zip(asked.owners, asked.turns, strict=True)
        ]

    def read(self, fused: FusedInputs, asked: Asked) -> Read:
        """The target reads on through the questions and the answers; gradients reach the fusers."""
        target, cache = self.bridge.target, fused["past_key_values"]
        labels = self._labels(asked)
        # The token that ends an answer is not read, in shorter rows neither.
        shown = (labels[:, 1:] != -100).long()
        input_ids = torch.cat([fused["input_ids"], labels[:, :-1] * shown], dim=1)
        mask = torch.cat([fused["attention_mask"], shown], dim=1)
        done = cache.get_seq_length()
        cache = fork(cache)
        width = labels.shape[1]
        logits = target.model(
            input_ids[:, done:],
            attention_mask=mask,
            position_ids=count_positions(mask)[:, done:],
            past_key_values=cache,
            use_cache=True,
            **dict.fromkeys(target.spared, torch.arange(-width, 0)),
        ).logits[:, -width:]
        return Read(logits, labels, cache, mask)

    @torch.no_grad()
    def tell(self, asked: Asked, examples: Sequence[Example]) -> FusedInputs:
        """The questions to the target alone, each after the example's true description.

        Raises:
            InputError: an example has no description.
        """
        told = [examples[owner].description for owner in asked.owners]
        if None in told:
            raise InputError(
                "phases.reconstruct wants a `caption` in each example, and one has none; give it, "
                "or set phases.reconstruct.steps=0"
            )
        tokenizer = self.bridge.target.tokenizer
        before = self.bridge.fuse_slots({}).input_ids[0].tolist()
        words = tokenizer(told, add_special_tokens=False)["input_ids"]
        questions = self.bridge.question_tokens(self._questions(examples, asked))
        rows = [
            torch.tensor([*before, *description, *question])
            for description, question in zip(words, questions, strict=True)
        ]
        # Padded in front, where nothing has been read yet.
        ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=-1)
        ids = ids.to(self.bridge.device)
        return FusedInputs(
            input_ids=ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            past_key_values=full_cache(self.bridge.target.model),
        )

    def _labels(self, asked: Asked) -> Tensor:
        """`(questions, answer_len)`: each answer and the token that ends it; -100 pads."""
        rows = [torch.tensor(answer) for answer in self._answers(asked)]
        return pad_sequence(rows, batch_first=True, padding_value=-100).to(self.bridge.device)

    def _answers(self, asked: Asked) -> list[list[int]]:
        """The tokens of each answer, and the one that ends it."""
        tokenizer = self.bridge.target.tokenizer
        texts = [turn.answer.strip() for turn in asked.turns]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*row, tokenizer.eos_token_id] for row in ids]

    def _last_states(
        self, fused: FusedInputs, asked: Asked, spans: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """K without rotation and V of the last tokens of each row, when all is read.

        Returns:
            `(layers, questions, tokens, 2, width)`, and where these are real: `(1, questions,
            tokens, 1, 1)`.
        """
        read = self.read(fused, asked)
        layers, indices = read_layers(read.cache)
        index, real = _last_places(read.mask, spans)
        positions = count_positions(read.mask).gather(1, index)
        rope = self.bridge.target.rope(read.mask.shape[1])
        states = []
        for (keys, values), layer_index in zip(layers, indices, strict=True):
            at = index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            plain = derotate(keys.gather(2, at), positions, rope[layer_index])
            both = torch.stack([plain, values.gather(2, at)], dim=3)
            states.append(both.permute(0, 2, 3, 1, 4).flatten(3))
        return torch.stack(states).float(), real[None, :, :, None, None]

    def _last_returned(
        self, fused: FusedInputs, asked: Asked, spans: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What attention returns at the last tokens of each row, of those that are read on.

        Returns:
            `(layers, questions, tokens, 1, width)`, and where these are real, as `_last_states`.
        """
        with attention_returns(self.bridge.target.model) as returned:
            read = self.read(fused, asked)
        if not returned:
            raise UnsupportedError(
                f"{self.bridge.target}: no layer tells what its attention returns; set "
                "phases.reconstruct.match to cache"
            )
        index, real = _last_places(read.mask, spans)
        index = index - (read.mask.shape[1] - returned[0].shape[1])
        at = index.clamp(min=0)[:, :, None]
        states = [rows.gather(1, at.expand(-1, -1, rows.shape[2])) for rows in returned]
        real = real & (index >= 0)
        return torch.stack(states).float().unsqueeze(3), real[None, :, :, None, None]


@contextmanager
def attention_returns(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each attention layer of a model returns while it runs, `(batch, len, hidden_size)`."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, returned: Any) -> None:
        # With its weights; recurrent layers and MLPs with an index return a tensor alone, and
        # routers what is no state of each position.
        if isinstance(returned, tuple) and returned[0].ndim == 3:
            found.append(returned[0])

    # A layer of some families has an index too; its attention is the innermost that has one.
    indexed = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hooks = [
        module.register_forward_hook(keep)
        for module in indexed
        if not any(hasattr(inner, "layer_idx") for inner in module.modules() if inner is not module)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _last_places(mask: Tensor, spans: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the last tokens of each row stand, `(rows, tokens)`, and which are within its span."""
    length = mask.shape[1]
    last = (mask * torch.arange(1, length + 1, device=mask.device)).argmax(1)
    back = torch.arange(max(spans) - 1, -1, -1, device=mask.device)
    real = back < torch.tensor(spans, device=mask.device)[:, None]
    return (last[:, None] - back).clamp(min=0), real


def _weigh(costs: Tensor, asked: Asked) -> Tensor:
    weights: Any = torch.tensor(asked.weights, device=costs.device)
    return (costs * weights).sum()

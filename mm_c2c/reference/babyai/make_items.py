"""Questions about rollouts as JSONL: to train a reader on, or to evaluate one.

    python -m mm_c2c.reference.babyai.make_items train --rollouts FILE --out FOLDER
    python -m mm_c2c.reference.babyai.make_items unseen --rollouts FILE --out FOLDER

`train` writes `items.jsonl`. `unseen` writes `items.jsonl`, balanced over kinds and their answers;
`narration.jsonl`, one sentence each; `lies.jsonl`, whose instruction was swapped after the fact: the
policy acted under its own, and its action tokens are those; `why.jsonl`, what will go wrong; and
`monitor.jsonl`, which asks about episodes again and again whether they will succeed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import torch

from mm_c2c.errors import run_main
from mm_c2c.reference.babyai.levels import ACTIONS, Camera
from mm_c2c.reference.babyai.questions import (
    MOTIONS,
    OPTIONS,
    WORDINGS,
    Question,
    answers,
    ask,
    caption,
    failure,
    in_view,
    swapped_mission,
)
from mm_c2c.reference.babyai.rollouts import POLICY, Episode, load_episodes, load_policy
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.sources.base import SourceInput

# What an instruction is about, so that a swapped one says something else.
_ABOUT_GOAL = ("next", "object", "colour", "side")
# What a step with something in the robot's hands is asked further, so that what it holds and what
# it is after are told apart.
_ABOUT_HANDS = ("held", "hands", "object", "colour")
# Steps at which a failure monitor looks.
WATCHED = range(0, 21, 2)
_BATCH = 64
# Unseen questions about what goes wrong.
_WHY = 240


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One step of an episode, as a reader is shown it.

    Attributes:
        episode: which.
        number: of the step.
        mission: the instruction that is shown.
        text: what the policy is shown to have read.
        tokens: the action tokens that it wrote.
        told: where the instruction was swapped: what the policy would be after if it had read it,
            by the name of a wording.
    """

    episode: Episode
    number: int
    mission: str
    text: str
    tokens: tuple[int, ...]
    told: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Of its picture."""
        return f"{self.episode.name}-{self.number:03d}"


class Row(NamedTuple):
    """A question about a moment."""

    moment: Moment
    question: Question


def moments(
    episodes: Iterable[Episode],
    policy: TokenActionSource,
    rng: random.Random,
    per_episode: int,
    among: Callable[[Episode], Sequence[int]] = lambda episode: range(len(episode.steps)),
) -> list[Moment]:
    """Steps of each episode, drawn at random, in order.

    Args:
        episodes: in which to look.
        policy: who acted in them.
        rng: picks the steps.
        per_episode: how many, at most.
        among: which steps of an episode there are to pick from; all, where nothing else is said.
    """
    found = []
    for episode in episodes:
        numbers = among(episode)
        for number in sorted(rng.sample(numbers, min(per_episode, len(numbers)))):
            step = episode.steps[number]
            tokens = tuple(policy.bins.tokens(torch.tensor(step.chunk)).tolist())
            found.append(
                Moment(
                    episode=episode,
                    number=number,
                    mission=episode.mission,
                    text=step.text,
                    tokens=tokens,
                )
            )
    return found


def carrying(episode: Episode) -> list[int]:
    """Its steps with something in the robot's hands."""
    return [number for number, step in enumerate(episode.steps) if step.carrying]


def watched(episode: Episode) -> list[int]:
    """Those of the steps `WATCHED` that it has."""
    return [number for number in WATCHED if number < len(episode.steps)]


def swap(
    found: Sequence[Moment],
    policy: TokenActionSource,
    camera: Camera,
    rng: random.Random,
    most: int = 1,
) -> list[Moment]:
    """The moments whose instruction can be swapped for one that asks for another action.

    The other object is in view, and not called as the one the policy goes for; and the policy,
    reading about it, would begin otherwise.

    Args:
        found: moments with their own instruction.
        policy: who reads the swapped ones.
        camera: what it sees them with.
        rng: picks the other objects.
        most: other objects that are tried a moment.
    """
    tried = []
    for moment in found:
        step, episode = moment.episode.steps[moment.number], moment.episode
        truth = answers(episode, moment.number)
        others = [thing for thing in in_view(step) if thing[0] != truth.get("object")]
        names = Counter(name for name, _, _ in in_view(step))
        others = [thing for thing in others if names[thing[0]] == 1]
        if "object" not in truth:
            continue
        for name, forward, right in rng.sample(others, min(most, len(others))):
            mission = swapped_mission(episode, moment.number, name)
            if mission is None or name in episode.mission:
                continue
            ahead = not right and forward > 0
            side = "straight ahead" if ahead else "left" if right < 0 else "right"
            told = {"object": name, "colour": name.split()[0], "side": side}
            text = mission + moment.text[len(moment.mission) :]
            tried.append(
                Moment(
                    episode=episode,
                    number=moment.number,
                    mission=mission,
                    text=text,
                    tokens=moment.tokens,
                    told=told,
                )
            )
    kept = []
    for first in range(0, len(tried), _BATCH):
        batch = tried[first : first + _BATCH]
        looks = [
            SourceInput(
                text=moment.text,
                images=(camera.picture(moment.episode.steps[moment.number].symbols()),),
            )
            for moment in batch
        ]
        acted = policy.act(looks).tokens[:, 0]
        for moment, token, step in zip(
            batch, acted.tolist(), policy.bins.tokens(acted).tolist(), strict=True
        ):
            motion = MOTIONS.get(ACTIONS[step])
            if token != moment.tokens[0] and motion and moment.told is not None:
                moment.told["next"] = motion
                kept.append(moment)
    return kept


def questions_of(moment: Moment, rng: random.Random) -> list[Question]:
    """All questions of a moment; of a swapped one those to which it says something untrue."""
    found = answers(moment.episode, moment.number)
    if moment.told is not None:
        told = moment.told
        found = {k: v for k, v in found.items() if k in _ABOUT_GOAL and told[k] != v}
    return ask(found, rng)


def about_hands(found: Sequence[Moment], rng: random.Random) -> list[Row]:
    """What steps with something in the robot's hands are asked further."""
    rows = []
    for moment in found:
        known = answers(moment.episode, moment.number)
        asked = {name: known[name] for name in _ABOUT_HANDS if name in known}
        rows += [Row(moment, question) for question in ask(asked, rng)]
    return rows


def about_sentences(found: Sequence[Moment], count: int) -> list[Row]:
    """So many sentences about each moment, asked for in every wording by turns.

    A training weighs an answer's tokens, so that what a sentence says counts less a question than
    what two words say.
    """
    wordings = WORDINGS["narration"]
    told = [(moment, answers(moment.episode, moment.number).get("narration")) for moment in found]
    return [
        Row(moment, Question("narration", words, sentence, ()))
        for moment, sentence in told
        if sentence is not None
        for words in itertools.islice(itertools.cycle(wordings), count)
    ]


def about_ends(found: Sequence[Moment]) -> list[Row]:
    """Whether and why its episode will fail, asked of each moment in all words."""
    rows = []
    for moment in found:
        ends = {"success": answers(moment.episode, moment.number)["success"]}
        ends["why"] = failure(moment.episode)
        rows += [
            Row(moment, Question(kind, words, answer, OPTIONS[kind]))
            for kind, answer in ends.items()
            for words in WORDINGS[kind]
        ]
    return rows


def about_failures(found: Sequence[Moment], rng: random.Random) -> list[Row]:
    """What will go wrong, asked of each moment."""
    reasons = {moment.episode.name: failure(moment.episode) for moment in found}
    return [
        Row(moment, question)
        for moment in found
        for question in ask({"why": reasons[moment.episode.name]}, rng)
    ]


def thin(rows: Sequence[Row], rng: random.Random, narrated: float, most: float = 2.0) -> list[Row]:
    """Fewer of the answers that are given far oftener than others of their kind.

    Args:
        rows: questions, in order.
        rng: picks which.
        narrated: share of the narrations that are kept.
        most: times the median over a kind's answers that one of them may have.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.question.kind][row.question.answer] += 1

    def share(question: Question) -> float:
        found = counts[question.kind]
        if question.kind == "narration":
            return narrated
        return min(1.0, most * median_high(found.values()) / found[question.answer])

    return [row for row in rows if rng.random() < share(row.question)]


def balance(
    rows: Sequence[Row], per_kind: int, rng: random.Random, prefer: Collection[str] = ()
) -> list[Row]:
    """So many of each kind, its answers in turn as long as each lasts.

    Args:
        rows: questions.
        per_kind: how many.
        rng: picks which.
        prefer: names of moments that are taken first, since their pictures are there already.
    """
    by_kind: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    mixed = rng.sample(list(rows), len(rows))
    for row in sorted(mixed, key=lambda row: row.moment.name in prefer):  # taken from the end
        by_kind[row.question.kind][row.question.answer].append(row)
    chosen = []
    for kind in sorted(by_kind):
        piles = [by_kind[kind][answer] for answer in sorted(by_kind[kind])]
        count = 0
        while count < per_kind and any(piles):
            for pile in piles:
                if pile and count < per_kind:
                    chosen.append(pile.pop())
                    count += 1
    return sorted(chosen, key=lambda row: row.moment.name)


def write(rows: Sequence[Row], path: Path, camera: Camera) -> None:
    """Write questions, one a line, and their pictures into `images` beside the file."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for moment, question in rows:
            step = moment.episode.steps[moment.number]
            picture = path.parent / "images" / f"{moment.name}.webp"
            if not picture.exists():
                camera.picture(step.symbols()).save(picture, lossless=True, method=6)
            line: dict[str, Any] = {
                "image": f"images/{picture.name}",
                "text": moment.text,
                "action_tokens": moment.tokens,
                "question": question.question,
                "answer": question.answer,
                "kind": question.kind,
                "options": question.options,
                "caption": caption(step),
                "instruction": moment.mission,
                "episode": moment.episode.name,
                "step": moment.number,
                "success": moment.episode.success,
            }
            if moment.told is not None:
                line["told"] = moment.told[question.kind]
            file.write(json.dumps(line) + "\n")


def watch(
    episodes: Sequence[Episode], policy: TokenActionSource, rng: random.Random, count: int
) -> list[Row]:
    """Whether it will succeed, asked at the steps `WATCHED` of each episode.

    They are the same in all: looks spread over an episode would tell its length by their numbers.
    As many episodes that fail as such that succeed, at most `count` of each.
    """
    groups = [[e for e in episodes if e.success is success] for success in (True, False)]
    size = min(count, *map(len, groups))
    rows = []
    for group in groups:
        for episode in rng.sample(group, size):
            for moment in moments([episode], policy, rng, len(WATCHED), watched):
                found = {"success": answers(episode, moment.number)["success"]}
                rows += [Row(moment, question) for question in ask(found, rng)]
    return rows


def main() -> None:
    """Make the files of a split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("split", choices=("train", "unseen"))
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy", type=Path, default=POLICY)
    parser.add_argument("--per-episode", type=int, default=12, help="steps of an episode, at most")
    parser.add_argument("--per-kind", type=int, default=106, help="unseen questions of a kind")
    parser.add_argument("--lies", type=float, default=0.25, help="swapped steps a step of `train`")
    parser.add_argument("--swaps", type=int, default=1, help="other objects tried a step")
    parser.add_argument(
        "--carrying",
        type=int,
        default=0,
        help="further steps of an episode of `train`, at most, with something in its hands",
    )
    parser.add_argument(
        "--watched",
        type=int,
        default=0,
        help="further steps of an episode of `train`, at most, where a monitor looks: how it ends",
    )
    parser.add_argument(
        "--narrated", type=float, default=0.5, help="sentences about a step of `train`, on average"
    )
    parser.add_argument(
        "--monitored",
        type=int,
        default=300,
        help="unseen episodes to watch that fail; as many others",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, camera, policy = random.Random(args.seed), Camera(), load_policy(args.policy)
    episodes = load_episodes(args.rollouts)
    found = moments(episodes, policy, rng, args.per_episode)
    lies = swap(found, policy, camera, rng, args.swaps)
    if args.split == "train":
        lies = rng.sample(lies, min(len(lies), int(args.lies * len(found))))
        rows = [Row(m, question) for m in (*found, *lies) for question in questions_of(m, rng)]
        rows += about_failures(found, rng)
        asked_for = max(1, math.ceil(args.narrated))
        rows += about_sentences(found, asked_for - 1)
        rows.sort(key=lambda row: (row.moment.name, row.moment.text))  # one example a moment
        rows += about_hands(moments(episodes, policy, rng, args.carrying, carrying), rng)
        rows += about_ends(moments(episodes, policy, rng, args.watched, watched))
        write(thin(rows, rng, args.narrated / asked_for), args.out / "items.jsonl", camera)
        return
    rows = [Row(moment, question) for moment in found for question in questions_of(moment, rng)]
    asked = [row for row in rows if row.question.kind != "narration"]
    told = [row for row in rows if row.question.kind == "narration"]
    false = [Row(moment, question) for moment in lies for question in questions_of(moment, rng)]
    chosen = balance(asked, args.per_kind, rng)
    seen = {row.moment.name for row in chosen}
    told = [row for row in told if row.moment.name in seen]
    files = {
        "items": chosen,
        "narration": rng.sample(told, min(len(told), args.per_kind // 2)),
        "lies": balance(false, args.per_kind * 2 // 3, rng, seen),
        "why": balance(about_failures(moments(episodes, policy, rng, 4), rng), _WHY, rng),
        "monitor": watch(episodes, policy, rng, args.monitored),
    }
    for name, picked in files.items():
        write(picked, args.out / f"{name}.jsonl", camera)


if __name__ == "__main__":
    run_main(main)

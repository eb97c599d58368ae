"""Text to text on multiple-choice questions: each arm and control, by the options' likelihood.

    python -m mm_c2c.evaluation.text_to_text --questions runs/text_qa --bridges runs/text_to_text

asks `test.jsonl` of `mm_c2c.reference.text_qa` and the bridges of `mm_c2c.reference.train_text`.

Every arm reads the question and `Answer:`, the target in its chat template and a base model as
plain text, and chooses the option whose words are the likeliest to follow, by the mean
log-likelihood of a character: what lm-evaluation-harness calls `acc_norm`. Nothing is generated, so
no arm fails for its form. In `text_to_text` the source chooses first, in the same way, and the
target reads its option beside the question, in the wording that did best on questions to train on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.cache import LayerKV, PositionKind, SourceCache, zeroed
from mm_c2c.errors import run_main
from mm_c2c.evaluation.statistics import accuracy, compare, draw_resamples, hits_of
from mm_c2c.perception import FusedInputs
from mm_c2c.pretrained import fingerprint
from mm_c2c.reference.text_qa import Choice, load_choices
from mm_c2c.run_folder import JsonLines, claim, hold, write_json
from mm_c2c.sources.base import FrozenReader, SourceInput
from mm_c2c.sources.text import TextSource, encode_chats

WORDINGS = (
    "Another model answers: {answer}",
    "Hint: the answer is {answer}",
    "A friend thinks it is {answer}",
)
"""What the target may be told of the source's answer."""
SEARCHED = 100
"""Questions to train on, on which the wording is chosen."""
RESAMPLES = 2000
SHUFFLED, ZEROED = "_shuffled", "_zeroed"
"""What the names of a fuser's controls end in."""


@dataclass(frozen=True)
class Arms:
    """Every arm of the comparison.

    Attributes:
        bridges: into one target, with one prompt, by name; each has one source of text. The first
            is the one that the others are compared with, and whose source is the arm `source`.
        wording: one of `WORDINGS`.
    """

    bridges: Mapping[str, Bridge]
    wording: str = WORDINGS[0]

    @property
    def fused(self) -> Bridge:
        """The first bridge."""
        return next(iter(self.bridges.values()))

    @property
    def source(self) -> TextSource:
        """The source of the first bridge."""
        (source,) = self.fused.sources.values()
        return source  # type: ignore[return-value]  # `Source` is what bridges know of it

    @torch.no_grad()
    def answer(self, choices: Sequence[Choice]) -> dict[str, list[int]]:
        """Numbers of the options that each arm chooses.

        Args:
            choices: at least two, of about the same length: the shuffled control hands each the
                cache of its neighbour.
        """
        texts = [choice.asked() for choice in choices]
        reading = self.fused.read_questions(texts)
        answers = {"target": self._choose(reading.inputs, choices)}
        answers["source"] = source_answers(self.source, choices)
        answers["text_to_text"] = self.relayed(choices, answers["source"], self.wording)
        read: dict[str, SourceCache] = {}
        for name, bridge in self.bridges.items():
            ((called, source),) = bridge.sources.items()
            if called not in read:
                read[called] = source.prefill([SourceInput(text=text) for text in texts])
            given = {name: read[called], f"{name}{SHUFFLED}": shuffled(read[called])}
            given[f"{name}{ZEROED}"] = zeroed(read[called])
            for arm, cache in given.items():
                answers[arm] = self._choose(bridge.fuse_words(reading, {called: cache}), choices)
        return answers

    @torch.no_grad()
    def relayed(self, choices: Sequence[Choice], answers: Sequence[int], wording: str) -> list[int]:
        """The target chooses after it was told the source's answers."""
        reading = self.fused.read_questions(
            [tell(choice, answer, wording) for choice, answer in zip(choices, answers, strict=True)]
        )
        return self._choose(reading.inputs, choices)

    def _choose(self, fused: FusedInputs, choices: Sequence[Choice]) -> list[int]:
        target = self.fused.target
        return choose(target, target.tokenizer, fused, choices)


def source_answers(source: TextSource, choices: Sequence[Choice]) -> list[int]:
    """What a source chooses."""
    texts = [choice.asked() for choice in choices]
    encoded, _ = encode_chats(source.tokenizer, texts, source.model.device)
    return choose(source, source.tokenizer, encoded, choices)


def choose(
    reader: FrozenReader, tokenizer: Any, inputs: Mapping[str, Any], choices: Sequence[Choice]
) -> list[int]:
    """The option of each question that is the likeliest, a character.

    Args:
        reader: of the prompts.
        tokenizer: its own; where it has no chat template, an answer follows a space.
        inputs: of `FrozenReader.score`, a prompt a question.
        choices: the questions.
    """
    before = "" if tokenizer.chat_template else " "
    rows = [row for row, choice in enumerate(choices) for _ in choice.options]
    options = [option for choice in choices for option in choice.options]
    ids = tokenizer([before + option for option in options], add_special_tokens=False)["input_ids"]
    sums, _ = reader.score(inputs, rows, ids)
    means = sums.cpu() / torch.tensor([len(option) for option in options])
    parts = means.split([len(choice.options) for choice in choices])
    return [int(part.argmax()) for part in parts]


def tell(choice: Choice, answer: int, wording: str) -> str:
    """A question as the target reads it with the source's answer."""
    question, _, end = choice.asked().rpartition("\n")
    return f"{question}\n{wording.format(answer=choice.options[answer])}\n{end}"


def shuffled(cache: SourceCache) -> SourceCache:
    """Each row's words with what the source made of the row before, the last words on each other.

    Where that row is shorter, its first position is repeated.
    """
    first = (cache.kinds != PositionKind.PAD).long().argmax(1).roll(1)
    places = torch.arange(cache.kinds.shape[1], device=first.device)
    index = torch.maximum(places[None], first[:, None])

    def of_other(states: Tensor) -> Tensor:
        return states.roll(1, 0).gather(2, index[:, None, :, None].expand_as(states))

    layers = tuple(LayerKV(of_other(keys), of_other(values)) for keys, values in cache.layers)
    return replace(
        cache, layers=layers, position_ids=cache.position_ids.roll(1, 0).gather(1, index)
    )


def split_rows(count: int, batch_size: int) -> list[range]:
    """Batches of at least two where there are two: a lone row could not be shuffled."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def choose_wording(arms: Arms, choices: Sequence[Choice], batch_size: int) -> dict[str, float]:
    """Accuracy of the relay on questions, by its wording; the best comes first."""
    found: Counter[str] = Counter(dict.fromkeys(WORDINGS, 0))
    for rows in tqdm(split_rows(len(choices), batch_size), desc="wordings"):
        batch = choices[rows.start : rows.stop]
        answers = source_answers(arms.source, batch)
        for wording in WORDINGS:
            said = arms.relayed(batch, answers, wording)
            found[wording] += sum(a == choice.answer for a, choice in zip(said, batch, strict=True))
    return {wording: count / len(choices) for wording, count in found.most_common()}


def evaluate(
    bridges: Mapping[str, Bridge],
    test: Sequence[Choice],
    train: Sequence[Choice],
    out: Path,
    *,
    batch_size: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Ask every arm; a run that was stopped goes on where it stopped.

    Args:
        bridges: as in `Arms`.
        test: what is asked.
        train: where the relay's wording is chosen, on `SEARCHED` of them.
        out: folder of `answers.jsonl` and `summary.json`.
        batch_size: questions at once.
        seed: of the bootstrap, and of which questions the wording is chosen on.

    Returns:
        What `summary.json` holds.
    """
    prints = {name: fingerprint(bridge.fusers.state_dict()) for name, bridge in bridges.items()}
    dtype = str(next(iter(bridges.values())).target.model.dtype).removeprefix("torch.")
    asked = {"test": _fingerprint(test), "train": _fingerprint(train)}
    settings = {"fusers": prints, "dtype": dtype, "items": len(test), "fingerprints": asked}
    settings |= {"batch_size": batch_size, "seed": seed}
    test = sorted(test, key=lambda choice: (choice.kind, len(choice.asked())))
    with hold(out):
        claim(out, settings)
        wordings = _kept_wordings(out / "wordings.json", bridges, train, batch_size, seed)
        arms = Arms(bridges, next(iter(wordings)))
        batches = split_rows(len(test), batch_size)
        answers = JsonLines(out / "answers.jsonl", [rows.stop for rows in batches])
        for rows in tqdm(batches, desc="answers"):
            if rows.stop > len(answers.rows):
                batch = test[rows.start : rows.stop]
                said = arms.answer(batch)
                answers.append([_row(choice, said, i) for i, choice in enumerate(batch)])
        first = next(iter(bridges))
        kinds = dict.fromkeys(row["kind"] for row in answers.rows)
        summary = {
            "config": settings,
            "wordings": wordings,
            "first": first,
            "kinds": {
                kind: summarise([row for row in answers.rows if row["kind"] == kind], first, seed)
                for kind in kinds
            },
        }
        write_json(out / "summary.json", summary)
    return summary


def _fingerprint(choices: Sequence[Choice]) -> str:
    return hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]


def _kept_wordings(
    path: Path, bridges: Mapping[str, Bridge], train: Sequence[Choice], batch_size: int, seed: int
) -> dict[str, float]:
    if not path.exists():
        asked = random.Random(seed).sample(train, min(SEARCHED, len(train)))
        asked.sort(key=lambda choice: len(choice.asked()))
        write_json(path, choose_wording(Arms(bridges), asked, batch_size))
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _row(choice: Choice, said: Mapping[str, Sequence[int]], place: int) -> dict[str, Any]:
    return {
        "kind": choice.kind,
        "question": choice.question,
        "options": choice.options,
        "gold": choice.answer,
        "answers": {arm: numbers[place] for arm, numbers in said.items()},
    }


def summarise(rows: Sequence[Mapping[str, Any]], first: str, seed: int) -> dict[str, Any]:
    """Accuracy of each arm with its interval, what guessing gets, and the paired tests.

    `against` compares the first arm with all others; `shuffled` each fuser with another question's
    cache through the same fuser.

    Args:
        rows: lines of `answers.jsonl`.
        first: the arm that all others are compared with.
        seed: of the bootstrap.
    """
    draws = draw_resamples(len(rows), RESAMPLES, seed)
    hits = {
        arm: hits_of([row["answers"][arm] == row["gold"] for row in rows])
        for arm in rows[0]["answers"]
    }

    def against(one: str, other: str) -> dict[str, Any]:
        paired = compare(hits[one], hits[other], draws)
        return {**paired._asdict(), "difference": paired.difference._asdict()}

    return {
        "n": len(rows),
        "accuracy": {arm: accuracy(found, draws)._asdict() for arm, found in hits.items()},
        "guess": sum(1 / len(row["options"]) for row in rows) / len(rows),
        "against": {arm: against(first, arm) for arm in hits if arm != first},
        "shuffled": {
            arm: against(arm, f"{arm}{SHUFFLED}") for arm in hits if f"{arm}{SHUFFLED}" in hits
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate trained bridges."""
    from mm_c2c.evaluation.text_report import text_report
    from mm_c2c.reference.train_text import load_bridges

    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.evaluation.text_to_text", description="Ask every arm and control."
    )
    parser.add_argument("--questions", type=Path, required=True, help="folder of train and test")
    parser.add_argument("--bridges", type=Path, required=True, help="folder of the training")
    parser.add_argument("--out", type=Path, help="instead of `evaluation` in that folder")
    args = parser.parse_args(argv)
    out = args.out or args.bridges / "evaluation"
    evaluate(
        load_bridges(args.bridges),
        load_choices(args.questions / "test.jsonl"),
        load_choices(args.questions / "train.jsonl"),
        out,
    )
    sys.stdout.write(text_report(out) + "\n")


if __name__ == "__main__":
    run_main(main)

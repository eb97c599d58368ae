"""Items to ask about, and how an answer is scored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mm_c2c.errors import InputError
from mm_c2c.images import load_image

_NUMBERS = {"zero": "0", "none": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_ARTICLES = {"a", "an", "the"}


class Item(NamedTuple):
    """One question about one picture.

    Attributes:
        image: path of the picture.
        kind: kind of question.
        question: what is asked.
        answer: the true answer.
        options: all answers this kind of question can have.
    """

    image: Path
    kind: str
    question: str
    answer: str
    options: tuple[str, ...]

    def picture(self) -> Image.Image:
        """The picture, read from disk."""
        return load_image(self.image)


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read a JSONL of `{"image", "kind", "question", "answer"}`; pictures lie beside it.

    Args:
        path: the file.
        limit: keep so many, spread evenly over the file.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read items from {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((path.parent / row["image"], row["kind"], row["question"], row["answer"]))
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: expected an item, got {error}") from error
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    options: dict[str, set[str]] = {}
    for _, kind, _, answer in rows:
        options.setdefault(kind, set()).add(answer)
    return [Item(*row, options=tuple(sorted(options[row[1]]))) for row in rows]


def normalise(text: str) -> str:
    """Lower case, without articles and punctuation; numbers up to four as digits."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def is_right(answer: str, item: Item) -> bool:
    """Exact match after normalising."""
    return normalise(answer) == normalise(item.answer)


def is_right_in_a_sentence(answer: str, item: Item) -> bool:
    """Whether a wordy answer names the true option, and no other one of its kind."""
    options = sorted({normalise(o) for o in (*item.options, item.answer)}, key=len, reverse=True)
    pattern = r"\b(" + "|".join(re.escape(option) for option in options) + r")\b"
    return set(re.findall(pattern, normalise(answer))) == {normalise(item.answer)}

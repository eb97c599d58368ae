"""Items to ask about, and how an answer is scored."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mm_c2c.errors import InputError
from mm_c2c.images import load_image
from mm_c2c.sources.base import SourceInput
from mm_c2c.training.data import look_at

_COUNT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNT_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_THOUSANDS = re.compile(r"\b\d{1,3}(,\d{3})+\b")
# All but the sign of a number.
_PUNCTUATION = re.compile(r"(?!(?<!\w)-\d)[^\w\s]")


class Item(NamedTuple):
    """One question about one picture or recording, or about what a policy sees and does.

    Attributes:
        image: path of the picture; of the first where there are several; of the recording where
            there is none.
        kind: kind of question.
        question: what is asked.
        answer: the true answer.
        options: all answers this question can have; empty where that is open.
        description: a true description of the picture, where the file has one.
        human_answers: what each of several people answered, where the file has that.
        told: what a policy's instruction says, where it was swapped after the fact; `answer` is
            what the policy does.
        episode: which episode the item is of, where it is of one.
        step: of the episode, from 0.
        success: whether the episode succeeds, where the file says so.
        row: the line of the file, with paths of what it shows as they can be opened.
    """

    image: Path
    kind: str
    question: str
    answer: str
    options: tuple[str, ...]
    description: str | None = None
    human_answers: tuple[str, ...] = ()
    told: str | None = None
    episode: str | None = None
    step: int = 0
    success: bool | None = None
    row: Mapping[str, Any] = {}

    @property
    def sampled_with(self) -> str:
        """What it has in common with other items, which are no samples apart from it."""
        return str(self.image) if self.episode is None else self.episode

    def picture(self) -> Image.Image:
        """The picture, read from disk."""
        return load_image(self.image)

    def look(self) -> SourceInput:
        """What the source is shown: picture or recording, from disk, and what else the line has."""
        return look_at(self.row or {"image": self.image}, str(self.image))


def load_items(path: Path, limit: int | None = None, kinds: Collection[str] = ()) -> list[Item]:
    """Read a JSONL of `{"image", "question", "answer"}`; pictures lie beside it.

    A line may also have what else `mm_c2c.training.data` shows a source (`images`, `video` or `audio`
    in place of `image`, `text`, `state`), `kind`, its `options` (else: all answers of its kind in
    the file), a true `caption`, `human_answers`, a list of what each of several people answered, and
    of a policy's episode `episode`, `step`, `success` and `told`.

    Args:
        path: the file.
        limit: keep so many, spread evenly over the file.
        kinds: keep these kinds of question only; all when empty.

    Raises:
        InputError: the file cannot be read, or holds no such items.
    """
    try:
        # Not `splitlines`: JSON may hold other line breaks as they are.
        *lines, last = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot read items from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read items from {path}: it is no UTF-8 ({error})") from error
    lines += [last] * bool(last)
    if not lines:
        raise InputError(f"{path} holds no items")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"{row!r}")
            lists = [row.get(key) or [] for key in ("options", "human_answers", "images", "video")]
            if wrong := [found for found in lists if not isinstance(found, list)]:
                raise TypeError(f"{wrong[0]!r} where a list is due")
            kind = "question" if row.get("kind") is None else row["kind"]
            texts = [kind, row["question"], row["answer"], *lists[0], *lists[1]]
            rows.append({**row, "kind": kind, **_shown_paths(row, path.parent)})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"image", "question", "answer"}}, got {error!r}'
            ) from error
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise InputError(
                f"{path}, line {number}: question, answers, options and kind must be words in quotes, "
                f"got {wrong[0]!r}"
            )
    if kinds:
        known = ", ".join(sorted({row["kind"] for row in rows}))
        rows = [row for row in rows if row["kind"] in kinds]
        if not rows:
            raise InputError(f"{path} holds no item of kind {', '.join(kinds)}; its kinds: {known}")
    # Before the cut: what can be answered is not less for asking less.
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["kind"], set()).add(row["answer"])
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [
        Item(
            image=row.get("image") or row.get("audio") or row["video"][0],
            kind=row["kind"],
            question=row["question"],
            answer=row["answer"],
            options=tuple(
                sorted(answers[row["kind"]]) if row.get("options") is None else row["options"]
            ),
            description=row.get("caption"),
            human_answers=tuple(row.get("human_answers") or ()),
            told=row.get("told"),
            episode=None if row.get("episode") is None else str(row["episode"]),
            step=row.get("step", 0),
            success=row.get("success"),
            row=row,
        )
        for row in rows
    ]


def _shown_paths(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where pictures and recordings of a line lie; `image` is the first of several pictures."""
    shown: dict[str, Any] = {
        key: [folder / name for name in row[key]] for key in ("images", "video") if row.get(key)
    }
    shown |= {key: folder / row[key] for key in ("image", "audio") if row.get(key)}
    if "images" in shown:
        shown["image"] = shown["images"][0]
    return shown or {"image": folder / row["image"]}


def normalise(text: str) -> str:
    """Lower case, without articles and punctuation; numbers up to ten as digits.

    A number keeps its minus and loses the commas of its thousands. Articles and punctuation stay
    where nothing else is there: an option may be called A.
    """
    text = text.lower().replace("\N{MINUS SIGN}", "-")
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    words = _PUNCTUATION.sub(" ", text).split() or text.split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_NUMBERS.get(word, word) for word in kept)


def is_right(answer: str, gold: str) -> bool:
    """Exact match after normalising."""
    return normalise(answer) == normalise(gold)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """How far people agree with an answer (Antol et al., arXiv:1505.00468).

    As the published code counts: min(people who said so / 3, 1), averaged over leaving out each
    of the people in turn. Answers are normalised as everywhere here; that code has a longer list
    of contractions.

    Args:
        answer: what is scored.
        human_answers: one a person, ten in VQAv2 and TextVQA; at least one.
    """
    said, count = normalise(answer), len(human_answers)
    agree = sum(normalise(other) == said for other in human_answers)
    # Without one of those who agree, and without one of those who do not.
    scores = agree * min(1, (agree - 1) / 3) + (count - agree) * min(1, agree / 3)
    return scores / count


def is_right_in_a_sentence(answer: str, gold: str, options: Collection[str]) -> bool:
    """Whether a wordy answer names the true option, and no other one of its kind."""
    names, longest = _names(frozenset(options) if gold in options else frozenset((*options, gold)))
    words = normalise(answer).split()
    named, at = set(), 0
    while at < len(words):
        for end in range(min(at + longest, len(words)), at, -1):  # the longest name first
            if (name := " ".join(words[at:end])) in names:
                named.add(name)
                at = end
                break
        else:
            at += 1
    return named == {normalise(gold)}


@lru_cache(maxsize=256)
def _names(options: frozenset[str]) -> tuple[frozenset[str], int]:
    """Options as they are compared, and the words of the longest: open questions share many."""
    names = frozenset(map(normalise, options)) - {""}
    return names, max((len(name.split()) for name in names), default=0)

"""Published question sets as the items that `mm-c2c evaluate` asks.

    python -m mm_c2c.evaluation.sets easy-vqa --out easy-vqa
    mm-c2c evaluate items=easy-vqa/items.jsonl

writes `items.jsonl` with its pictures beside it. easy-vqa comes from the package index, the others
from the Hub through `datasets`, row by row. Where a set has several people's answers, the item's
answer is the one most of them gave, which the exact match of `tasks.is_right` takes, and all of
them go with it: `mm-c2c evaluate` then counts VQA accuracy too. `openbookqa` has no
pictures, so that its items are read by text to text bridges, not by `mm-c2c evaluate`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mm_c2c.errors import FetchError, InputError, MMC2CError
from mm_c2c.reference.fetch import pip_download

EASY_VQA = "easy-vqa==1.0"
EASY_VQA_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
EASY_VQA_KINDS = {
    "yes or no": ("no", "yes"),
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
"""Its thirteen answers by what is asked for; the package itself names no kinds."""


class SetItem(NamedTuple):
    """One question of a set.

    Attributes:
        question: what is asked.
        answer: the true answer.
        kind: kind of question.
        options: the answers to choose from; empty where the question is open.
        picture: the picture, if the set has any.
        picture_name: names its file, the same for all questions about it.
        human_answers: what each of several people answered, if the set says so.
    """

    question: str
    answer: str
    kind: str
    options: tuple[str, ...] = ()
    picture: Image.Image | None = None
    picture_name: str = ""
    human_answers: tuple[str, ...] = ()


Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """Where a set lies on the Hub, and how its rows are read.

    Attributes:
        hub_id: of the data set.
        split: that is asked by default.
        items: the questions of one row, whose picture is in its column `image`.
        name: its configuration, where it has several.
        pictures: the configuration that holds the pictures, where the questions' has none: rows
            of `id` and `image`.
        picture_column: a question's column that holds the `id` of its picture.
    """

    hub_id: str
    split: str
    items: Callable[[Row], Iterable[SetItem]]
    name: str | None = None
    pictures: str | None = None
    picture_column: str = ""


def _vqav2(row: Row) -> Iterator[SetItem]:
    yield SetItem(
        row["question"],
        row["multiple_choice_answer"],
        row["answer_type"],
        picture=row["image"],
        picture_name=str(row["image_id"]),
        human_answers=tuple(given["answer"] for given in row["answers"]),
    )


def _gqa(row: Row) -> Iterator[SetItem]:
    kind = row["types"]["semantic"]
    name = str(row["imageId"])
    yield SetItem(row["question"], row["answer"], kind, picture=row["image"], picture_name=name)


def _textvqa(row: Row) -> Iterator[SetItem]:
    given = tuple(row["answers"])
    yield SetItem(
        row["question"],
        Counter(given).most_common(1)[0][0],
        "text",
        picture=row["image"],
        picture_name=str(row["question_id"]),
        human_answers=given,
    )


def _captionqa(row: Row) -> Iterator[SetItem]:
    for asked in row["questions"]:
        yield SetItem(
            asked["question"],
            asked["answer"],
            asked["category"][0],
            tuple(asked["choices"]),
            row["images"][0],
            row["id"],
        )


def _openbookqa(row: Row) -> Iterator[SetItem]:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    answer = options[row["answerKey"].strip()]
    yield SetItem(row["question_stem"], answer, "science", tuple(options.values()))


# Ids, splits and columns as lmms-eval 0.7.3 and lm-eval 0.4.13 read them. The rest is from the data
# sets' cards and from copies of them, and was not tried against the Hub: VQAv2's
# `multiple_choice_answer`, `answer_type`, `image_id` and `answers`, GQA's `types`.
HUB_SETS = {
    "captionqa": HubSet(hub_id="Borise/CaptionQA", split="natural", items=_captionqa),
    "vqav2": HubSet(hub_id="lmms-lab-encoder/VQAv2", split="validation", items=_vqav2),
    "gqa": HubSet(
        hub_id="lmms-lab-encoder/GQA",
        name="testdev_balanced_instructions",
        split="testdev",
        items=_gqa,
        pictures="testdev_balanced_images",
        picture_column="imageId",
    ),
    "textvqa": HubSet(hub_id="lmms-lab-encoder/textvqa", split="validation", items=_textvqa),
    "openbookqa": HubSet(hub_id="allenai/openbookqa", name="main", split="test", items=_openbookqa),
}
NAMES = ("easy-vqa", *HUB_SETS)


def write_set(name: str, out: Path, split: str | None = None, limit: int | None = None) -> int:
    """Write a set's questions and pictures into a folder.

    Args:
        name: one of `NAMES`.
        out: the folder; `items.jsonl` in it is written last.
        split: instead of the set's usual one.
        limit: the first so many questions; None takes all.

    Returns:
        How many questions were written.

    Raises:
        InputError: no such set, or its rows are not what is known of it.
        FetchError: it could not be had.
    """
    if name == "easy-vqa":
        with tempfile.TemporaryDirectory() as scratch:
            pip_download(EASY_VQA, Path(scratch), progress=True)
            (wheel,) = Path(scratch).glob("*.whl")
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != EASY_VQA_SHA256:
                raise FetchError(f"{wheel.name} is damaged, or not the package it was: try again")
            return _write(read_easy_vqa(wheel, split or "test"), out, limit)
    if name not in HUB_SETS:
        raise InputError(f"no set {name!r}; known: {', '.join(NAMES)}")
    return _write(read_hub_set(HUB_SETS[name], split), out, limit)


def read_easy_vqa(wheel: Path, split: str) -> Iterator[SetItem]:
    """The questions in easy-vqa's wheel, which is read as an archive and not imported."""
    kinds = {answer: kind for kind, answers in EASY_VQA_KINDS.items() for answer in answers}
    with zipfile.ZipFile(wheel) as archive:
        try:
            rows = json.loads(archive.read(f"easy_vqa/data/{split}/questions.json"))
        except KeyError as error:
            raise InputError(f"easy-vqa has splits train and test, not {split!r}") from error
        for question, answer, image in rows:
            with archive.open(f"easy_vqa/data/{split}/images/{image}.png") as file:
                picture = Image.open(io.BytesIO(file.read()))
            kind = kinds[answer]
            yield SetItem(question, answer, kind, EASY_VQA_KINDS[kind], picture, f"{image}")


def read_hub_set(hub_set: HubSet, split: str | None = None) -> Iterator[SetItem]:
    """The questions of a set on the Hub, streamed."""
    split = split or hub_set.split
    pictures = {}
    if hub_set.pictures:
        pictures = {row["id"]: row["image"] for row in _load(hub_set, hub_set.pictures, split)}
    for row in _load(hub_set, hub_set.name, split):
        try:
            if hub_set.pictures:
                row = {**row, "image": pictures[row[hub_set.picture_column]]}
            yield from hub_set.items(row)
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"{hub_set.hub_id}: a row is not as expected, {error!r}; its columns: "
                f"{', '.join(row)}"
            ) from error


def _load(hub_set: HubSet, name: str | None, split: str) -> Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'mm-c2c[sets]'") from error
    try:
        return datasets.load_dataset(hub_set.hub_id, name, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise FetchError(f"{hub_set.hub_id}, split {split!r}, from the Hub: {error}") from error


def _write(items: Iterable[SetItem], out: Path, limit: int | None) -> int:
    """Pictures as PNG, each once, and then the lines."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    written: set[Path] = set()
    for item in islice(items, limit):
        row: dict[str, Any] = {
            "question": item.question,
            "answer": item.answer,
            "kind": item.kind,
            "options": item.options,
        }
        if item.human_answers:
            row["human_answers"] = item.human_answers
        if item.picture is not None:
            file = Path("images") / (re.sub(r"[^\w.-]", "_", item.picture_name) + ".png")
            if file not in written:
                written.add(file)
                (out / file).parent.mkdir(exist_ok=True)
                item.picture.convert("RGB").save(out / file)
            row = {"image": file.as_posix(), **row}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (out / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write one set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.evaluation.sets", description="Write a question set's items."
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder for items and pictures")
    parser.add_argument("--split", help="instead of the set's usual one")
    parser.add_argument("--limit", type=int, help="the first so many questions")
    args = parser.parse_args(argv)
    try:
        count = write_set(args.name, args.out, args.split, args.limit)
    except (MMC2CError, ImportError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    sys.stdout.write(f"{count} questions in {args.out / 'items.jsonl'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

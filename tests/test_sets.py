"""Published sets as items: easy-vqa's archive in small, the Hub's columns in memory."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_c2c.errors import FetchError, InputError
from mm_c2c.evaluation import sets
from mm_c2c.evaluation.tasks import load_items


@pytest.fixture
def easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of one picture and three questions in the place of the published one."""
    rows = [["what is the red shape?", "circle", 7], ["is there a box?", "no", 7]]
    rows.append(["what color is the shape?", "red", 7])

    def download(requirement: str, folder: Path, *, progress: bool) -> None:
        assert requirement == sets.EASY_VQA
        with zipfile.ZipFile(folder / "easy_vqa-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("easy_vqa/data/test/questions.json", json.dumps(rows))
            Image.new("RGB", (8, 8), "red").save(tmp_path / "7.png")
            archive.write(tmp_path / "7.png", "easy_vqa/data/test/images/7.png")

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    download(sets.EASY_VQA, scratch, progress=False)
    (wheel,) = scratch.iterdir()
    # An archive notes when it was made: this one is handed out, so that its digest is known.
    monkeypatch.setattr(sets, "EASY_VQA_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(
        sets,
        "pip_download",
        lambda name, folder, progress: (folder / wheel.name).write_bytes(wheel.read_bytes()),
    )


@pytest.mark.usefixtures("easy_vqa")
def test_easy_vqa_gives_items_that_can_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sets.main(["easy-vqa", "--out", str(out)]) == 0
    assert "3 questions" in capsys.readouterr().out
    items = load_items(out / "items.jsonl")
    assert [(item.kind, item.answer) for item in items] == [
        ("shape", "circle"),
        ("yes or no", "no"),
        ("colour", "red"),
    ]
    assert all(item.answer in item.options for item in items)
    assert items[0].picture().getpixel((0, 0)) == (255, 0, 0)
    assert len(list((out / "images").iterdir())) == 1
    assert sets.write_set("easy-vqa", out, limit=2) == 2
    assert sets.main(["easy-vqa", "--out", str(out), "--split", "val"]) == 1
    assert "train and test" in capsys.readouterr().err


@pytest.mark.usefixtures("easy_vqa")
def test_another_wheel_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "EASY_VQA_SHA256", "0")
    with pytest.raises(FetchError, match="damaged"):
        sets.write_set("easy-vqa", tmp_path)
    with pytest.raises(InputError, match="known: easy-vqa, captionqa"):
        sets.write_set("easyvqa", tmp_path)


PICTURE = Image.new("RGB", (6, 4), "blue")
ANSWERS = ["stop"] * 6 + ["go"] * 4
# The columns that are read, and one or two that are not.
ROWS: dict[str, dict[str | None, list[dict[str, Any]]]] = {
    "captionqa": {
        None: [
            {
                "id": "nat_001",
                "domain": "natural",
                "images": [PICTURE],
                "questions": [
                    {
                        "question": "How many?",
                        "choices": ["1", "2"],
                        "answer": "2",
                        "category": ["Count"],
                    },
                    {
                        "question": "Is it red?",
                        "choices": ["Yes", "No"],
                        "answer": "No",
                        "category": ["Colour"],
                    },
                ],
            }
        ]
    },
    "vqav2": {
        None: [
            {
                "question_id": 12,
                "image_id": 1,
                "image": PICTURE,
                "question": "What sign?",
                "multiple_choice_answer": "stop",
                "answer_type": "other",
                "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(ANSWERS)],
            }
        ]
    },
    "gqa": {
        "testdev_balanced_instructions": [
            {
                "id": "9",
                "imageId": "n5",
                "question": "What sign?",
                "answer": "stop",
                "types": {"semantic": "obj", "structural": "query"},
            }
        ],
        "testdev_balanced_images": [{"id": "n5", "image": PICTURE}],
    },
    "textvqa": {
        None: [
            {"question_id": 3, "image": PICTURE, "question": "What sign?", "answers": ANSWERS[::-1]}
        ]
    },
    "openbookqa": {
        "main": [
            {
                "id": "q",
                "question_stem": "The sun is a",
                "choices": {"text": ["star", "stone"], "label": ["A", "B"]},
                "answerKey": "A",
            }
        ]
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`datasets.load_dataset` that knows the sets' names, and notes what is asked of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of itself
        datasets = pytest.importorskip("datasets", reason="make test-harness has datasets")
    known = {sets.HUB_SETS[name].hub_id: configs for name, configs in ROWS.items()}
    asked: list[tuple[Any, ...]] = []

    def load_dataset(hub_id: str, name: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((hub_id, name, split, streaming))
        return datasets.Dataset.from_list(known[hub_id][name]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.filterwarnings("ignore")  # arrow warns of itself
@pytest.mark.parametrize("name", ROWS)
def test_a_set_of_the_hub_gives_items(
    name: str, hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    sets.write_set(name, tmp_path)
    assert all(call[2:] == (sets.HUB_SETS[name].split, True) for call in hub)
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    if name == "openbookqa":  # no picture, which `load_items` says
        assert lines == [
            {
                "question": "The sun is a",
                "answer": "star",
                "kind": "science",
                "options": ["star", "stone"],
            }
        ]
        return
    items = load_items(tmp_path / "items.jsonl")
    expected = {
        "captionqa": [("Count", "2", ("1", "2")), ("Colour", "No", ("Yes", "No"))],
        "vqav2": [("other", "stop", ())],
        "gqa": [("obj", "stop", ())],
        "textvqa": [("text", "stop", ())],
    }
    assert [(item.kind, item.answer, item.options) for item in items] == expected[name]
    people = {"vqav2": ANSWERS, "textvqa": ANSWERS[::-1]}
    assert items[0].human_answers == tuple(people.get(name, ()))
    assert items[0].picture().getpixel((0, 0)) == (0, 0, 255)
    assert sets.write_set(name, tmp_path, limit=1) == 1


@pytest.mark.filterwarnings("ignore")  # arrow warns of itself
def test_rows_of_other_columns_are_named(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS["openbookqa"], "main", [{"id": "q", "stem": "The sun is a"}])
    with pytest.raises(InputError, match="its columns: id, stem"):
        sets.write_set("openbookqa", tmp_path)


@pytest.mark.network
def test_easy_vqa_is_there(tmp_path: Path) -> None:
    assert sets.write_set("easy-vqa", tmp_path) == 9673
    assert len(load_items(tmp_path / "items.jsonl", limit=20)) == 20

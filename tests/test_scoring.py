"""Items and their options, what counts as right, and what intervals and tests are over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_c2c.errors import InputError, MismatchError
from mm_c2c.evaluation.findings import findings
from mm_c2c.evaluation.report import brief, set_beside
from mm_c2c.evaluation.run import _others
from mm_c2c.evaluation.statistics import compare, draw_resamples, hits_of, mcnemar
from mm_c2c.evaluation.summary import summarise, swap_outcomes
from mm_c2c.evaluation.tasks import is_right, is_right_in_a_sentence, load_items
from mm_c2c.run_folder import JsonLines


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps({"image": "0.png", **row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- items ------------------------------------------------------------------------------------


def test_fewer_items_have_the_options_of_all(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": a} for a in "xyzw"])
    for limit in (1, 3, None):
        assert {item.options for item in load_items(path, limit)} == {("w", "x", "y", "z")}


def test_a_line_break_within_a_text_ends_no_line(tmp_path: Path) -> None:
    said = "one\u2028two\x85three"
    path = write(tmp_path / "items.jsonl", [{"question": said, "answer": "x"}] * 2)
    assert [item.question for item in load_items(path)] == [said] * 2
    kept = JsonLines(tmp_path / "rows.jsonl", [])
    kept.append([{"said": said}, {"said": "x"}])
    assert JsonLines(tmp_path / "rows.jsonl", [2]).rows == kept.rows


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "answer": 3},
        {"question": "Q?", "answer": "3", "options": ["3", 4]},
        {"question": "Q?", "answer": "3", "human_answers": ["3", None]},
    ],
)
def test_an_answer_that_is_no_text_is_refused_before_anything_is_asked(
    row: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": "3"}, row])
    with pytest.raises(InputError, match=r"line 2: .* must be words in quotes, got"):
        load_items(path)


@pytest.mark.parametrize("key", ["options", "human_answers", "images", "video"])
def test_words_where_a_list_is_due_are_refused(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": "3", key: "3, 4"}])
    with pytest.raises(InputError, match=r"line 1: .*'3, 4' where a list is due"):
        load_items(path)


def test_what_is_null_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    keys = ("kind", "options", "human_answers", "images", "video", "caption", "episode")
    row = {"image": "a.png", "question": "Q?", "answer": "3"}
    plain, null = load_items(write(tmp_path / "items.jsonl", [row, {**row, **dict.fromkeys(keys)}]))
    assert null._replace(row={}) == plain._replace(row={})
    assert plain.kind == "question"
    assert plain.options == ("3",)


def test_a_kind_that_is_no_word_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": "3", "kind": 3}])
    with pytest.raises(InputError, match="kind must be words in quotes, got 3"):
        load_items(path)


def test_items_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes('{"question": "où?"}'.encode("latin-1"))
    with pytest.raises(InputError, match="it is no UTF-8"):
        load_items(path)


def test_no_item_at_all_cannot_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": "3"}])
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        load_items(path, limit=0)


def test_the_shuffled_control_hands_over_another_picture(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": f"{i // 3}.png"} for i in range(6)]
    rows += [{"image": f"{i}.png", "episode": "e"} for i in (3, 4)]
    items = load_items(
        write(tmp_path / "items.jsonl", [{"question": "Q?", "answer": "x", **row} for row in rows])
    )
    assert _others(items) == [3, 3, 3, 6, 6, 6, 0, 0]
    assert _others(items[:3]) == [*_others(items[6:]), None] == [None] * 3


# --- scoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("", "A", False),
        ("the", "A", False),
        ("A.", "a", True),
        ("The cat", "a cat.", True),
        ("!", "?", False),
        ("-5", "5", False),
        ("\N{MINUS SIGN}5", "-5", True),
        ("- five", "5", True),
        ("3-4", "3 4", True),
        ("1,000", "1000", True),
        ("1,234,567", "1234567", True),
        ("1,2", "12", False),
    ],
)
def test_an_answer_is_right_by_its_words_and_numbers(answer: str, gold: str, right: bool) -> None:
    assert is_right(answer, gold) == is_right(gold, answer) == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("dog", "A", False),
        ("It is -5 degrees", "5", False),
        ("It is -5 degrees", "-5", True),
        ("It is 5 degrees", "5", True),
        ("anything at all", "?", False),
    ],
)
def test_a_sentence_names_an_option_whole(answer: str, gold: str, right: bool) -> None:
    assert is_right_in_a_sentence(answer, gold, ["A", "B", "-5", "5", "?"]) == right


def rows_of(said: list[str], **same: Any) -> list[dict[str, Any]]:
    row = {"kind": "what", "question": "Q?", "gold": "cat", **same}
    return [{**row, "answers": {"fused": text, "blind": "no"}} for text in said]


def test_a_sentence_that_names_another_option_of_its_item_is_wrong() -> None:
    said = ["a cat, a dog or a bird"]
    for options, right in ((["cat", "dog", "bird"], 0.0), (["cat", "cow"], 1.0), ([], 1.0)):
        found = summarise(rows_of(said, options=options), [], 20, 0)
        assert found["arms"]["fused"]["in_a_sentence"][0] == right
    # A run that kept no options has the answers of its kind.
    rows = [*rows_of(said), {**rows_of(["dog"])[0], "gold": "dog"}]
    assert summarise(rows, [], 20, 0)["arms"]["fused"]["in_a_sentence"][0] == 0.5


# --- what intervals are over ------------------------------------------------------------------


def test_questions_about_one_picture_are_one_sample() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for picture in range(12):
        right = rng.random() < 0.5
        for folder in "ab":
            shown = {"image": f"{folder}/{picture}.png"}
            rows += rows_of(["cat" if right else "no"] * 5, **shown)
    found = summarise(rows, [], 400, 0)
    assert found["pictures"] == 24
    names = [row["image"] for row in rows]
    hits, none = hits_of([row["answers"]["fused"] == "cat" for row in rows]), hits_of([False] * 120)
    expected = compare(hits, none, draw_resamples(120, 400, 0, names), names)
    assert found["against"]["blind"]["exact"] == {
        **expected._asdict(),
        "difference": list(expected.difference),
    }
    assert expected.p_value > 100 * mcnemar(expected.only_first, 0)
    found["config"] = {"arms": [], "items": "x.jsonl"}
    assert "intervals over 24 pictures;" in brief(found)
    assert "(sign flips of pictures, p" in brief(found)


def test_questions_about_a_picture_each_are_samples_themselves() -> None:
    rows = [rows_of(["cat"], image=f"{i}.png")[0] for i in range(5)]
    found = summarise(rows, [], 50, 0)
    assert "pictures" not in found
    assert found["against"]["blind"]["exact"]["p_value"] == mcnemar(5, 0)
    recordings = summarise(rows_of(["cat"] * 3, image="0.wav"), [], 50, 0)
    assert recordings["recordings"] == 1


def test_mcnemar_counts_thousands_as_it_counts_few() -> None:
    for first, second in ((0, 0), (3, 9), (150, 190), (1500, 1400)):
        count = first + second
        ways = sum(math.comb(count, k) for k in range(min(first, second) + 1))
        assert mcnemar(first, second) == min(1.0, 2 * ways / 2**count)


# --- reports ----------------------------------------------------------------------------------


def test_a_report_prints_the_command_of_its_run() -> None:
    found = summarise(rows_of(["cat"]), [], 20, 0)
    settings = {
        "arms": ["fused", "blind"],
        "bridge": "my/pair",
        "items": "mine/items.jsonl",
        "source": "eye",
        "kinds": ["what"],
        "limit": 7,
        "request": "Say all.",
        "prompts": "0123",
        "answer_tokens": 3,
        "batch_size": 48,
        "timed": 0,
        "dtype": "bfloat16",
    }
    assert brief({**found, "config": settings}).startswith(
        '`mm-c2c evaluate "arms=[fused, blind]" bridge=FOLDER items=mine/items.jsonl source=eye '
        '"kinds=[what]" limit=7 "request=Say all." prompts=FILE answer_tokens=3 timed=0 '
        "dtype=bfloat16`:"
    )


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("answer_tokens", 3)])
def test_a_run_of_another_setting_is_not_shown_beside(key: str, value: Any) -> None:
    free: dict[str, Any] = {"config": {"dtype": None, "prompts": None}, "kinds": {"what": 1}}
    choice = {**free, "choice": {}, "config": {**free["config"], "prompts": "0123"}}
    assert set_beside(free, choice)["beside"] == choice
    choice["config"] = {**choice["config"], key: value}
    with pytest.raises(MismatchError, match=f"{key} differ"):
        set_beside(free, choice)


def test_captions_are_counted_once_a_picture() -> None:
    said = {"a.png": ("A cat on the left.", "a cat on the left"), "b.png": ("a dog.", "a cat.")}
    rows = [
        {
            "image": image,
            "kind": "what",
            "question": question,
            "gold": "cat",
            "options": ["cat", "dog"],
            "answers": {"caption_relay": "cat", "true_description": "cat"},
            "relayed": {"caption_relay": written, "true_description": true},
        }
        for image, (written, true) in said.items()
        for question in ("What?", "Which?", "Who?")[: 3 if image == "a.png" else 1]
    ]
    found = summarise(rows, [], 20, 0)["captions"]
    assert (found["n"], found["share"][0]) == (2, 0.5)
    assert "captions: 50.0 % (" in " ".join(findings({"captions": found}))


def test_the_intervals_of_a_swap_are_over_pictures() -> None:
    # Two pictures with as many questions each, all answered alike: the sample has two, not 40.
    rows: list[dict[str, Any]] = [
        {
            "question": f"{number}?",
            "gold": f"{picture}",
            "image": f"{picture}.png",
            "answers": {"shuffled": "1"},
            "shuffled_with": 20 * (1 - picture) + number,
        }
        for picture in range(2)
        for number in range(20)
    ]
    truth = swap_outcomes(rows, None, 200, 0)["truth"]
    assert truth["n"] == 40
    assert truth["follow"] == (0.5, 0.0, 1.0)

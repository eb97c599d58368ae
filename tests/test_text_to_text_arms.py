"""Text to text: what each arm answers, how often it is right, and how that is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_rigs import CHOICES, build_bridge, make_base

from mm_c2c import Target
from mm_c2c.cache import SourceCache
from mm_c2c.errors import InputError
from mm_c2c.evaluation import text_report, text_to_text
from mm_c2c.evaluation.text_to_text import (
    WORDINGS,
    Arms,
    evaluate,
    shuffled,
    source_answers,
    summarise,
    tell,
)
from mm_c2c.reference.text_qa import Choice
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import TextSource, encode_chats


@pytest.fixture
def target(tiny_target: Any, tiny_target_tokenizer: Any) -> Target:
    return Target(tiny_target, tiny_target_tokenizer, "tiny")


@pytest.fixture
def source(tiny_text_source: Any, tiny_text_source_tokenizer: Any) -> TextSource:
    return TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny-reader")


def test_closed_gates_choose_what_the_target_chooses(target: Target, source: TextSource) -> None:
    bridge = build_bridge(target, source, opened=True)
    arms = Arms({"small": bridge})
    opened = arms.answer(CHOICES * 4)
    assert opened["small"] != opened["target"]
    bridge.fusers["reader_aligned"].close()
    closed = arms.answer(CHOICES * 4)
    assert closed["target"] == opened["target"]
    for arm in ("small", "small_shuffled", "small_zeroed"):
        assert closed[arm] == closed["target"]


def mean_chances(model: Any, prompt: torch.Tensor, tokenizer: Any, options: Any) -> list[float]:
    """Log-likelihood a character of each option, one at a time and token by token."""
    found = []
    for option in options:
        ids, total = prompt, 0.0
        for token in tokenizer(option, add_special_tokens=False)["input_ids"]:
            total += float(model(ids).logits[0, -1].log_softmax(-1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        found.append(total / len(option))
    return found


def test_answers_score_as_token_by_token(target: Target, source: TextSource) -> None:
    bridge = build_bridge(target, source, opened=False)
    questions, options = [choice.asked() for choice in CHOICES], ("a dog", "red", "it is not")
    ids = target.tokenizer(list(options), add_special_tokens=False)["input_ids"]
    rows = [2, 0, 2]
    read = bridge.fuse(None, questions)
    unread = bridge.read_questions(questions).inputs
    for inputs in (read, {key: unread[key] for key in ("input_ids", "attention_mask")}):  # type: ignore[literal-required]
        sums, is_greedy = target.score(inputs, rows, ids)
        for row, option, total in zip(rows, options, sums.tolist(), strict=True):
            prompt = bridge.fuse(None, [questions[row]])["input_ids"]
            (expected,) = mean_chances(target.model, prompt, target.tokenizer, [option])
            assert total == pytest.approx(len(option) * expected, abs=1e-4)
        assert not is_greedy.any()
    with torch.no_grad():
        first = target.next_logits(read).argmax(1).tolist()
    assert target.score(read, [0, 1, 1], [[first[0]], [first[1]], [first[1], 0]])[1].tolist() == [
        True,
        True,
        False,
    ]


def test_the_likeliest_option_a_character_is_chosen(target: Target, source: TextSource) -> None:
    bridge = build_bridge(target, source, opened=True)
    choices = [*CHOICES, CHOICES[0]._replace(options=("a cat", "it"))]
    expected = []
    for choice in choices:
        prompt = bridge.fuse(None, [choice.asked()])["input_ids"]
        chances = mean_chances(target.model, prompt, target.tokenizer, choice.options)
        expected.append(max(range(len(chances)), key=chances.__getitem__))
    assert len(set(expected)) > 1
    assert Arms({"small": bridge}).answer(choices)["target"] == expected


def test_options_follow_a_space_where_a_base_model_reads(source: TextSource) -> None:
    make_base(source.tokenizer, "<s>")
    texts = [choice.asked() for choice in CHOICES]
    encoded, _ = encode_chats(source.tokenizer, texts, source.model.device)
    expected = []
    for row, choice in enumerate(CHOICES):
        prompt = encoded["input_ids"][row : row + 1, int(encoded["attention_mask"][row].argmax()) :]
        spaced = [f" {option}" for option in choice.options]
        sums = [
            len(option) * chance
            for option, chance in zip(
                spaced, mean_chances(source.model, prompt, source.tokenizer, spaced), strict=True
            )
        ]
        means = [total / len(option) for total, option in zip(sums, choice.options, strict=True)]
        expected.append(max(range(len(means)), key=means.__getitem__))
    assert source_answers(source, CHOICES) == expected


def test_the_relayed_answer_stands_before_the_last_line() -> None:
    told = tell(CHOICES[0], 3, "It is {answer}")
    assert told == f"{CHOICES[0].question}\nIt is the ball\nAnswer:"


def states(cache: SourceCache, row: int, place: int) -> torch.Tensor:
    return torch.cat([torch.cat([k[row, :, place], v[row, :, place]]) for k, v in cache.layers])


def test_a_shuffled_cache_has_the_states_of_the_row_before(source: TextSource) -> None:
    texts = ["the cat", "the cat is red and it is the one", "a"]
    cache = source.prefill([SourceInput(text=text) for text in texts])
    other = shuffled(cache)
    assert other.texts == cache.texts
    torch.testing.assert_close(other.spans, cache.spans)
    width = cache.kinds.shape[1]
    begins = (cache.kinds != 0).long().argmax(1).tolist()
    for row in range(3):
        before = (row - 1) % 3
        for place in range(width):
            taken = max(place, begins[before])  # where the row before has no position: its first
            torch.testing.assert_close(states(other, row, place), states(cache, before, taken))
            assert other.position_ids[row, place] == cache.position_ids[before, taken]


def test_each_fuser_is_handed_its_cache_another_one_and_none(
    target: Target, source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = build_bridge(target, source, opened=True)
    handed: list[SourceCache] = []
    fuse = bridge.fuse_words

    def watch(reading: Any, caches: dict[str, SourceCache]) -> Any:
        handed.append(caches["reader"])
        return fuse(reading, caches)

    monkeypatch.setattr(bridge, "fuse_words", watch)
    Arms({"small": bridge}).answer(CHOICES)
    own, other, none = (cache.layers[0].keys for cache in handed)
    torch.testing.assert_close(other[1, :, -1], own[0, :, -1])
    assert not torch.equal(other[1, :, -1], own[1, :, -1])
    assert not none.any()


def test_an_evaluation_goes_on_where_it_was_stopped(
    tmp_path: Path, target: Target, source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges = {"small": build_bridge(target, source, opened=True)}
    test = [*CHOICES, *CHOICES[:2], CHOICES[2]]
    test[1], test[4] = (test[i]._replace(kind="a") for i in (1, 4))
    first = evaluate(bridges, test, CHOICES, tmp_path, batch_size=3)
    assert set(first["wordings"]) == set(WORDINGS)
    assert {kind: found["n"] for kind, found in first["kinds"].items()} == {"a": 2, "openbookqa": 4}
    arms = {"target", "source", "text_to_text", "small", "small_shuffled", "small_zeroed"}
    assert all(found["accuracy"].keys() == arms for found in first["kinds"].values())
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]), encoding="utf-8")
    asked: list[int] = []
    answer = Arms.answer

    def counted(self: Arms, choices: list[Choice]) -> dict[str, list[int]]:
        asked.append(len(choices))
        return answer(self, choices)

    monkeypatch.setattr(text_to_text.Arms, "answer", counted)
    assert evaluate(bridges, test, CHOICES, tmp_path, batch_size=3) == first
    assert asked == [3]


def rows_of(said: dict[str, str]) -> list[dict[str, Any]]:
    """Four questions, the right options of which are 0 to 3."""
    return [
        {
            "gold": gold,
            "options": "abcd",
            "answers": {arm: int(numbers[gold]) for arm, numbers in said.items()},
        }
        for gold in range(4)
    ]


def test_the_summary_compares_each_arm_with_the_first() -> None:
    rows = rows_of({"target": "1113", "small": "0120"})
    summary = summarise([{**rows[0], "options": "ab"}, *rows[1:]], "small", seed=0)
    assert summary["accuracy"]["target"]["value"] == 0.5
    assert summary["accuracy"]["small"]["value"] == 0.75
    assert summary["guess"] == (1 / 2 + 3 / 4) / 4
    paired = summary["against"]["target"]
    assert (paired["only_first"], paired["only_second"]) == (2, 1)


def write_run(folder: Path) -> None:
    """A finished run of two sets of four questions."""
    said = {
        "target": "1113",
        "text_to_text": "0120",
        "small": "0120",
        "small_shuffled": "3030",
        "own": "0123",
        "own_shuffled": "0123",
        "own_zeroed": "0000",
    }
    wordings = {"Hint: {answer}": 0.5, "It is {answer}": 0.25}
    kinds = {
        "siqa": summarise(rows_of(said), "small", seed=0),
        "piqa": summarise(rows_of({**said, "target": "0123"}), "small", seed=0),
    }
    summary = {"wordings": wordings, "first": "small", "kinds": kinds}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_a_readme_gets_every_arm_and_each_fuser_against_its_shuffled_cache(tmp_path: Path) -> None:
    write_run(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results: text -->\nstale\n<!-- end of results -->\nb\n", "utf-8")
    text_report.main([str(tmp_path), "--readme", str(readme), "--section", "text"])
    text = readme.read_text(encoding="utf-8")
    assert "stale" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    assert "4 questions of siqa (a guess is right in 25 %), 4 questions of piqa" in text
    assert "|  | siqa | `small` ahead by | p | piqa | `small` ahead by | p |" in text
    assert "| fused, `small` | 75.0 (25.0 to 100.0) |  |  | 75.0 (25.0 to 100.0) |  |  |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| target alone"))
    cells = line.split("|")
    assert cells[2].startswith(" 50.0 (")
    assert cells[3].startswith(" +25.0 (")
    assert cells[5].startswith(" 100.0 (")
    assert cells[6].startswith(" -25.0 (")
    assert "| control: `own` with an empty cache | 25.0 (" in text
    assert "`small`, siqa: ahead of itself with another question's cache by +75.0 (" in text
    assert "3 questions against 0)" in text
    assert "own source, piqa: ahead of itself with another question's cache by +0.0 (" in text
    assert "*Hint: {answer}* 50 %, *It is {answer}* 25 %" in text


def test_a_report_wants_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished run"):
        text_report.text_report(tmp_path)

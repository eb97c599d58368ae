"""Forced choice: answers that can only be one of the options, in arms, runs and reports."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_rigs import make_file, open_up
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.errors import ConfigError, MismatchError, UnsupportedError
from mm_c2c.evaluation import arms
from mm_c2c.evaluation.arms import ARMS, FILES, MAX_NEW_TOKENS, Asked, Setting, build_arm
from mm_c2c.evaluation.arms.choice import AmongOptions
from mm_c2c.evaluation.clock import timed
from mm_c2c.evaluation.report import brief, markdown, page, set_beside, text_table, write_report
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.evaluation.summary import summarise
from mm_c2c.reference import models

PLAIN_ARMS = [name for name in ARMS if name not in (*FILES, "prefix_only", "action_only")]
# More tokens than a free answer may have.
LONG = "the blue circle left of a red square, above the apple, in some detail"
OPTIONS = (("cat", "cat sat", LONG), (), ("yes", "no"), (LONG,))
QUESTIONS = ("What?", "Where is it in the picture?", "Is it there?", "What is above the apple ?")


@pytest.fixture
def setting(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> Setting:
    # Each row's cache makes a difference, and a caption is short.
    open_up(bridge.fusers)
    monkeypatch.setattr(arms, "CAPTION_TOKENS", 16)
    return Setting(
        bridge=bridge, source_name=models.SOURCE_NAME, request="Say.", among_options=True
    )


@pytest.fixture
def asked(pictures: list[Image.Image]) -> list[Asked]:
    """Questions of unlike lengths, with unlike options; the second has none."""
    return [
        Asked(
            SourceInput(text="go .", images=(pictures[i % 2],)), question, options, "a cat."
        )._replace(other=SourceInput(text="go .", images=(pictures[1 - i % 2],)))
        for i, (question, options) in enumerate(zip(QUESTIONS, OPTIONS, strict=True))
    ]


@pytest.fixture
def config(tmp_path: Path, pictures: list[Image.Image]) -> EvaluationConfig:
    """Six items: four of a kind, one that lists its options, one that has none."""
    rows = []
    for index in range(6):
        pictures[index % 2].save(tmp_path / f"{index}.png")
        row: dict[str, Any] = {
            "image": f"{index}.png",
            "kind": "what",
            "question": f"What {index}?",
            "answer": ("cat", "apple")[index % 2],
        }
        if index > 3:
            row["kind"] = "else"
            row["options"] = ["cat", "apple", "picture", "square"] if index == 4 else []
        rows.append(json.dumps(row))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return EvaluationConfig(
        items=tmp_path / "items.jsonl",
        arms=("fused", "blind", "source", "shuffled"),
        batch_size=2,
        timed=0,
        resamples=20,
    )


def _free(setting: Setting) -> Setting:
    return dataclasses.replace(setting, among_options=False)


# --- decoding ---------------------------------------------------------------------------------


def _write(choice: AmongOptions, wishes: list[list[int]], vocabulary: int) -> list[list[int]]:
    """Greedy decoding by a model that wishes for one token after the other, whatever came."""
    written: list[list[int]] = [[] for _ in wishes]
    for step in range(choice.max_new_tokens):
        ids = torch.tensor([[7, 7, *row] for row in written])
        scores = torch.zeros(len(wishes), vocabulary)
        for row, wish in enumerate(wishes):
            scores[row, wish[min(step, len(wish) - 1)]] = 1.0
        for row, token in enumerate(choice(ids, scores).argmax(1).tolist()):
            written[row].append(token)
    return written


def test_an_option_that_starts_another_can_end_or_go_on(bridge: Bridge) -> None:
    target = bridge.target
    end = target.tokenizer.eos_token_id
    short, long = target.tokenizer(["cat", "cat sat"], add_special_tokens=False)["input_ids"]
    assert long[: len(short)] == short
    choice = AmongOptions([("cat", "cat sat")] * 3, target, 4)
    other = next(token for token in range(9, 99) if token not in long)
    written = _write(choice, [[*short, end], long, [other]], len(target.tokenizer))
    for row, expected in zip(written, (short, long, None), strict=True):
        said = row[: row.index(end)]
        # Who wishes for neither gets one of both all the same.
        assert said == expected if expected else said in (short, long)
        assert set(row[len(said) :]) == {end}


def test_a_free_row_beside_long_options_writes_no_more_than_alone(bridge: Bridge) -> None:
    end = bridge.target.tokenizer.eos_token_id
    choice = AmongOptions([(), (LONG,)], bridge.target, 3)
    free, chosen = _write(choice, [[20], [20]], len(bridge.target.tokenizer))
    assert free[:3] == [20] * 3
    assert set(free[3:]) == {end}
    assert bridge.target.tokenizer.decode(chosen, skip_special_tokens=True) == LONG
    assert chosen[-1] == end


def test_every_end_of_the_generation_config_ends_an_option(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = bridge.target.tokenizer.eos_token_id
    monkeypatch.setattr(bridge.target.model.generation_config, "eos_token_id", [end, 20])
    choice = AmongOptions([("no",)], bridge.target, 3)
    (written,) = _write(choice, [[20]], len(bridge.target.tokenizer))
    no = bridge.target.tokenizer("no", add_special_tokens=False)["input_ids"]
    assert written == [*no, *[20] * (choice.max_new_tokens - len(no))]


def test_a_choice_that_cannot_be_kept_is_an_error(bridge: Bridge) -> None:
    choice = AmongOptions([("yes", "no")] * 2, bridge.target, 3)
    scores = torch.zeros(1, len(bridge.target.tokenizer))
    with pytest.raises(UnsupportedError, match="2 rows was made for 1"):
        choice(torch.tensor([[7]]), scores)
    choice = AmongOptions([("yes", "no")], bridge.target, 3)
    choice(torch.tensor([[7]]), scores)
    with pytest.raises(UnsupportedError, match=r"\[20\] start no option"):
        choice(torch.tensor([[7, 20]]), scores)


# --- arms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN_ARMS)
def test_an_arm_answers_with_an_option_and_freely_where_there_is_none(
    name: str, setting: Setting, asked: list[Asked]
) -> None:
    replies = build_arm(name, setting).answer(asked)
    free = build_arm(name, _free(setting)).answer(asked)
    assert len({reply.answer for reply in free}) > 1
    for row, reply, other in zip(asked, replies, free, strict=True):
        if row.options:
            assert reply.answer in row.options
        else:
            assert reply == other
            assert reply.answer
        # What is handed on the way is nobody's choice.
        assert reply.relayed == other.relayed
    turned = build_arm(name, setting).answer(asked[::-1])
    assert turned[::-1] == replies
    assert replies == [build_arm(name, setting).answer([row])[0] for row in asked]


def test_a_caption_on_the_way_is_no_option(setting: Setting, asked: list[Asked]) -> None:
    for name in ("caption_relay", "answer_relay"):
        replies = build_arm(name, setting).answer(asked)
        assert all(reply.relayed not in (None, *OPTIONS[0]) for reply in replies)


@pytest.mark.parametrize("name", FILES)
def test_an_arm_with_a_file_answers_with_an_option(
    name: str, setting: Setting, asked: list[Asked], tmp_path: Path
) -> None:
    file = make_file(name, setting.bridge, tmp_path)
    setting = dataclasses.replace(setting, **{FILES[name]: file})
    replies = build_arm(name, setting).answer(asked)
    free = build_arm(name, _free(setting)).answer(asked)
    assert len({reply.answer for reply in free}) > 1
    for row, reply, other in zip(asked, replies, free, strict=True):
        assert reply.answer in row.options or (not row.options and reply == other)


def test_a_choice_runs_by_the_clock(setting: Setting, asked: list[Asked]) -> None:
    answer = timed(build_arm("fused", setting), setting.bridge, asked[0])
    assert answer.answer in asked[0].options
    tokens = setting.bridge.target.tokenizer(LONG)["input_ids"]
    assert len(tokens) > MAX_NEW_TOKENS  # else long options would not be tested


# --- runs and reports -------------------------------------------------------------------------


def test_an_unknown_decoding_names_the_known() -> None:
    with pytest.raises(ConfigError, match="one of free, choice, got 'beam'"):
        EvaluationConfig(items=Path("x"), decoding="beam")


def test_a_run_says_how_many_were_asked_among_options(
    setting: Setting, config: EvaluationConfig, tmp_path: Path
) -> None:
    choice = dataclasses.replace(config, decoding="choice")
    summary = evaluate(setting.bridge, choice, tmp_path / "run", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    said = {row["question"]: row for row in rows}
    for index in range(4):
        assert set(said[f"What {index}?"]["answers"].values()) <= {"cat", "apple"}
    assert [len(said[f"What {index}?"]["options"]) for index in range(6)] == [2, 2, 2, 2, 4, 0]
    assert summary["config"]["decoding"] == "choice"
    counted = summary["choice"]
    assert (counted["n"], counted["listed"]) == (5, 1)
    assert math.isclose(counted["guess"], (4 / 2 + 1 / 4) / 5)
    gap = summary["arms"]["shuffled"]["accuracy"][0] - summary["arms"]["blind"]["accuracy"][0]
    assert math.isclose(counted["shuffled_over_blind"]["difference"][0], gap)
    line = (
        "Decoding among options: 5 of 6 questions could only be answered with one of theirs, which "
        "are all answers of the same kind in the file for 4 of them; a guess is right in 45.0 %."
    )
    for shown in (text_table(summary), page(summary, "x"), markdown(summary)):
        assert shown.count(line) == 1
    assert "decoding=choice`" in brief(summary)
    free = evaluate(setting.bridge, config, progress=False)
    assert "choice" not in free
    assert "Decoding" not in brief(free)
    for shown in (text_table(free), page(free, "x"), markdown(free)):
        assert shown.count("Decoding: free.") == 1


def test_a_shuffled_cache_is_tested_against_the_blind_target() -> None:
    said = {"fused": "cat", "shuffled": "cat", "blind": "dog"}
    rows = [
        {"kind": "what", "question": "Q?", "gold": gold, "answers": said}
        | {"options": ["cat", "dog"], "lists_options": True, "shuffled_with": 0}
        for gold in ("cat", "cat", "cat", "dog")
    ]
    test = summarise(rows, [], 20, 0)["choice"]["shuffled_over_blind"]
    assert (test["only_first"], test["only_second"], test["difference"][0]) == (3, 1, 0.5)


def test_a_run_that_knew_no_decoding_was_free(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    expected = evaluate(bridge, config, out, progress=False)
    path = out / "config.json"
    settings = json.loads(path.read_text())
    del settings["decoding"]
    path.write_text(json.dumps(settings))
    assert evaluate(bridge, config, out, progress=False)["arms"] == expected["arms"]
    with pytest.raises(ConfigError, match="decoding differ"):
        evaluate(bridge, dataclasses.replace(config, decoding="choice"), out, progress=False)


def test_a_report_shows_a_choice_beside_free_answers(
    setting: Setting, config: EvaluationConfig, tmp_path: Path
) -> None:
    free, other, readme = tmp_path / "free", tmp_path / "choice", tmp_path / "README.md"
    summary = evaluate(setting.bridge, config, free, progress=False)
    # Other arms, without the source.
    choice = dataclasses.replace(config, decoding="choice", arms=("blind", "fused", "shuffled"))
    beside = evaluate(setting.bridge, choice, other, progress=False)
    beside["arms"]["fused"]["accuracy"] = [0.5, 0.25, 0.75]
    beside["choice"]["shuffled_over_blind"]["difference"] = [0.012, -0.005, 0.029]
    beside["retention"] = {"over_blind": [0.85, 0.8, 0.9]}
    (other / "summary.json").write_text(json.dumps(beside))
    readme.write_text("<!-- results: mm-c2c evaluate -->\n<!-- end of results -->\n")

    write_report(free, readme, choice=other)
    text = readme.read_text()
    head = next(line for line in text.splitlines() if line.startswith("|  |"))
    assert head.startswith("|  | accuracy | 95 % | wordy | among options | fused ahead by |")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines()}
    assert rows["| **fused** (question-blind slots)"][4] == "50.0 (25.0 to 75.0)"
    assert rows["| source answers itself"][4] == ""
    assert (
        "- Among options: another picture's cache minus blind +1.2 points (-0.5 to +2.9), "
        "retention over blind 0.85 (0.80 to 0.90).\n"
    ) in text
    assert "*among options*: the same with `decoding=choice`. Decoding among options: 5 of" in text
    shown = (free / "report.html").read_text()
    assert "<em>Among options</em>: decoding=choice. Decoding among options: 5 of 6" in shown
    assert shown.count("<td>50.0 (25.0 to 75.0)</td>") == 1
    assert "among options" in (free / "report.md").read_text()

    write_report(free, readme)
    assert brief(json.loads((free / "summary.json").read_text())) in readme.read_text()
    assert "mong options" not in readme.read_text() + (free / "report.html").read_text()
    with pytest.raises(MismatchError, match="decoding=free"):
        set_beside(beside, summary)
    with pytest.raises(MismatchError, match="fuser"):
        set_beside(summary, {**beside, "config": {**beside["config"], "fuser": "x"}})
    with pytest.raises(MismatchError, match="numbers of items"):
        set_beside(summary, {**beside, "kinds": {"what": 3}})

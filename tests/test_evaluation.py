"""Arms, controls, runs that go on where they stopped, and what is counted about them."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from arm_rigs import open_up
from PIL import Image

from mm_c2c import Bridge, SourceInput
from mm_c2c.cache import SourceCache, zeroed
from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.evaluation import arms, command, run
from mm_c2c.evaluation.arms import (
    ARMS,
    FILES,
    MAX_NEW_TOKENS,
    Arm,
    Asked,
    Reply,
    Setting,
    build_arm,
)
from mm_c2c.evaluation.arms.fused import Fused, Shuffled, Zeroed
from mm_c2c.evaluation.clock import timed
from mm_c2c.evaluation.render import new_figure, write_readme
from mm_c2c.evaluation.report import (
    brief,
    markdown,
    page,
    text_table,
    write_report,
)
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.evaluation.statistics import hits_of
from mm_c2c.evaluation.summary import summarise, swap_outcomes
from mm_c2c.evaluation.tasks import load_items, normalise, vqa_accuracy
from mm_c2c.evaluation.text_to_text import split_rows
from mm_c2c.reference import models

# What is told apart of a source that has words but no instruction, as the items below.
ITEM_ARMS = [
    name
    for name in ARMS
    if name not in (*FILES, "prefix_only", "action_only", "true_description_options")
    and "instruction" not in name
]


@pytest.fixture(autouse=True)
def _captions_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "CAPTION_TOKENS", 16)


@pytest.fixture
def setting(bridge: Bridge) -> Setting:
    open_up(bridge.fusers)
    return Setting(bridge=bridge, source_name=models.SOURCE_NAME, request="Say.")


@pytest.fixture
def asked(pictures: list[Image.Image]) -> list[Asked]:
    return [
        Asked(
            SourceInput(text="go .", images=(picture,)), question, ("cat", "dog"), "a cat."
        )._replace(other=SourceInput(text="go .", images=(other,)))
        for picture, other, question in zip(
            pictures, pictures[1::-1], ("What?", "Where is it?"), strict=False
        )
    ]


@pytest.fixture
def items(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """Five items, of which one is the last of its batch of two."""
    rows = []
    for index in range(5):
        pictures[index % 2].save(tmp_path / f"{index}.png")
        question = {"image": f"{index}.png", "kind": "what", "question": f"What {index}?"}
        rows.append(json.dumps({**question, "answer": "cat", "caption": "a cat."}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return tmp_path / "items.jsonl"


@pytest.fixture
def config(items: Path) -> EvaluationConfig:
    return EvaluationConfig(items=items, batch_size=2, timed=1, resamples=20)


class _Counting:
    """An arm that notes how many questions it was asked."""

    def __init__(self, arm: Arm, counts: dict[str, int], name: str) -> None:
        self.arm, self.counts, self.name = arm, counts, name

    def answer(self, asked: list[Asked], streamer: Any = None) -> list[Reply]:
        self.counts[self.name] = self.counts.get(self.name, 0) + len(asked)
        return self.arm.answer(asked, streamer)


def test_a_timed_answer_is_the_arms_own(setting: Setting, asked: list[Asked]) -> None:
    alone = timed(build_arm("source", setting), setting.bridge, asked[0])
    item = SourceInput(text="go .\nWhat?", images=(asked[0].picture,))
    expected = setting.source.generate([item], max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
    assert alone.answer == expected.strip()
    assert alone.relayed is None
    assert timed(build_arm("caption_relay", setting), setting.bridge, asked[0]).relayed is not None
    fused = timed(build_arm("fused", setting), setting.bridge, asked[0])
    assert fused.answer == build_arm("fused", setting).answer(asked)[0].answer
    assert fused.total_ms >= fused.ttft_ms > 0


def test_controls_move_or_empty_every_row(setting: Setting, asked: list[Asked]) -> None:
    cache = setting.source.prefill([row.look for row in asked])
    own, moved = Fused(setting).see(asked), Shuffled(setting).see(asked)
    swapped = Fused(setting).see([row._replace(look=row.other or row.look) for row in asked])
    for states, others, mine in zip(
        *(x.past_key_values.layers for x in (moved, swapped, own)), strict=True
    ):
        assert states.keys.equal(others.keys)
        assert not states.keys.equal(mine.keys)
    with pytest.raises(ConfigError, match="wants `other`"):
        Shuffled(setting).answer([row._replace(other=None) for row in asked])
    empty: SourceCache = Zeroed(setting).alter(cache)
    assert all(not kv.keys.any() and not kv.values.any() for kv in empty.layers)
    assert zeroed(cache).shape == empty.shape


def test_relays_hand_over_what_they_say(setting: Setting, asked: list[Asked]) -> None:
    relayed = {
        name: build_arm(name, setting).answer(asked)[0].relayed
        for name in ("caption_relay", "answer_relay", "true_description")
    }
    look = SourceInput(text="go .\nSay.", images=(asked[0].picture,))
    written = setting.source.generate([look], max_new_tokens=16, do_sample=False)[0]
    assert relayed["caption_relay"] == written.strip()
    assert relayed["true_description"] == "a cat."
    assert relayed["answer_relay"] == build_arm("source", setting).answer(asked)[0].answer
    with pytest.raises(InputError, match="no true description"):
        build_arm("true_description", setting).answer([asked[0]._replace(description=None)])


def test_an_unknown_arm_names_the_closest(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="closest: fused"):
        build_arm("fussed", setting)


def test_an_evaluation_counts_every_item_once(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    summary = evaluate(bridge, config, tmp_path / "run", progress=False)
    assert summary["n"] == 5
    assert list(summary["arms"]) == ITEM_ARMS
    # A fuser that was never trained changes nothing: whatever the cache, the answer is the same.
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    said = [json.loads(line)["answers"] for line in lines]
    assert len({answers["fused"] for answers in said}) == 5
    for control in ("shuffled", "zeroed"):
        assert all(answers[control] == answers["fused"] for answers in said)
        test = summary["against"][control]["exact"]
        assert (test["only_first"], test["only_second"], test["p_value"]) == (0, 0, 1.0)
    assert summary["time"]["fused"]["n"] == 1
    assert "first token" in text_table(summary)


def test_a_stopped_run_goes_on_where_it_stopped(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    expected = evaluate(bridge, config, out, progress=False)
    whole = (out / "answers.jsonl").read_text()
    # Stopped in the middle of the second batch's second line; its first line is dropped too.
    lines = whole.splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (out / "times.jsonl").write_text("")
    counts: dict[str, int] = {}
    monkeypatch.setattr(
        "mm_c2c.evaluation.run.build_arm",
        lambda name, setting: _Counting(build_arm(name, setting), counts, name),
    )
    found = evaluate(bridge, config, out, progress=False)
    assert (out / "answers.jsonl").read_text() == whole
    assert counts == dict.fromkeys(ITEM_ARMS, 3 + 3)  # of five items, and by the clock
    assert found["arms"] == expected["arms"]


def test_a_beginning_token_is_no_token_of_an_answer(
    setting: Setting, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = setting.bridge.target.tokenizer
    own = type(tokenizer).__call__

    def begun(self: Any, text: Any, *, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        found = own(self, text, add_special_tokens=add_special_tokens, **kwargs)
        if add_special_tokens and isinstance(text, str):
            found["input_ids"] = [0, *found["input_ids"]]
        return found

    arm = SimpleNamespace(answer=lambda rows, streamer: [Reply("cat")])
    before = timed(arm, setting.bridge, asked[0]).tokens
    monkeypatch.setattr(type(tokenizer), "__call__", begun)
    assert timed(arm, setting.bridge, asked[0]).tokens == before


def test_an_answer_has_no_more_tokens_than_it_may(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    lengths = {}
    for tokens in (1, 8):
        changed = dataclasses.replace(config, answer_tokens=tokens, timed=0)
        evaluate(bridge, changed, tmp_path / str(tokens), progress=False)
        lines = (tmp_path / str(tokens) / "answers.jsonl").read_text().splitlines()
        said = [json.loads(line)["answers"] for line in lines]
        lengths[tokens] = {arm: max(len(row[arm]) for row in said) for arm in ITEM_ARMS}
    assert all(lengths[1][arm] < lengths[8][arm] for arm in ITEM_ARMS)
    for name in ("answer_tokens", "limit", "resamples"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            dataclasses.replace(config, **{name: 0})


def test_a_folder_of_another_run_is_left_alone(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    evaluate(bridge, config, out, progress=False)
    kept = (out / "answers.jsonl").read_text()
    with pytest.raises(ConfigError, match="limit differ"):
        evaluate(bridge, dataclasses.replace(config, limit=3), out, progress=False)
    assert (out / "answers.jsonl").read_text() == kept


def test_a_run_does_not_go_on_over_models_with_other_weights(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    evaluate(bridge, config, tmp_path / "run", progress=False)
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["models"] == run.weights_of(bridge)
    other = json.dumps({**told, "models": "0123456789abcdef"})
    (tmp_path / "run" / "config.json").write_text(other)
    with pytest.raises(ConfigError, match="models differ"):
        evaluate(bridge, config, tmp_path / "run", progress=False)
    # A run of before this was told apart goes on.
    del told["models"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(told))
    evaluate(bridge, config, tmp_path / "run", progress=False)


def test_frozen_models_are_told_apart_by_their_weights(bridge: Bridge) -> None:
    before = run.weights_of(bridge)
    assert run.weights_of(bridge) == before
    model: Any = next(iter(bridge.sources.values())).model  # type: ignore[attr-defined]
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    assert run.weights_of(bridge) != before
    with torch.no_grad():
        weight.copy_(kept)


def test_what_is_timed_lies_all_over_the_items() -> None:
    assert run._spread(1050, 5) == [2, 211, 421, 630, 840]
    assert run._spread(4, 10) == [2, 3]
    assert run._spread(1, 10) == []


def test_a_folder_that_another_process_writes_in_is_refused(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    holder = (
        "import sys, pathlib; from mm_c2c.run_folder import hold\n"
        "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is writing"):
            evaluate(bridge, config, out, progress=False)
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
    # Killed, it could not tidy up: the lock's file is still there, and stops nobody.
    assert (out / ".lock").exists()
    assert evaluate(bridge, config, out, progress=False)["n"] == 5


def test_the_place_of_a_result_is_made_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measurement takes minutes; that it has nowhere to go is said before, not after them."""
    monkeypatch.setattr(command, "load_pair", lambda _: None)
    out = tmp_path / "made" / "found.json"

    def measure(*_: object) -> dict[str, int]:
        assert out.parent.is_dir()
        return {"n": 7}

    def run(where: Path) -> None:
        arguments = [f"items={tmp_path}", "--out", str(where)]
        command.run_measurement(EvaluationConfig, measure, lambda r: f"n = {r['n']}", "", arguments)

    run(out)
    assert json.loads(out.read_text()) == {"n": 7}
    assert capsys.readouterr().out == "n = 7\n"
    with pytest.raises(InputError, match="cannot make the folder"):
        run(out / "in_a_file" / "found.json")
    with pytest.raises(InputError, match="got the folder"):
        run(out.parent)
    assert capsys.readouterr().out == ""


def test_other_weights_do_not_go_on_with_a_run(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    evaluate(bridge, config, out, progress=False)
    for fuser in bridge.fusers.values():
        fuser.close()
    with pytest.raises(ConfigError, match="fuser differ"):
        evaluate(bridge, config, out, progress=False)


def test_no_row_is_left_alone_where_it_could_not_be_shuffled() -> None:
    for count in range(1, 40):
        batches = split_rows(count, 4)
        assert [row for rows in batches for row in rows] == list(range(count))
        assert all(len(rows) > 1 for rows in batches) or count == 1


def test_a_swap_counts_where_the_other_row_asks_alike_and_differs() -> None:
    def rows(said: list[str]) -> list[dict[str, Any]]:
        asked = [("What?", "cat"), ("What?", "dog"), ("What?", "dog"), ("Who?", "cat")]
        return [
            {"question": question, "gold": gold, "answers": {"shuffled": answer}}
            | {"shuffled_with": (1, 2, 0, 1)[place]}
            for place, ((question, gold), answer) in enumerate(zip(asked, said, strict=True))
        ]

    def shares(counted: dict[str, Any]) -> dict[str, float]:
        return {key: found if key == "n" else found.value for key, found in counted.items()}

    source = hits_of([True, True, False, True])
    counted = swap_outcomes(rows(["Dog.", "dog", "cat", "cat"]), source, 50, 0)
    # 0 takes 1's picture and says so; 2 takes 0's and says so; 1 and 2 agree; 3 asks otherwise.
    assert shares(counted["truth"]) == {"n": 2, "follow": 1.0, "stay": 0.0, "neither": 0.0}
    assert shares(counted["source_right"]) == {"n": 1, "follow": 1.0, "stay": 0.0, "neither": 0.0}
    counted = swap_outcomes(rows(["cat", "dog", "bird", "cat"]), source, 50, 0)
    assert shares(counted["truth"]) == {"n": 2, "follow": 0.0, "stay": 0.5, "neither": 0.5}
    assert counted["truth"]["stay"] == (0.5, 0.0, 1.0)
    alone = swap_outcomes([{**rows(["cat"] * 4)[0], "shuffled_with": 0}], source[:1], 50, 0)
    assert math.isnan(alone["truth"]["follow"].value)


def test_what_each_relay_misses_is_counted_by_itself() -> None:
    said = {"fused": "xxy", "source": "xxx", "caption_relay": "yyx", "tuned_relay": "yxx"}
    rows = [
        {"question": "Q?", "gold": "x", "kind": "k", "options": ["x", "y"]}
        | {"answers": {name: answers[place] for name, answers in said.items()}}
        for place in range(3)
    ]
    found = summarise(rows, [], 50, 0)["recovered"]
    assert {name: part["n"] for name, part in found.items()} == {
        "caption_relay": 2,
        "tuned_relay": 1,
    }
    assert all(part["share"][0] == 1.0 for part in found.values())


def test_the_first_token_is_compared_over_what_ran_by_the_clock() -> None:
    row = {"question": "Q?", "gold": "x", "kind": "k", "answers": {"fused": "x"}}
    times = [
        {
            "caption_relay": {"ttft_ms": relay, "total_ms": 1.0, "tokens": 1},
            "fused": {"ttft_ms": 10.0, "total_ms": 1.0, "tokens": 1},
        }
        for relay in (20.0, 30.0, 40.0)
    ]
    value, low, high = summarise([row], times, 400, 0)["speed"]
    assert (value, low, high) == (3.0, 2.0, 4.0)
    assert "speed" not in summarise([row], [{"fused": times[0]["fused"]}], 400, 0)


def test_items_may_bring_their_own_options_and_no_kind(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"image": "a.png", "question": "Q?", "answer": "B", "options": ["A", "B"]}\n')
    (item,) = load_items(path)
    assert item[:7] == (tmp_path / "a.png", "question", "Q?", "B", ("A", "B"), None, ())
    assert (item.told, item.episode, item.step, item.success) == (None, None, 0, None)
    path.write_text("\n")
    with pytest.raises(InputError, match="line 1"):
        load_items(path)
    path.write_text("")
    with pytest.raises(InputError, match="holds no items"):
        load_items(path)


def test_vqa_accuracy_is_what_the_published_code_counts() -> None:
    def published(answer: str, people: list[str]) -> float:
        """Leave each person out, and see how many of the others agree."""
        left_out = [people[:i] + people[i + 1 :] for i in range(len(people))]
        scores = [min(1.0, others.count(answer) / 3) for others in left_out]
        return sum(scores) / len(scores)

    for count in (1, 3, 10):
        for agree in range(count + 1):
            people = ["stop"] * agree + ["go"] * (count - agree)
            assert vqa_accuracy("stop", people) == pytest.approx(published("stop", people))
    ten = ["two"] * 2 + ["a stop."] + ["no"] * 7
    assert vqa_accuracy("2", ten) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("Stop", ten) == pytest.approx(0.3)
    assert normalise("Ten of the SEVEN") == "10 of 7"


def test_an_evaluation_counts_agreement_where_people_were_asked(
    bridge: Bridge, config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fused, "answer", lambda _, asked, *__: [Reply("dog")] * len(asked))
    config = dataclasses.replace(config, arms=("fused", "source"), timed=0)
    rows = [json.loads(line) for line in config.items.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["human_answers"] = ["dog"] * number + ["cat"] * (10 - number)
    config.items.write_text("\n".join(map(json.dumps, rows)))
    summary = evaluate(bridge, config, progress=False)
    expected = [vqa_accuracy("dog", row["human_answers"]) for row in rows]
    value, low, high = summary["arms"]["fused"]["vqa_accuracy"]
    assert value == pytest.approx(sum(expected) / 5)
    assert low < value < high
    assert "| VQA |" in brief(summary)
    assert "VQA" in text_table(summary)
    del rows[0]["human_answers"]
    config.items.write_text("\n".join(map(json.dumps, rows)))
    summary = evaluate(bridge, config, progress=False)
    assert "vqa_accuracy" not in summary["arms"]["fused"]
    assert "VQA" not in brief(summary)


def test_a_run_and_its_report_say_the_dtype_that_is_not_the_usual_one(
    bridge: Bridge, config: EvaluationConfig
) -> None:
    bridge.target.model.bfloat16()
    summary = evaluate(bridge, config, progress=False)
    assert summary["config"]["dtype"] == "bfloat16"
    assert " dtype=bfloat16`" in brief(summary)
    assert " dtype=" not in brief({**summary, "config": {**summary["config"], "dtype": None}})


def test_an_evaluation_names_the_dtypes_it_knows(config: EvaluationConfig) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, got 'half'"):
        dataclasses.replace(config, dtype="half")


def test_a_report_stands_beside_its_run_and_in_the_readme(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out, readme = tmp_path / "run", tmp_path / "README.md"
    summary = evaluate(bridge, config, out, progress=False)
    readme.write_text("before\n<!-- results: mm-c2c evaluate -->\n<!-- end of results -->\nafter\n")
    write_report(out, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    read_back = json.loads((out / "summary.json").read_text())
    assert brief(read_back) in text
    assert brief(read_back) in markdown(read_back)
    assert (out / "report.md").read_text() == markdown(read_back)
    shown = (out / "report.html").read_text()
    assert shown.count("<svg") == shown.count("aria-label=") == 3  # all, the one kind, times
    assert "caption relay, options shown" in shown
    assert page(summary, "again") == page(summary, "again")
    assert page(summary, "again").count("<tr>") == 2 * (1 + len(ITEM_ARMS))
    with pytest.raises(InputError, match="no lines"):
        write_readme(out / "report.md", "x", "mm-c2c evaluate")
    with pytest.raises(InputError, match="no finished run"):
        write_report(tmp_path)


def test_a_missing_plotter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"mm-c2c\[evaluate\]"):
        new_figure(1, 1)

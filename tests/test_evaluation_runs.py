"""Runs: whose files they go on over, whom the control shuffles with, what is timed, by which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from text_rigs import CHOICES, build_bridge

from mm_c2c import Bridge, Target, cli
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.evaluation import diagnostics, pair, run, text_to_text
from mm_c2c.evaluation.arms import Asked, Reply
from mm_c2c.evaluation.diagnostics import DiagnosticsConfig, diagnose
from mm_c2c.evaluation.monitor import MonitorConfig
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.probe import ProbeConfig
from mm_c2c.evaluation.prompt_search import PromptSearchConfig
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.evaluation.sets import SetItem, _write
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.reference import models
from mm_c2c.sources.text import TextSource


@pytest.fixture
def config(tmp_path: Path, pictures: list[Image.Image]) -> EvaluationConfig:
    """Five items on pictures of two folders that have one name."""
    rows = []
    for index in range(5):
        picture = Path("ab"[index % 2]) / f"{index // 2}.png"
        (tmp_path / picture).parent.mkdir(exist_ok=True)
        pictures[index % 2].save(tmp_path / picture)
        row = {"image": str(picture), "kind": "what", "question": f"What {index}?"}
        rows.append(json.dumps({**row, "answer": ("cat", "dog")[index % 2]}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return EvaluationConfig(
        items=tmp_path / "items.jsonl",
        arms=("fused", "shuffled"),
        batch_size=2,
        timed=0,
        resamples=20,
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().split("\n")[:-1]]


def test_a_run_does_not_go_on_over_other_items(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    evaluate(bridge, config, tmp_path / "run", progress=False)
    asked = DiagnosticsConfig(items=config.items, limit=2, grids=(), rank_pictures=1)
    diagnose(bridge, asked, tmp_path / "diagnosis", progress=False)
    config.items.write_text(config.items.read_text().replace("cat", "cow"))
    with pytest.raises(ConfigError, match="items_fingerprint differ"):
        evaluate(bridge, config, tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="items_fingerprint differ"):
        diagnose(bridge, asked, tmp_path / "diagnosis", progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"items": ', r"config\.json cannot be read"),
        ("config.json", "[]", r"config\.json: expected names and values, got \[\]"),
        ("answers.jsonl", '"a"\n', r"answers\.jsonl, line 1: expected names and values, got 'a'"),
        ("answers.jsonl", '{"a": 1}\n' * 2, r"line 1: expected answers of fused, shuffled to 'Wha"),
    ],
)
def test_a_damaged_run_is_said_and_left_as_it_is(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path, name: str, content: str, message: str
) -> None:
    out = tmp_path / "run"
    evaluate(bridge, config, out, progress=False)
    (out / name).write_text(content)
    with pytest.raises(InputError, match=message):
        evaluate(bridge, config, out, progress=False)
    assert (out / name).read_text() == content


def test_answers_to_other_questions_are_not_taken_for_these(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    evaluate(bridge, config, out, progress=False)
    kept = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(kept.replace("What 3?", "Who?"))
    with pytest.raises(InputError, match=r"line \d: expected answers .* to 'What 3\?' about b/1"):
        evaluate(bridge, config, out, progress=False)
    (out / "answers.jsonl").write_text(kept)
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds answers, and no config\.json says of what"):
        evaluate(bridge, config, out, progress=False)
    assert (out / "answers.jsonl").read_text() == kept


def test_a_diagnosis_draws_pictures(
    bridge: Bridge, config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    honest = diagnostics.draw_resamples

    def note(count: int, resamples: int, seed: int, clusters: Any = None) -> Any:
        drawn.append(clusters)
        return honest(count, resamples, seed, clusters)

    monkeypatch.setattr(diagnostics, "draw_resamples", note)
    asked = DiagnosticsConfig(items=config.items, limit=2, grids=(), rank_pictures=1)
    diagnose(bridge, asked, progress=False)
    assert drawn == [[str(item.image) for item in load_items(config.items, 2)]]


def test_text_to_text_does_not_go_on_over_other_questions(
    tmp_path: Path,
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tiny_text_source: Any,
    tiny_text_source_tokenizer: Any,
) -> None:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    source = TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny-reader")
    bridges = {"small": build_bridge(target, source, opened=True)}
    text_to_text.evaluate(bridges, CHOICES, CHOICES, tmp_path, batch_size=3)
    other = [CHOICES[0]._replace(question="Who?"), *CHOICES[1:]]
    for test, train in ((other, CHOICES), (CHOICES, other)):
        with pytest.raises(ConfigError, match="fingerprints differ"):
            text_to_text.evaluate(bridges, test, train, tmp_path, batch_size=3)


class _Sizes:
    """An arm that tells the size of the other picture that it is handed."""

    def answer(self, asked: list[Asked], streamer: Any = None) -> list[Reply]:
        return [Reply(str(row.other and row.other.images[0].size)) for row in asked]


def test_the_batch_does_not_change_whose_cache_the_control_hands_over(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build_arm", lambda *_: _Sizes())
    found = []
    for size in (1, 3):
        changed = dataclasses.replace(config, batch_size=size)
        summary = evaluate(bridge, changed, tmp_path / str(size), progress=False)
        found.append((rows_of(tmp_path / str(size)), summary["swap"]))
    assert found[0] == found[1]
    rows = found[0][0]
    assert [row["image"] for row in rows] == ["a/0.png", "b/0.png", "a/1.png", "b/1.png", "a/2.png"]
    assert [row["shuffled_with"] for row in rows] == [1, 2, 3, 4, 0]
    sizes = {item.question: item.picture().size for item in load_items(config.items)}
    for row in rows:
        other = rows[row["shuffled_with"]]
        assert row["answers"]["shuffled"] == str(sizes[other["question"]])


def test_items_of_one_picture_have_no_shuffled_control(
    bridge: Bridge, config: EvaluationConfig
) -> None:
    row = json.loads(config.items.read_text().split("\n")[0])
    config.items.write_text("\n".join([json.dumps(row)] * 2))
    summary = evaluate(bridge, dataclasses.replace(config, arms=()), progress=False)
    assert "shuffled" not in summary["arms"]
    with pytest.raises(ConfigError, match="give items of two pictures"):
        evaluate(bridge, config, progress=False)


def test_a_process_that_times_is_warm(
    bridge: Bridge, config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, arms=("fused",), timed=3)
    asked: list[str] = []
    honest = run._time_row

    def note(arms: Any, bridge: Bridge, item: Any, *rest: Any) -> dict[str, Any]:
        asked.append(item.question)
        return honest(arms, bridge, item, *rest)

    monkeypatch.setattr(run, "_time_row", note)
    summary = evaluate(bridge, config, tmp_path / "run", progress=False)
    times = tmp_path / "run" / "times.jsonl"
    lines = times.read_text().splitlines(keepends=True)
    assert asked == [f"What {i}?" for i in range(5)]
    assert len(lines) == summary["time"]["fused"]["n"] == 3
    times.write_text("".join(lines[:2]))
    asked.clear()
    evaluate(bridge, config, tmp_path / "run", progress=False)
    assert asked == ["What 0?", "What 1?", "What 4?"]
    asked.clear()
    evaluate(bridge, config, tmp_path / "run", progress=False)
    assert asked == []


def test_words_found_with_the_reference_pair_serve_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[EvaluationConfig] = []

    def stop(_: Any, config: EvaluationConfig, out: Any) -> None:
        given.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(pair, "load_pair", lambda _: None)
    monkeypatch.setattr(run, "evaluate", stop)
    for words in ([], ["prompts=null"], ["bridge=my/pair"], ["bridge=my/pair", "prompts=p.json"]):
        cli.main(["evaluate", *words])
    shipped = models.HERE / "prompts.json"
    assert [config.prompts for config in given] == [shipped, None, None, Path("p.json")]


def test_words_are_found_with_any_bridge(
    monkeypatch: pytest.MonkeyPatch, config: EvaluationConfig, bridge: Bridge, tmp_path: Path
) -> None:
    asked: list[PairConfig] = []
    monkeypatch.setattr(pair, "load_pair", lambda config: asked.append(config) or bridge)
    out = tmp_path / "prompts.json"
    settings = [f"items={config.items}", "bridge=my/pair", "source_model=there"]
    settings += ["limit=2", "examples=1", "templates=['{caption} {question}']"]
    assert cli.main(["prompts", *settings, "--out", str(out)]) == 0
    assert [(c.bridge, c.source_model, c.target_model) for c in asked] == [
        ("my/pair", "there", None)
    ]
    found = json.loads(out.read_text())["config"]
    assert (found["bridge"], found["source_model"]) == ("my/pair", None)


@pytest.mark.parametrize(
    "kind", [DiagnosticsConfig, EvaluationConfig, MonitorConfig, ProbeConfig, PromptSearchConfig]
)
def test_a_place_of_a_model_wants_the_bridge_whose_it_is(kind: Any, tmp_path: Path) -> None:
    train = {"train": tmp_path} if kind is ProbeConfig else {}
    with pytest.raises(ConfigError, match="give bridge=FOLDER too"):
        kind(items=tmp_path, target_model="there", **train)
    with pytest.raises(ConfigError, match="source_dtype"):
        kind(items=tmp_path, source_dtype="int8", **train)


def test_a_pair_computes_where_its_config_says(
    bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def load(name: str, revision: Any, *, dtype: torch.dtype) -> Any:
        seen.append(dtype)
        return bridge.sources[models.SOURCE_NAME]

    monkeypatch.setattr(models, "_call_as", lambda model, origin: None)
    monkeypatch.setattr(models.sources, "load_source", load)
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: bridge.target)
    bridge.save_pretrained(tmp_path)
    named = PairConfig(bridge=str(tmp_path), source_dtype="bfloat16", device="meta")
    there = pair.load_pair(named)
    assert seen == [torch.bfloat16]
    weights = [*there.fusers.parameters(), *there.target.model.parameters()]
    weights += there.sources[models.SOURCE_NAME].model.parameters()
    assert {weight.device.type for weight in weights} == {"meta"}
    with pytest.raises(ConfigError, match="device=nowhere: torch cannot compute there"):
        pair.load_pair(PairConfig(device="nowhere"))


def test_a_set_written_over_another_shows_its_own_pictures(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (4, 4), colour)
        _write([SetItem(f"{colour}?", "a", "k", picture=picture, picture_name="0")], tmp_path, None)
    (item,) = load_items(tmp_path / "items.jsonl")
    assert (item.question, item.picture().getpixel((0, 0))) == ("blue?", (0, 0, 255))

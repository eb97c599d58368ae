"""What `mm-c2c train` cannot learn from or go on with, and what it says then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_rigs import TINY, assert_same, go, weights

from mm_c2c import Bridge
from mm_c2c.config import load_config, override
from mm_c2c.errors import AlignmentError, ConfigError, InputError, ShapeError
from mm_c2c.run_folder import hold
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.dry_run import dry_run
from mm_c2c.training.kept import KeptCaches
from mm_c2c.training.models import load_source, load_target

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(tiny_settings: list[str]) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, tiny_settings)


# --- examples -----------------------------------------------------------------------------


def change_last(config: TrainingConfig, change: Callable[[dict[str, Any]], Any]) -> None:
    """Line 6, of the third example's second question, becomes one of a fourth example."""
    path = Path(config.data.path)
    *rows, last = map(json.loads, path.read_text().splitlines())
    last["text"] = "look"
    change(last)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("image"), "needs a picture, got none"),
        (lambda row: row.update(images=["0.png", "1.png"]), "has 2 pictures, its slots hold 1"),
        (lambda row: row.pop("caption"), "wants a `caption` in each example"),
    ],
)
def test_an_example_that_cannot_be_learned_from_is_named(
    config: TrainingConfig, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_last(config, change)
    with pytest.raises((InputError, ShapeError), match=rf"data\.jsonl, line 6: .*{message}"):
        go(override(config, ["batch_size=4"]))


def test_an_example_without_what_slots_take_is_named(config: TrainingConfig) -> None:
    link = "links={eyes: {geometry: slots, kinds: [state], rows: 1, cols: 2}}"
    with pytest.raises(AlignmentError, match=r"data\.jsonl, line \d: .*no position of kind STATE"):
        go(override(config, [link]))


def test_a_blank_question_is_left_out(config: TrainingConfig) -> None:
    change_last(config, lambda row: row.update(question=" "))
    with pytest.raises(
        InputError, match=r"line 6: expected a question of words, got ' '; data\.on"
    ):
        open_examples(config.data, 0)
    examples = open_examples(override(config, ["data.on_corrupt=skip"]).data, 0)
    assert sum(len(examples.at(place).turns) for place in range(3)) == 5


# --- what it goes on with -----------------------------------------------------------------


def test_a_start_beside_a_checkpoint_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    """It would not be read, since the checkpoint takes its place."""
    go(override(config, [f"out={tmp_path / 'first'}"]))
    before = go(config)
    start = f"start={tmp_path / 'first' / 'bridge'}"
    with pytest.raises(ConfigError, match=r"began otherwise \(start: None -> .*give another out"):
        go(override(config, [start]))
    assert_same(weights(config.out), before)
    (config.out / "last.pt").unlink()
    after = go(override(config, [start]))
    # Written otherwise, it is the same folder.
    other = tmp_path / "." / "first" / ".." / "first" / "bridge"
    assert_same(go(override(config, [f"start={other}", "phases.generate.steps=2"])), after)


def test_what_is_frozen_cannot_be_drawn_anew(config: TrainingConfig) -> None:
    frozen = override(config, ["frozen=[eyes_slots.projection.head_]"])
    go(frozen)
    longer = override(frozen, ["phases.generate.steps=3"])
    with pytest.raises(ConfigError, match=r"began otherwise \(seed: 0 -> 1\)"):
        go(override(longer, ["seed=1"]))
    go(longer)
    begun = [f"start={config.out / 'bridge'}", f"out={config.out / 'more'}"]
    go(override(frozen, begun))
    go(override(longer, [*begun, "seed=1"]))  # what is frozen comes from the start


def test_where_nothing_is_left_to_train_the_settings_stay(
    config: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = go(config)
    path = config.out / "config.json"
    kept = path.read_text()
    assert_same(go(override(config, ["optimizer.learning_rate=1.0"])), before)
    assert "all 4 steps are done, nothing is left to train" in caplog.text
    assert path.read_text() == kept
    path.unlink()
    for damaged in ("", "[]", kept[:9]):
        path.write_text(damaged)
        go(config)
        assert path.read_text() == kept


def test_settings_that_could_not_be_set_have_not_changed(
    config: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    go(config)
    path = config.out / "config.json"
    kept = json.loads(path.read_text())
    del kept["phases"]["reconstruct"]["match"], kept["packed"], kept["data"]["on_corrupt"]
    path.write_text(json.dumps(kept))
    go(override(config, ["phases.generate.steps=3"]))
    assert "goes on with other settings: phases.generate.steps: 2 -> 3\n" in caplog.text
    caplog.clear()
    kept["drop"].pop("slots")
    path.write_text(json.dumps(kept))
    go(override(config, ["phases.generate.steps=4"]))
    assert "drop.slots: None -> 0.2" in caplog.text


def test_the_last_steps_are_in_the_log(config: TrainingConfig) -> None:
    go(override(config, ["log_every=3"]))
    rows = (config.out / "log.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "3", "4"]


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.weight_decay=-1.0", r"optimizer\.weight_decay must be 0 or more, got -1"),
        ("phases.generate.answer_tokens=0", r"phases\.generate\.answer_tokens must be at least 1"),
        ("phases.generate.steps=-5", "steps and warmup of a phase must be 0 or more, got -5 and 1"),
        ("kept={folder: kept, budget_gb: .nan}", r"kept\.budget_gb must be 0 or more, got nan"),
        ("links.eyes.fuser=small", r"links\.eyes\.fuser: expected settings .*, got 'small'"),
        ("data.columns={captions: text}", r"data\.columns, which is ours, must be one of .*'capti"),
    ],
)
def test_settings_without_sense_are_refused(
    config: TrainingConfig, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(config, ["data.format=datasets", setting])


def test_a_fuser_without_settings_has_the_defaults(config: TrainingConfig) -> None:
    links = override(config, ["links.eyes.fuser=null"]).links
    assert links["eyes"]["fuser"] is None


def test_something_must_be_left_to_train(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="frozen: eyes_slots leaves no weight to train"):
        go(override(config, ["frozen=[eyes_slots]"]))


def test_folders_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file"):
        KeptCaches(tmp_path / "file", 1)
    with (
        pytest.raises(InputError, match=r"cannot make the folder .*file/below"),
        hold(tmp_path / "file" / "below"),
    ):
        pass


WORDS = (
    "links={eyes: {geometry: slots, rows: 2, cols: 2, fuser: {hidden_size: 16, rank: 4}}, "
    "words: {source: %s, geometry: aligned, fuser: {hidden_size: 16, rank: 4}}}"
)


def test_aligned_links_are_not_left_out_singly(config: TrainingConfig) -> None:
    """They were taken, and did nothing."""
    both = override(config, [WORDS % "eyes"])
    named = r"drop\.named: expected links with slots, .* got eyes_aligned; drop\.sources"
    with pytest.raises(ConfigError, match=named):
        override(both, ["drop.named={eyes_aligned: 0.5}"])
    override(both, ["drop.named={eyes_slots: 0.5}"])
    aligned = ["drop.slots=0", "links={eyes: {geometry: aligned}}"]
    override(config, aligned)
    for idle in ("drop.slots=0.1", "drop.links=0.1"):
        with pytest.raises(ConfigError, match=r"drop\.slots and drop\.links: .* got eyes_aligned"):
            override(config, [*aligned, idle])


# --- readers of words ---------------------------------------------------------------------


@pytest.fixture
def reader(tiny_text_source: Any, tiny_text_source_tokenizer: Any, tmp_path: Path) -> Path:
    for part in (tiny_text_source, tiny_text_source_tokenizer):
        part.save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


def test_a_reader_of_words_is_shown_no_pictures_beside_one_that_sees(
    config: TrainingConfig, reader: Path
) -> None:
    both = override(config, [f"sources.words={{model: {reader}}}", WORDS % "words"])
    first = go(override(both, ["phases.generate.steps=0"]))
    after = go(both)
    moved = {name.partition(".")[0] for name in first if not first[name].equal(after[name])}
    assert moved == {"eyes_slots", "words_aligned"}
    slots = "{words: {geometry: slots, kinds: [text], rows: 1, cols: 2}, eyes: {geometry: slots}}"
    slots = override(both, [f"links={slots}", "drop.questions=0", f"out={config.out / 'slots'}"])
    go(slots)
    sources = {name: load_source(model) for name, model in slots.sources.items()}
    bridge = Bridge.from_pretrained(slots.out / "bridge", load_target(slots.target), sources)
    seen = bridge.perceive(Image.new("RGB", (28, 28)), "what is left")
    assert seen.input_ids.shape[1] >= 2 + 16
    alone = ["links={words: {source: words, geometry: aligned}}", "drop.slots=0"]
    alone.append(f"out={config.out / 'alone'}")
    with pytest.raises(InputError, match=r"line \d: .*reads text only, but got a picture"):
        go(override(config, [f"sources={{words: {{model: {reader}}}}}", *alone]))


def test_slots_of_a_reader_of_words_want_the_question(config: TrainingConfig, reader: Path) -> None:
    path = Path(config.data.path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "image": None}) + "\n" for row in rows))
    link = "links={words: {geometry: slots, kinds: [text], rows: 1, cols: 3}}"
    words = override(config, [f"sources={{words: {{model: {reader}}}}}", link])
    with pytest.raises(InputError, match=r"line \d: .*drop\.questions=0 lets it read each"):
        go(words)
    go(override(words, ["drop.questions=0"]))


# --- dry runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["openvla_to_llama_3_2_3b", "pi0_to_qwen3_0_6b"])
def test_a_dry_run_has_what_slots_ask(recipe: str) -> None:
    config = load_config(TrainingConfig, TINY.parent / f"{recipe}.yaml")
    links = {
        name: {**link, "pooling": "resampler", "asking": ["action"]}
        for name, link in config.links.items()
    }
    plain = dry_run(config)
    asked = dry_run(override(config, [f"links={json.dumps(links)}"]))
    assert asked["parameters"] > plain["parameters"]  # the resamplers'

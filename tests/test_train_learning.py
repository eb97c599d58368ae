"""What a training learns from: parts left out at random, texts of a source."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rigs import TINY, WORDS, assert_same, go

from mm_c2c import FuserConfig, LinkConfig
from mm_c2c.cache import CacheShape
from mm_c2c.config import load_config, override
from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.sources.base import SourceInput
from mm_c2c.training import objective as objective_module
from mm_c2c.training.config import DropConfig, TrainingConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.gumbel import GumbelNoise
from mm_c2c.training.log import read_log
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.models import load_source, load_target
from mm_c2c.training.objective import Asked, Objective, draw_questions
from mm_c2c.training.run import Trainer

PHASES = ("reconstruct", "generate")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(tiny_settings: list[str]) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, tiny_settings)


def build_trainer(config: TrainingConfig) -> Trainer:
    return Trainer(
        config,
        build_accelerator(config.out, cpu=True),
        load_target(config.target),
        {name: load_source(model) for name, model in config.sources.items()},
        open_examples(config.data, config.seed),
    )


# --- what is left out at random -----------------------------------------------------------


def test_dropped_links_leave_all_their_slots(config: TrainingConfig) -> None:
    """In all rows, so that nothing is learned; in some, whole links."""
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0", "drop.links=1"])
    before = go(config)
    assert_same(go(override(config, ["phases.generate.steps=3"])), before)
    drop = DropConfig(sources=0, slots=0.2, links=0.5, named={"eyes_aligned": 0.0})
    objective = Objective(None, None, drop)  # type: ignore[arg-type]
    rng = random.Random(0)
    shape = CacheShape(num_layers=1, num_key_value_heads=1, head_dim=2)
    fuser = FuserConfig(source=shape, target=shape)
    link = LinkConfig(source="eyes", geometry="slots", rows=5, cols=10, fuser=fuser)
    rows = [objective._kept_slots(link, rng) for _ in range(200)]
    dropped = [row for row in rows if not any(row)]
    assert 70 < len(dropped) < 130
    assert 0.75 < sum(map(sum, rows)) / (50 * (200 - len(dropped))) < 0.85
    spared = replace(objective, drop=DropConfig(links=1.0, named={link.name: 0.0}))
    assert all(spared._kept_slots(link, rng))


def test_a_link_is_dropped_by_its_name(config: TrainingConfig) -> None:
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0"])
    before = go(override(config, ["drop.links=1"]))
    named = ["drop.named.eyes_slots=1.0", "phases.generate.steps=3"]
    assert_same(go(override(config, named)), before)
    with pytest.raises(ConfigError, match=r"a link of drop.named must be one of .*eyes_slots"):
        go(override(config, ["drop.named.eyes=1.0"]))
    with pytest.raises(ConfigError, match=r"drop.named.eyes must be in \[0, 1\], got 2"):
        override(config, ["drop.named.eyes=2.0"])


def test_frozen_weights_stay_while_others_move(config: TrainingConfig, tmp_path: Path) -> None:
    first = go(override(config, ["phases.generate.steps=3"]))
    again = ["frozen=[eyes_slots.projection.head_]", "phases.generate.steps=6"]
    start = [f"start={config.out / 'bridge'}", f"out={tmp_path / 'more'}"]
    after = go(override(config, [*again, *start]))
    moved = {name for name, weight in after.items() if not torch.equal(weight, first[name])}
    heads = {name for name in after if name.startswith("eyes_slots.projection.head_")}
    assert heads
    assert not moved & heads
    assert len(moved) > len(heads) / 2
    with pytest.raises(ConfigError, match="no weight's name begins with 'ears'; links: eyes_slots"):
        go(override(config, ["frozen=[ears]"]))


def test_dropped_slots_and_sources_leave_their_mark(config: TrainingConfig) -> None:
    still = ["optimizer.name=adamw", "optimizer.weight_decay=0", "phases.reconstruct.steps=0"]
    config = override(config, [*still, "drop.sources=0", "drop.slots=1"])
    before = go(config)
    assert_same(go(override(config, ["phases.generate.steps=3"])), before)
    # With the slots in place, the same steps move weights.
    after = go(override(config, ["phases.generate.steps=4", "drop.slots=0"]))
    assert any(not before[name].equal(after[name]) for name in before)


def test_packed_questions_cost_what_they_cost_one_by_one(config: TrainingConfig) -> None:
    """The loss and its gradients, also where an example has fewer questions than another."""
    quiet = ["drop.sources=0.5", "drop.links=0.3", "data.questions=3", "batch_size=3"]
    config = override(config, [*quiet, "phases.reconstruct.steps=0"])
    found = []
    for packed in (False, True):
        trainer = build_trainer(replace(config, packed=packed))
        torch.manual_seed(0)
        for weight in trainer.bridge.fusers.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        loss = trainer.loss(0, random.Random(0))
        loss.backward()
        found.append([loss, *(w.grad for w in trainer.bridge.fusers.parameters())])
        assert trainer.gauges(1.0)["tokens_per_s"] > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["drop.questions=0.5", "links.eyes.geometry=aligned"])
def test_packing_wants_slots_that_are_question_blind(config: TrainingConfig, other: str) -> None:
    with pytest.raises(ConfigError, match="packed"):
        override(config, ["packed=true", "drop.slots=0", other])


BOTH = (
    "links={eyes: {geometry: slots, rows: 2, cols: 2}, "
    "words: {source: eyes, geometry: aligned, fuser: {hidden_size: 16, rank: 4}}}"
)


def test_a_bridge_to_go_on_from_brings_the_links_that_settings_must_go_with(
    config: TrainingConfig, tmp_path: Path
) -> None:
    still = ["phases.reconstruct.steps=0", f"out={tmp_path / 'both'}"]
    go(override(config, [*still, BOTH]))
    onward = [f"start={tmp_path / 'both' / 'bridge'}", f"out={tmp_path / 'onward'}"]
    with pytest.raises(ConfigError, match=r"links of geometry slots .* got eyes_slots, eyes_align"):
        go(override(config, [*onward, "packed=true"]))
    with pytest.raises(ConfigError, match="answers of one source, and there are 2 links"):
        go(override(config, [*onward, "phases.generate.distill=0.5"]))
    assert not (tmp_path / "onward" / "config.json").exists()


def test_a_dropped_source_is_missing_from_all_its_links(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[list[bool]] = []

    def note(cache: Any, rows: list[bool]) -> Any:
        emptied.append(list(rows))
        return cache

    monkeypatch.setattr(objective_module, "zeroed", note)
    settings = ["drop.sources=0.5", "data.questions=1", "phases.reconstruct.steps=0"]
    go(override(config, [*settings, BOTH, "phases.generate.steps=8"]))
    slots, words = emptied[::2], emptied[1::2]
    assert slots == words
    assert {True, False} <= {empty for rows in slots for empty in rows}


def test_sources_may_hear_the_question(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    prefill = Trainer.prefill

    def listen(self: Trainer, name: str, looks: list[SourceInput]) -> Any:
        heard.extend(look.text for look in looks)
        return prefill(self, name, looks)

    monkeypatch.setattr(Trainer, "prefill", listen)
    go(override(config, ["drop.questions=0"]))
    assert set(heard) <= set(WORDS)
    assert len(set(heard)) > 1
    heard.clear()
    go(override(config, ["out=" + str(config.out / "blind")]))
    assert set(heard) == {""}


@pytest.mark.parametrize("pooling", ["window", "resampler"])
def test_examples_of_unlike_numbers_of_pictures_are_learned_from_as_each_alone(
    config: TrainingConfig, tmp_path: Path, pooling: str
) -> None:
    """The loss and its gradients, with and without kept caches, and while parts are dropped."""
    path = Path(config.data.path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        first = int(row.pop("image").partition(".")[0])
        row["images"] = [f"{picture}.png" for picture in range(first, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {**config.links["eyes"], "images": 3, "pooling": pooling}
    config = replace(config, batch_size=3, links={"eyes": shape})
    sources = {name: load_source(model) for name, model in config.sources.items()}
    accelerator = build_accelerator(config.out, cpu=True)
    examples = open_examples(config.data, config.seed)
    assert {len(examples.at(place).images) for place in range(3)} == {1, 2, 3}

    def gradients(*settings: str) -> list[torch.Tensor]:
        """Of one step, in pieces of as many examples as there are."""
        chosen = override(config, list(settings))
        trainer = Trainer(chosen, accelerator, load_target(config.target), sources, examples)
        torch.manual_seed(0)
        for weight in trainer.bridge.fusers.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        total = sum(
            trainer.loss(piece, random.Random(0)) / chosen.accumulation
            for piece in range(chosen.accumulation)
        )
        assert isinstance(total, torch.Tensor)
        total.backward()
        return [total, *(weight.grad for weight in trainer.bridge.fusers.parameters())]

    whole = gradients("drop.sources=0", "drop.slots=0")
    assert all(part.isfinite().all() for part in whole)
    kept = f"kept.folder={tmp_path / 'kept'}"
    for settings in (["accumulation=3"], [kept], [kept], [kept, "accumulation=3"]):
        found = gradients("drop.sources=0", "drop.slots=0", *settings)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    dropped = gradients("drop.sources=0.5", "drop.slots=0.5")
    found = gradients("drop.sources=0.5", "drop.slots=0.5", "accumulation=3")
    torch.testing.assert_close(found, dropped, rtol=1e-4, atol=1e-5)
    assert not dropped[0].isclose(whole[0])
    assert all(weight.isfinite().all() for weight in go(config).values())


# --- two texts, and what is learned -------------------------------------------------------


@pytest.fixture
def text_config(
    config: TrainingConfig, tiny_text_source: Any, tiny_text_source_tokenizer: Any, tmp_path: Path
) -> TrainingConfig:
    """A text source whose words are aligned with the target's."""
    tiny_text_source.save_pretrained(tmp_path / "reader")
    tiny_text_source_tokenizer.save_pretrained(tmp_path / "reader")
    rows = [
        {"question": question, "answer": "red", "caption": "a red square", "text": "see : red"}
        for question in WORDS
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"sources={{reader: {{model: {tmp_path / 'reader'}}}}}",
        "links={words: {source: reader, geometry: aligned, fuser: {hidden_size: 16, rank: 4}}}",
        f"data.path={tmp_path / 'texts.jsonl'}",
        "drop.slots=0",
    ]
    return override(config, settings)


@pytest.mark.parametrize("match", ["cache", "attention"])
def test_words_of_a_text_source_are_trained_on(text_config: TrainingConfig, match: str) -> None:
    config = override(text_config, [f"phases.reconstruct.match={match}"])
    found = []
    for steps in ((2, 0), (3, 0), (2, 2)):
        lengths = [f"phases.{name}.steps={n}" for name, n in zip(PHASES, steps, strict=True)]
        found.append(go(override(config, [*lengths, f"out={config.out / str(steps)}"])))
    first, longer, after = found
    for other in (longer, after):
        assert any(not first[name].equal(other[name]) for name in first)


def test_answers_may_be_the_sources_own(
    text_config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, answers = Objective.generate, []

    def look(self: Objective, fused: Any, asked: Asked) -> torch.Tensor:
        answers.extend(turn.answer for turn in asked.turns)
        return read(self, fused, asked)

    monkeypatch.setattr(Objective, "generate", look)
    go(override(text_config, ["phases.generate.distill=1"]))
    assert answers
    assert "red" not in answers


def test_answers_drawn_from_the_source_do_not_depend_on_their_batch(
    text_config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(text_config)

    def distil(temperature: float, *rows: int) -> list[str]:
        generate = replace(trainer.config.phases.generate, distill=1.0, temperature=temperature)
        phases = replace(trainer.config.phases, generate=generate)
        monkeypatch.setattr(trainer, "config", replace(trainer.config, phases=phases))
        examples = [trainer.examples.at(row) for row in rows]
        rngs = [random.Random(row) for row in rows]
        asked = draw_questions(examples, rngs, 1)
        return [turn.answer for turn in trainer.distil(examples, asked, rngs).turns]

    drawn = distil(1.0, 0, 1, 2, 3)
    assert [text for row in range(4) for text in distil(1.0, row)] == drawn
    assert len(set(drawn)) == 4
    greedy = distil(0.0, 0, 1, 2, 3)
    assert greedy != drawn
    assert distil(1e-6, 0, 1, 2, 3) == greedy


def test_the_largest_of_noisy_logits_is_a_sample() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, -torch.inf]).expand(4000, -1)
    for temperature in (0.5, 1.0, 3.0):
        noise = GumbelNoise(range(4000), temperature)
        first, second = (noise(torch.zeros(4000, 0), logits).argmax(1) for _ in range(2))
        expected = (logits[0] / temperature).softmax(0)
        for drawn in (first, second):  # each step draws anew
            shares = drawn.bincount(minlength=4) / 4000
            torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
        both = ((first == second).float().mean(), expected.square().sum())
        torch.testing.assert_close(*both, atol=0.03, rtol=0)
    with pytest.raises(UnsupportedError, match="4000 rows at once, it wrote 1"):
        noise(torch.zeros(1, 0), logits[:1])


@pytest.mark.parametrize("temperature", ["-1", ".nan", ".inf"])
def test_a_temperature_is_zero_or_more(config: TrainingConfig, temperature: str) -> None:
    with pytest.raises(ConfigError, match=r"phases\.generate\.temperature must be 0 or more"):
        override(config, [f"phases.generate.temperature={temperature}"])


@pytest.mark.parametrize("phase", ["reconstruct", "reconstruct by attention", "generate"])
def test_each_phase_lowers_its_loss(config: TrainingConfig, phase: str) -> None:
    steps = ["drop.sources=0", "drop.slots=0", "batch_size=3", "optimizer.learning_rate=0.02"]
    lengths = {**dict.fromkeys(PHASES, 0), phase.split()[0]: 20}
    steps += [f"phases.{name}.steps={length}" for name, length in lengths.items()]
    if "attention" in phase:
        steps.append("phases.reconstruct.match=attention")
    go(override(config, steps))
    losses = read_log(config.out / "log.csv")["loss"]
    assert losses[-1] < 0.997 * losses[0]


@pytest.mark.parametrize("match", ["cache", "attention"])
def test_nothing_is_left_to_reconstruct_after_the_truth(config: TrainingConfig, match: str) -> None:
    """And something after another example's description."""
    trainer = build_trainer(config)
    examples, rngs = trainer.draw(0, 0)
    asked = draw_questions(examples, rngs, 2)
    objective = trainer.objective
    told = objective.tell(asked, examples)
    assert float(objective.reconstruct(told, asked, examples, match)) < 1e-9
    others = examples[1:] + examples[:1]
    assert others[0].description != examples[0].description
    assert float(objective.reconstruct(told, asked, others, match)) > 1e-5


def test_what_is_matched_is_known(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match=r"phases\.reconstruct\.match must be one of"):
        override(config, ["phases.reconstruct.match=logits"])


def test_a_true_description_is_asked_for(text_config: TrainingConfig, tmp_path: Path) -> None:
    path = Path(text_config.data.path)
    path.write_text(path.read_text().replace("caption", "legend"))
    with pytest.raises(InputError, match="wants a `caption` in each example"):
        go(text_config)

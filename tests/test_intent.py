"""Readers of policies: what an evaluation shows and asks them, and what is reported of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intent_rigs import NAME, ask, build_reader, build_rows, write
from PIL import Image
from torch import Tensor

from mm_c2c import Bridge
from mm_c2c.cli import main
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.evaluation import intent_report, probe, readers_report, run
from mm_c2c.evaluation.arms import Asked, Setting, build_arm
from mm_c2c.evaluation.arms.fused import ActionOnly, Fused, PrefixOnly
from mm_c2c.evaluation.report import markdown, page, text_table
from mm_c2c.evaluation.run import EvaluationConfig, evaluate, source_name
from mm_c2c.evaluation.summary import lie_outcomes, summarise
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.recordings import write_wav
from mm_c2c.reference import babyai, train_description
from mm_c2c.reference.models import load_saved_bridge
from mm_c2c.reference.train_description import shared_loss

ARMS = ["fused", "prefix_only", "action_only", "blind"]
WORDS = [
    "instruction_only",
    "instruction_only_options",
    "true_description",
    "true_description_options",
    "description_and_instruction",
    "description_and_instruction_options",
]


@pytest.fixture
def reader(tiny_llava: Any, tiny_target: Any, tiny_target_tokenizer: Any) -> Bridge:
    return build_reader(tiny_llava, tiny_target, tiny_target_tokenizer)


@pytest.fixture
def rows(reader: Bridge, pictures: list[Image.Image], tmp_path: Path) -> list[dict[str, Any]]:
    return build_rows(reader, pictures, tmp_path)


@pytest.fixture
def items(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    return write(tmp_path / "items.jsonl", rows)


@pytest.fixture
def setting(reader: Bridge) -> Setting:
    return Setting(bridge=reader, source_name=NAME, request="")


@pytest.fixture
def asked(rows: list[dict[str, Any]], pictures: list[Image.Image]) -> list[Asked]:
    return ask(rows, pictures)


# --- items, arms and a run -------------------------------------------------------------------


def test_an_item_shows_a_source_all_that_its_line_has(tmp_path: Path, items: Path) -> None:
    item = load_items(items)[4]
    look = item.look()
    assert look.text == "go left of the cat"
    assert look.images[0].size == item.picture().size
    assert look.action_tokens is not None
    assert look.action_tokens.tolist() == item.row["action_tokens"]
    assert (item.episode, item.step, item.success) == ("e1", 1, True)
    (tmp_path / "more").mkdir()
    row = {"images": ["../0.png", "../1.png"], "state": [1, 2], "question": "Q?", "answer": "a"}
    (two,) = load_items(write(tmp_path / "more" / "items.jsonl", [row]))
    assert [image.size for image in two.look().images] == [(56, 40), (36, 48)]
    assert two.look().state is not None
    assert two.image == tmp_path / "more" / "../0.png"
    # A picture does not hide the recording or the film beside it.
    (tmp_path / "more" / "said.wav").write_bytes(write_wav(np.zeros(80, dtype=np.float32)))
    films = {"video": ["../0.png", "../1.png"], "audio": "said.wav", "image": "../0.png"}
    (all_three,) = load_items(write(tmp_path / "more" / "items.jsonl", [row | films]))
    shown = all_three.look()
    assert [len(video) for video in shown.videos] == [2]
    assert shown.audio is not None
    assert shown.audio.shape == (80,)
    with pytest.raises(InputError, match="no item of kind who; its kinds: turn"):
        load_items(items, kinds=("who",))


def test_an_evaluation_of_a_policy_leaves_out_what_wants_its_words(
    reader: Bridge, items: Path, tmp_path: Path
) -> None:
    config = EvaluationConfig(items=items, batch_size=8, timed=1, resamples=20)
    summary = evaluate(reader, config, tmp_path / "run", progress=False)
    assert list(summary["arms"]) == [*ARMS, *WORDS, "shuffled", "zeroed"]
    assert summary["config"]["source"] == NAME
    assert (summary["n"], summary["episodes"]) == (24, 8)
    assert "8 episodes" in markdown(summary)
    assert "8 episodes" in page(summary, "x")
    assert "sign flips" in text_table(summary)
    assert set(summary["swap"]) == {"truth"}
    answers = [json.loads(x) for x in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["relayed"]["instruction_only"] == "go left of the cat"
    # The shuffled control hands on a cache of another episode.
    assert all(row["episode"] != answers[row["shuffled_with"]]["episode"] for row in answers)


def test_partners_of_the_shuffled_control_know_nothing_of_each_other() -> None:
    items = run.ordered(load_items(Path(babyai.__file__).parent / "unseen" / "items.jsonl"))
    others = run._others(items)
    pairs = [(item, items[at]) for item, at in zip(items, others, strict=True) if at is not None]
    assert len(pairs) == len(items)
    assert all(a.episode != b.episode for a, b in pairs)
    alike = [(a, b) for a, b in pairs if a.question == b.question]
    assert len(alike) > 0.9 * len(items)
    for kind in ("success", "progress", "intent", "task"):
        same = [a.answer == b.answer for a, b in alike if a.kind == kind]
        count = len({item.answer for item in items if item.kind == kind})
        # No more than three standard errors over what a guess would be.
        share = 1 / count
        assert sum(same) / len(same) < share + 3 * (share * (1 - share) / len(same)) ** 0.5, kind


def test_a_source_is_named_where_there_are_several(reader: Bridge) -> None:
    assert source_name(reader, None) == NAME
    with pytest.raises(ConfigError, match="no source 'x'; known: policy"):
        source_name(reader, "x")
    reader.sources["other"] = reader.sources[NAME]
    with pytest.raises(ConfigError, match="several sources; give source= one of policy, other"):
        source_name(reader, None)


@torch.no_grad()
def test_a_part_of_the_cache_writes_its_own_slots_and_no_others(
    setting: Setting, asked: list[Asked]
) -> None:
    def slots(arm: type[Fused], rows: list[Asked] = asked) -> Tensor:
        seen = arm(setting).see(rows)
        layers = seen.past_key_values.layers
        return torch.stack([layer.keys for layer in layers])[:, :, :, -6:]

    own = setting.bridge._prefill_prefix(tuple(Fused(setting).see(asked).input_ids[0].tolist()))
    bare = torch.stack([layer.keys[0] for layer in own.layers])[:, :, -6:]
    prefix, action, whole = slots(PrefixOnly), slots(ActionOnly), slots(Fused)
    for row in range(2):
        assert prefix[:, row, :, 4:].equal(bare[:, :, 4:])
        assert action[:, row, :, :4].equal(bare[:, :, :4])
    assert prefix[..., :4, :].equal(whole[..., :4, :])
    assert action[..., 4:, :].equal(whole[..., 4:, :])
    assert not prefix[:, 0, :, :4].equal(bare[:, :, :4])
    # Both rows show the same and did something else.
    assert not whole[:, 0, :, 4:].equal(whole[:, 1, :, 4:])


def test_a_part_that_no_link_reads_is_refused(bridge: Bridge, asked: list[Asked]) -> None:
    arm = build_arm("action_only", Setting(bridge=bridge, source_name="stickers", request=""))
    with pytest.raises(ConfigError, match=r"no link .* reads its state or actions; leave this arm"):
        arm.answer(asked)


def test_words_of_a_policy_are_its_instruction_and_what_a_camera_tells(
    setting: Setting, asked: list[Asked]
) -> None:
    prompts = {}
    for name in WORDS:
        arm: Any = build_arm(name, setting)
        prompts[name] = arm.prompt(arm.write(asked)[0], asked[0])
    told = "The robot was told: go left of the cat"
    shown = "\nAnswer with one of: left, right."
    assert prompts["instruction_only"] == f"{told}\nWhich way?"
    assert prompts["true_description"] == "The picture shows: a cat.\nWhich way?"
    both = f"The picture shows: a cat.\n{told}\nWhich way?"
    assert prompts["description_and_instruction"] == both
    for name in WORDS[::2]:
        assert prompts[f"{name}_options"] == prompts[name] + shown
    silent = [asked[0]._replace(look=replace(asked[0].look, text=" "))]
    with pytest.raises(InputError, match="1 of 1 items have no instruction"):
        build_arm("instruction_only", setting).answer(silent)


def test_a_lie_counts_where_both_answers_differ() -> None:
    said = ["It goes left.", "right", "left or right", "up", "left"]
    told = ["right", "right", "right", "right", "left"]
    rows = [
        {"kind": "turn", "question": "?", "gold": "left", "told": t, "answers": {"fused": s}}
        for s, t in zip(said, told, strict=True)
    ]
    found = lie_outcomes([*rows, {**rows[0], "told": None}], resamples=20, seed=0)
    assert found["n"] == 4
    shares = {key: values[0] for key, values in found["arms"]["fused"].items()}
    assert shares == {"does": 0.25, "told": 0.25, "neither": 0.5}
    summary = summarise(rows, [], 20, 0)
    assert summary["lie"]["n"] == 4
    summary["config"] = {"arms": [], "items": "lies.jsonl"}
    assert "| 25.0 (0.0 to" in markdown(summary)
    assert "Lie test, fused: does 25.0" in text_table(summary)
    assert "what it was told" in page(summary, "x")


def test_a_saved_reader_is_evaluated_by_one_command(
    reader: Bridge, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With models that lie elsewhere than where the bridge says."""
    policy: Any = reader.sources[NAME]
    policy.model.config.n_action_bins = 8
    policy.model.config.norm_stats = {"x": {"action": {"q01": [0.0, 0.0], "q99": [1.0, 1.0]}}}
    policy.model.save_pretrained(tmp_path / "source")
    policy.processor.save_pretrained(tmp_path / "source")
    reader.target.model.save_pretrained(tmp_path / "target")
    reader.target.tokenizer.save_pretrained(tmp_path / "target")
    reader.save_pretrained(tmp_path / "bridge")
    places = [f"source_model={tmp_path / 'source'}", f"target_model={tmp_path / 'target'}"]
    settings = [f"items={items}", "arms=[fused, blind]", "timed=0", "resamples=20"]
    assert main(["evaluate", *settings, f"bridge={tmp_path / 'bridge'}", *places, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = EvaluationConfig(items=items, arms=("fused", "blind"), timed=0, resamples=20)
    expected = evaluate(reader, config, progress=False)
    assert found["arms"] == json.loads(json.dumps(expected["arms"]))
    assert found["config"]["bridge"] == f"{tmp_path.name}/bridge"
    assert found["config"]["source_model"] is None

    loaded = load_saved_bridge(
        str(tmp_path / "bridge"), str(tmp_path / "source"), str(tmp_path / "target")
    )
    assert loaded.target.origin == reader.target.origin
    header = json.loads((tmp_path / "bridge" / "config.json").read_text())
    header["sources"]["second"] = header["sources"][NAME]
    (tmp_path / "bridge" / "config.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match="has 2: policy, second"):
        load_saved_bridge(str(tmp_path / "bridge"), str(tmp_path / "source"))
    with pytest.raises(ConfigError, match="give bridge=FOLDER too"):
        EvaluationConfig(items=items, source_model="x")


# --- a target tuned on descriptions ---------------------------------------------------------


def test_prompts_that_share_a_beginning_cost_what_each_costs_alone(reader: Bridge) -> None:
    model, tokenizer = reader.target.model, reader.target.tokenizer
    prompts = ["go to the red cat . what is it ?", "go to the red cat . where is the blue dog ?"]
    answers = ["left", "right of the cat"]
    for chosen in ([0, 1], [1]):
        costs = []
        for place in chosen:
            ids = tokenizer(prompts[place])["input_ids"]
            wanted = [*tokenizer(answers[place])["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([[*ids, *wanted]])).logits[0, len(ids) - 1 : -1]
            costs.append(-logits.log_softmax(1)[range(len(wanted)), wanted])
        found = shared_loss(
            model, tokenizer, [prompts[i] for i in chosen], [answers[i] for i in chosen]
        )
        torch.testing.assert_close(found, torch.cat(costs).mean(), rtol=1e-4, atol=1e-4)


def test_a_target_is_tuned_on_descriptions_and_serves_its_arm(
    reader: Bridge, items: Path, asked: list[Asked], tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("peft", reason="LoRA needs PEFT: the extra `tune`")
    monkeypatch.setattr(train_description, "load_saved_bridge", lambda *_: reader)
    config = train_description.DescriptionTrainingConfig(
        items=items, bridge="reader", out=tmp_path / "out", parameters=3000, steps=2, warmup=1,
        examples=2, questions=2, save_every=1, log_every=1,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in reader.target.model.state_dict().items()}
    train_description.train(config)
    assert all(w.equal(before[name]) for name, w in reader.target.model.state_dict().items())
    adapter = tmp_path / "out" / "adapter"
    arm: Any = build_arm(
        "tuned_description",
        Setting(bridge=reader, source_name=NAME, request="", description_adapter=adapter),
    )
    said = arm.answer(asked)
    assert said[0].relayed == "a cat.\nThe robot was told: go left of the cat"
    tuned = {n: p for n, p in arm.reader.target.model.named_parameters() if "lora_B" in n}
    assert any(weight.any() for weight in tuned.values())
    groups = train_description.group_steps(load_items(items))
    assert [len(group) for group in groups] == [3] * 8
    with pytest.raises(ConfigError, match="must exceed warmup"):
        replace(config, steps=1)


# --- one section of a README -----------------------------------------------------------------


def test_all_that_was_measured_stands_in_one_section(
    reader: Bridge, rows: list[dict[str, Any]], items: Path, tmp_path: Path
) -> None:
    run, readme = tmp_path / "run", tmp_path / "README.md"
    config = EvaluationConfig(items=items, arms=("fused", "blind"), timed=0, resamples=20)
    evaluate(reader, config, run, progress=False)
    lies = write(tmp_path / "lies.jsonl", [{**row, "told": "up"} for row in rows])
    evaluate(reader, replace(config, items=lies), run / "lies", progress=False)
    found = probe.probe(
        reader, probe.ProbeConfig(train=items, items=items, resamples=20), progress=False
    )
    (run / "probe.json").write_text(json.dumps(found))
    (run / "why").mkdir()
    reasons = [("stuck", "stuck"), ("nothing", "stuck"), ("stuck", "Stuck."), ("stuck", "nothing")]
    (run / "why" / "answers.jsonl").write_text(
        "\n".join(
            json.dumps({"gold": gold, "episode": f"{i}", "answers": {"fused": said}})
            for i, (gold, said) in enumerate(reasons)
        )
    )
    readme.write_text("a\n<!-- results: policy -->\nstale\n<!-- end of results -->\nb\n")
    intent_report.main([str(run), "--readme", str(readme), "--section", "policy"])
    text = readme.read_text()
    assert "stale" not in text
    for words in ("24 questions", "what it was told", "| linear probe |", "95 %"):
        assert words in text
    assert "| what goes wrong, % right | all (4) | stuck (3) | nothing (1) |" in text
    assert re.search(r"\| fused \| 50\.0 \(\d.* to \d.*\) \| 66\.7 \| 0\.0 \|", text)
    assert text.endswith("<!-- end of results -->\nb\n")
    with pytest.raises(InputError, match="no finished run"):
        intent_report.intent_report(tmp_path)


def test_readers_stand_side_by_side(tmp_path: Path) -> None:
    half, third = [0.5, 0.4, 0.6], [0.333, 0.3, 0.4]
    fused = {"accuracy": half, "in_a_sentence": half, "kinds": {"why": third}}
    for name, arms in (("a", ["fused"]), ("b", ["fused", "shuffled", "tuned_description"])):
        whole = {"n": 1200, "episodes": 30, "arms": dict.fromkeys(arms, fused)}
        (tmp_path / name / "why").mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(whole))
    other = {"arms": {"fused": {"kinds": {"why": half}}}}
    (tmp_path / "b" / "why" / "summary.json").write_text(json.dumps(other))
    watched = ("policy", "caption_relay", "steps")
    among_options = {"fused": {"accuracy": half}, "blind": {"accuracy": third}}
    for path, found in {
        "monitor.json": {
            "monitors": {
                name: {
                    "at_same_step": half,
                    "in_same_task": [0.25, 0.2, 0.3],
                    "over_steps": third,
                    "fused_ahead": {"at_same_step": [0.1, -0.01, 0.2], "in_same_task": half},
                }
                for name in watched
            }
        },
        "probe.json": {"all": {"action only": third, "both": half}},
        "lies/summary.json": {"lie": {"arms": {"fused": {"does": half, "told": third}}}},
        "choice/summary.json": {"arms": among_options},
    }.items():
        (tmp_path / "a" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / path).write_text(json.dumps(found))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: readers -->\nstale\n<!-- end of results -->\n")
    place = ["--readme", str(readme), "--section", "readers"]
    readers_report.main([f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}", *place])
    assert readme.read_text().splitlines()[1:-1] == [
        "| % right (95 %) | A | B |",
        "| --- | --- | --- |",
        "| questions, episodes | 1,200, 30 | 1,200, 30 |",
        "| **fused** | 50.0 (40.0 to 60.0) | 50.0 (40.0 to 60.0) |",
        "| ... another episode's cache |  | 50.0 (40.0 to 60.0) |",
        "| linear probe of the same cache | 50.0 (40.0 to 60.0) |  |",
        "| ... and tuned on such words (LoRA) |  | 50.0 (40.0 to 60.0) |",
        "| among options only | fused 50.0, blind 33.3 |  |",
        "| instruction swapped after the fact: tells what it does | 50.0 (40.0 to 60.0) |  |",
        "| ... what it was told | 33.3 (30.0 to 40.0) |  |",
        "| ... the policy's own uncertainty | 0.50 (0.40 to 0.60) |  |",
        "| ... target told in words | 0.50 (0.40 to 0.60) |  |",
        "| ... fused ahead of that uncertainty | +0.10 (-0.01 to +0.20) |  |",
        "| ... the same, among looks at the same step of the same task"
        " | +0.50 (+0.40 to +0.60) |  |",
        "| ... AUROC at the same step of the same task"
        " | policy 0.25, caption relay 0.25, steps 0.25 |  |",
        "| ... AUROC among all looks, of which late ones tell the end"
        " | policy 0.33, caption relay 0.33, steps 0.33 |  |",
        "| what goes wrong? | 33.3 (30.0 to 40.0) | 50.0 (40.0 to 60.0) |",
    ]
    with pytest.raises(InputError, match="expected TITLE=RUN"):
        readers_report.main(["A", *place])

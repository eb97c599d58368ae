"""Ablations: each variant is trained and judged once, and compared with the first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from mm_c2c.config import load_config
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.reference import ablate, train_baseline, train_fuser
from mm_c2c.reference.ablate import AblationConfig
from mm_c2c.reference.ablate_report import ablation_report
from mm_c2c.reference.train_baseline import BaselineTrainingConfig
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.reference.variants import Variant
from mm_c2c.training import run as training_run
from mm_c2c.training.config import TrainingConfig

GOLD = ["cat", "dog", "2", "left"]


@pytest.fixture
def config(tmp_path: Path) -> AblationConfig:
    items = [  # two questions a picture, in another order than they are asked in
        {"image": f"{number // 2}.webp", "kind": "what", "question": question, "answer": gold}
        for number, (question, gold) in enumerate(zip("ABAB", GOLD, strict=True))
    ]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (tmp_path / "items.jsonl").write_text(lines, encoding="utf-8")
    base = {"data": "scenes", "source": "source", "out": "nowhere", "steps": 50}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    settings = {
        "base": str(tmp_path / "base.yaml"),
        "shared": {"steps": 30},
        "variants": {"whole": {}, "raw keys": {"raw_keys": True}},
        "items": str(tmp_path / "items.jsonl"),
        "out": str(tmp_path / "runs"),
    }
    (tmp_path / "ablations.yaml").write_text(
        yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"
    )
    return load_config(AblationConfig, tmp_path / "ablations.yaml", [])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[FuserTrainingConfig]:
    """What was trained; a variant with raw keys gets one question right, others two and then all."""
    done: list[FuserTrainingConfig] = []

    def judge(variant: Variant, items: Path, steps: int) -> None:
        training = variant.training
        right = 1 if getattr(training, "raw_keys", False) else 2 + 2 * training.seed
        last = steps == training.steps
        right = right if last else steps // 10
        folder = training.out / ("evaluation" if last else f"evaluation-{steps}")
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = [
            {"gold": gold, "answers": dict.fromkeys(variant.arms, "?")} for gold in GOLD
        ]
        for row in rows[:right]:
            row["answers"][variant.arms[0]] = row["gold"]
        lines = [json.dumps(row) for row in rows]
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "summary.json").write_text("{}", encoding="utf-8")
        (training.out / "bridge").mkdir(exist_ok=True)
        save_file(
            {"a": torch.zeros(2, 3), "b": torch.zeros(4)}, training.out / "bridge/model.safetensors"
        )

    monkeypatch.setattr(train_fuser, "train", lambda config, until: done.append(config))
    monkeypatch.setattr(ablate, "judge", judge)
    return done


def test_variants_differ_from_the_base_in_what_they_name(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(config)
    assert [(t.raw_keys, t.seed, t.steps) for t in trained] == [
        (False, 0, 30),
        (True, 0, 30),
        (False, 1, 30),
        (True, 1, 30),
    ]
    assert len({t.out for t in trained}) == 4
    ablate.ablate(config)
    assert len(trained) == 4  # nothing twice


def test_results_are_written_by_one_process_at_a_time(
    config: AblationConfig, trained: list[FuserTrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(path: Path, values: Any) -> None:
        if path.parent != config.out:
            return  # a training's own folder
        with pytest.raises(Timeout):
            FileLock(path.parent / ".lock").acquire(blocking=False)
        written.append(path.name)

    monkeypatch.setattr(ablate, "write_json", write)
    ablate.ablate(AblationConfig(**{**vars(config), "seeds": (0,), "only": ("whole",)}))
    assert written == ["judgements.json", "ablations.json"]


def test_a_variant_is_compared_with_the_first_over_the_seeds_that_both_have(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(load_config(AblationConfig, config.base.parent / "ablations.yaml", ["seeds=[0]"]))
    ablate.ablate(
        load_config(
            AblationConfig,
            config.base.parent / "ablations.yaml",
            ["seeds=[1]", "only=['whole']"],
        )
    )
    result = json.loads((config.out / "ablations.json").read_text(encoding="utf-8"))
    whole, raw = result["variants"]["whole"], result["variants"]["raw keys"]
    assert (whole["seeds"], whole["each"], whole["accuracy"][0]) == ([0, 1], [0.5, 1.0], 0.75)
    assert (raw["seeds"], raw["each"], raw["parameters"]) == ([0], [0.25], 10)
    assert raw["over_first"][0] == pytest.approx(-0.25)  # seed 1 of the first does not count
    assert "over_first" not in whole
    table = ablation_report(config.out)
    assert "n = 4 a seed" in table
    assert "| raw keys | `raw_keys=True` | 0.00 M | 0 | 25.0 | 25.0 (" in table
    assert "| -25.0 (" in table


def test_trainings_pause_to_be_judged_and_their_curves_are_compared(
    config: AblationConfig, trained: list[FuserTrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[tuple[bool, int]] = []
    monkeypatch.setattr(
        train_fuser, "train", lambda config, until: pauses.append((config.raw_keys, until))
    )
    two = {"whole": {}, "raw keys": {"raw_keys": True, "steps": 50}}
    settings = {**vars(config), "variants": two, "seeds": (0,), "judged_at": (10, 20, 40)}
    config = AblationConfig(**settings)
    ablate.ablate(config)
    before = config.variant("whole", 0).training.reconstruct_steps
    steps = [(False, 10), (False, 20), (False, 30), *((True, n) for n in (10, 20, 40, 50))]
    assert pauses == [(raw, before + n) for raw, n in steps]
    result = json.loads((config.out / "ablations.json").read_text(encoding="utf-8"))
    curve = result["curves"]["raw keys"]
    assert [point["steps"] for point in curve] == [10, 20, 40, 50]
    assert [point["scenes"] for point in curve] == [80, 160, 320, 400]
    assert [point["accuracy"][0] for point in curve] == [0.25, 0.5, 1.0, 0.25]
    report = ablation_report(config.out)
    assert "| 240 | 50.0 (" in report
    assert "45.0 %, which is 90 % of where the first ends" in report
    assert "is reached by whole after 160 scenes, by raw keys after 160 scenes." in report
    # What was judged stays in the result of a process that is to judge elsewhere, or nothing more.
    ablate.ablate(AblationConfig(**{**settings, "judged_at": ()}))
    assert json.loads((config.out / "ablations.json").read_text(encoding="utf-8")) == result


def test_what_was_trained_with_other_settings_is_not_taken_for_a_variant(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(config)
    told = json.loads((config.out / "judgements.json").read_text(encoding="utf-8"))
    assert told["raw_keys-1"]["settings"]["raw_keys"] is True
    two = {"whole": {}, "raw keys": {"raw_keys": True, "rank": 7}}
    with pytest.raises(
        ConfigError, match=r"'raw keys' has now \(rank: 96 -> 7\); give another out"
    ):
        ablate.ablate(AblationConfig(**{**vars(config), "variants": two}))
    assert len(trained) == 4


def test_a_setting_that_came_later_had_its_default(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    config = AblationConfig(**{**vars(config), "seeds": (0,), "only": ("whole",)})
    ablate.ablate(config)
    path = config.folder("whole", 0) / "settings.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in told.items() if k != "pooling"}))
    ablate.ablate(config)
    assert len(trained) == 1
    resampled = {**vars(config), "variants": {"whole": {"pooling": "resampler"}}}
    with pytest.raises(ConfigError, match=r"pooling: None -> resampler"):
        ablate.ablate(AblationConfig(**resampled))


def test_a_curve_waits_for_its_variant_to_end(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    config = AblationConfig(**{**vars(config), "seeds": (0,), "judged_at": (10, 20)})
    ablate.judge(config.variant("raw keys", 0), config.items, 10)  # and still at work
    ablate.ablate(AblationConfig(**{**vars(config), "only": ("whole",)}))
    result = json.loads((config.out / "ablations.json").read_text(encoding="utf-8"))
    assert [*result["curves"]] == [*result["variants"]] == ["whole"]
    assert "is reached by whole after 160 scenes." in ablation_report(config.out)


def test_what_was_judged_elsewhere_stands_for_its_training(
    config: AblationConfig, trained: list[FuserTrainingConfig], tmp_path: Path
) -> None:
    config = AblationConfig(**{**vars(config), "judged_at": (10,)})
    ablate.ablate(config)
    done = len(trained)
    elsewhere = AblationConfig(**{**vars(config), "out": tmp_path / "elsewhere"})
    elsewhere.out.mkdir()
    (config.out / "judgements.json").rename(elsewhere.out / "judgements.json")
    ablate.ablate(elsewhere)
    assert len(trained) == done
    first, second = (
        json.loads((c.out / "ablations.json").read_text("utf-8")) for c in (config, elsewhere)
    )
    assert first == second
    assert [point["steps"] for point in second["curves"]["whole"]] == [10, 30]
    ablate.ablate(AblationConfig(**{**vars(elsewhere), "seeds": (0, 1, 2)}))
    assert [t.seed for t in trained[done:]] == [2, 2, 2, 2]  # to the pause and to the end


def test_variants_judged_by_other_questions_are_not_compared(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(config)
    path = config.out / "judgements.json"
    known = json.loads(path.read_text("utf-8"))
    known["raw_keys-7"] = {"parameters": 1, "right": {"end": {"fused": "01", "zeroed": "00"}}}
    path.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(ConfigError, match="judged by 2 and 4 questions"):
        ablate.tabulate(config)


def test_intervals_are_over_pictures(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(AblationConfig(**{**vars(config), "seeds": (0,)}))
    result = json.loads((config.out / "ablations.json").read_text(encoding="utf-8"))
    assert (result["questions"], result["pictures"]) == (4, 2)
    # Asked are A of both pictures, then B, and the first two answers are right: half of each
    # picture's, whichever pictures are drawn. In the file's order both would be of one picture.
    assert result["variants"]["whole"]["accuracy"] == [0.5, 0.5, 0.5]
    assert "n = 4 a seed, 95 % intervals over 2 pictures." in ablation_report(config.out)


def test_questions_that_did_not_judge_are_refused(
    config: AblationConfig, trained: list[FuserTrainingConfig]
) -> None:
    ablate.ablate(config)
    config.items.write_text(config.items.read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    with pytest.raises(ConfigError, match=r"items.jsonl: holds 1 questions, and 4 were asked in"):
        ablate.tabulate(config)


def test_unknown_variants_and_settings_are_refused(config: AblationConfig) -> None:
    with pytest.raises(ConfigError, match="no variant is named hole; known: whole"):
        AblationConfig(**{**vars(config), "only": ("hole",)})
    with pytest.raises(ConfigError, match="raw_kees"):
        AblationConfig(**{**vars(config), "variants": {"typo": {"raw_kees": True}}})
    with pytest.raises(ConfigError, match="at least one name"):
        AblationConfig(**{**vars(config), "variants": {}})


def test_a_base_with_links_is_trained_by_the_general_trainer(
    config: AblationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {
        "sources": {"eyes": {"model": "eyes"}},
        "target": {"model": "llm"},
        "links": {"eyes": {"geometry": "slots", "fuser": {"hidden_size": 4, "rank": 2}}},
        "data": {"path": "items.jsonl"},
        "out": "nowhere",
        "phases": {
            "reconstruct": {"steps": 5, "warmup": 1},
            "generate": {"steps": 30, "warmup": 1},
        },
    }
    config.base.write_text(yaml.safe_dump(base), encoding="utf-8")
    two = {"distilled": {"phases.generate.distill": 0.5, "target.model": "third"}, "slots": {}}
    shared = {"target": {"model": "other"}, "batch_size": 4}
    settings = {**vars(config), "shared": shared, "variants": two, "seeds": (0, 3)}
    config = AblationConfig(**settings)
    done: list[TrainingConfig] = []
    pauses: list[int] = []

    def train(config: TrainingConfig, until: int) -> None:
        done.append(config)
        pauses.append(until)

    monkeypatch.setattr(training_run, "train", train)
    judged: list[int] = []
    monkeypatch.setattr(ablate, "judge", lambda variant, items, steps: judged.append(steps))
    config.out.mkdir()
    ablate.ablate(config)
    assert [(t.phases.generate.distill, t.target.model, t.seed) for t in done] == [
        *((0.5, "third", 0), (0.0, "other", 0)),
        *((0.5, "third", 3), (0.0, "other", 3)),
    ]
    assert {(t.batch_size, t.phases.generate.warmup) for t in done} == {(4, 1)}
    assert len({t.out for t in done}) == 4
    assert judged == [30] * 4
    assert pauses == [35] * 4  # with the first phase
    halfway = AblationConfig(**{**settings, "judged_at": (10,), "only": ("slots",)})
    ablate.ablate(halfway)
    assert pauses[4:] == [15, 35] * 2
    # Settings of an older training, of which some could not be set then.
    path = config.folder("slots", 0) / "settings.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    del told["phases"]["generate"]["temperature"]
    path.write_text(json.dumps(told), encoding="utf-8")
    ablate.ablate(halfway)
    told["phases"]["generate"]["distill"] = 1.0
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ConfigError, match="with other settings than 'slots'"):
        ablate.ablate(halfway)
    with pytest.raises(ConfigError, match=r"unknown key 'phases.generate.distil'"):
        AblationConfig(**{**settings, "variants": {"typo": {"phases.generate.distil": 0.5}}})


def test_a_baseline_is_a_variant_with_a_base_of_its_own(
    config: AblationConfig, trained: list[FuserTrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"kind": "tuned_relay", "data": "scenes", "source": "source", "out": "nowhere"}
    path = config.base.parent / "relay.yaml"
    path.write_text(yaml.safe_dump({**base, "scenes": 2}), encoding="utf-8")
    relay = {"base": str(path), "learning_rate": 2e-3}
    settings = {**vars(config), "variants": {"whole": {}, "relay": relay}, "seeds": (1,)}
    config = AblationConfig(**settings)
    done: list[BaselineTrainingConfig] = []
    monkeypatch.setattr(train_baseline, "train", done.append)
    ablate.ablate(config)
    ((training,), variant) = done, config.variant("relay", 1)
    assert (training.steps, training.learning_rate, training.seed) == (400, 2e-3, 1)  # not 30
    assert (variant.steps, variant.scenes, variant.arms) == (400, 2, ("tuned_relay",))
    assert variant.files == {"adapter": training.out / "tuned_relay"}
    result = json.loads((config.out / "ablations.json").read_text(encoding="utf-8"))["variants"]
    assert [result[name]["accuracy"][0] for name in ("whole", "relay")] == [1.0, 1.0]
    assert ("zeroed" in result["whole"], "zeroed" in result["relay"]) == (True, False)
    assert "| relay | `base=" in ablation_report(config.out)
    told = json.loads((config.out / "judgements.json").read_text(encoding="utf-8"))
    bridges = {run["settings"]["bridge"] for name, run in told.items() if name.startswith("relay")}
    assert bridges == {"mm_c2c/reference/bridge"}  # wherever the package lies
    with pytest.raises(ConfigError, match="the trainer of 'relay' does not pause"):
        AblationConfig(**{**settings, "judged_at": (10,)})
    AblationConfig(**{**settings, "judged_at": (10,), "only": ("whole",)})


def test_a_report_wants_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no evaluated variant"):
        ablation_report(tmp_path)


@pytest.mark.parametrize("key", ["seed", "out", "seed.x"])
def test_what_follows_from_the_whole_is_not_a_variants_own(
    config: AblationConfig, key: str
) -> None:
    """It was overwritten, and all variants were the same training."""
    with pytest.raises(ConfigError, match=rf"raw keys: {key} of each training follows from seeds"):
        dataclasses.replace(config, variants={"whole": {}, "raw keys": {key: 5}})
    with pytest.raises(ConfigError, match=rf"shared: {key} of each training follows"):
        dataclasses.replace(config, shared={key: 5})


def test_what_cannot_be_read_is_said_before_anything_is_trained(
    config: AblationConfig, trained: list[FuserTrainingConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"base: cannot read .*none\.yaml"):
        dataclasses.replace(config, base=tmp_path / "none.yaml")
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="foreign"):
        ablate.ablate(dataclasses.replace(config, items=tmp_path / "foreign.jsonl"))
    config.out.mkdir()
    (config.out / "judgements.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"judgements\.json cannot be read"):
        ablate.ablate(config)
    assert not trained

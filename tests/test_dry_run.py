"""Every recipe trains on random weights; what it would cost is reckoned, not measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from mm_c2c.bench import kept
from mm_c2c.cli import main
from mm_c2c.config import load_config, override
from mm_c2c.errors import ConfigError
from mm_c2c.geometry import find
from mm_c2c.training.blank import narrow
from mm_c2c.training.config import OptimizerConfig, PhasesConfig, TrainingConfig
from mm_c2c.training.dry_run import dry_run, estimate
from mm_c2c.training.run import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
# The readers of policies, whose sources are trained here, are no recipes for published models.
RECIPES = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "# mm-c2c train" in path.read_text() and "_reader" not in path.stem
]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> None:
    """Recipes name the reference source from there."""
    del fresh_accelerate
    monkeypatch.chdir(CONFIGS.parent)


def test_the_recipes_ship() -> None:
    assert len(RECIPES) == 14


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(path: Path) -> None:
    config = load_config(TrainingConfig, path)
    result = dry_run(config)
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert len(result["losses"]) == 3
    assert result["seconds_a_step"] > 0
    if path.stem != "tiny":
        head = path.read_text().splitlines()
        assert head[1].startswith("# Hardware: ")
        assert head[2].startswith("# Cost, an estimate by --dry-run and not measured: ")
        assert f"{result['flop']:.1e} FLOP" in head[2]


def test_costs_grow_with_what_is_done() -> None:
    config = load_config(TrainingConfig, CONFIGS / "smolvlm_256m_to_smollm2_135m.yaml")
    flop = estimate(config)["flop"]
    assert estimate(replace(config, batch_size=64))["flop"] == 2 * flop
    longer = override(config, ["phases.generate.steps=12000", "phases.reconstruct.steps=1000"])
    assert estimate(longer)["flop"] == 2 * flop
    # By hand: a step of one example with one question, without the first phase.
    one = replace(config, batch_size=1, phases=PhasesConfig())
    one = override(one, ["phases.generate.steps=21", "data.questions=1"])
    source, target = (find(m.model) for m in (config.sources["eyes"], config.target))
    fuser = 12_818_484
    a_step = 2 * 1088 * source.num_parameters + 4 * 24 * target.num_parameters + 6 * 64 * fuser
    assert estimate(one)["flop"] == 21 * a_step


def test_a_source_of_two_links_is_read_once() -> None:
    config = load_config(TrainingConfig, CONFIGS / "smolvlm_256m_to_smollm2_135m.yaml")
    config = replace(config, batch_size=1, phases=PhasesConfig())
    config = override(config, ["phases.generate.steps=21", "data.questions=1"])
    ((name, link),) = config.links.items()
    link = {"source": name, **link}
    twice = replace(config, links={"left": link, "right": link})
    fuser = 12_818_484
    one, two = estimate(config), estimate(twice)
    assert two["flop"] - one["flop"] == 21 * 6 * 64 * fuser
    assert two["parameters"] == 2 * one["parameters"] == 2 * fuser


def test_every_source_is_held_in_memory() -> None:
    config = load_config(TrainingConfig, CONFIGS / "smolvlm_256m_to_smollm2_135m.yaml")
    (name,) = config.sources
    (link,) = config.links.values()
    both = replace(
        config,
        sources={**config.sources, "more": config.sources[name]},
        links={**config.links, "more": link},
    )
    source = find(config.sources[name].model)
    more = estimate(both)["true_memory_bytes"] - estimate(config)["true_memory_bytes"]
    text = find(config.target.model).text
    slots = 64 * (34 * text.hidden_size * text.num_hidden_layers + 8 * text.vocab_size)
    rows = config.batch_size // config.accumulation * config.data.questions
    assert more == 2 * source.num_parameters + 16 * 12_818_484 + rows * slots


def test_what_the_source_itself_answers_is_reckoned_and_tried() -> None:
    config = load_config(TrainingConfig, CONFIGS / "tiny.yaml")
    config = replace(config, batch_size=1, phases=PhasesConfig())
    config = override(config, ["phases.generate.steps=21", "data.questions=1"])
    distilled = override(config, ["phases.generate.distill=1"])
    source = find(config.sources["eyes"].model)
    more = estimate(distilled)["flop"] - estimate(config)["flop"]
    pictures = source.picture_tokens or 0
    assert more == 21 * 2 * source.num_parameters * (pictures + 16 + 8)


def test_a_dry_run_moves_weights_as_the_training_would(monkeypatch: pytest.MonkeyPatch) -> None:
    built, distilled = [], []
    build, distil = OptimizerConfig.build, Trainer.distil
    monkeypatch.setattr(OptimizerConfig, "build", lambda *a: built.append(a[0]) or build(*a))
    monkeypatch.setattr(Trainer, "distil", lambda *a: distilled.append(1) or distil(*a))
    settings = ["optimizer.dtype=bfloat16", "phases.generate.distill=0.5"]
    config = load_config(TrainingConfig, CONFIGS / "tiny.yaml", settings)
    assert all(math.isfinite(loss) for loss in dry_run(config)["losses"])
    assert [optimizer.dtype for optimizer in built] == ["bfloat16"]
    assert distilled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["links={}"], "links: expected one or more, got none"),
        (["batch_size=3", "accumulation=2"], "batch_size 3 cannot be cut into 1 processes x 2"),
    ],
)
def test_what_cannot_be_trained_fails_dry_too(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dry_run(load_config(TrainingConfig, CONFIGS / "tiny.yaml", settings))


def test_slots_for_pictures_of_a_text_model_are_refused() -> None:
    config = load_config(TrainingConfig, CONFIGS / "tiny.yaml", ["sources.eyes.model=Qwen2.5-0.5B"])
    with pytest.raises(ConfigError, match="source 'eyes' reads words only"):
        dry_run(config)


def test_narrow_models_are_of_the_same_family() -> None:
    for name in ("Qwen2.5-VL-3B", "gemma-3-1b", "Llama-3.2-1B"):
        text = find(name).text
        small = narrow(text)
        assert small.model_type == text.model_type
        assert small.hidden_size < text.hidden_size
        assert text.num_hidden_layers > small.num_hidden_layers == 6
    assert sum(narrow(find("Qwen2.5-VL-3B").text).rope_parameters["mrope_section"]) == 16


def test_the_command_prints_memory_speed_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CONFIGS / "tiny.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in ("3 steps on random weights (narrow)", "s a step", "GB", "FLOP", "TFLOP/s"):
        assert words in printed
    settings = ["phases.reconstruct.steps=0", "phases.generate.steps=3"]
    assert main(["train", str(CONFIGS / "tiny.yaml"), "--dry-run", *settings, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert main(["train", str(CONFIGS / "tiny.yaml"), "--true-width"]) == 1
    assert "--true-width and --json go with --dry-run" in capsys.readouterr().err


def test_kept_caches_are_timed_against_none() -> None:
    result = kept.bench(load_config(TrainingConfig, CONFIGS / "tiny.yaml"), rounds=2)
    low, high = result["speed"][1:]
    assert 0 < low <= result["speed"][0] <= high
    assert set(result["ms"]) == {"plain", "kept"}


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configs_of_accelerate_load(path: Path) -> None:
    found = ClusterConfig.from_yaml_file(str(path))
    assert found.num_processes == 8
    assert path.name in path.read_text().splitlines()[0]

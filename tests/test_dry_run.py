"""Every recipe trains on random weights; what it would cost is reckoned, not measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from families import FAMILIES
from policies import build_pi0
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
)

from mm_c2c.bench import kept
from mm_c2c.cache import PatchGrid, PositionKind
from mm_c2c.cli import main
from mm_c2c.config import load_config, override
from mm_c2c.errors import ConfigError, MismatchError, UnsupportedError
from mm_c2c.geometry import find
from mm_c2c.sources import Source, SourceInput
from mm_c2c.target import Target
from mm_c2c.training.blank import blank_source, narrow
from mm_c2c.training.config import OptimizerConfig, PhasesConfig, TrainingConfig
from mm_c2c.training.dry_run import dry_run, estimate
from mm_c2c.training.models import build_bridge
from mm_c2c.training.run import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
# The readers of policies, whose sources are trained here, are no recipes for published models.
POLICIES = ("babyai_reader", "metaworld_reader")
RECIPES = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "# mm-c2c train" in path.read_text() and not path.stem.startswith(POLICIES)
]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> None:
    """Recipes name the reference source from there."""
    del fresh_accelerate
    monkeypatch.chdir(CONFIGS.parent)


def test_the_recipes_ship() -> None:
    assert len(RECIPES) == 15


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


def one_example(*settings: str) -> TrainingConfig:
    """21 steps of an example with three questions, from SmolVLM-256M (1,088 patches a picture)."""
    config = load_config(TrainingConfig, CONFIGS / "smolvlm_256m_to_smollm2_135m.yaml")
    config = replace(config, batch_size=1, phases=PhasesConfig())
    return override(config, ["phases.generate.steps=21", "data.questions=3", *settings])


def test_a_source_of_aligned_words_sees_the_picture_anew_with_each_question() -> None:
    aligned = one_example("links={eyes: {geometry: aligned}}")
    source, target = (find(m.model) for m in (aligned.sources["eyes"], aligned.target))
    read = 2 * 3 * (1088 + 16) * source.num_parameters
    fuser = estimate(aligned)["parameters"]
    a_step = read + 3 * (4 * 24 * target.num_parameters + 6 * 16 * fuser)
    assert estimate(aligned)["flop"] == 21 * a_step
    # The source's own answers take another look, as the slots' do.
    distilled = override(aligned, ["phases.generate.distill=1"])
    more = estimate(distilled)["flop"] - estimate(aligned)["flop"]
    assert more == 21 * 2 * 3 * (1088 + 16 + 8) * source.num_parameters
    # Links of both kinds are read for, each in its own way.
    both = one_example("links.words={source: eyes, geometry: aligned}")
    slots = estimate(one_example())["flop"]
    assert estimate(both)["flop"] - slots == 21 * (read + 6 * 3 * 16 * fuser)


def test_a_source_that_hears_some_questions_looks_for_each_of_them() -> None:
    blind, hearing = one_example(), one_example("drop.questions=0.25")
    source = find(blind.sources["eyes"].model)
    more = estimate(hearing)["flop"] - estimate(blind)["flop"]
    looks = 2 * (3 * (1088 + 12) - 1088) * source.num_parameters
    assert more == 21 * (looks + 6 * 2 * 64 * estimate(blind)["parameters"])


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


@pytest.mark.parametrize("given", ["none", "others"])
def test_the_links_of_a_saved_bridge_are_tried_and_reckoned(given: str) -> None:
    path, folder = CONFIGS / "reference_aligned.yaml", CONFIGS.parent / "mm_c2c/reference/bridge"
    links = ["links={}"] if given == "none" else []
    own = ["system=Say nothing.", "slot_token=z"]
    saved = load_config(TrainingConfig, path, [*links, *own, f"start={folder}"])
    same = load_config(
        TrainingConfig, path, ["links={stickers: {geometry: slots, rows: 9, cols: 9}}"]
    )
    assert estimate(saved) == estimate(same)
    assert dry_run(saved)["losses"] == dry_run(same)["losses"]


def test_a_saved_bridge_of_other_models_fails_dry_too(tmp_path: Path) -> None:
    path, folder = CONFIGS / "reference_aligned.yaml", CONFIGS.parent / "mm_c2c/reference/bridge"
    for settings, message in (
        (["target.model=Qwen/Qwen3-0.6B"], "the target: the fuser was trained with 'HuggingFaceTB"),
        (["sources.stickers.model=Qwen/Qwen3-0.6B"], "source 'stickers': the fuser was trained"),
        (["sources={eyes: {model: pi0}}", "links={}"], "needs a source named 'stickers'"),
        ([f"start={tmp_path}"], "is not a saved bridge: config.json is missing"),
        ([f"start={tmp_path / 'none'}", "links={}"], "is not a saved bridge"),
    ):
        config = load_config(TrainingConfig, path, [f"start={folder}", *settings])
        with pytest.raises(MismatchError, match=message):
            dry_run(config)


def test_a_chain_of_trainings_is_tried_before_the_first_has_run(tmp_path: Path) -> None:
    config = load_config(TrainingConfig, CONFIGS / "tiny.yaml")
    onward = replace(config, start=tmp_path / "not_trained_yet")
    assert dry_run(onward)["losses"] == dry_run(config)["losses"]


def test_answers_of_a_source_without_words_are_refused(
    tiny_target: LlamaForCausalLM, tiny_target_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = ["phases.generate.distill=0.5", "slot_token=a"]
    config = load_config(TrainingConfig, CONFIGS / "pi0_to_qwen3_0_6b.yaml", settings)
    refusal = (
        r"distill takes the answers of source 'policy', .*pi0.* actions, not words; set it to 0"
    )
    with pytest.raises(ConfigError, match=refusal):
        dry_run(config)
    sources: dict[str, Source] = {"policy": build_pi0()}
    with pytest.raises(ConfigError, match=refusal):
        build_bridge(config, Target(tiny_target, tiny_target_tokenizer, "tiny"), sources)


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


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=32064, pad_token_id=32000, eos_token_id=[2, 32007]),
        GemmaConfig(vocab_size=257152, pad_token_id=257000, bos_token_id=None),
        WhisperConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_special_tokens_of_a_narrow_model_are_in_its_vocabulary(config: PreTrainedConfig) -> None:
    small = narrow(config)
    assert small.vocab_size == 512
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        given, found = getattr(config, key, None), getattr(small, key, None)
        assert (found is None) == (given is None)
        for token in found if isinstance(found, list) else [found or 0]:
            assert 0 <= token < 512
    assert find("Llama-3.2-1B").text.eos_token_id == narrow(find("Llama-3.2-1B").text).eos_token_id


def test_models_whose_padding_is_a_late_token_are_tried(tmp_path: Path) -> None:
    for number, vocab_size in enumerate((32064, 40000)):
        config = LlamaConfig(
            vocab_size=vocab_size,
            pad_token_id=32000,
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=4,
        )
        config.save_pretrained(tmp_path / str(number))
    settings = [f"sources.eyes.model={tmp_path / '0'}", f"target.model={tmp_path / '1'}"]
    settings.append("links={eyes: {geometry: aligned, fuser: {hidden_size: 16, rank: 4}}}")
    settings.append("drop.slots=0")
    result = dry_run(load_config(TrainingConfig, CONFIGS / "tiny.yaml", settings))
    assert all(math.isfinite(loss) for loss in result["losses"])


@pytest.mark.parametrize("true_width", [False, True], ids=["narrow", "true width"])
def test_a_speech_models_config_is_enough(true_width: bool, tmp_path: Path) -> None:
    WhisperConfig(max_source_positions=100, encoder_layers=2, d_model=192).save_pretrained(tmp_path)
    target = find("SmolLM2-135M").text
    target.num_hidden_layers = 2
    target.save_pretrained(tmp_path / "target")
    settings = [f"sources.ears.model={tmp_path}", f"target.model={tmp_path / 'target'}"]
    config = load_config(TrainingConfig, CONFIGS / "whisper_reader.yaml", settings)
    source, config = find(str(tmp_path)), replace(config, batch_size=1)
    assert (source.picture_tokens, source.picture_pixels) == (100, "2 s")
    result = dry_run(config, true_width=true_width)
    assert all(math.isfinite(loss) for loss in result["losses"])


def test_a_blank_recording_leaves_what_whisper_would() -> None:
    found = find("whisper-tiny.en")
    cache = blank_source(found, [], "float32", true_width=True).prefill([SourceInput()])
    assert cache.shape == found.layout.shape
    assert cache.grids == ((PatchGrid(1, 1500),),)
    assert (cache.kinds == PositionKind.AUDIO).all()


def test_what_a_recording_costs_is_its_encoders_work() -> None:
    config = load_config(TrainingConfig, CONFIGS / "whisper_reader.yaml")
    config = replace(config, batch_size=1)
    source, target = (find(m.model) for m in (config.sources["ears"], config.target))
    encoder, keys_and_values = 8_208_384, 384 * 2 * 4 * 384
    assert source.num_parameters == 37_760_256
    fuser = estimate(config)["parameters"]
    a_step = 2 * 1500 * (encoder + keys_and_values)
    a_step += 3 * 4 * 24 * target.num_parameters + 6 * 24 * fuser
    assert estimate(config)["flop"] == 1000 * a_step


REFUSED = {
    **dict.fromkeys(("blip-2_t5", "florence2", "mllama"), "a dry run knows those of speech only"),
    "gemma4": "layers differ in",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_is_built_blank_or_refused(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build().model.save_pretrained(tmp_path)
    config = load_config(TrainingConfig, CONFIGS / "tiny.yaml", [f"sources.eyes.model={tmp_path}"])
    if name in REFUSED:
        with pytest.raises(
            UnsupportedError, match=rf"{name.partition('_t5')[0]}.* {REFUSED[name]}"
        ):
            dry_run(config)
    else:
        assert all(math.isfinite(loss) for loss in dry_run(config)["losses"])


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

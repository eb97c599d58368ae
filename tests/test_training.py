"""The trainings of the reference pair: a few steps, resumed, and gone on from."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from mm_c2c import Bridge, SourceInput, Target
from mm_c2c.cache import SourceCache
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import FILES, Asked, Setting, build_arm
from mm_c2c.reference import lessons, train_baseline, train_fuser, train_source
from mm_c2c.reference.concepts import CONCEPTS
from mm_c2c.reference.knowledge import FACTS
from mm_c2c.reference.models import SOURCE_NAME, load_source
from mm_c2c.reference.scene_data import read_shard, write_shard
from mm_c2c.reference.scenes import CAPTION_REQUEST, Question
from mm_c2c.reference.tower import EfficientNetLite0
from mm_c2c.reference.train_baseline import BaselineTrainingConfig
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.reference.train_source import SourceTrainingConfig
from mm_c2c.training.log import read_log

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def weights(model: Path) -> dict[str, torch.Tensor]:
    """Read whole, not mapped: the file is written again."""
    return load((model / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few scenes in one flat style, and a tower that was never trained."""
    folder = tmp_path_factory.mktemp("data")
    stickers = {
        c.name: Image.new("RGBA", (32, 24), (7 * i % 256, 90, 200, 255))
        for i, c in enumerate(CONCEPTS)
    }
    tower = EfficientNetLite0().eval()
    save_file(tower.state_dict(), folder / "tower.safetensors")
    for split, size in (("train", 8), ("dev", 2)):
        path = folder / f"{split}-0000.safetensors"
        write_shard(path, split, 0, size, {"flat": stickers}, tower)
    return folder


@pytest.fixture(scope="module")
def source_config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SourceTrainingConfig:
    """Two steps, done."""
    config = SourceTrainingConfig(
        data=data,
        tower=data / "tower.safetensors",
        out=tmp_path_factory.mktemp("source"),
        hidden_size=32,
        num_layers=1,
        tower_layers=1,
        steps=2,
        warmup=1,
        easy_steps=1,
        batch_size=2,
        save_every=1,
        log_every=1,
    )
    train_source.train(config)
    return config


def test_shards_hold_features_and_truth(data: Path) -> None:
    features, scenes = read_shard(data / "train-0000.safetensors")
    assert features.shape == (8, 81, 2240)
    assert len(scenes) == 8
    assert all(1 <= len(scene.stickers) <= 4 for scene in scenes)


def test_a_source_training_goes_on_where_it_stopped(
    source_config: SourceTrainingConfig, tmp_path: Path
) -> None:
    before = weights(source_config.out / "model")
    stopped = replace(source_config, out=tmp_path / "stopped", steps=4, save_every=2)
    draw = train_source.draw_questions
    asked = []

    def stop(*args: Any) -> Any:
        asked.append(args)
        if len(asked) == 3 * stopped.batch_size:
            raise KeyboardInterrupt
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_source, "draw_questions", stop)
        with pytest.raises(KeyboardInterrupt):
            train_source.train(stopped)
    train_source.train(stopped)
    whole = replace(stopped, out=tmp_path / "whole")
    train_source.train(whole)
    assert load_source(whole.out / "model").model.model.vision_tower.feature_dropout.p > 0
    after = weights(whole.out / "model")
    gone_on = weights(stopped.out / "model")
    assert all(after[name].equal(gone_on[name]) for name in after)
    logs = [read_log(config.out / "log.csv") for config in (whole, stopped)]
    assert logs[0]["step"] == logs[1]["step"] == [1, 2, 3, 4]
    assert logs[0]["loss"] == logs[1]["loss"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in moved)
    assert not any("convolutions" in name or "feature_" in name for name in moved)


def test_a_source_can_train_in_bfloat16(
    source_config: SourceTrainingConfig, tmp_path: Path
) -> None:
    train_source.train(replace(source_config, out=tmp_path, precision="bf16"))
    full, half = (read_log(out / "log.csv")["loss"][:2] for out in (source_config.out, tmp_path))
    assert full != half
    assert full == pytest.approx(half, rel=0.02)


def test_a_source_training_names_the_precisions_it_knows(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision must be one of fp32, bf16, got 'half'"):
        SourceTrainingConfig(data=data, tower=data, out=tmp_path, precision="half")


def test_a_training_can_start_from_a_trained_source(
    source_config: SourceTrainingConfig, tmp_path: Path
) -> None:
    start = source_config.out / "model"
    train_source.train(
        replace(source_config, out=tmp_path, start=start, steps=2, learning_rate=0.0)
    )
    torch.testing.assert_close(weights(tmp_path / "model"), weights(start))


@pytest.fixture
def targets(
    tiny_target: Any, tiny_target_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Target]:
    """The tiny targets that trainings have loaded."""
    loaded = []

    def load_target(dtype: torch.dtype) -> Target:
        model = copy.deepcopy(tiny_target).to(dtype)
        loaded.append(Target(model, tiny_target_tokenizer, "tiny"))
        return loaded[-1]

    monkeypatch.setattr(train_fuser, "load_target", load_target)
    monkeypatch.setattr(train_baseline, "load_target", load_target)
    return loaded


@pytest.fixture
def fuser_config(source_config: SourceTrainingConfig, tmp_path: Path) -> FuserTrainingConfig:
    """Two steps a phase."""
    return FuserTrainingConfig(
        data=source_config.data,
        source=source_config.out / "model",
        out=tmp_path / "first",
        hidden_size=8,
        rank=2,
        slot_token="a",
        reconstruct_steps=2,
        reconstruct_scenes=2,
        steps=2,
        warmup=1,
        scenes=2,
        save_every=1,
        log_every=1,
    )


def test_a_fuser_training_goes_on_where_it_stopped(
    fuser_config: FuserTrainingConfig, targets: list[Target], tiny_target: Any, tmp_path: Path
) -> None:
    config = replace(fuser_config, dtype="bfloat16")
    train_fuser.train(config)
    before = weights(config.out / "bridge")
    train_fuser.train(replace(config, steps=4))
    after = weights(config.out / "bridge")
    assert read_log(config.out / "log.csv")["step"] == [1, 2, 3, 4, 5, 6]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    frozen = {n: w.bfloat16() for n, w in tiny_target.state_dict().items()}
    assert len(targets) == 2
    for target in targets:
        trained_through = target.model.state_dict()
        assert all(torch.equal(frozen[n], w) for n, w in trained_through.items())

    onward = replace(
        config,
        out=tmp_path / "second",
        start=config.out / "bridge",
        reconstruct_steps=0,
        learning_rate=0.0,
    )
    train_fuser.train(onward)
    kept = weights(onward.out / "bridge")
    assert all(torch.equal(after[name], kept[name]) for name in after)


def test_a_stopped_training_ends_as_one_that_was_not(
    fuser_config: FuserTrainingConfig, targets: list[Target], tmp_path: Path
) -> None:
    config = replace(fuser_config, reconstruct_steps=0, steps=3, drop=0.5)
    train_fuser.train(replace(config, out=tmp_path / "whole"))
    draw = lessons.draw_questions
    calls = []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lessons, "draw_questions", stop)
        with pytest.raises(KeyboardInterrupt):
            train_fuser.train(config)
    train_fuser.train(config)
    whole, stopped = weights(tmp_path / "whole" / "bridge"), weights(config.out / "bridge")
    assert all(whole[name].equal(stopped[name]) for name in whole)
    paused = replace(config, out=tmp_path / "paused")
    train_fuser.train(paused, until=2)
    assert read_log(paused.out / "log.csv")["step"] == [1, 2]
    train_fuser.train(paused)
    gone_on = weights(paused.out / "bridge")
    assert all(whole[name].equal(gone_on[name]) for name in whole)
    with pytest.raises(ConfigError, match=r"at most 2 steps .* 3 are done"):
        train_fuser.train(paused, until=2)
    assert read_log(paused.out / "log.csv")["step"] == [1, 2, 3]
    with pytest.raises(ConfigError, match="other parts"):
        train_fuser.train(replace(config, layers="proportional"))


def test_a_shuffled_training_shows_each_scene_the_next_ones_cache(
    fuser_config: FuserTrainingConfig, targets: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(fuser_config, reconstruct_steps=0, steps=2, scenes=3, drop=0.0)
    read, fuse = train_fuser.FeatureReader.read, Bridge.fuse_slots
    seen: list[SourceCache] = []
    shown: list[SourceCache] = []

    def note_read(self: Any, features: torch.Tensor) -> SourceCache:
        seen.append(read(self, features))
        return seen[-1]

    def note_fuse(self: Bridge, caches: Any) -> Any:
        shown.extend(caches.values())
        return fuse(self, caches)

    monkeypatch.setattr(train_fuser.FeatureReader, "read", note_read)
    monkeypatch.setattr(Bridge, "fuse_slots", note_fuse)
    for shuffled, order in ((False, [0, 1, 2]), (True, [1, 2, 0])):
        seen.clear()
        shown.clear()
        train_fuser.train(replace(config, shuffled=shuffled, out=config.out / str(shuffled)))
        assert len(seen) == len(shown) == 2
        for own, other in zip(seen, shown, strict=True):
            assert other.layers[0].values.equal(own.layers[0].values[order])
            assert not own.layers[0].values[0].equal(own.layers[0].values[1])
    with pytest.raises(ConfigError, match="at least 2 scenes"):
        replace(config, shuffled=True, scenes=1)


@pytest.fixture
def asked_in_training(monkeypatch: pytest.MonkeyPatch) -> list[list[Question]]:
    """The questions about each picture, in the order of training."""
    noted: list[list[Question]] = []
    learn = train_fuser.answer_loss

    def note(bridge: Bridge, perception: Any, asked: list[list[Question]]) -> torch.Tensor:
        noted.extend(asked)
        return learn(bridge, perception, asked)

    monkeypatch.setattr(train_fuser, "answer_loss", note)
    return noted


def test_a_training_asks_what_no_picture_shows_only_when_told_to(
    fuser_config: FuserTrainingConfig,
    targets: list[Target],
    asked_in_training: list[list[Question]],
) -> None:
    config = replace(fuser_config, reconstruct_steps=0, steps=3, scenes=4)
    for knowledge in (False, True):
        asked_in_training.clear()
        train_fuser.train(replace(config, knowledge=knowledge, out=config.out / str(knowledge)))
        kinds = {q.kind for questions in asked_in_training for q in questions}
        assert "caption" in kinds
        assert bool(kinds & set(FACTS)) == knowledge


def test_as_many_scenes_as_wanted_have_an_odd_one_out(
    fuser_config: FuserTrainingConfig,
    targets: list[Target],
    asked_in_training: list[list[Question]],
) -> None:
    config = replace(fuser_config, reconstruct_steps=0, steps=2, scenes=4, questions=1, late=20)
    for odd in (0, 1):
        asked_in_training.clear()
        train_fuser.train(replace(config, odd=odd, out=config.out / str(odd)))
        kinds = [{q.kind for q in questions} for questions in asked_in_training]
        steps = [kinds[:4], kinds[4:]]
        assert all("odd" in set.union(*step) for step in steps) == bool(odd)
    with pytest.raises(ConfigError, match=r"odd must be in \[0, scenes=4\], got 5"):
        replace(config, odd=5)


def test_a_training_asks_more_of_what_is_learned_late_when_told_to(
    fuser_config: FuserTrainingConfig,
    targets: list[Target],
    asked_in_training: list[list[Question]],
) -> None:
    config = replace(fuser_config, reconstruct_steps=0, steps=2, scenes=4, questions=1)
    train_fuser.train(replace(config, late=5, out=config.out / "late"))
    assert len(asked_in_training) == 8
    for questions in asked_in_training:
        assert questions[1].kind == "caption"
        late = questions[2:]
        assert {q.kind for q in late} <= {"where", "count", "exists", "odd"}
        assert len(set(late)) == len(late)
        assert 3 <= len(late) <= 5  # a scene of one thing has few to ask
    assert any(len(questions) == 7 for questions in asked_in_training)


def test_a_reader_describes_a_picture_as_the_source_does() -> None:
    # The shipped source: one that has hardly learned would write nothing.
    source = load_source()
    with Image.open(Path(__file__).parent.parent / "demos" / "scene.webp") as file:
        picture = file.convert("RGB")
    looks = [SourceInput(text=CAPTION_REQUEST, images=(picture,))]
    pixels = source.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = source.model.model.vision_tower.features(pixels)
    expected = source.generate(looks, max_new_tokens=64, do_sample=False)
    found = train_fuser.FeatureReader(source).describe(features, CAPTION_REQUEST)
    assert found == [text.strip() for text in expected]
    assert "dog" in found[0]


@pytest.fixture(params=train_baseline.KINDS)
def baseline_config(
    request: pytest.FixtureRequest,
    fuser_config: FuserTrainingConfig,
    targets: list[Target],
    tmp_path: Path,
) -> BaselineTrainingConfig:
    """Of each kind, beside a trained fuser."""
    if request.param == "tuned_relay":
        pytest.importorskip("peft", reason="LoRA needs PEFT: the extra `tune`")
    train_fuser.train(replace(fuser_config, reconstruct_steps=0))
    return BaselineTrainingConfig(
        kind=request.param,
        data=fuser_config.data,
        source=fuser_config.source,
        bridge=fuser_config.out / "bridge",
        out=tmp_path / "baseline",
        parameters=5000,
        steps=2,
        warmup=1,
        easy_steps=1,
        scenes=2,
        save_every=1,
        log_every=1,
    )


def trained_baseline(config: BaselineTrainingConfig) -> dict[str, torch.Tensor]:
    (path,) = (config.out / config.kind).glob("*.safetensors")
    return load(path.read_bytes())


def test_a_baseline_training_goes_on_where_it_stopped_and_serves_its_arm(
    baseline_config: BaselineTrainingConfig,
    targets: list[Target],
    tiny_target: Any,
    pictures: list[Image.Image],
) -> None:
    config, kind = baseline_config, baseline_config.kind
    train_baseline.train(config)
    before = trained_baseline(config)
    train_baseline.train(replace(config, steps=4))
    after = trained_baseline(config)
    assert read_log(config.out / "log.csv")["step"] == [1, 2, 3, 4]
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before if "lora_A" not in name)
    assert abs(sum(weight.numel() for weight in after.values()) - 5000) < 750
    frozen = tiny_target.state_dict()
    for target in targets:
        assert all(w.equal(frozen[name]) for name, w in target.model.state_dict().items())

    source = load_source(config.source)
    bridge = Bridge.from_pretrained(config.bridge, targets[-1], {SOURCE_NAME: source})
    files = {FILES[kind]: config.out / kind}
    setting = Setting(bridge=bridge, source_name=SOURCE_NAME, request="Say.", **files)
    asked = [Asked(SourceInput(images=(picture,)), "What is it?") for picture in pictures]
    assert len(build_arm(kind, setting).answer(asked)) == 2


def test_a_baseline_goes_on_from_a_trained_one(
    baseline_config: BaselineTrainingConfig, tmp_path: Path
) -> None:
    first = baseline_config
    second = replace(
        first,
        start=first.out / first.kind,
        out=tmp_path / "after",
        parameters=1,
        learning_rate=1e-9,
    )
    for config in (first, second):
        train_baseline.train(config)
    before, after = trained_baseline(first), trained_baseline(second)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
    assert any(not weight.equal(after[name]) for name, weight in before.items())


def test_a_baseline_of_no_known_kind_is_refused(fuser_config: FuserTrainingConfig) -> None:
    with pytest.raises(ConfigError, match="tuned_relay, soft_prompt, own_source"):
        BaselineTrainingConfig(
            kind="tuned", data=fuser_config.data, source=fuser_config.source, out=fuser_config.out
        )

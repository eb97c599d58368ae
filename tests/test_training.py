"""The trainings of the reference pair: a few steps, resumed, and gone on from."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from mm_c2c import Target
from mm_c2c.reference import train_fuser, train_source
from mm_c2c.reference.concepts import CONCEPTS
from mm_c2c.reference.scene_data import read_shard, write_shard
from mm_c2c.reference.tower import EfficientNetLite0
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.reference.train_source import SourceTrainingConfig
from mm_c2c.reference.training_log import read_log


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
    assert features.shape == (8, 81, 1536)
    assert len(scenes) == 8
    assert all(1 <= len(scene.stickers) <= 4 for scene in scenes)


def test_a_source_training_goes_on_where_it_stopped(source_config: SourceTrainingConfig) -> None:
    before = weights(source_config.out / "model")
    train_source.train(replace(source_config, steps=4))
    after = weights(source_config.out / "model")
    assert read_log(source_config.out / "log.csv")["step"] == [1, 2, 3, 4]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in moved)
    assert not any("convolutions" in name or "feature_" in name for name in moved)


def test_a_training_can_start_from_a_trained_source(
    source_config: SourceTrainingConfig, tmp_path: Path
) -> None:
    start = source_config.out / "model"
    train_source.train(
        replace(source_config, out=tmp_path, start=start, steps=2, learning_rate=0.0)
    )
    torch.testing.assert_close(weights(tmp_path / "model"), weights(start))


def test_a_fuser_training_goes_on_where_it_stopped(
    source_config: SourceTrainingConfig,
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = []

    def load_target(dtype: torch.dtype) -> Target:
        model = copy.deepcopy(tiny_target).to(dtype)
        targets.append(Target(model, tiny_target_tokenizer, "tiny"))
        return targets[-1]

    monkeypatch.setattr(train_fuser, "load_target", load_target)
    config = FuserTrainingConfig(
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

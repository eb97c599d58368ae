"""`mm-c2c train` on tiny models that are loaded from disk, as any others are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from families import TinyVLM
from PIL import Image
from safetensors.torch import load

from mm_c2c import Bridge
from mm_c2c.cli import main
from mm_c2c.config import load_config
from mm_c2c.training import run
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.log import read_log

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
WORDS = ["what is left", "what is in the image", "is it a circle or a square", "where is the cat"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Each training of a process takes up what accelerate shares among all of them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def settings(
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tiny_llava: TinyVLM,
    pictures: list[Image.Image],
    tmp_path: Path,
) -> list[str]:
    """What `configs/tiny.yaml` names, made: both models and three examples with several questions."""
    for name, model, reader in (
        ("target", tiny_target, tiny_target_tokenizer),
        ("source", *reversed(tiny_llava)),
    ):
        model.save_pretrained(tmp_path / name)
        reader.save_pretrained(tmp_path / name)
    lines = []
    for index, count in enumerate((1, 3, 2)):
        picture = pictures[index % 2].rotate(90 * index)
        picture.save(tmp_path / f"{index}.png")
        for question in WORDS[:count]:
            row = {
                "image": f"{index}.png",
                "question": question,
                "answer": ["red", "a blue circle", "cat"][index],
                "caption": f"picture {index} shows a square and a cat",
            }
            lines.append(json.dumps(row) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return [
        f"sources.eyes.model={tmp_path / 'source'}",
        f"target.model={tmp_path / 'target'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        f"out={tmp_path / 'out'}",
    ]


@pytest.fixture
def config(settings: list[str]) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load((out / "bridge" / "model.safetensors").read_bytes())


def test_tiny_yaml_trains_two_steps_and_resumes(
    settings: list[str], config: TrainingConfig, tmp_path: Path
) -> None:
    assert main(["train", str(TINY), *settings]) == 0
    before = weights(config.out)
    assert main(["train", str(TINY), *settings, "phases.generate.steps=4"]) == 0
    after = weights(config.out)
    log = read_log(config.out / "log.csv")
    assert log["step"] == [1, 2, 3, 4, 5, 6]
    assert all(speed > 0 for speed in log["tokens_per_s"])
    assert log["open_gates"] == [1.0] * 6
    assert any(not before[name].equal(after[name]) for name in before)
    bridge = Bridge.from_pretrained(
        config.out / "bridge",
        run.load_target(config.target),
        {"eyes": run.load_source(config.sources["eyes"])},
    )
    frozen = run.load_target(config.target).model.state_dict()
    assert all(w.equal(frozen[n]) for n, w in bridge.target.model.state_dict().items())

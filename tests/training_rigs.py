"""What `mm-c2c train` is given in tests, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load

from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.models import load_source, load_target
from mm_c2c.training.run import run_training

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
WORDS = ["what is left", "what is in the image", "is it a circle or a square", "where is the cat"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load((out / "bridge" / "model.safetensors").read_bytes())


def go(config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Train in this process; returns the fuser's weights."""
    accelerator = build_accelerator(config.out, precision=config.precision, cpu=True)
    sources = {name: load_source(model) for name, model in config.sources.items()}
    run_training(config, accelerator, load_target(config.target), sources)
    return weights(config.out)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].equal(weight), name

"""What `mm-c2c train` is given in tests, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load
from tiny_vlm import TinyVLM

from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.models import load_source, load_target
from mm_c2c.training.run import run_training

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
WORDS = ["what is left", "what is in the image", "is it a circle or a square", "where is the cat"]


def save_settings(
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tiny_llava: TinyVLM,
    pictures: list[Image.Image],
    folder: Path,
) -> list[str]:
    """What `configs/tiny.yaml` names, made: both models and three examples with several questions."""
    for name, model, reader in (
        ("target", tiny_target, tiny_target_tokenizer),
        ("source", *reversed(tiny_llava)),
    ):
        model.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    lines = []
    for index, count in enumerate((1, 3, 2)):
        picture = pictures[index % 2].rotate(90 * index)
        picture.save(folder / f"{index}.png")
        for question in WORDS[:count]:
            row = {
                "image": f"{index}.png",
                "question": question,
                "answer": ["red", "a blue circle", "cat"][index],
                "caption": f"picture {index} shows a square and a cat",
            }
            lines.append(json.dumps(row) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return [
        f"sources.eyes.model={folder / 'source'}",
        f"target.model={folder / 'target'}",
        f"data.path={folder / 'data.jsonl'}",
        f"out={folder / 'out'}",
    ]


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

"""A reader of a tiny policy, and episodes whose answers are in the policy's actions alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, SourceInput, Target
from mm_c2c.evaluation.arms import Asked
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.sources.action_bins import ActionBins

NAME = "policy"


def build_reader(tiny_llava: Any, tiny_target: Any, tiny_target_tokenizer: Any) -> Bridge:
    """A policy with action tokens into the tiny target, its picture and its actions; open fusers."""
    vocab = tiny_llava.model.config.text_config.vocab_size
    bins = ActionBins(vocab_size=vocab, low=(0.0, 0.0), high=(1.0, 1.0), num_bins=8)
    source = TokenActionSource(tiny_llava.model, tiny_llava.processor, bins, "tiny/policy")
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    both = {"source": NAME, "geometry": "slots", "fuser": fuser}
    links = (
        LinkConfig(**both, rows=2, cols=2),
        LinkConfig(**both, rows=1, cols=2, kinds=("action",)),
    )
    bridge = Bridge(target, {NAME: source}, BridgeConfig(links=links, slot_token="a")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.normal_(std=0.5, generator=generator)
    return bridge


def build_rows(reader: Bridge, pictures: list[Image.Image], folder: Path) -> list[dict[str, Any]]:
    """Three steps of each of eight episodes; the answer is in the action tokens alone."""
    policy: Any = reader.sources[NAME]
    last = policy.bins.vocab_size - 1
    pictures[0].save(folder / "0.png")
    pictures[1].save(folder / "1.png")
    found = []
    for episode in range(8):
        for step in range(3):
            left = (episode // 2 + step) % 2 == 0
            found.append(
                {
                    "image": f"{episode % 2}.png",
                    "text": "go left of the cat",
                    "action_tokens": [last, last - 2] if left else [last - 3, last - 1],
                    "kind": "turn",
                    "question": ("Which way?", "Left or right?")[step % 2],
                    "answer": "left" if left else "right",
                    "options": ["left", "right"],
                    "caption": "a cat.",
                    "episode": f"e{episode}",
                    "step": step,
                    "success": episode % 4 < 2,
                }
            )
    return found


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(rows: list[dict[str, Any]], pictures: list[Image.Image]) -> list[Asked]:
    return [
        Asked(
            SourceInput(
                text=row["text"],
                images=(pictures[0],),
                action_tokens=torch.tensor(row["action_tokens"]),
            ),
            row["question"],
            ("left", "right"),
            "a cat.",
        )
        for row in rows[:2]
    ]

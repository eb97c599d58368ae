"""Many scenes with the frozen tower's features of them, on disk: training does not run the tower.

    python -m mm_c2c.reference.scene_data --split train --shards 20 --out FOLDER --artwork FOLDER

A shard is one safetensors file, made from its number alone, so that any of them can be made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mm_c2c.errors import ConfigError, run_main
from mm_c2c.reference.concepts import CONCEPTS
from mm_c2c.reference.scenes import Scene, Sticker, odd_one_out, render, sample_scene
from mm_c2c.reference.stickers import DEV_STYLE, TEST_STYLE, TRAIN_STYLES, load_stickers
from mm_c2c.reference.tower import EfficientNetLite0

SCENES_PER_SHARD = 1024
PIXEL_MEAN = 127.0
PIXEL_STD = 128.0

Artworks = Mapping[str, Mapping[str, Image.Image]]


class Split(NamedTuple):
    """Which artwork and which concepts a split draws from, and where its seeds begin."""

    styles: tuple[str, ...]
    heldout: bool
    first_seed: int

    @property
    def names(self) -> list[str]:
        """Concepts that may appear."""
        return [c.name for c in CONCEPTS if c.heldout == self.heldout]


SPLITS = {
    "train": Split(TRAIN_STYLES, heldout=False, first_seed=0),
    "seen_style": Split(TRAIN_STYLES, heldout=False, first_seed=1_000_000),
    "dev": Split((DEV_STYLE,), heldout=False, first_seed=2_000_000),
    "unseen_style": Split((TEST_STYLE,), heldout=False, first_seed=3_000_000),
    "unseen_concept": Split((TEST_STYLE,), heldout=True, first_seed=4_000_000),
}


def load_artworks(split: str, folder: Path) -> dict[str, dict[str, Image.Image]]:
    """Cut-outs of every style that a split draws from."""
    return {style: load_stickers(style, folder) for style in SPLITS[split].styles}


def make_scene(
    split: str, number: int, artworks: Artworks, num_stickers: int | None = None
) -> Scene:
    """The `number`-th scene of a split; the same whenever it is asked for.

    Args:
        split: a key of `SPLITS`.
        number: from 0.
        artworks: cut-outs of the split's styles.
        num_stickers: as `sample_scene` takes it.
    """
    rng = random.Random(SPLITS[split].first_seed + number)
    styles = {
        name: [style for style in artworks if name in artworks[style]]
        for name in SPLITS[split].names
    }
    names = [name for name, drawn in styles.items() if drawn]
    return sample_scene(rng, names, styles, num_stickers)


def to_pixels(picture: Image.Image) -> Tensor:
    """`(3, height, width)`, normalised as the tower expects."""
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32))
    return ((pixels - PIXEL_MEAN) / PIXEL_STD).permute(2, 0, 1)


def write_shard(
    path: Path, split: str, index: int, size: int, artworks: Artworks, tower: EfficientNetLite0
) -> None:
    """Make one shard: `features` `(size, patches, 2240)` in float16, and the scenes as JSON."""
    scenes, features = [], []
    numbers = range(index * SCENES_PER_SHARD, index * SCENES_PER_SHARD + size)
    for number in tqdm(numbers, desc=path.name, mininterval=5):
        scene = make_scene(split, number, artworks)
        pixels = to_pixels(render(scene, artworks, jitter=split == "train"))
        with torch.inference_mode():
            grid = tower(pixels[None].contiguous(memory_format=torch.channels_last))
        features.append(grid.flatten(2).transpose(1, 2)[0].half())
        scenes.append(asdict(scene))
    scratch = path.with_suffix(".part")
    save_file({"features": torch.stack(features)}, scratch, {"scenes": json.dumps(scenes)})
    scratch.replace(path)


def read_shard(path: Path) -> tuple[Tensor, list[Scene]]:
    """Features and scenes of one shard."""
    with safe_open(path, "pt") as file:
        scenes = json.loads(file.metadata()["scenes"])
        features = file.get_tensor("features")
    return features, [_scene(entry) for entry in scenes]


class ScenePool:
    """All scenes that a training draws from, with the frozen tower's features of them.

    Args:
        folder: of shards.

    Raises:
        ConfigError: the folder holds no training shards.
    """

    def __init__(self, folder: Path) -> None:
        self.shards = [read_shard(path) for path in sorted(folder.glob("train-*.safetensors"))]
        if not self.shards:
            raise ConfigError(f"no train-*.safetensors in {folder}; run scene_data first")
        self.all = [(s, i) for s, (_, scenes) in enumerate(self.shards) for i in range(len(scenes))]
        self.easy = [(s, i) for s, i in self.all if len(self.shards[s][1][i].stickers) <= 2]
        self.odd = [(s, i) for s, i in self.all if odd_one_out(self.shards[s][1][i])]

    def draw(
        self, rng: random.Random, count: int, *, easily: bool = False, odd: int = 0
    ) -> tuple[Tensor, list[Scene]]:
        """Features `(count, patches, 2240)` and truth of scenes.

        Args:
            rng: source of randomness.
            count: how many.
            easily: only scenes of one and two stickers.
            odd: so many of them that have an odd one out.
        """
        picked = rng.sample(self.easy if easily else self.all, count - odd)
        picked += rng.sample(self.odd, odd)
        features = torch.stack([self.shards[s][0][i].float() for s, i in picked])
        return features, [self.shards[s][1][i] for s, i in picked]


def _scene(entry: dict[str, Any]) -> Scene:
    return Scene(tuple(Sticker(**sticker) for sticker in entry["stickers"]), entry["seed"])


def main() -> None:
    """Make the shards that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--size", type=int, default=SCENES_PER_SHARD)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--artwork", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True, help="folded weights, safetensors")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    tower = EfficientNetLite0().eval().requires_grad_(requires_grad=False)
    tower.load_state_dict(load_file(args.tower))
    tower = tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    artworks = load_artworks(args.split, args.artwork)
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.worker, args.shards, args.workers):
        path = args.out / f"{args.split}-{index:04d}.safetensors"
        if not path.exists():
            write_shard(path, args.split, index, args.size, artworks, tower)


if __name__ == "__main__":
    run_main(main)

"""Examples on disk for tests of training data."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from mm_c2c.training.config import DataConfig
from mm_c2c.training.data import Example, Examples


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_lines(folder: Path, rows: list[Any]) -> DataConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return DataConfig(path=str(folder / "data.jsonl"))


def shades(examples: Examples, positions: range) -> list[int]:
    return [shade(examples.at(position)) for position in positions]


def shade(example: Example) -> int:
    return example.images[0].getpixel((0, 0))[0]


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for stem, parts in samples.items():
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

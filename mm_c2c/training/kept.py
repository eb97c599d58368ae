"""Source caches on disk: computed once, so that later epochs do not run the source.

The folder holds shards, each a batch of rows as `transport.save_cache` writes it, and an index of
each process that wrote some: a line says which rows a shard has. Lines are written after their
shard, so that what they name is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mm_c2c.cache import SourceCache, join_sources, without_padding
from mm_c2c.errors import MismatchError
from mm_c2c.sources.base import SourceInput
from mm_c2c.transport import load_row, save_cache

logger = logging.getLogger(__name__)


def row_key(salt: str, look: SourceInput) -> str:
    """Tells what a source was shown from everything else it can be shown.

    Args:
        salt: which source, at which precision.
        look: text, state, action tokens, pictures and videos by their pixels, and a recording by
            its samples.
    """
    digest = hashlib.sha256(repr((salt, look.text, len(look.images))).encode())
    if look.videos:
        lengths = [len(video) for video in look.videos]
        digest.update(repr(("videos", lengths, look.fps)).encode())
    for picture in (*look.images, *(frame for video in look.videos for frame in video)):
        digest.update(repr((picture.mode, picture.size)).encode() + picture.tobytes())
    if look.state is not None:
        digest.update(repr(look.state.tolist()).encode())
    if look.action_tokens is not None:
        digest.update(repr(("action_tokens", look.action_tokens.tolist())).encode())
    if look.audio is not None:
        samples = np.asarray(look.audio, dtype=np.float32)
        digest.update(repr(("audio", samples.shape)).encode() + samples.tobytes())
    return digest.hexdigest()[:32]


class _Place(NamedTuple):
    shard: str
    row: int


class KeptCaches:
    """Rows of source caches by key, in shards of a folder.

    Args:
        folder: made if it is not there.
        budget: bytes that this process may write; what is there already counts.
        process: number of this process.
    """

    def __init__(self, folder: Path, budget: int, process: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.budget = folder, budget
        self._index = folder / f"index-{process:03d}.jsonl"
        self._prefix = f"{process:03d}"
        self._places: dict[str, _Place] = {}
        self._read: dict[Path, int] = {}
        self._refresh()
        own = list(folder.glob(f"{self._prefix}-*.safetensors"))
        self.num_bytes = sum(path.stat().st_size for path in own)
        self._shards = len(own)

    def fetch(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], SourceCache],
        device: torch.device | str = "cpu",
    ) -> SourceCache:
        """The caches of a batch, read or computed.

        Args:
            keys: of its rows, by `row_key`.
            compute: the cache of some of the rows, by their numbers in `keys`.
            device: where its tensors go.
        """
        if any(key not in self._places for key in keys):
            self._refresh()
        rows = {place: row for place, key in enumerate(keys) if (row := self._load(key, device))}
        missing = [place for place in range(len(keys)) if place not in rows]
        if missing:
            cache = compute(missing)
            self._store([keys[place] for place in missing], cache)
            for number, place in enumerate(missing):
                rows[place] = without_padding(cache.select(torch.tensor([number])))
        return join_sources([rows[place] for place in range(len(keys))])

    def _load(self, key: str, device: torch.device | str) -> SourceCache | None:
        place = self._places.get(key)
        if place is None:
            return None
        try:
            return without_padding(load_row(self.folder / place.shard, place.row, device))
        except MismatchError as error:
            logger.warning("%s; it is computed again", error)
            del self._places[key]
            return None

    def _store(self, keys: Sequence[str], cache: SourceCache) -> None:
        """Write a shard, if it is within the budget."""
        if self.num_bytes + cache.num_bytes > self.budget:
            return
        shard = f"{self._prefix}-{self._shards:06d}.safetensors"
        save_cache(cache, self.folder / shard)
        self._shards += 1
        self.num_bytes += (self.folder / shard).stat().st_size
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"shard": shard, "rows": list(keys)}) + "\n")

    def _refresh(self) -> None:
        """Read what processes have added to their indices."""
        for path in sorted(self.folder.glob("index-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._read[path] = self._read.get(path, 0) + len(line)
                    self._add(path, line)

    def _add(self, path: Path, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: a line is damaged; what it named is computed again", path)
            return
        for row, key in enumerate(entry["rows"]):
            self._places[key] = _Place(entry["shard"], row)

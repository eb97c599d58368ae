"""Source caches on disk: computed once, so that later epochs do not run the source.

The folder holds a file a row, whose name says which source was shown what. Files appear whole or
not at all, so that any number of trainings may share a folder, also at the same time.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from mm_c2c.cache import SourceCache, join_sources, without_padding
from mm_c2c.errors import MismatchError
from mm_c2c.pretrained import fingerprint_weights
from mm_c2c.run_folder import make_folder
from mm_c2c.sources.base import SourceInput
from mm_c2c.transport import load_cache, save_cache

logger = logging.getLogger(__name__)

# Bytes of the disk that are left to checkpoints and logs.
_RESERVE = 1_000_000_000
# What policies are told beside their model's config.
_OWN_SETTINGS = ("seed", "read_actions")


def fingerprint_source(source: Any) -> str:
    """Tells a source from others, and from itself with other weights or settings.

    Of large tensors a sample is read, which takes a moment and sees what training changes; a few
    rows of an embedding, changed by hand, it may miss.

    Args:
        source: of any class in `mm_c2c.sources`, or a blank one.
    """
    readers = [getattr(source, name, None) for name in ("processor", "tokenizer")]
    templates = [getattr(reader, "chat_template", None) for reader in readers]
    weights = fingerprint_weights(source.model)
    own = {name: getattr(source, name) for name in _OWN_SETTINGS if hasattr(source, name)}
    whole = repr((source.origin, source.model.config, readers, templates, weights, own))
    return hashlib.sha256(whole.encode()).hexdigest()


def row_key(salt: str, look: SourceInput) -> str:
    """Tells what a source was shown from everything else it can be shown.

    Args:
        salt: which source, by its `fingerprint_source`.
        look: text, state, action tokens, noise, pictures and videos by their pixels, and a
            recording by its samples.
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
    if look.noise is not None:
        digest.update(repr(("noise", look.noise.tolist())).encode())
    if look.audio is not None:
        samples = np.asarray(look.audio, dtype=np.float32)
        digest.update(repr(("audio", samples.shape)).encode() + samples.tobytes())
    return digest.hexdigest()[:32]


class KeptCaches:
    """Rows of source caches by key, each in a file of its own.

    Args:
        folder: made if it is not there.
        budget: bytes that the folder may take, with what is there already. Trainings that begin
            at the same time may each take what they find left of it.
        processes: how many of this training share what is left of it, in equal parts.
    """

    def __init__(self, folder: Path, budget: int, processes: int = 1) -> None:
        make_folder(folder)
        self.folder = folder
        # With what a killed training left half written.
        taken = sum(path.stat().st_size for path in folder.glob("*/*"))
        self.room = (budget - taken) // processes

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
        rows = {key: row for key in dict.fromkeys(keys) if (row := self._load(key, device))}
        missing = [key for key in dict.fromkeys(keys) if key not in rows]
        if missing:
            cache = compute([keys.index(key) for key in missing])
            for number, key in enumerate(missing):
                rows[key] = without_padding(cache.select(torch.tensor([number])))
                self._store(key, rows[key])
        return join_sources([rows[key] for key in keys])

    def _path(self, key: str) -> Path:
        # A folder of 100,000s of files is slow to list, and on some disks to open a file in.
        return self.folder / key[:2] / f"{key}.safetensors"

    def _load(self, key: str, device: torch.device | str) -> SourceCache | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return load_cache(path, device)
        except MismatchError as error:
            logger.warning("%s; it is computed again", error)
            return None

    def _store(self, key: str, row: SourceCache) -> None:
        """Write a row, if it is within the budget and leaves room for checkpoints."""
        if row.num_bytes > self.room:
            return
        path = self._path(key)
        before = path.stat().st_size if path.exists() else 0
        try:
            path.parent.mkdir(exist_ok=True)
            if shutil.disk_usage(self.folder).free < row.num_bytes + _RESERVE:
                raise OSError(f"less than {_RESERVE / 1e9:g} GB would be left on the disk")
            save_cache(row, path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s: %s; what is not kept is computed again each time", path, error)
            self.room = 0
            return
        self.room -= path.stat().st_size - before

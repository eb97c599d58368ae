"""Tar shards and data sets: which are meant, what they hold, and what in them is damaged."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mm_c2c.errors import FetchError, InputError, UnsupportedError
from mm_c2c.training.config import DataConfig

logger = logging.getLogger(__name__)

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
# How gzip, bzip2, xz and zstd begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512  # of a tar archive, in bytes


class Member(NamedTuple):
    """Where a file lies in a shard."""

    name: str
    offset: int
    size: int


def meet_corrupt(words: str, *, skip: bool) -> None:
    """Stop at what cannot be read, or say that it is left out.

    Raises:
        InputError: it is not to be skipped.
    """
    if not skip:
        raise InputError(f"{words}; data.on_corrupt=skip goes on without it")
    logger.warning("left out: %s", words)


def matching(pattern: str) -> list[Path]:
    """Files that are called so, in order; `*` and `?` may stand in any part of the path.

    What stands in braces is named: it is among them whether it is there or not.
    """
    found = set(map(Path, glob(pattern)))  # noqa: PTH207, Path.glob takes no absolute pattern
    if not found and _BRACES.search(pattern):
        for name in _expand(pattern):
            found.update(matching(name) or [Path(name)])
    return sorted(found)


def _expand(pattern: str) -> list[str]:
    """The names of a pattern with ranges, `{00..12}`, or choices, `{a,b}`, as shells write them."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last, choices = braces.groups()
    if choices is None:
        inner = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        inner = choices.split(",")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for part in inner for name in _expand(before + part + after)]


def list_members(shard: Path) -> tuple[list[Member], str]:
    """The files of a shard, in order, without reading them.

    Returns:
        Those up to where the shard is damaged, if it is, and how it is; else an empty string.
    """
    members: list[Member] = []
    try:
        with shard.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                return [], "it is compressed; unpack it, so that it can be read in any order"
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                # An error leaves what came before it in the list.
                members.extend(Member(m.name, m.offset_data, m.size) for m in archive if m.isfile())
                file.seek(archive.offset)
            # tarfile takes a damaged header for the end, behind which there are zeros alone.
            return members, _damage(file)
    except (OSError, tarfile.TarError) as error:
        return members, str(error)


def _damage(file: BinaryIO) -> str:
    """What is wrong with the end of an archive, from where the file stands."""
    size = 0
    for part in iter(partial(file.read, 1 << 20), b""):
        if part.strip(b"\0"):
            return "a header is damaged"
        size += len(part)
    return "" if size >= _BLOCK else "its end is missing"


def load_data_set(config: DataConfig) -> Any:
    """The rows of a data set, by number; or, when streaming, one after the other.

    Raises:
        FetchError: it could not be had.
        UnsupportedError: the package that reads it is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            f'data.format datasets needs a package ({error}): pip install "mm-c2c[train]"'
        ) from error
    name = f"data set {config.path}, split {config.split!r}"
    try:
        rows = datasets.load_dataset(
            config.path, config.name, split=config.split, streaming=config.streaming
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise FetchError(
            f"{name}: {error.__cause__ or error}; mend the file, or read around it by "
            "data.streaming=true data.on_corrupt=skip"
        ) from error
    except (OSError, ValueError) as error:
        raise FetchError(f"{name}: {error}") from error
    # Pictures and recordings are opened with the rest of an example, which may be left out where
    # one is damaged; a stream would end there.
    if config.streaming:
        rows = rows.decode(enable=False) if rows.features else rows
        return StreamedRows(rows, name, config.on_corrupt == "skip")
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            rows = rows.cast_column(column, replace(feature, decode=False))
    return rows


@dataclass(frozen=True)
class StreamedRows:
    """Rows that are read as they come, file by file, as often as they are gone through.

    Attributes:
        rows: an `IterableDataset`.
        name: for errors.
        skip: leave out a file from where it cannot be read, and go on with the next.
    """

    rows: Any
    name: str
    skip: bool

    def __iter__(self) -> Iterator[Any]:
        count = self.rows.num_shards
        for index in range(count):
            part, done = self.rows.shard(num_shards=count, index=index), 0
            try:
                for row in part:
                    yield row
                    done += 1
            except (OSError, ValueError) as error:  # Arrow's are among them
                where = f"{self.name}: file {index + 1} of {count} cannot be read behind row {done}"
                meet_corrupt(f"{where}: {error}", skip=self.skip)

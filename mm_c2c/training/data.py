"""Examples by their position: whatever the number of processes, a step sees the same ones.

An example is a mapping (a line of JSONL, the `.json` of a sample in a tar shard, a row of a data
set) of

    image or images   a picture or several; in JSONL, paths beside the file
    video, fps        the frames of a video, as images are; frames a second (2)
    audio             a recording, WAV; in JSONL, a path beside the file
    text              what the source reads beside them, such as an instruction
    state             a robot's state, numbers
    action_tokens     what a policy that writes its actions as tokens did, ids; else it acts
    question, answer  strings or numbers; or `turns`, a list of such pairs
    caption           a true description, for the reconstruct phase

so that what `mm-c2c evaluate` asks can be trained on. Lines that follow each other and show the
same are one example with several questions.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import random
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mm_c2c.errors import InputError
from mm_c2c.images import load_image, to_rgb
from mm_c2c.recordings import read_wav
from mm_c2c.sources.base import SourceInput
from mm_c2c.training.config import FIELDS, DataConfig
from mm_c2c.training.containers import (
    Member,
    list_members,
    load_data_set,
    matching,
    meet_corrupt,
)

logger = logging.getLogger(__name__)

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Of a damaged file, Pillow also raises what its own parsing stumbles over.
_DAMAGED = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)
_SHOWN = ("image", "images", "video", "fps", "audio", "text", "state", "action_tokens")


class Turn(NamedTuple):
    """A question and its true answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a source is shown, and what is asked about it.

    Attributes:
        images: pictures.
        video: frames of a video behind them.
        fps: frames that it shows in a second.
        audio: a recording, as `SourceInput` takes it.
        text: what the source reads beside them.
        state: a robot's state.
        action_tokens: what a policy did, where the example says so.
        turns: questions and their answers.
        description: a true description, where there is one.
        where: it stands: a file and its line, a shard and its sample, a data set and its row.
    """

    images: tuple[Image.Image, ...]
    video: tuple[Image.Image, ...] = ()
    fps: float = SourceInput.fps
    audio: NDArray[np.float32] | None = None
    text: str
    state: tuple[float, ...]
    turns: tuple[Turn, ...]
    description: str | None
    action_tokens: tuple[int, ...] = ()
    where: str = ""

    def look(self, question: str = "") -> SourceInput:
        """What a source is given: what is shown, and the text with a question or without."""
        return SourceInput(
            text="\n".join(part for part in (self.text, question) if part),
            images=self.images,
            videos=(self.video,) if self.video else (),
            fps=self.fps,
            audio=self.audio,
            state=torch.tensor(self.state) if self.state else None,
            action_tokens=torch.tensor(self.action_tokens) if self.action_tokens else None,
        )


Reader = Callable[[], Example]


class Examples(Protocol):
    """Examples in a shuffled order that does not end."""

    def at(self, position: int) -> Example:
        """The example at a position, which goes on counting from epoch to epoch."""


def open_examples(config: DataConfig, seed: int) -> Examples:
    """Find the examples; pictures are read when they are asked for.

    Raises:
        InputError: there are none, or `on_corrupt` is `stop` and something cannot be read.
        FetchError: a data set could not be had.
        UnsupportedError: the package that reads it is missing.
    """
    skip = config.on_corrupt == "skip"
    if config.format == "datasets":
        rows = load_data_set(config)
        read = partial(_read_row, config.columns, config.path)
        if config.streaming:
            return _Stream(rows, read, config.path, config.window, seed, skip=skip)
        readers: list[Reader] = [
            partial(read, index, partial(rows.__getitem__, index)) for index in range(len(rows))
        ]
    elif config.format == "webdataset":
        readers = list(_index_shards(config.path, skip=skip))
    else:
        # A name that matches nothing is read, and so refused by name.
        files = matching(config.path) or [Path(config.path)]
        readers = [reader for file in files for reader in _index_lines(file, skip=skip)]
    if not readers:
        raise InputError(f"{config.path} holds no examples")
    return _Shuffled(readers, seed, skip=skip)


class _Shuffled:
    """Examples that can be reached in any order; a new order in each epoch."""

    def __init__(self, readers: list[Reader], seed: int, *, skip: bool) -> None:
        self.readers, self.seed, self.skip = readers, seed, skip
        self._epoch = -1
        self._order: list[int] = []

    def at(self, position: int) -> Example:
        """See `Examples`."""
        return _first_whole(self._reader, position, len(self.readers), skip=self.skip)

    def _reader(self, position: int) -> Reader:
        epoch, place = divmod(position, len(self.readers))
        if epoch != self._epoch:
            # Python's generator, whose numbers stay from release to release.
            rng = random.Random(f"{self.seed}/{epoch}")
            self._order = rng.sample(range(len(self.readers)), len(self.readers))
            self._epoch = epoch
        return self.readers[self._order[place]]


class _Stream:
    """Examples that come one after the other; those of a window are shuffled among each other.

    A position before the last one, or after a restart, is found by reading from the start again.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        read: Callable[[int, Callable[[], Any]], Example],
        name: str,
        window: int,
        seed: int,
        *,
        skip: bool,
    ) -> None:
        self.rows, self.read, self.name = rows, read, name
        self.window, self.seed, self.skip = window, seed, skip
        self._coming = self._endless()
        self._block = -1
        self._held: list[tuple[int, Any]] = []

    def at(self, position: int) -> Example:
        """See `Examples`."""
        return _first_whole(self._reader, position, self.window, skip=self.skip)

    def _reader(self, position: int) -> Reader:
        block, place = divmod(position, self.window)
        if block < self._block:
            self._coming, self._block = self._endless(), -1
        while self._block < block:
            self._held = list(itertools.islice(self._coming, self.window))
            self._block += 1
            random.Random(f"{self.seed}/{self._block}").shuffle(self._held)
        index, row = self._held[place]
        return lambda: self.read(index, lambda: row)

    def _endless(self) -> Iterator[tuple[int, Any]]:
        while True:
            empty = True
            for index, row in enumerate(self.rows):
                empty = False
                yield index, row
            if empty:
                raise InputError(f"{self.name} holds no examples")


def _first_whole(
    reader: Callable[[int], Reader], position: int, tries: int, *, skip: bool
) -> Example:
    """The example at a position, or the first after it that can be read."""
    for place in range(position, position + tries):
        try:
            return reader(place)()
        except InputError as error:
            if not skip:
                raise InputError(f"{error}; data.on_corrupt=skip goes on without it") from error
            logger.warning("left out: %s", error)
    raise InputError(f"none of {tries} examples in succession can be read")


def _index_lines(path: Path, *, skip: bool) -> Iterator[Reader]:
    """Examples of a JSONL file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read examples from {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            with _named(f"{path}, line {number}"):
                row = _read_json(line)
                _turns(row), _caption(row)
        except InputError as error:
            meet_corrupt(str(error), skip=skip)
            continue
        rows.append((number, row))

    def shown(numbered: tuple[int, Mapping[str, Any]]) -> str:
        return json.dumps([numbered[1].get(key) for key in _SHOWN])

    for seen, group in itertools.groupby(rows, shown):
        numbers, same = zip(*group, strict=True)
        # A line that shows nothing is an example of its own.
        parts = [same] if seen != shown((0, {})) else [(row,) for row in same]
        for number, part in zip(numbers, parts, strict=False):
            captions = [caption for caption in map(_caption, part) if caption]
            merged = {
                **part[0],
                "turns": [turn for row in part for turn in _turns(row)],
                "caption": captions[0] if captions else None,
            }
            yield partial(_read_line, merged, f"{path}, line {number}", path.parent)


def _index_shards(pattern: str, *, skip: bool) -> Iterator[Reader]:
    """Examples of tar shards: files that follow each other and share a name before the first dot.

    Shards are gone through once, without reading what is in them.
    """
    shards = matching(pattern)
    if not shards:
        raise InputError(f"no shard is named {pattern} (* and ? stand for any characters)")
    for shard in shards:
        members, damage = list_members(shard)
        samples = [
            (stem, list(group))
            for stem, group in itertools.groupby(members, lambda member: _stem(member.name))
        ]
        if damage:
            # Of the last sample before the damage some may be missing.
            samples = samples[:-1]
            words = f"shard {shard} cannot be read whole: {damage} (samples before: {len(samples)})"
            meet_corrupt(words, skip=skip)
        for stem, group in samples:
            yield partial(_read_sample, shard, stem, group)


def _stem(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _read_line(row: Mapping[str, Any], where: str, folder: Path) -> Example:
    with _named(where):
        return _example(row, partial(_beside, folder), partial(_recording_beside, folder), where)


def _read_sample(shard: Path, stem: str, members: Sequence[Member]) -> Example:
    where = f"{shard}, sample {stem}"
    with _named(where):
        parts = {}
        with shard.open("rb") as file:
            for name, offset, size in members:
                file.seek(offset)
                parts[name] = file.read(size)
                if len(parts[name]) < size:
                    raise InputError(f"{name} is cut off")
        texts = [data for name, data in parts.items() if name.endswith(".json")]
        if len(texts) != 1:
            raise InputError(f"expected one .json, got {', '.join(parts)}")
        pictures = [data for name, data in parts.items() if name.lower().endswith(_PICTURES)]
        recordings = [data for name, data in parts.items() if name.lower().endswith(".wav")]
        shown = {**_read_json(texts[0]), "images": pictures, "audio": next(iter(recordings), None)}
        return _example(shown, _open_picture, _open_recording, where)


def _read_row(
    columns: Mapping[str, str], name: str, index: int, row: Callable[[], Mapping[str, Any]]
) -> Example:
    """An example of a row of a data set; where a list of pictures is damaged, `row` raises."""
    where = f"{name}, row {index}"
    with _named(where):
        return _example(_rename(columns, row()), _open_picture, _open_recording, where)


def _rename(columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    lacking = sorted(set(columns.values()) - set(row))
    if lacking:
        raise InputError(f"a row lacks {', '.join(lacking)}; its columns: {', '.join(row)}")
    return {ours: row[columns.get(ours, ours)] for ours in FIELDS if columns.get(ours, ours) in row}


def _read_json(data: bytes) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(data))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"expected JSON, got {reprlib.repr(data)}: {error}") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"expected names and values, got {reprlib.repr(value)}")
    return value


def _list(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    """What is listed under a name; nothing where there is no such name."""
    value = row.get(key)
    if not isinstance(value, list | tuple | None):
        raise InputError(f"expected {key} to be a list, got {reprlib.repr(value)}")
    return value or ()


def _words(row: Mapping[str, Any], key: str) -> str:
    """What is said under a name."""
    value = row.get(key)
    # No NaN, which is how tables write that there is nothing.
    numeric = isinstance(value, int | float) and abs(value) < math.inf
    if isinstance(value, bool) or not (numeric or isinstance(value, str)):
        raise InputError(f"expected {key} to be a string or a number, got {reprlib.repr(value)}")
    return str(value)


def _turns(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The questions of a row and their answers: one or more."""
    pairs = _list(row, "turns") if "turns" in row else [row]
    if not pairs:
        raise InputError("expected turns to be questions and answers, got none")
    return tuple(pair if isinstance(pair, Turn) else _turn(_mapping(pair)) for pair in pairs)


def _turn(row: Mapping[str, Any]) -> Turn:
    if not row.keys() >= {"question", "answer"}:
        raise InputError(f"expected question and answer, got {', '.join(row) or 'nothing'}")
    turn = Turn(_words(row, "question"), _words(row, "answer"))
    if not turn.question.strip():
        raise InputError(f"expected a question of words, got {turn.question!r}")
    return turn


def _caption(row: Mapping[str, Any]) -> str | None:
    return None if row.get("caption") is None else _words(row, "caption") or None


def _example(
    row: Mapping[str, Any],
    open_picture: Callable[[Any], Image.Image],
    open_recording: Callable[[Any], NDArray[np.float32]],
    where: str,
) -> Example:
    """Read what a mapping says and open what it shows."""
    alone = [] if row.get("image") is None else [row["image"]]
    return Example(
        images=tuple(open_picture(picture) for picture in _list(row, "images") or alone),
        video=tuple(open_picture(frame) for frame in _list(row, "video")),
        fps=float(row.get("fps") or SourceInput.fps),
        audio=None if row.get("audio") is None else open_recording(row["audio"]),
        text="" if row.get("text") is None else _words(row, "text"),
        state=tuple(map(float, _list(row, "state"))),
        action_tokens=tuple(map(int, _list(row, "action_tokens"))),
        turns=_turns(row),
        description=_caption(row),
        where=where,
    )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors about what is read say where it stands."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, *_DAMAGED) as error:
        raise InputError(f"{where}: {error!r}") from error


def look_at(row: Mapping[str, Any], where: str) -> SourceInput:
    """What a source is shown of a line of JSONL, without the question.

    Args:
        row: the line, with paths of its pictures and its recording as they can be opened.
        where: it stands, for errors.

    Raises:
        InputError: it cannot be read.
    """
    with _named(where):
        unasked = {**row, "turns": [Turn("", "")]}
        return _example(unasked, load_image, partial(_recording_beside, Path()), where).look()


def _beside(folder: Path, name: str) -> Image.Image:
    return load_image(folder / name)


def _recording_beside(folder: Path, name: str) -> NDArray[np.float32]:
    try:
        return read_wav((folder / name).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read recording {folder / name}: {error.strerror}") from error


def _open_recording(data: Any) -> NDArray[np.float32]:
    """The bytes of a WAV file, alone or as `datasets` hands them on undecoded."""
    if isinstance(data, Mapping):
        held = data["bytes"]
        data = Path(data["path"]).read_bytes() if held is None else held
    return read_wav(data)


def _open_picture(data: Any) -> Image.Image:
    """A picture, the bytes of its file, or what `datasets` hands on undecoded; upright."""
    try:
        if isinstance(data, Mapping):
            import datasets

            data = datasets.Image().decode_example(data)
        elif not isinstance(data, Image.Image):
            data = Image.open(io.BytesIO(data))
        return to_rgb(data, "a picture")
    except _DAMAGED as error:
        raise InputError(f"expected a picture that can be read, got {error!r}") from error

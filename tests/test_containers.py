"""Tar shards and data sets: what they hold, and what of them is damaged."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from data_rigs import png, shades, write_lines, write_shard
from PIL import Image, UnidentifiedImageError

from mm_c2c.errors import ConfigError, FetchError, InputError, UnsupportedError
from mm_c2c.recordings import write_wav
from mm_c2c.training.config import DataConfig
from mm_c2c.training.data import open_examples


@pytest.fixture
def shards(tmp_path: Path) -> DataConfig:
    """Three samples in two shards."""
    said = json.dumps({"question": "what", "answer": "it"}).encode()
    for name, picked in (("a", (0, 1)), ("b", (2,))):
        samples = {f"{i:03d}": {"json": said, "png": png(i)} for i in picked}
        write_shard(tmp_path / f"{name}.tar", samples)
    return DataConfig(path=str(tmp_path / "*.tar"), format="webdataset")


@pytest.mark.parametrize("form", ["gif", "bmp", "tif", "webp"])
def test_pictures_of_a_shard_are_of_any_usual_form(tmp_path: Path, form: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 0, 0)).save(data, format={"tif": "tiff"}.get(form, form))
    said = json.dumps({"question": "what", "answer": "it"}).encode()
    write_shard(tmp_path / "a.tar", {"0": {"json": said, form: data.getvalue()}})
    config = DataConfig(path=str(tmp_path / "a.tar"), format="webdataset")
    (picture,) = open_examples(config, seed=0).at(0).images
    assert abs(picture.getpixel((1, 1))[0] - 200) < 9


def test_shards_are_read_in_any_order(shards: DataConfig) -> None:
    examples = open_examples(shards, seed=0)
    assert sorted(shades(examples, range(3))) == [0, 1, 2]
    assert examples.at(0).turns[0] == ("what", "it")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("s-{08..10}.tar", [8, 9, 10]),
        ("s-{09..09}.tar", [9]),
        ("{s-08,s-10}.tar", [8, 10]),
        ("s-{0,1}{0,9}.tar", [0, 9, 10, 19]),
        ("s-{0,1}*.tar", [0, 8, 9, 10, 19]),
    ],
)
def test_shards_are_named_in_braces(tmp_path: Path, pattern: str, named: list[int]) -> None:
    """As WebDataset has them; where one is missing it is not passed over."""
    said = json.dumps({"question": "what", "answer": "it"}).encode()
    for number in (0, 8, 9, 10, 19):
        write_shard(tmp_path / f"s-{number:02d}.tar", {"0": {"json": said, "png": png(number)}})
    config = DataConfig(path=str(tmp_path / pattern), format="webdataset")
    assert sorted(shades(open_examples(config, seed=0), range(len(named)))) == named
    (tmp_path / f"s-{named[-1]:02d}.tar").unlink()
    if "*" not in pattern:
        with pytest.raises(InputError, match=rf"s-{named[-1]:02d}\.tar cannot be read whole: .*No"):
            open_examples(config, seed=0)


def test_a_file_may_be_called_as_braces_are_written(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"question": "what", "answer": "it"}])
    (tmp_path / "data.jsonl").rename(tmp_path / "{a,b}.jsonl")
    config = DataConfig(path=str(tmp_path / "{a,b}.jsonl"))
    assert open_examples(config, seed=0).at(0).turns == (("what", "it"),)


def header(data: bytes, number: int) -> int:
    """Where the header of a shard's file is."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()[number].offset


@pytest.mark.parametrize(
    ("damage", "left", "words"),
    [
        (lambda data: b"x" + data[1:], 0, "bad checksum"),
        (lambda data: b"", 0, "empty file"),
        # Of three samples of two files each, the second's picture.
        (lambda data: put(data, header(data, 3), b"x"), 1, "a header is damaged"),
        (lambda data: put(data, header(data, 3), bytes(512)), 1, "a header is damaged"),
        (lambda data: data[: header(data, 3) + 100], 1, "a header is damaged"),
        (lambda data: data[: header(data, 4)], 1, "its end is missing"),
        (lambda data: data[: header(data, 3) + 515], 1, "unexpected end of data"),
    ],
)
def test_of_a_damaged_shard_what_stands_before_the_damage_is_left(
    tmp_path: Path, damage: Callable[[bytes], bytes], left: int, words: str
) -> None:
    said = json.dumps({"question": "what", "answer": "it"}).encode()
    samples = {str(i): {"json": said, "png": png(i)} for i in range(3)}
    write_shard(tmp_path / "a.tar", samples)
    write_shard(tmp_path / "b.tar", {"9": {"json": said, "png": png(9)}})
    config = DataConfig(path=str(tmp_path / "*.tar"), format="webdataset", on_corrupt="skip")
    assert set(shades(open_examples(config, seed=0), range(4))) == {0, 1, 2, 9}
    path = tmp_path / "a.tar"
    path.write_bytes(damage(path.read_bytes()))
    words = rf"a\.tar cannot be read whole: {words} \(samples before: {left}\); .*on_corrupt=skip"
    with pytest.raises(InputError, match=words):
        open_examples(replace(config, on_corrupt="stop"), seed=0)
    found = shades(open_examples(config, seed=0), range(2 * (left + 1)))
    assert set(found) == {9, *range(left)}


def put(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def test_a_compressed_shard_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"anything"))
    with pytest.raises(InputError, match="it is compressed; unpack it"):
        open_examples(DataConfig(path=str(tmp_path / "a.tar"), format="webdataset"), seed=0)


@pytest.mark.filterwarnings("ignore")  # arrow warns of itself
@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_damaged_file_of_a_data_set_stops_or_is_read_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `train` has datasets")
    for name, ids in (("a", (1, 2)), ("b", (3, 4)), ("c", (5, 6))):
        table = datasets.Dataset.from_dict({"question": list(ids), "answer": list(ids)})
        getattr(table, f"to_{form}")(str(tmp_path / name))
    path = tmp_path / "b"
    path.write_bytes(path.read_bytes()[:-20] + (b"" if form == "parquet" else b"{\n"))
    load = partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"))

    def load_files(*args: Any, **kwargs: Any) -> Any:
        return load(form, data_files=[str(tmp_path / name) for name in "abc"], **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_files)
    whole = DataConfig(path="set", format="datasets", on_corrupt="skip")
    for settings in (whole, replace(whole, on_corrupt="stop")):
        with pytest.raises(FetchError, match=r"data set set, .*data\.streaming=true data\.on_corr"):
            open_examples(settings, seed=0)
    stream = replace(whole, streaming=True, window=2)
    with pytest.raises(InputError, match=r"data set set, .* file 2 of 3 .*; data.on_corrupt=skip"):
        asked(open_examples(replace(stream, on_corrupt="stop"), seed=0), range(8))
    assert set(asked(open_examples(stream, seed=0), range(8))) == {"1", "2", "5", "6"}


def asked(examples: Any, places: Iterable[int]) -> list[str]:
    return [examples.at(place).turns[0].question for place in places]


def test_settings_of_data_sets_are_refused_for_files(tmp_path: Path) -> None:
    for setting in (
        {"name": "en"},
        {"split": "dev"},
        {"streaming": True},
        {"columns": {"text": "b"}},
    ):
        (key,) = setting
        for form in ("jsonl", "webdataset"):
            with pytest.raises(ConfigError, match=rf"expected data\.{key} with .* got {form}"):
                DataConfig(path="x", format=form, **setting)
        DataConfig(path="x", format="datasets", **setting)


class Rows(list[Any]):
    """What `datasets` has on disk; a row that is an error is one that cannot be decoded."""

    features: ClassVar[dict[str, Any]] = {}

    def __getitem__(self, index: Any) -> Any:
        if isinstance(row := super().__getitem__(index), Exception):
            raise row
        return row


class Stream:
    """What `datasets` streams: rows that can only be gone through."""

    features = None
    num_shards = 1

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def shard(self, num_shards: int, index: int) -> Stream:
        assert (num_shards, index) == (1, 0)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_data_sets_are_read_whole_or_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(
        {"pixels": Image.new("L", (3, 3), i), "question": "?", "label": f"{i}"} for i in range(7)
    )
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return Stream(rows) if kwargs["streaming"] else rows

    errors = SimpleNamespace(DatasetGenerationError=RuntimeError)
    stub = SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    columns = {"image": "pixels", "answer": "label"}
    config = DataConfig(path="org/set", format="datasets", columns=columns, window=3)
    assert sorted(shades(open_examples(config, seed=0), range(7))) == list(range(7))
    assert asked == [(("org/set", None), {"split": "train", "streaming": False})]

    streaming = replace(config, streaming=True)
    order = shades(open_examples(streaming, seed=0), range(15))
    for start, held in ((0, {0, 1, 2}), (3, {3, 4, 5}), (6, {6, 0, 1}), (9, {2, 3, 4})):
        assert set(order[start : start + 3]) == held
    assert order != sorted(order)
    assert shades(open_examples(streaming, seed=0), range(8, 12)) == order[8:12]
    with pytest.raises(InputError, match="a row lacks labels; its columns: pixels"):
        open_examples(replace(streaming, columns={"answer": "labels"}), seed=0).at(0)

    rows[4] = UnidentifiedImageError("no picture")
    with pytest.raises(InputError, match=r"org/set, row 4: Unidentified.*on_corrupt=skip"):
        shades(open_examples(config, seed=0), range(7))
    left = open_examples(replace(config, on_corrupt="skip"), seed=0)
    assert set(shades(left, range(7))) == {0, 1, 2, 3, 5, 6}

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'pip install "mm-c2c\[train\]"'):
        open_examples(config, seed=0)


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def kept_as(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str, list[Any], str], DataConfig]:
    """A data set of so many questions beside one column of a kind, and what opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of itself
        datasets = pytest.importorskip("datasets", reason="the extra `train` has datasets")

    def keep(name: str, values: list[Any], kind: str) -> DataConfig:
        count = len(values)
        table = datasets.Dataset.from_dict(
            {name: values, "question": ["what"] * count, "answer": ["it"] * count}
        )
        feature = getattr(datasets, kind)()
        if isinstance(values[0], list):
            feature = datasets.List(feature)
        table = table.cast_column(name, feature)
        rows = table.to_iterable_dataset() if request.param else table
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        return DataConfig(path="set", format="datasets", streaming=request.param, window=count)

    return keep


@pytest.mark.filterwarnings("ignore")  # arrow warns of itself
@pytest.mark.parametrize("name", ["image", "images"])
def test_a_damaged_picture_of_a_data_set_stops_or_is_left_out(
    kept_as: Callable[..., DataConfig], name: str
) -> None:
    files = [{"bytes": data, "path": None} for data in (png(0), png(1)[:40], b"x", png(3))]
    config = kept_as(name, files if name == "image" else [[file] for file in files], "Image")
    with pytest.raises(InputError, match=r"set, row [12]: .*; data.on_corrupt=skip goes on"):
        shades(open_examples(config, seed=0), range(4))
    skipping = open_examples(replace(config, on_corrupt="skip"), seed=0)
    assert set(shades(skipping, range(8))) == {0, 3}


@pytest.mark.filterwarnings("ignore")  # arrow warns of itself
def test_a_recording_of_a_data_set_needs_no_decoder(
    kept_as: Callable[..., DataConfig], tmp_path: Path
) -> None:
    data = write_wav(np.array([0.0, 0.5], np.float32))
    (tmp_path / "a.wav").write_bytes(data)
    files = [{"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a.wav")}]
    examples = open_examples(kept_as("audio", files, "Audio"), seed=0)
    for place in range(2):
        assert examples.at(place).audio.tolist() == pytest.approx([0.0, 0.5], abs=1e-4)

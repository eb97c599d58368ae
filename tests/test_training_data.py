"""Examples from files, shards and data sets, in an order that the position alone decides."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from mm_c2c.errors import ConfigError, FetchError, InputError, UnsupportedError
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.recordings import write_wav
from mm_c2c.training.config import DataConfig
from mm_c2c.training.data import Example, Examples, open_examples
from mm_c2c.training.kept import row_key


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Two questions about the first of five pictures, one about each other; pictures beside them."""
    for shade in range(5):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    asked = [(0, "first"), (0, "second"), (1, "a"), (2, "b"), (3, "c"), (4, "d")]
    return [
        {"image": f"{shade}.png", "question": question, "answer": f"{shade}"}
        for shade, question in asked
    ]


def write_lines(folder: Path, rows: list[Any]) -> DataConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return DataConfig(path=str(folder / "data.jsonl"))


def shades(examples: Examples, positions: range) -> list[int]:
    return [shade(examples.at(position)) for position in positions]


def shade(example: Example) -> int:
    return example.images[0].getpixel((0, 0))[0]


def test_lines_about_one_picture_are_one_example(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    rows[1]["caption"] = "red"
    config = write_lines(tmp_path, rows)
    assert len(load_items(Path(config.path))) == 6  # what is evaluated can be trained on
    examples = open_examples(config, seed=0)
    found = {shade(example): example for example in map(examples.at, range(5))}
    assert [turn.question for turn in found[0].turns] == ["first", "second"]
    assert found[0].description == "red"
    assert found[1].description is None
    assert found[1].look("why?").text == "why?"
    assert found[1].look().images[0].size == (4, 3)


def test_a_pattern_takes_several_files_each_with_its_pictures(tmp_path: Path) -> None:
    for name, shade in (("one", 3), ("two", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(shade))
        write_lines(tmp_path / name, [{"image": "0.png", "question": "what", "answer": "it"}])
    both = open_examples(DataConfig(path=str(tmp_path / "*" / "data.jsonl")), seed=0)
    assert sorted(shades(both, range(2))) == [3, 7]


def test_the_order_is_new_in_each_epoch_and_follows_from_the_seed(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    config = write_lines(tmp_path, rows)
    order = shades(open_examples(config, seed=0), range(20))
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert shades(open_examples(config, seed=0), range(13, 20)) == order[13:]
    assert shades(open_examples(config, seed=1), range(20)) != order


def test_lines_without_a_picture_are_examples_of_their_own(tmp_path: Path) -> None:
    texts = [{"question": f"{i}?", "answer": "yes", "state": [i, 1]} for i in range(2)]
    texts += [{"question": "2?", "answer": "no", "text": "pick it up"}]
    texts += [{"question": f"{i}?", "answer": "no"} for i in range(3, 5)]
    examples = open_examples(write_lines(tmp_path, texts), seed=0)
    found = sorted(map(examples.at, range(5)), key=lambda example: example.turns)
    assert [len(example.turns) for example in found] == [1] * 5
    assert found[1].look().state.tolist() == [1, 1]
    assert found[2].look("2?").text == "pick it up\n2?"


def test_lines_that_differ_in_the_action_are_apart(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    same = [{**rows[0], "question": f"{i}?", "action_tokens": [7, i // 2]} for i in range(4)]
    examples = open_examples(write_lines(tmp_path, same), seed=0)
    found = sorted(map(examples.at, range(2)), key=lambda example: example.action_tokens)
    assert [len(example.turns) for example in found] == [2, 2]
    assert found[1].look().action_tokens.tolist() == [7, 1]
    assert examples.at(0).look("why?").action_tokens.dtype == torch.int64


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for stem, parts in samples.items():
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> DataConfig:
    """Three samples in two shards."""
    said = json.dumps({"question": "what", "answer": "it"}).encode()
    for name, picked in (("a", (0, 1)), ("b", (2,))):
        samples = {f"{i:03d}": {"json": said, "png": png(i)} for i in picked}
        write_shard(tmp_path / f"{name}.tar", samples)
    return DataConfig(path=str(tmp_path / "*.tar"), format="webdataset")


def test_shards_are_read_in_any_order(shards: DataConfig) -> None:
    examples = open_examples(shards, seed=0)
    assert sorted(shades(examples, range(3))) == [0, 1, 2]
    assert examples.at(0).turns[0] == ("what", "it")


def test_a_picture_stands_upright_wherever_it_is_read_from(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """A phone's camera writes which way up a picture is, not the picture so."""
    picture = Image.new("RGB", (4, 3))
    turned = picture.getexif()
    turned[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "0.jpg", exif=turned)
    said = json.dumps(rows[0]).encode()
    write_shard(tmp_path / "a.tar", {"0": {"json": said, "jpg": (tmp_path / "0.jpg").read_bytes()}})
    beside = write_lines(tmp_path, [{**rows[0], "image": "0.jpg"}])
    for config in (beside, DataConfig(path=str(tmp_path / "a.tar"), format="webdataset")):
        assert open_examples(config, seed=0).at(0).images[0].size == (3, 4)


def test_a_picture_of_16_bits_is_scaled_in_a_shard_too(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    data = io.BytesIO()
    Image.fromarray(np.full((3, 4), 25700, dtype=np.uint16)).save(data, "PNG")
    said = json.dumps(rows[0]).encode()
    write_shard(tmp_path / "a.tar", {"0": {"json": said, "png": data.getvalue()}})
    examples = open_examples(DataConfig(path=str(tmp_path / "a.tar"), format="webdataset"), seed=0)
    assert examples.at(0).images[0].getpixel((0, 0)) == (100, 100, 100)


def test_what_cannot_be_read_stops_or_is_left_out(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    broken = write_lines(tmp_path, [*rows[:3], "{", {"question": "no answer"}, *rows[3:]])
    with pytest.raises(InputError, match=r"line 4: expected .*on_corrupt=skip goes on"):
        open_examples(broken, seed=0)
    left = open_examples(replace(broken, on_corrupt="skip"), seed=0)
    assert sorted(shades(left, range(5))) == [0, 1, 2, 3, 4]

    (tmp_path / "2.png").write_bytes(png(2)[:40])
    config = write_lines(tmp_path, rows)
    with pytest.raises(InputError, match=r"line 4: .*2\.png .*on_corrupt=skip goes on"):
        shades(open_examples(config, seed=0), range(5))
    skipping = replace(config, on_corrupt="skip")
    found = shades(open_examples(skipping, seed=0), range(10))
    assert set(found) == {0, 1, 3, 4}
    # Whoever else reads, a position holds the same.
    assert shades(open_examples(skipping, seed=0), range(4, 7)) == found[4:7]


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


def test_lines_may_be_blank(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    config = write_lines(tmp_path, rows)
    path = Path(config.path)
    path.write_text("\n" + path.read_text().replace("\n", "\n \n"))
    assert sorted(shades(open_examples(config, seed=0), range(5))) == [0, 1, 2, 3, 4]


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


GOOD = {"question": "what", "answer": "it"}
UNUSABLE = [
    ({"question": "q", "answer": None}, "expected answer to be a string or a number, got None"),
    ({"question": "q", "answer": float("nan")}, "expected answer to be .* number, got nan"),
    ({"question": ["q"], "answer": True}, r"expected question to be .* number, got \['q'\]"),
    ({"question": "q", "answer": True}, "expected answer to be .* number, got True"),
    ({"question": "q", "label": "a"}, "expected question and answer, got question, label.*"),
    ([1, 2], r"expected names and values, got \[1, 2\]"),
    ({"turns": []}, "expected turns to be questions and answers, got none"),
    ({"turns": "q"}, "expected turns to be a list, got 'q'"),
    ({"turns": ["q"]}, "expected names and values, got 'q'"),
    ({**GOOD, "caption": ["red"]}, r"expected caption to be a string .* got \['red'\]"),
]


@pytest.mark.parametrize(("row", "message"), UNUSABLE)
def test_a_row_of_another_form_stops_or_is_left_out(tmp_path: Path, row: Any, message: str) -> None:
    lines = write_lines(tmp_path, [GOOD, row])
    with pytest.raises(InputError, match=rf"data\.jsonl, line 2: {message}; data.on_corrupt=skip"):
        open_examples(lines, seed=0)
    parts = {"000": GOOD, "001": row}
    write_shard(tmp_path / "a.tar", {k: {"json": json.dumps(v).encode()} for k, v in parts.items()})
    shard = DataConfig(path=str(tmp_path / "a.tar"), format="webdataset")
    with pytest.raises(InputError, match=rf"a\.tar, sample /001: {message}; data.on_corrupt=skip"):
        list(map(open_examples(shard, seed=0).at, range(2)))
    for config in (lines, shard):
        examples = open_examples(replace(config, on_corrupt="skip"), seed=0)
        assert [examples.at(place).turns for place in range(4)] == [(("what", "it"),)] * 4


def test_a_picture_of_absurd_size_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    huge += struct.pack(">I", zlib.crc32(header)) + png(0)[33:]
    said = json.dumps(GOOD).encode()
    parts = {name: {"json": said, "png": data} for name, data in (("a", png(3)), ("b", huge))}
    write_shard(tmp_path / "a.tar", parts)
    config = DataConfig(path=str(tmp_path / "a.tar"), format="webdataset")
    with pytest.raises(InputError, match=r"sample /b: expected a picture .* got Decompression"):
        shades(open_examples(config, seed=0), range(2))
    assert set(shades(open_examples(replace(config, on_corrupt="skip"), seed=0), range(2))) == {3}


@pytest.mark.parametrize(("key", "value"), [("state", "12"), ("images", "0.png"), ("text", ["x"])])
def test_what_is_shown_in_another_form_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    config = write_lines(tmp_path, [{**GOOD, key: value}])
    with pytest.raises(InputError, match=rf"line 1: expected {key} to be a .*, got "):
        open_examples(config, seed=0).at(0)


def test_a_number_that_is_too_large_is_refused(tmp_path: Path) -> None:
    config = write_lines(tmp_path, [{**GOOD, "state": [10**400]}])
    with pytest.raises(InputError, match=r"line 1: OverflowError.*on_corrupt=skip"):
        open_examples(config, seed=0).at(0)


def test_a_number_is_an_answer(tmp_path: Path) -> None:
    config = write_lines(tmp_path, [{"question": "how many", "answer": 3}])
    assert open_examples(config, seed=0).at(0).turns == (("how many", "3"),)


def test_settings_of_data_sets_are_refused_for_files(tmp_path: Path) -> None:
    for setting in ({"name": "en"}, {"split": "dev"}, {"streaming": True}, {"columns": {"a": "b"}}):
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


def test_no_examples_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="holds no examples"):
        open_examples(DataConfig(path=str(tmp_path / "empty.jsonl")), seed=0)
    with pytest.raises(InputError, match="no shard is named"):
        open_examples(DataConfig(path=str(tmp_path / "x*.tar"), format="webdataset"), seed=0)
    with pytest.raises(InputError, match="cannot read examples"):
        open_examples(DataConfig(path=str(tmp_path / "none.jsonl")), seed=0)


def test_a_video_is_its_frames(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 6), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    line = {"video": [f"{i}.png" for i in range(3)], "fps": 5, "question": "q", "answer": "a"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n")
    looks = [
        open_examples(DataConfig(path=str(path)), seed=0).at(0).look(),
        load_items(path)[0].look(),
    ]
    for look in looks:
        assert look.images == ()
        assert look.fps == 5.0
        (video,) = look.videos
        assert [frame.getpixel((0, 0)) for frame in video] == [(80 * i, 0, 0) for i in range(3)]
    slower, shorter = replace(looks[0], fps=2.0), replace(looks[0], videos=(video[:2],))
    pictures = replace(looks[0], videos=(), images=video)
    assert len({row_key("eyes", look) for look in (looks[0], slower, shorter, pictures)}) == 4
    assert row_key("eyes", looks[0]) == row_key("eyes", looks[1])
    line["video"] = ["0.png", "gone.png"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"line 1: .*gone\.png"):
        open_examples(DataConfig(path=str(path)), seed=0).at(0)

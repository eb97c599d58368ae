"""Examples from files, shards and data sets, in an order that the position alone decides."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_rigs import png, shade, shades, write_lines, write_shard
from PIL import ExifTags, Image

from mm_c2c.errors import InputError
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.training.config import DataConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.kept import row_key


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Two questions about the first of five pictures, one about each other; pictures beside them."""
    for red in range(5):
        (tmp_path / f"{red}.png").write_bytes(png(red))
    asked = [(0, "first"), (0, "second"), (1, "a"), (2, "b"), (3, "c"), (4, "d")]
    return [
        {"image": f"{red}.png", "question": question, "answer": f"{red}"} for red, question in asked
    ]


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
    for name, red in (("one", 3), ("two", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(red))
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


def test_lines_may_be_blank(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    config = write_lines(tmp_path, rows)
    path = Path(config.path)
    path.write_text("\n" + path.read_text().replace("\n", "\n \n"))
    assert sorted(shades(open_examples(config, seed=0), range(5))) == [0, 1, 2, 3, 4]


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

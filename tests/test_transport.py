"""A cache that travels as a file is the same cache, and a file that is not whole is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_c2c import Bridge, SourceCache, SourceInput, load_cache, save_cache
from mm_c2c.cache import CacheOrigin, LayerKV, PatchGrid, PositionKind
from mm_c2c.errors import MismatchError
from mm_c2c.pretrained import WEIGHTS_NAME
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.rope import RopeSpec
from mm_c2c.transport import FORMAT, _checksum

# tmp_path is one folder for all examples: each writes the same file anew.
ONE_FOLDER = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROPES = (
    None,
    RopeSpec(inv_freq=(1.0, float(torch.tensor(0.1))), attention_scaling=1 / 3, interleaved=True),
    RopeSpec(inv_freq=(1.0, 0.5, 1e-7), mrope_section=(1, 1, 1), mrope_interleaved=True),
)
WORDS = st.text(max_size=8)


@st.composite
def source_caches(draw: st.DrawFn) -> SourceCache:
    """Layers of unlike heads, head_dim and dtype; their bits are random, NaN among them."""
    batch, seq_len, layers = (draw(st.integers(1, 3)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2**40, shape, generator=generator)

    def states(dtype: torch.dtype, heads: int, head_dim: int) -> Tensor:
        shape = (batch, seq_len, heads, head_dim * dtype.itemsize)
        bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return bits.view(dtype).transpose(1, 2)  # heads first: not contiguous

    def layer() -> LayerKV:
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        sizes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
        return LayerKV(states(dtype, *sizes), states(dtype, *sizes))

    grid = st.builds(PatchGrid, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2))
    grids = st.lists(grid, max_size=2).map(tuple)
    return SourceCache(
        layers=tuple(layer() for _ in range(layers)),
        layer_indices=tuple(range(1, 2 * layers, 2)),
        position_ids=whole(*draw(st.sampled_from([(), (3,)])), batch, seq_len),
        kinds=whole(batch, seq_len) % len(PositionKind),
        patches=whole(batch, seq_len, 3),
        grids=tuple(draw(grids) for _ in range(batch)),
        spans=whole(batch, seq_len, 2),
        texts=tuple(draw(WORDS) for _ in range(batch)),
        rope=tuple(draw(st.sampled_from(ROPES)) for _ in range(layers)),
        origin=CacheOrigin(draw(WORDS), draw(st.none() | WORDS), draw(WORDS)),
    )


def plain_cache(**changes: Any) -> SourceCache:
    """Two rows of three positions, two layers."""
    states = [torch.arange(2 * 2 * 3 * 4.0).view(2, 2, 3, 4) + i for i in range(4)]
    fields: dict[str, Any] = {
        "layers": (LayerKV(*states[:2]), LayerKV(*states[2:])),
        "layer_indices": (0, 3),
        "position_ids": torch.tensor([[0, 1, 2], [0, 0, 1]]),
        "kinds": torch.tensor([[1, 3, 2], [0, 3, 2]]),
        "patches": torch.zeros(2, 3, 3, dtype=torch.long),
        "grids": ((PatchGrid(1, 1),), (PatchGrid(1, 1),)),
        "spans": torch.zeros(2, 3, 2, dtype=torch.long),
        "texts": ("is it red ?", "wo ist die 🐱 ?"),
        "rope": (ROPES[1], None),
        "origin": CacheOrigin("tiny/model", "abc", "llava"),
    }
    return SourceCache(**{**fields, **changes})


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, expected)]
    torch.testing.assert_close(*bits, rtol=0, atol=0)


def assert_same_cache(found: SourceCache, expected: SourceCache) -> None:
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert_same_bits(ours.keys, theirs.keys)
        assert_same_bits(ours.values, theirs.values)
    for field in dataclasses.fields(SourceCache):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, Tensor):
            assert_same_bits(ours, theirs)
        elif field.name != "layers":
            assert ours == theirs
            assert repr(ours) == repr(theirs)  # a list or a bare tuple would not do


def rewrite(path: Path, *, without: str = "", **changes: Any) -> None:
    """Change tensors or header entries as someone would who knows the format."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118
        header = json.loads(file.metadata()["cache"])
    tensors |= {name: value for name, value in changes.items() if isinstance(value, Tensor)}
    header |= {name: value for name, value in changes.items() if not isinstance(value, Tensor)}
    text = json.dumps(header)
    crc32 = _checksum(text, tensors)
    save_file(tensors, path, {"format": FORMAT, "cache": text, "crc32": crc32})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_cache(plain_cache(), tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


@ONE_FOLDER
@given(cache=source_caches())
def test_a_cache_comes_back_bit_for_bit(cache: SourceCache, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    assert_same_cache(load_cache(path), cache)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mm_c2c.transport.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_cache(plain_cache(texts=("other", "words")), saved)
    assert_same_cache(load_cache(saved), plain_cache())
    assert list(saved.parent.iterdir()) == [saved]


def test_two_may_write_one_file_at_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [plain_cache(texts=("other", "words"))]

    def write(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        if others:
            save_cache(others.pop(), saved)
            assert load_cache(saved).texts == ("other", "words")

    monkeypatch.setattr("mm_c2c.transport.save_file", write)
    save_cache(plain_cache(), saved)
    assert_same_cache(load_cache(saved), plain_cache())
    assert list(saved.parent.iterdir()) == [saved]


def test_layers_may_share_their_memory(tmp_path: Path) -> None:
    layer = plain_cache().layers[0]
    cache = plain_cache(layers=(layer, LayerKV(layer.keys, layer.keys)))
    save_cache(cache, tmp_path / "cache.safetensors")
    assert_same_cache(load_cache(tmp_path / "cache.safetensors"), cache)


def test_the_device_is_chosen(saved: Path) -> None:
    cache = load_cache(saved, device="meta")
    for tensor in (*cache.layers[1], cache.position_ids, cache.kinds, cache.patches, cache.spans):
        assert tensor.device.type == "meta"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"absent\.safetensors is missing or unreadable"):
        load_cache(tmp_path / "absent.safetensors")


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="missing or unreadable"):
        load_cache(tmp_path)


@ONE_FOLDER
@given(data=st.data())
def test_a_file_that_is_cut_off_is_refused(data: st.DataObject, saved: Path) -> None:
    save_cache(plain_cache(), saved)
    whole = saved.read_bytes()
    saved.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(MismatchError, match=f"{saved.name} is .*(cut off|unreadable)"):
        load_cache(saved)


@pytest.mark.parametrize("place", [0, 7, 8, 12], ids=["length", "length's end", "brace", "name"])
def test_a_damaged_header_is_refused(saved: Path, place: int) -> None:
    content = bytearray(saved.read_bytes())
    content[place] ^= 0x80
    saved.write_bytes(content)
    with pytest.raises(MismatchError, match=f"{saved.name} is damaged or cut off"):
        load_cache(saved)


@settings(ONE_FOLDER, max_examples=300)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(data: st.DataObject, saved: Path) -> None:
    save_cache(plain_cache(), saved)
    content = bytearray(saved.read_bytes())
    # The header is the longer part, and the one in which a byte can do more than change a number.
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    saved.write_bytes(content)
    try:
        cache = load_cache(saved)
    except MismatchError as error:
        assert str(saved) in str(error)  # noqa: PT017
    else:
        assert_same_cache(cache, plain_cache())  # white space between two words of the header


@pytest.mark.parametrize("letter", "CFU")
@pytest.mark.parametrize("name", ["kinds", "position_ids", "patches", "spans"])
def test_another_kind_of_number_of_the_same_bytes_is_refused(
    saved: Path, name: str, letter: str
) -> None:
    save_cache(plain_cache(), saved)
    content = saved.read_bytes()
    place = content.index(b'"I64"', content.index(f'"{name}":'.encode())) + 1
    saved.write_bytes(content[:place] + letter.encode() + content[place + 1 :])
    with pytest.raises(MismatchError, match=str(saved)):
        load_cache(saved)


def test_every_byte_of_the_tensors_counts(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(MismatchError, match="is damaged: expected checksum"):
        load_cache(saved)


def test_the_weights_of_a_bridge_are_no_cache(bridge: Bridge, tmp_path: Path) -> None:
    bridge.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"is not a cache of format .*save_cache"):
        load_cache(tmp_path / WEIGHTS_NAME)


def test_a_cache_of_another_format_is_refused(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), "format": "mm_c2c.cache.99"}
    save_file(tensors, saved, metadata)
    with pytest.raises(MismatchError, match=r"its format is 'mm_c2c\.cache\.99'"):
        load_cache(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "keys.1"}, r"missing \['keys\.1'\], unknown \[\]"),
        ({"extra": torch.zeros(1)}, r"missing \[\], unknown \['extra'\]"),
        ({"layer_indices": [0]}, r"missing \[\], unknown \['keys\.1', 'values\.1'\]"),
        ({"keys.1": torch.zeros(2, 2, 3, 8)}, r"layer 3: expected .* got \(2, 2, 3, 8\)"),
        ({"kinds": torch.zeros(2, 4)}, "layer 0: expected .*seq_len=4"),
        ({"kinds": torch.zeros(6)}, "do not fit together"),
        ({"kinds": torch.full((2, 3), 9)}, r"kinds has 9, expected those of PositionKind"),
        ({"position_ids": torch.zeros(1, 3)}, r"position_ids is \(1, 3\), expected \(2, 3\) or"),
        ({"patches": torch.zeros(2, 3, 2)}, r"patches is \(2, 3, 2\), expected \(2, 3, 3\)"),
        ({"spans": torch.zeros(2, 3, 3)}, r"spans is \(2, 3, 3\), expected \(2, 3, 2\)"),
        ({"texts": ["one"]}, "2 rows, but 2 grids and 1 texts"),
        ({"grids": []}, "2 rows, but 0 grids and 2 texts"),
        ({"grids": [[[1]], [[1, 1]]]}, "do not fit together"),
        ({"texts": [1, 2]}, r"texts should be str, got \(1, 2\)"),
        ({"layer_indices": [0, 0]}, r"numbers, each once, got \(0, 0\)"),
        ({"layer_indices": ["a", "b"]}, r"numbers, each once, got \('a', 'b'\)"),
        ({"position_ids": torch.zeros(2, 3)}, "position_ids is of torch.float32, expected int64"),
        ({"rope": [None]}, "2 layers but 1 rope entries"),
        ({"rope": [{"inv_freq": []}, None]}, "inv_freq must be finite and not empty"),
        ({"origin": {"model": "tiny"}}, "do not fit together"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(saved, **changes)
    with pytest.raises(MismatchError, match=f"{saved.name}.*{message}"):
        load_cache(saved)


@torch.no_grad()
def test_a_cache_from_a_file_is_fused_as_the_one_in_memory(
    bridge: Bridge, pictures: list[Image.Image], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in bridge.fusers.parameters():  # an untrained fuser would write nothing
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    inputs = [SourceInput(images=(picture,)) for picture in pictures]
    here = bridge.sources[SOURCE_NAME].prefill(inputs)
    save_cache(here, tmp_path / "cache.safetensors")
    there = load_cache(tmp_path / "cache.safetensors")

    questions = ["is it red ?", "what is in the image ?"]
    answers = []
    for cache in (here, there, here.select(torch.tensor([1, 0]))):
        fused = bridge.fuse(bridge.fuse_slots({SOURCE_NAME: cache}), questions)
        out = bridge.target.model.generate(
            **fused,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers.append(torch.stack(out.logits))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    # The pictures matter: with the rows exchanged, the answers are others.
    assert not torch.equal(answers[0], answers[2])

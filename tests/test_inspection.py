"""What `mm-c2c inspect` says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_c2c import Bridge, SourceInput, save_cache
from mm_c2c.cli import main
from mm_c2c.errors import InputError, MismatchError
from mm_c2c.inspection import describe
from mm_c2c.reference.models import SOURCE_NAME


def test_a_saved_bridge_is_described(
    bridge: Bridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bridge.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in bridge.fusers.parameters())
    assert f"{count:,} parameters" in printed
    assert "3 layers, 2 KV heads of 8" in printed
    assert "slots   2 x 2\n" in printed
    links = tuple(replace(link, images=2) for link in bridge.config.links)
    Bridge(bridge.target, bridge.sources, replace(bridge.config, links=links)).save_pretrained(
        tmp_path
    )
    assert "slots   2 x 2, for each of 2 pictures\n" in describe(str(tmp_path))
    links = tuple(replace(link, kinds=("state", "action"), rows=1) for link in bridge.config.links)
    Bridge(bridge.target, bridge.sources, replace(bridge.config, links=links)).save_pretrained(
        tmp_path
    )
    assert "slots   1 x 2, of state and action\n" in describe(str(tmp_path))


def test_a_cache_file_is_described(
    bridge: Bridge, pictures: list[Image.Image], tmp_path: Path
) -> None:
    cache = bridge.sources[SOURCE_NAME].prefill([SourceInput(images=(p,)) for p in pictures])
    save_cache(cache, tmp_path / "seen.safetensors")
    said = describe(str(tmp_path / "seen.safetensors"))
    shape = cache.shape
    grid = cache.grids[0][0]
    assert "cache of tiny-llava (llava)" in said
    assert f"{shape.num_layers}, {shape.num_key_value_heads} KV heads of {shape.head_dim}" in said
    assert f"positions  2 x {cache.seq_len}: " in said
    assert f"{2 * grid.rows * grid.cols} image" in said
    assert f"2 of {grid.rows} x {grid.cols} patches" in said
    assert f"{cache.num_bytes:,} bytes of K and V, float32" in said


def test_models_are_counted_without_being_made(
    tiny_target: Any, tiny_llava: Any, tmp_path: Path
) -> None:
    for name, model in (("text", tiny_target), ("vlm", tiny_llava.model)):
        model.save_pretrained(tmp_path / name)
        said = describe(str(tmp_path / name))
        assert f"({model.config.model_type}): {model.num_parameters():,} parameters" in said
    said = describe(str(tmp_path / "text"))
    assert "3 layers, 2 KV heads of 8" in said
    assert "192 bytes of bf16 cache each" in said


def test_a_damaged_cache_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(MismatchError, match="damaged or cut off"):
        describe(str(tmp_path / "cut.safetensors"))
    with pytest.raises(MismatchError, match="is missing"):
        describe(str(tmp_path / "absent.safetensors"))
    with pytest.raises(InputError, match="neither a saved bridge"):
        describe("no/such/model")

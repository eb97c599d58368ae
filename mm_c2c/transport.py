"""`SourceCache` to a file and back: one safetensors file that says which model wrote it.

A cache can be inverted to what made it (arXiv:2508.09442): treat the file like the picture.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_c2c.cache import CacheOrigin, LayerKV, PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import MismatchError, MMC2CError
from mm_c2c.rope import RopeSpec

FORMAT = "mm_c2c.cache.1"
_PLACES = ("position_ids", "kinds", "patches", "spans")


def save_cache(cache: SourceCache, path: str | Path) -> None:
    """Write a cache; the file appears whole or not at all.

    Args:
        cache: on any device, of any dtype, which is kept.
        path: the file to write; one that is there is replaced.
    """
    path = Path(path)
    tensors = {name: _copy(getattr(cache, name)) for name in _PLACES}
    for index, (keys, values) in enumerate(cache.layers):
        tensors[f"keys.{index}"] = _copy(keys)
        tensors[f"values.{index}"] = _copy(values)
    header = {
        "layer_indices": cache.layer_indices,
        "grids": cache.grids,
        "texts": cache.texts,
        "rope": [None if spec is None else asdict(spec) for spec in cache.rope],
        "origin": cache.origin._asdict(),
    }
    text = json.dumps(header)
    metadata = {"format": FORMAT, "cache": text, "crc32": _checksum(text, tensors)}
    # Another process may be writing the same file.
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(tensors, scratch, metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_cache(path: str | Path, device: torch.device | str = "cpu") -> SourceCache:
    """Read a cache that `save_cache` wrote, bit for bit.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        MismatchError: the file is missing, cut off or damaged, or holds something else.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = _read_header(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise MismatchError(f"{path} is missing or unreadable: {error}") from error
    except SafetensorError as error:
        raise MismatchError(f"{path} is damaged or cut off: {error}; save it again") from error
    expected, found = metadata.get("crc32"), _checksum(metadata["cache"], tensors)
    if expected != found:
        raise MismatchError(
            f"{path} is damaged: expected checksum {expected}, got {found}; save it again"
        )
    kinds = set(tensors["kinds"].flatten().tolist()) if "kinds" in tensors else set()
    if not kinds <= set(PositionKind):
        # As text: of a damaged header they may be complex numbers, which have no order.
        held = ", ".join(sorted(map(str, kinds)))
        raise MismatchError(f"{path}: kinds has {held}, expected those of PositionKind")
    return _build(path, header, {name: tensor.to(device) for name, tensor in tensors.items()})


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU and contiguous; a copy, since safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the header and of the tensors' bytes, in the order of their names.

    Without it a changed digit of the header (a grid, a frequency) would go unseen.
    """
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What a cache file says of itself, from the metadata of its safetensors header."""
    found = metadata.get("format")
    if found != FORMAT:
        raise MismatchError(
            f"{path} is not a cache of format {FORMAT!r}, its format is {found!r}; expected a file "
            "that `save_cache` of this version wrote"
        )
    try:
        header = json.loads(metadata["cache"])
    except (KeyError, json.JSONDecodeError) as error:
        raise MismatchError(f"{path}: its header is damaged: {error}; save it again") from error
    return dict(header)


def _build(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> SourceCache:
    """A cache of the parts; whatever does not fit together is refused."""
    try:
        count = len(header["layer_indices"])
        expected = {f"{kind}.{i}" for kind in ("keys", "values") for i in range(count)}
        expected |= set(_PLACES)
        if expected != tensors.keys():
            raise MismatchError(
                f"{path}: missing {sorted(expected - tensors.keys())[:5]}, unknown "
                f"{sorted(tensors.keys() - expected)[:5]}"
            )
        cache = SourceCache(
            layers=tuple(
                LayerKV(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(count)
            ),
            layer_indices=tuple(header["layer_indices"]),
            grids=tuple(tuple(PatchGrid(*grid) for grid in row) for row in header["grids"]),
            texts=tuple(header["texts"]),
            rope=tuple(None if spec is None else RopeSpec(**spec) for spec in header["rope"]),
            origin=CacheOrigin(**header["origin"]),
            **{name: tensors[name] for name in _PLACES},
        )
    except MismatchError:
        raise
    except (MMC2CError, KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{path}: its parts do not fit together: {error}") from error
    return cache

"""Files of a saved bridge, and whether they belong to the models at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_c2c.cache import CacheOrigin, CacheShape
from mm_c2c.errors import MismatchError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
OWN_WEIGHTS = "weights"
"""What the config says of the weights beside it: their `fingerprint`."""
SAMPLE = 1024
"""About so many of its numbers tell a frozen model's tensor from others; smaller ones are read
whole."""


def read_header(folder: Path) -> dict[str, Any]:
    """The config of a saved bridge: links, prompt, and the models it was trained for."""
    path = folder / CONFIG_NAME
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MismatchError(f"{folder} is not a saved bridge: {path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MismatchError(f"{path} is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != 1:
        raise MismatchError(f"{path} is not a saved bridge of format 1")
    lacking = [key for key in ("bridge", "target", "sources") if key not in header]
    if lacking:
        raise MismatchError(f"{path} lacks {', '.join(lacking)}")
    parts = {key: header[key] for key in ("bridge", "target", "sources")}
    if isinstance(header["sources"], dict):
        parts |= {f"sources.{name}": origin for name, origin in header["sources"].items()}
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise MismatchError(f"{path} is damaged: {key} should have entries, got {value!r}")
    return header


def read_weights(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Weights from a safetensors file, strictly those that the module has."""
    expected, found = module.state_dict(), read_tensors(path)
    if found.keys() != expected.keys():
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(found.keys() - expected.keys())
        raise MismatchError(f"{path}: missing weights {missing[:5]}, unknown ones {extra[:5]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise MismatchError(
                f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    return {name: tensor.float() for name, tensor in found.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise MismatchError(f"{path} is missing or unreadable: {error}") from error
    except SafetensorError as error:
        raise MismatchError(f"{path} is damaged or cut off: {error}; fetch it again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], header: str | None = None) -> None:
    """Write a safetensors file; a process that is stopped leaves what was there whole.

    Args:
        path: of the file.
        tensors: by name.
        header: text of a saved bridge's config, which lies beside the file and is written with it.
    """
    texts = {} if header is None else {path.with_name(CONFIG_NAME): header}
    scratch = {final: final.with_name(final.name + ".part") for final in (path, *texts)}
    try:
        save_file(tensors, scratch[path], {"format": "pt"})
        for final, text in texts.items():
            scratch[final].write_text(text, encoding="utf-8")
        for final, whole in scratch.items():
            whole.replace(final)
    finally:
        for left in scratch.values():
            left.unlink(missing_ok=True)


def write_bridge(folder: Path, header: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Write both files of a saved bridge; the header says which weights it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header, OWN_WEIGHTS: fingerprint(weights)}, indent=2) + "\n"
    write_tensors(folder / WEIGHTS_NAME, weights, text)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Which fuser weights these are, whatever dtype they were saved in, as far as it kept them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_weights(model: nn.Module) -> str:
    """Tells a frozen model's weights from others, by a sample of each."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(repr((name, tuple(weight.shape))).encode())
        step = weight.numel() // SAMPLE | 1  # odd: an even one would read few of the columns
        sample = weight.flatten()[::step].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_weights(folder: Path, header: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights beside the config of others; a config of earlier versions does not say."""
    own = header.get(OWN_WEIGHTS)
    if own is not None and own != fingerprint(weights):
        raise MismatchError(
            f"{folder}: {CONFIG_NAME} is of other weights than {WEIGHTS_NAME}; a save was stopped "
            "between them, or one of them was changed: save or fetch the bridge again"
        )


def check_shape(what: str, expected: CacheShape, found: CacheShape) -> None:
    """Refuse a fuser made for a cache of another shape; `what` says whose."""
    if expected != found:
        raise MismatchError(f"{what}: the fuser was made for {expected}, got {found}")


def check_origin(what: str, expected: Mapping[str, Any], found: CacheOrigin) -> None:
    """Refuse a fuser trained with another model, or revision; `what` says whose."""
    if set(expected) != set(CacheOrigin._fields):
        raise MismatchError(
            f"{what}: expected {', '.join(CacheOrigin._fields)}, got {', '.join(expected)}"
        )
    wanted = CacheOrigin(**expected)
    if wanted.revision is None:  # nothing is known of it
        found = found._replace(revision=None)
    folder, given = (origin.model.rstrip("/") for origin in (wanted, found))
    if wanted._replace(model=folder) != found._replace(model=given):
        raise MismatchError(
            f"{what}: the fuser was trained with {wanted.model!r} at revision {wanted.revision!r} "
            f"({wanted.model_type}), got {found.model!r} at {found.revision!r} "
            f"({found.model_type}); load that model at that revision, or train a fuser for this one"
        )

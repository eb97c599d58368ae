"""Run configs: frozen dataclasses, filled from YAML and from `key.sub=value` on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mm_c2c.errors import ConfigError

T = TypeVar("T")


def load_config(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into a dataclass.

    Args:
        kind: the dataclass; the file holds only what differs from its defaults.
        path: the YAML file.
        overrides: `key=value` or `key.sub=value`, values in YAML.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value the dataclass refuses.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    for override in overrides:
        _set(data, override)
    return from_dict(kind, data)


def from_dict(kind: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass, and those inside it, from plain values; unknown keys are errors."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or kind.__name__}: expected a mapping, got {data!r}")
    types = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown key {name!r}{hint} (known: {', '.join(known)})")
        values[key] = _convert(types[key], value, name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, ready for JSON; the inverse of `from_dict`."""
    return {
        key: (str(value) if isinstance(value, Path) else value)
        for key, value in dataclasses.asdict(config).items()
    }


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_dict(kind, value, f"{name}.")
    if kind is Path:
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(value)
    if kind in (int, float, str, bool) and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


def _set(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"expected key=value, got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{key}: {parent!r} is not a mapping")
    data[last] = yaml.safe_load(text)

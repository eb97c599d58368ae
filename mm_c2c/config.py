"""Run configs: frozen dataclasses, filled from YAML and from `key.sub=value` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from mm_c2c.errors import ConfigError

T = TypeVar("T")
# A model's dtypes by their names in configs.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Those in which nothing that float32 holds overflows.
WIDE_DTYPES = ("float32", "bfloat16")
# A training's mixed precision, to accelerate's name for it: YAML would read its `no` as false.
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
# YAML 1.1 reads 1e-3 as a word: it wants 1.0e-3.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


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
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping, got {data!r}")
    for text in overrides:
        _set(data, text)
    return from_dict(kind, data)


def override(config: T, overrides: Sequence[str]) -> T:
    """A config with some values changed by `key=value` or `key.sub=value`, values in YAML."""
    data = to_dict(config)
    for text in overrides:
        _set(data, text)
    return from_dict(type(config), data)


def parse_overrides(kind: type[T], overrides: Sequence[str]) -> T:
    """A config from `key=value` or `key.sub=value` alone, values in YAML."""
    data: dict[str, Any] = {}
    for text in overrides:
        _set(data, text)
    return from_dict(kind, data)


def from_command_line(kind: type[T], argv: Sequence[str] | None = None, *, file: bool = False) -> T:
    """A config from the words of a command line; bad ones end the program as argparse has it.

    Args:
        kind: the dataclass.
        argv: the words; None takes the program's own.
        file: whether a YAML file's path comes before the `key=value`.
    """
    parser = argparse.ArgumentParser()
    if file:
        parser.add_argument("config", type=Path, help="YAML, such as those of configs/")
    keys = ", ".join(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"keys: {keys}")
    args = parser.parse_args(argv)
    try:
        if file:
            return load_config(kind, args.config, args.overrides)
        return parse_overrides(kind, args.overrides)
    except ConfigError as error:
        parser.error(str(error))


def from_dict(kind: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass, and those inside it, from plain values; unknown keys are errors."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or kind.__name__}: expected a mapping, got {data!r}")
    kinds = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown key {name!r}{hint} (known: {', '.join(known)})")
        values[key] = _convert(kinds[key], value, name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}") from error


def check_one_of(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a value of the setting `name` that is not among those known."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_at_least_one(config: Any, *names: str, where: str = "") -> None:
    """Refuse a config whose settings of these names are below 1; None is let through."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}{name} must be at least 1, got {value}")


def with_defaults(config: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were kept, with the defaults of those that could not be set yet.

    Args:
        config: a dataclass of today's settings.
        before: plain values of earlier ones, as `to_dict` gives them.
    """
    merged = dict(before)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and isinstance(before.get(field.name, {}), Mapping):
            merged[field.name] = with_defaults(value, before.get(field.name, {}))
        elif field.name not in before and value == field.default:
            merged[field.name] = _plain(value)
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, ready for JSON; `from_dict` reads them back."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _convert(kind: Any, value: Any, name: str) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(kind)):
            return None
        if len(options) == 1:
            return _convert(options[0], value, name)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_dict(kind, value, f"{name}.")
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        _, inner = typing.get_args(kind)
        return {key: _convert(inner, item, f"{name}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return _convert_items(typing.get_args(kind), value, name)
    expected = typing.get_origin(kind) or kind
    if expected in (int, float, str, bool, tuple, dict, Path) and (
        not isinstance(value, expected) or (expected is int and isinstance(value, bool))
    ):
        raise ConfigError(f"{name}: expected {expected.__name__}, got {value!r}")
    return value


def _convert_items(kinds: Sequence[Any], values: Sequence[Any], name: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = [kinds[0]] * len(values)
    if len(kinds) != len(values):
        raise ConfigError(f"{name}: expected {len(kinds)} values, got {values!r}")
    return tuple(
        _convert(kind, value, f"{name}[{index}]")
        for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
    )


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `key.sub` in nested mappings; those that are missing are made."""
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{key}: {parent!r} is not a mapping")
    data[last] = value


def _set(data: dict[str, Any], assignment: str) -> None:
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise ConfigError(f"expected key=value, got {assignment!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{assignment!r}: the value is not valid YAML: {error}") from error
    set_key(data, key, value)

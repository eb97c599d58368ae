"""A pair that a visitor brings: checked by what its files say, then loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.config import from_dict
from mm_c2c.errors import InputError, MismatchError
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.arms.prompts import GENERIC_REQUEST
from mm_c2c.hub import fetch_folder
from mm_c2c.pretrained import read_header
from mm_c2c.reference.tower import register
from mm_c2c.sources import source_class
from mm_c2c.target import Target


class Checked(NamedTuple):
    """A pair whose files fit together.

    Attributes:
        folder: of the bridge.
        source_name: what the bridge calls its source.
        source: the source's origin, as the bridge's header gives it.
        target: the target's.
        reader: the class that reads such sources.
    """

    folder: Path
    source_name: str
    source: dict[str, Any]
    target: dict[str, Any]
    reader: type


class Step(NamedTuple):
    """How far a loading is.

    Attributes:
        text: what is being done, or has been.
        setting: the pair, at the end.
    """

    text: str
    setting: Setting | None = None


def check_pair(source: str, target: str, bridge: str) -> Checked:
    """See whether a pair fits, before a weight is read.

    Args:
        source: Hub id or folder of a vision-language model.
        target: of a causal LM.
        bridge: of what `Bridge.save_pretrained` wrote.

    Raises:
        InputError: a name is missing, or there is no such model.
        FetchError: the bridge could not be had from the Hub.
        MismatchError: there is no such bridge, it is damaged, or was trained for other models.
        UnsupportedError: the source's family is unknown.
    """
    given = {"source": source.strip(), "target": target.strip(), "bridge": bridge.strip()}
    missing = [what for what, name in given.items() if not name]
    if missing:
        raise InputError(f"Give a Hub id or a folder for: {', '.join(missing)}.")
    folder = fetch_folder(given["bridge"])
    header = read_header(folder)
    links = from_dict(BridgeConfig, header["bridge"]).links
    if [link.geometry for link in links] != ["slots"] or links[0].kinds or links[0].images > 1:
        raise MismatchError(
            f"{folder}: the page asks about one picture through one link with slots; this bridge "
            f"has {', '.join(f'{link.name} of {link.images} pictures' for link in links)}"
        )
    name = links[0].source
    if name not in header["sources"]:
        raise MismatchError(f"{folder}: its config names no model for the source {name!r}")
    origins = {"source": header["sources"][name], "target": header["target"]}
    for what, origin in origins.items():
        if origin["model"] != given[what]:
            raise MismatchError(
                f"{folder} was trained for the {what} {origin['model']!r}, got {given[what]!r}"
            )
    register()
    types = {what: _model_type(origin) for what, origin in origins.items()}
    for what, origin in origins.items():
        if types[what] != origin["model_type"]:
            raise MismatchError(
                f"{folder} was trained for a {what} of type {origin['model_type']!r}; "
                f"{given[what]!r} is {types[what]!r}"
            )
    reader = source_class(types["source"], has_vision=True)
    return Checked(folder, name, origins["source"], origins["target"], reader)


def load_pair(source: str, target: str, bridge: str) -> Iterator[Step]:
    """Check a pair, then load it.

    Args:
        source: as in `check_pair`.
        target: as in `check_pair`.
        bridge: as in `check_pair`.

    Yields:
        Steps; the last one has the pair.

    Raises:
        MMC2CError: as `check_pair` and `Bridge.from_pretrained` do.
        InputError: a model's files cannot be read.
    """
    yield Step("1 of 4: reading what the files say …")
    checked = check_pair(source, target, bridge)
    yield Step(f"2 of 4: loading the source {checked.source['model']} …")
    reader = _load_source(checked)
    yield Step(f"3 of 4: loading the target {checked.target['model']} …")
    llm = _load_target(checked)
    yield Step("4 of 4: loading the fuser …")
    loaded = Bridge.from_pretrained(checked.folder, llm, {checked.source_name: reader})
    setting = Setting(bridge=loaded, source_name=checked.source_name, request=GENERIC_REQUEST)
    yield Step(
        f"Loaded: {checked.target['model']} sees through {checked.source['model']}.", setting
    )


def _model_type(origin: dict[str, Any]) -> str:
    try:
        return AutoConfig.from_pretrained(origin["model"], revision=origin["revision"]).model_type
    except (OSError, ValueError) as error:
        raise InputError(
            f"{origin['model']!r} is no model that can be had: {_said(error)}"
        ) from error


def _load_source(checked: Checked) -> Any:
    name, revision = checked.source["model"], checked.source["revision"]
    try:
        # Nothing is unpickled, no code of a model's own is run.
        model = AutoModelForImageTextToText.from_pretrained(
            name, revision=revision, dtype=torch.float32, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the source {name!r} cannot be loaded: {_said(error)}") from error
    return checked.reader(
        model.requires_grad_(requires_grad=False).eval(), processor, name, revision
    )


def _load_target(checked: Checked) -> Target:
    name, revision = checked.target["model"], checked.target["revision"]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the target {name!r} cannot be loaded: {_said(error)}") from error
    return Target(model.requires_grad_(requires_grad=False).eval(), tokenizer, name, revision)


def _said(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

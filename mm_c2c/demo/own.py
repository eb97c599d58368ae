"""A pair that a visitor brings: checked by what its files say, then loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.config import from_dict
from mm_c2c.errors import InputError, MismatchError
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.arms.prompts import GENERIC_REQUEST
from mm_c2c.hub import fetch_folder, load_pretrained
from mm_c2c.pretrained import read_header
from mm_c2c.reference.tower import register
from mm_c2c.sources import load_source, source_class
from mm_c2c.target import Target


class Checked(NamedTuple):
    """A pair whose files fit together.

    Attributes:
        folder: of the bridge.
        source_name: what the bridge calls its source.
        source: the source's origin, as the bridge's header gives it.
        target: the target's.
    """

    folder: Path
    source_name: str
    source: dict[str, Any]
    target: dict[str, Any]


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
        FetchError: there is no such model.
        InputError: a name is missing.
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
    types = {
        what: load_pretrained("AutoConfig", origin["model"], origin["revision"]).model_type
        for what, origin in origins.items()
    }
    for what, origin in origins.items():
        if types[what] != origin["model_type"]:
            raise MismatchError(
                f"{folder} was trained for a {what} of type {origin['model_type']!r}; "
                f"{given[what]!r} is {types[what]!r}"
            )
    source_class(types["source"], has_vision=True)
    return Checked(folder, name, origins["source"], origins["target"])


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
    """
    yield Step("1 of 4: reading what the files say …")
    checked = check_pair(source, target, bridge)
    yield Step(f"2 of 4: loading the source {checked.source['model']} …")
    reader = load_source(checked.source["model"], checked.source["revision"])
    yield Step(f"3 of 4: loading the target {checked.target['model']} …")
    llm = Target.from_pretrained(checked.target["model"], checked.target["revision"])
    yield Step("4 of 4: loading the fuser …")
    loaded = Bridge.from_pretrained(checked.folder, llm, {checked.source_name: reader})
    setting = Setting(bridge=loaded, source_name=checked.source_name, request=GENERIC_REQUEST)
    yield Step(
        f"Loaded: {checked.target['model']} sees through {checked.source['model']}.", setting
    )

"""The model card of a saved bridge.

`mm-c2c card FOLDER` writes the card beside the weights; `Bridge.push_to_hub` sends both. What the
card says of a fuser's worth is the evaluation's own JSON, and only of the very weights it is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mm_c2c.errors import InputError, MismatchError
from mm_c2c.evaluation.render import pipe_table
from mm_c2c.evaluation.report import brief
from mm_c2c.hub import CARD_NAME, is_repo_id
from mm_c2c.pretrained import WEIGHTS_NAME, fingerprint, read_header, read_tensors
from mm_c2c.run_folder import read_summary

_TASK = "visual-question-answering"
_PAPER = "https://arxiv.org/abs/2510.03215"
_INVERSION = "https://arxiv.org/abs/2508.09442"
# Wrapped around a model that a package of its own loads.
_LOADED_ELSEWHERE = ("smolvla",)


def write_card(
    folder: Path,
    evaluation: Path | None = None,
    *,
    licence: str | None = None,
    name: str | None = None,
) -> ModelCard:
    """Write a saved bridge's model card, `README.md`.

    Args:
        folder: of the saved bridge.
        evaluation: folder of a finished run of `mm-c2c evaluate` with the arm `fused`; None says
            that nothing was measured.
        licence: of the fuser's weights, by the Hub's name, such as `apache-2.0`; None leaves it
            open.
        name: of the repository, `user/name`, for the card's title and its way to load; None takes
            the folder's name.

    Returns:
        The card.

    Raises:
        InputError: the run is not finished, or has no arm `fused`.
        MismatchError: the folder holds no bridge, or the run was of other weights.
    """
    header = read_header(folder)
    weights = read_tensors(_weights_file(folder))
    summary = None if evaluation is None else _own_summary(evaluation, fingerprint(weights))
    name = name or folder.resolve().name
    data = ModelCardData(
        base_model=_hub_names(header) or None,
        base_model_relation="adapter",
        library_name="mm_c2c",
        license=licence,
        model_name=name.rpartition("/")[2],
        tags=["cache-to-cache", "kv-cache"],
        eval_results=None if summary is None else _results(summary),
    )
    size = _weights_file(folder).stat().st_size
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"A Cache Fuser ([Cache-to-Cache]({_PAPER})) of the library `mm_c2c`: it hands the KV cache "
        f"of {' and '.join(_code(o['model']) for o in header['sources'].values())} to the frozen text LLM "
        f"{_code(header['target']['model'])}.",
        "## Models",
        _models(header),
        "None of them is part of this repository, and none was changed: only the fuser was trained.",
        "## Fuser",
        _fusers(header),
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters, "
        f"{size / 1e6:.1f} MB ({WEIGHTS_NAME}).",
        "## Results",
        "Nothing was measured." if summary is None else brief(summary).strip(),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(summary)),
        "## How to load",
        _loading(header, name),
        "## Licence",
        f"The fuser's weights: {licence}." if licence else "Not stated.",
        "The models named above keep their own licences.",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    card.save(folder / CARD_NAME)
    return card


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise MismatchError(f"{folder} is not a saved bridge: {WEIGHTS_NAME} is missing")
    return path


def _own_summary(run: Path, fuser: str) -> dict[str, Any]:
    """A run's summary, which must be of these weights."""
    summary = read_summary(run)
    if "fused" not in summary.get("arms", {}) or "fuser" not in summary.get("config", {}):
        raise InputError(
            f"{run} is no run of mm-c2c evaluate with an arm 'fused'; a card is about that one"
        )
    if summary["config"]["fuser"] != fuser:
        raise MismatchError(
            f"{run} is of other weights (fingerprint {summary['config']['fuser']}, here {fuser}); "
            "evaluate the saved bridge: a dtype of fewer bits is other weights too"
        )
    return summary


def _results(summary: Mapping[str, Any]) -> list[EvalResult]:
    """What the Hub shows beside the card."""
    items, count = summary["config"]["items"], summary["n"]
    among = " among options" if "choice" in summary else ""
    measured = {"exact match": ("exact_match", summary["arms"]["fused"]["accuracy"])}
    if vqa := summary["arms"]["fused"].get("vqa_accuracy"):
        measured["VQA accuracy"] = ("vqa_accuracy", vqa)
    for floor, kept in summary.get("retention", {}).items():
        if None not in kept:
            measured[f"retention {floor.replace('_', ' ')}"] = (f"retention_{floor}", kept)
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=items,
            dataset_name=items,
            metric_type=kind,
            metric_name=f"{label}{among}, n = {count:,}, 95 % interval {low:.3f} to {high:.3f}",
            metric_value=round(value, 4),
        )
        for label, (kind, (value, low, high)) in measured.items()
    ]


def _models(header: Mapping[str, Any]) -> str:
    rows = [["", "model", "revision", "type"]]
    for role, origin in _origins(header).items():
        revision = origin["revision"] or "not pinned"
        rows.append([role, _code(origin["model"]), revision, origin["model_type"]])
    return pipe_table(rows)


def _fusers(header: Mapping[str, Any]) -> str:
    rows = [["source", "geometry", "slots a picture", "preset", "layers", "width", "rank"]]
    for link in header["bridge"]["links"]:
        fuser = link["fuser"]
        slots = f"{link['rows']} x {link['cols']}" if link["geometry"] == "slots" else ""
        # `c2c` has no low rank.
        rank = str(fuser["rank"]) if fuser["preset"] == "small" else ""
        shape = [fuser["preset"], fuser["layers"], str(fuser["hidden_size"]), rank]
        rows.append([link["source"], link["geometry"], slots, *shape])
    return pipe_table(rows)


def _limits(summary: Mapping[str, Any] | None) -> list[str]:
    lines = [
        "It serves exactly the models above; `Bridge.from_pretrained` refuses others.",
        f"A cache can be inverted to what made it ([arXiv 2508.09442]({_INVERSION})): treat it "
        "like the picture.",
    ]
    if summary is None:
        return lines
    lines.append(
        f"Measured on {summary['n']:,} questions of {_code(summary['config']['items'])}; of other "
        "pictures and questions nothing is known. The interval is of the items: other seeds of the "
        "training are not in it."
    )
    for arm, what in (("zeroed", "an empty cache"), ("shuffled", "another picture's cache")):
        if arm in summary["arms"]:
            share = 100 * summary["arms"][arm]["accuracy"][0]
            lines.append(f"{share:.1f} % are right with {what}: so much needs no picture.")
    return lines


def _loading(header: Mapping[str, Any], name: str) -> str:
    """Code that loads the bridge; what only its owner can load is left to fill in."""
    lines = []
    for source, origin in header["sources"].items():
        known = is_repo_id(origin["model"]) and origin["model_type"] not in _LOADED_ELSEWHERE
        made = f"load_source({_named(origin)})" if known else f"...  # {origin['model']}"
        lines.append(f"{source} = {made}")
    pairs = ", ".join(f'"{source}": {source}' for source in header["sources"])
    code = [
        "from mm_c2c import Bridge, Target, load_source",
        "",
        f"target = Target.from_pretrained({_named(header['target'])})",
        *lines,
        f'bridge = Bridge.from_pretrained("{name}", target, {{{pairs}}})',
    ]
    return "```python\n" + "\n".join(code) + "\n```"


def _named(origin: Mapping[str, Any]) -> str:
    """A model's name and revision as arguments."""
    pinned = f", revision={json.dumps(origin['revision'])}" if origin["revision"] else ""
    return json.dumps(origin["model"]) + pinned


def _origins(header: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    sources = {f"source `{name}`": origin for name, origin in header["sources"].items()}
    return {**sources, "target": header["target"]}


def _hub_names(header: Mapping[str, Any]) -> list[str]:
    """The frozen models that the Hub may know."""
    names = [origin["model"] for origin in _origins(header).values()]
    return sorted({name for name in names if is_repo_id(name)})


def _code(name: str) -> str:
    return f"`{name}`"

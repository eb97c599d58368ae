"""A bridge as a model of the published harnesses: lm-evaluation-harness and lmms-eval.

This file is what both share and imports neither; `lm_eval_model.py` and `lmms_eval_model.py` are
the models.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache
from mm_c2c.errors import ConfigError
from mm_c2c.perception import Perception
from mm_c2c.sources.base import SourceInput

MODEL_NAME = "mm_c2c"
"""What the harnesses know the model by: `--model mm_c2c`."""
MAX_NEW_TOKENS = 128
# Tasks of both harnesses name the length of an answer in either way.
_LENGTHS = ("max_gen_toks", "max_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")


def lmms_eval_manifest() -> Any:
    """What the entry point `lmms_eval.models` hands to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__name__}.lmms_eval_model.BridgeLMM"
    return ModelManifest(model_id=MODEL_NAME, simple_class_path=path)


def find_bridge(bridge: Bridge | str) -> Bridge:
    """A bridge, or what the function `module:name` returns."""
    if isinstance(bridge, Bridge):
        return bridge
    module, _, name = bridge.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"bridge={bridge}: expected module:function, such as "
            f"mm_c2c.reference.models:load_bridge ({error})"
        ) from error
    if not isinstance(found, Bridge):
        raise ConfigError(f"bridge={bridge} returned a {type(found).__name__}, not a Bridge")
    return found


def check_batch_size(batch_size: int | str) -> int:
    """How many requests are answered at once; a harness hands it on as text."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ConfigError(f"batch_size must be a number from 1, got {batch_size!r}")
    return int(batch_size)


@torch.no_grad()
def read(
    bridge: Bridge, inputs: Sequence[SourceInput]
) -> tuple[Perception | None, dict[str, SourceCache]]:
    """Let the sources read a batch: pictures for the slots, everything for the aligned links.

    Returns:
        What `Bridge.fuse` takes before and after the questions.
    """
    named: dict[str, list[str]] = {"slots": [], "aligned": []}
    for link in bridge.config.links:
        named[link.geometry].append(link.source)
    seen = None
    if named["slots"] and inputs[0].images:
        looks = [replace(item, text="") for item in inputs]
        shown = dict.fromkeys(named["slots"])
        seen = bridge.fuse_slots({n: bridge.sources[n].prefill(looks) for n in shown})
    heard = dict.fromkeys(named["aligned"])  # once a source, however many links it has
    return seen, {name: bridge.sources[name].prefill(inputs) for name in heard}


def generate(
    bridge: Bridge,
    inputs: Sequence[SourceInput],
    settings: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[str]:
    """Answer requests, each with a task's own settings; neighbours of like settings together.

    Args:
        bridge: with the frozen models.
        inputs: one a request.
        settings: one a request: `until` cuts the answer off, `max_gen_toks` or `max_new_tokens`
            is its length in tokens, the rest goes to `target.generate`.
        batch_size: requests at once.
    """
    answers: list[str] = []
    for alike, group in groupby(zip(inputs, settings, strict=True), lambda pair: pair[1]):
        rows = [item for item, _ in group]
        kwargs, stops = _generation(alike)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            seen, caches = read(bridge, batch)
            texts = bridge.generate(seen, [item.text for item in batch], caches, **kwargs)
            answers += [_cut(text.strip(), stops) for text in texts]
    return answers


def _generation(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What `target.generate` takes of a task's settings, and where an answer is cut off."""
    kwargs = {"do_sample": False, **settings}
    until = kwargs.pop("until", None) or []
    lengths = [kwargs.pop(name) for name in _LENGTHS if name in kwargs]
    if not kwargs["do_sample"]:  # a greedy task says temperature 0, which transformers refuses
        kwargs = {key: value for key, value in kwargs.items() if key not in _SAMPLING}
    kwargs["max_new_tokens"] = int(lengths[0]) if lengths else MAX_NEW_TOKENS
    return kwargs, [until] if isinstance(until, str) else list(until)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop; an answer that begins with a stop has been stripped of it."""
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text

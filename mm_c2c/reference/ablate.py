"""What matters in a fuser: short trainings that differ in one setting, each with several seeds.

    python -m mm_c2c.reference.ablate configs/ablations.yaml [key=value ...]
    python -m mm_c2c.reference.ablate_report RUNS --readme FILE --section NAME

A variant's trainer is `train_fuser`, `train_baseline` or `mm-c2c train`, whichever its settings are
for; its judge is `mm-c2c evaluate` over one file of items.
What was trained and evaluated already is not done again, so that several processes may share the
seeds of one config. `ablations.json` holds what has come out so far, and `judgements.json` which
questions were answered right: laid into an empty folder, it stands for the trainings.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import safe_open

from mm_c2c.config import set_key, to_dict, with_defaults
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.evaluation.run import EvaluationConfig, evaluate, ordered
from mm_c2c.evaluation.statistics import accuracy, draw_resamples
from mm_c2c.evaluation.tasks import is_right, load_items
from mm_c2c.reference.models import HERE
from mm_c2c.reference.trainer import run
from mm_c2c.reference.variants import Variant, build_variant
from mm_c2c.run_folder import read_object, read_rows, write_json

_RESAMPLES = 10_000
_JUDGEMENTS = "judgements.json"
_SETTINGS = "settings.json"
_END = "end"
_CONTROL = "zeroed"
# Settings that do not change what is learned.
_WHEREABOUTS = ("out", "save_every", "log_every")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Variants of one short training.

    Attributes:
        base: the training that all share, a trainer's YAML file; its `out` is not used.
        shared: settings that take the place of the file's in every variant, `key` or `key.sub`.
        variants: by name, settings that take the place of the shared ones; the first is what the
            others are compared with. One with a `base` of its own shares nothing.
        items: JSONL of the questions that judge.
        out: where trainings, evaluations and the result go.
        seeds: of the trainings.
        judged_at: answer steps after which fusers are judged too, for their learning curves.
        only: names of the variants to train; all when empty.
    """

    base: Path
    shared: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    items: Path
    out: Path
    seeds: tuple[int, ...] = (0, 1)
    judged_at: tuple[int, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.variants:
            raise ConfigError("variants: expected at least one name with its settings, got none")
        unknown = sorted(set(self.only) - set(self.variants))
        if unknown:
            raise ConfigError(
                f"only: no variant is named {', '.join(unknown)}; known: {', '.join(self.variants)}"
            )
        for where, settings in {"shared": self.shared, **self.variants}.items():
            if taken := [key for key in settings if key.partition(".")[0] in ("seed", "out")]:
                raise ConfigError(
                    f"{where}: {', '.join(taken)} of each training follows from seeds and out of the "
                    "whole; leave it out"
                )
        variants = {name: self.variant(name, 0) for name in self.variants}
        for name in self.only or self.variants:
            if self.judged_at and not variants[name].pauses:
                raise ConfigError(
                    f"judged_at: the trainer of {name!r} does not pause; leave judged_at empty, or "
                    "name others in only"
                )

    def variant(self, name: str, seed: int) -> Variant:
        """The training of one variant with one seed."""
        own = dict(self.variants[name])
        base = Path(own.pop("base", self.base))
        shared = self.shared if base == self.base else {}
        try:
            settings = yaml.safe_load(base.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"base: cannot read {base} ({error})") from error
        place = {"seed": seed, "out": self.folder(name, seed)}
        for key, value in {**shared, **own, **place}.items():
            set_key(settings, key, copy.deepcopy(value))
        return build_variant(settings)

    def folder(self, name: str, seed: int) -> Path:
        """Where a variant's training lies; its evaluation is in `evaluation` there."""
        return self.out / f"{name.replace(' ', '_')}-{seed}"


def ablate(config: AblationConfig) -> None:
    """Train and evaluate what is not there yet, seed after seed."""
    load_items(config.items)  # what cannot judge is said before anything is trained
    for seed in config.seeds:
        for name in config.only or config.variants:
            variant = config.variant(name, seed)
            known = read_judgements(config.out).get(variant.out.name, {"right": {}})
            settings = _settings(variant)
            before = _read_settings(variant.out) or known.get("settings", settings)
            before = _without_places(with_defaults(variant.training, before))
            if before != settings:
                raise ConfigError(
                    f"{variant.out}: trained with other settings than {name!r} has now "
                    f"({_differences(before, settings)}); give another out"
                )
            right = known["right"]
            for steps in sorted({*config.judged_at, variant.steps}):
                at = _END if steps == variant.steps else str(steps)
                if steps <= variant.steps and at not in right:
                    variant.out.mkdir(parents=True, exist_ok=True)
                    write_json(variant.out / _SETTINGS, settings)
                    variant.train(steps)
                    judge(variant, config.items, steps)
            with FileLock(config.out / ".lock"):  # other seeds' processes write here too
                write_json(config.out / _JUDGEMENTS, read_judgements(config.out))
                write_json(config.out / "ablations.json", tabulate(config))


def judge(variant: Variant, items: Path, steps: int) -> None:
    """Ask a variant all questions after so many answer steps; its controls at the end."""
    last = steps == variant.steps
    arms = variant.arms if last else variant.arms[:1]
    settings = EvaluationConfig(items=items, arms=arms, timed=0, **variant.files)
    out = variant.out / ("evaluation" if last else f"evaluation-{steps}")
    with torch.inference_mode():
        evaluate(variant.load(), settings, out)


def tabulate(config: AblationConfig) -> dict[str, Any]:
    """What has come out so far, of every seed that was judged.

    Returns:
        `questions` and `pictures`, how many; for each of the `variants` its `settings`,
        `parameters`, `seeds`, `each`: a seed's share of right answers, and of them all, as [value,
        low, high] of a bootstrap over pictures, `accuracy`, `zeroed` (over an empty cache, where
        there is one) and, but for the first variant, `over_first`: how far it is above that, of
        the seeds that both have. `curves`, by variant judged at its end: `steps`, `scenes` seen in
        them and `accuracy`, of all seeds judged there.

    Raises:
        ConfigError: not all were asked as many questions, or other ones than `items` holds.
    """
    known = read_judgements(config.out)
    if not known:
        return {"questions": 0, "pictures": 0, "variants": {}, "curves": {}}
    counts = {
        len(digits)
        for run in known.values()
        for right in run["right"].values()
        for digits in right.values()
    }
    if len(counts) > 1:
        raise ConfigError(
            f"{config.out}: judged by {' and '.join(map(str, sorted(counts)))} questions, which "
            "cannot be compared; judge all variants by the same items, in a folder of their own"
        )
    questions = counts.pop()
    shown = [item.sampled_with for item in ordered(load_items(config.items))]  # as judged
    if len(shown) != questions:
        raise ConfigError(
            f"{config.items}: holds {len(shown)} questions, and {questions} were asked in "
            f"{config.out}; name the items that judged, or give another out"
        )
    draws = draw_resamples(questions, _RESAMPLES, seed=0, clusters=shown)
    found = {name: _by_seed(config, name, known) for name in config.variants}
    first = {seed: _hits(run, _END) for seed, run in found[next(iter(found))].items()}
    curves = {name: _curve(config, name, known, draws) for name, runs in found.items() if runs}
    if all(len(curve) < 2 for curve in curves.values()):
        curves = {}  # judged at their ends alone
    result: dict[str, Any] = {
        "questions": questions,
        "pictures": len(set(shown)),
        "variants": {},
        "curves": curves,
    }
    for number, (name, runs) in enumerate(found.items()):
        if not runs:
            continue
        hits = {seed: _hits(run, _END) for seed, run in runs.items()}
        row: dict[str, Any] = {
            "settings": config.variants[name],
            "parameters": next(iter(runs.values()))["parameters"],
            "seeds": list(runs),
            "each": [float(hits[seed].mean()) for seed in runs],
            "accuracy": accuracy(np.mean(list(hits.values()), axis=0), draws),
        }
        if all(_CONTROL in run["right"][_END] for run in runs.values()):
            zeroed = [_digits(run["right"][_END][_CONTROL]) for run in runs.values()]
            row[_CONTROL] = accuracy(np.mean(zeroed, axis=0), draws)
        if number:
            gaps = [hits[seed] - first[seed] for seed in hits if seed in first]
            row["over_first"] = accuracy(np.mean(gaps, axis=0), draws) if gaps else None
        result["variants"][name] = row
    return result


def read_judgements(out: Path) -> dict[str, dict[str, Any]]:
    """What `judgements.json` keeps, and what lies in the folders of trainings beside it.

    Returns:
        By the name of a training's folder: its `settings`, `parameters` and, by answer steps or
        `end`, in `right` for each arm a digit a question, 1 where it was answered right.
    """
    path = out / _JUDGEMENTS
    known: dict[str, dict[str, Any]] = {}
    if path.is_file():
        known = read_object(path)
    for summary in sorted(out.glob("*/evaluation*/summary.json")):
        training = summary.parent.parent
        run = known.setdefault(training.name, {"right": {}})
        if settings := _read_settings(training):
            run["settings"] = settings
        run["parameters"] = sum(map(_count_parameters, training.glob("*/*.safetensors")))
        rows = read_rows(summary.parent / "answers.jsonl")
        if not rows:
            raise InputError(f"{summary.parent} holds no answers; delete it to judge anew")
        run["right"][summary.parent.name.partition("-")[2] or _END] = {
            arm: "".join(str(int(is_right(row["answers"][arm], row["gold"]))) for row in rows)
            for arm in rows[0]["answers"]
        }
    return known


def _settings(variant: Variant) -> dict[str, Any]:
    """All that says what is learned, as a file keeps it."""
    kept = _without_places(to_dict(variant.training))
    # What ships is called as the configs call it, wherever the package lies.
    return json.loads(json.dumps(kept).replace(f"{HERE}/", "mm_c2c/reference/"))


def _without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _WHEREABOUTS}


def _read_settings(training: Path) -> dict[str, Any]:
    path = training / _SETTINGS
    return read_object(path) if path.is_file() else {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _by_seed(
    config: AblationConfig, name: str, known: Mapping[str, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """A variant's trainings that were judged at their end."""
    prefix = config.folder(name, 0).name.removesuffix("0")
    seeds = [folder.removeprefix(prefix) for folder in known if folder.startswith(prefix)]
    runs = {int(seed): known[prefix + seed] for seed in seeds if seed.isdigit()}
    return {seed: run for seed, run in sorted(runs.items()) if _END in run["right"]}


def _curve(
    config: AblationConfig,
    name: str,
    known: Mapping[str, dict[str, Any]],
    draws: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """A variant's accuracy after each number of steps at which it was judged."""
    runs = list(_by_seed(config, name, known).values())
    variant = config.variant(name, 0)
    paused = {int(steps) for run in runs for steps in run["right"] if steps != _END}
    curve = []
    for steps in sorted({*paused, variant.steps}):
        at = _END if steps == variant.steps else str(steps)
        hits = [_hits(run, at) for run in runs if at in run["right"]]
        share = accuracy(np.mean(hits, axis=0), draws)
        curve.append({"steps": steps, "scenes": steps * variant.scenes, "accuracy": share})
    return curve


def _hits(run: Mapping[str, Any], at: str) -> NDArray[np.float64]:
    """Which questions the arm that was trained answered right."""
    (digits,) = (digits for arm, digits in run["right"][at].items() if arm != _CONTROL)
    return _digits(digits)


def _digits(digits: str) -> NDArray[np.float64]:
    return np.array([float(digit) for digit in digits])


def _count_parameters(path: Path) -> int:
    with safe_open(path, "pt") as weights:
        names = weights.keys()
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


if __name__ == "__main__":
    run(AblationConfig, ablate)

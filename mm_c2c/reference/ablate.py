"""What matters in a fuser: short trainings that differ in one setting, each with several seeds.

    python -m mm_c2c.reference.ablate configs/ablations.yaml [key=value ...]
    python -m mm_c2c.reference.ablate_report RUNS --readme FILE --section NAME

A variant's training is that of `train_fuser`, its judge `mm-c2c evaluate` over one file of items.
What was trained and evaluated already is not done again, so that several processes may share the
seeds of one config. `ablations.json` holds what has come out so far.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import safe_open

from mm_c2c.bridge import Bridge
from mm_c2c.config import DTYPES, from_dict
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.results import write_json
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.evaluation.statistics import accuracy, draw_resamples
from mm_c2c.evaluation.tasks import is_right
from mm_c2c.reference import train_fuser
from mm_c2c.reference.models import SOURCE_NAME, load_source, load_target
from mm_c2c.reference.train_fuser import FuserTrainingConfig
from mm_c2c.reference.trainer import run

_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Variants of one short training.

    Attributes:
        base: the training that all share, a file of `train_fuser`; its `out` is not used.
        shared: settings that take the place of the file's in every variant.
        variants: by name, settings that take the place of the shared ones; the first is what the
            others are compared with.
        items: JSONL of the questions that judge.
        out: where trainings, evaluations and the result go.
        seeds: of the trainings.
        judged_at: answer steps after which trainings are judged too, for their learning curves.
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
        for name in self.variants:
            self.training(name, 0)

    def training(self, name: str, seed: int) -> FuserTrainingConfig:
        """The training of one variant with one seed."""
        base = yaml.safe_load(self.base.read_text(encoding="utf-8"))
        settings: Mapping[str, Any] = {**base, **self.shared, **self.variants[name]}
        return from_dict(
            FuserTrainingConfig, {**settings, "seed": seed, "out": self.folder(name, seed)}
        )

    def folder(self, name: str, seed: int) -> Path:
        """Where a variant's training lies; its evaluation is in `evaluation` there."""
        return self.out / f"{name.replace(' ', '_')}-{seed}"


def ablate(config: AblationConfig) -> None:
    """Train and evaluate what is not there yet, seed after seed."""
    for seed in config.seeds:
        for name in config.only or config.variants:
            training = config.training(name, seed)
            for steps in sorted({*config.judged_at, training.steps}):
                if steps <= training.steps and not _is_judged(training, steps):
                    train_fuser.train(training, training.reconstruct_steps + steps)
                    judge(training, config.items, steps)
            write_json(config.out / "ablations.json", tabulate(config))


def judge(training: FuserTrainingConfig, items: Path, steps: int) -> None:
    """Ask a variant all questions after so many answer steps.

    Over its picture's cache and, at the end, over an empty one.
    """
    target = load_target(dtype=DTYPES[training.dtype])
    sources = {SOURCE_NAME: load_source(training.source)}
    bridge = Bridge.from_pretrained(training.out / "bridge", target, sources)
    arms = ("fused",) if steps < training.steps else ("fused", "zeroed")
    settings = EvaluationConfig(items=items, arms=arms, timed=0)
    with torch.inference_mode():
        evaluate(bridge, settings, _judgement(training, steps))


def tabulate(config: AblationConfig) -> dict[str, Any]:
    """What has come out so far, of every seed that lies in the folder.

    Returns:
        `questions`, how many; for each of the `variants` its `settings`, `parameters`, `seeds`,
        `each`: a seed's share of right answers, and of them all, as [value, low, high] of a
        bootstrap over questions, `accuracy`, `zeroed` (over an empty cache) and, but for the first
        variant, `over_first`: how far it is above that, of the seeds that both have. `curves`, by
        variant judged at its end: `steps`, `scenes` seen in them and `accuracy`, of all seeds
        judged there.
    """
    found = {name: _judged(config, name) for name in config.variants}
    first = {s: _hits(run, "fused") for s, run in found[next(iter(found))].items()}
    curves = {name: _curve(config, name) for name, runs in found.items() if runs}
    if all(len(curve) < 2 for curve in curves.values()):
        curves = {}  # judged at their ends alone
    result: dict[str, Any] = {"questions": 0, "variants": {}, "curves": curves}
    for number, (name, runs) in enumerate(found.items()):
        if not runs:
            continue
        hits = {seed: _hits(run, "fused") for seed, run in runs.items()}
        zeroed = [_hits(run, "zeroed") for run in runs.values()]
        count = len(zeroed[0])
        draws = draw_resamples(count, _RESAMPLES, seed=0)
        result["questions"] = count
        row: dict[str, Any] = {
            "settings": config.variants[name],
            "parameters": next(iter(runs.values()))["parameters"],
            "seeds": list(runs),
            "each": [float(hits[seed].mean()) for seed in runs],
            "accuracy": accuracy(np.mean(list(hits.values()), axis=0), draws),
            "zeroed": accuracy(np.mean(zeroed, axis=0), draws),
        }
        if number:
            gaps = [hits[seed] - first[seed] for seed in hits if seed in first]
            row["over_first"] = accuracy(np.mean(gaps, axis=0), draws) if gaps else None
        result["variants"][name] = row
    return result


def _judged(config: AblationConfig, name: str) -> dict[int, dict[str, Any]]:
    """By seed: a variant's answers and the number of its parameters."""
    runs = {}
    for folder in sorted(config.out.glob(f"{config.folder(name, 0).name[:-1]}[0-9]*")):
        if not (folder / "evaluation" / "summary.json").is_file():
            continue
        with safe_open(folder / "bridge" / "model.safetensors", "pt") as weights:
            sizes = [math.prod(weights.get_slice(key).get_shape()) for key in weights.keys()]  # noqa: SIM118 -- no mapping: it cannot be iterated
        runs[int(folder.name.rpartition("-")[2])] = {
            "rows": _rows(folder / "evaluation"),
            "parameters": sum(sizes),
        }
    return runs


def _curve(config: AblationConfig, name: str) -> list[dict[str, Any]]:
    """A variant's accuracy after each number of steps at which it was judged."""
    trainings = [config.training(name, seed) for seed in config.seeds]
    curve = []
    paused = {
        int(folder.name.rpartition("-")[2])
        for training in trainings
        for folder in training.out.glob("evaluation-[0-9]*")
    }
    for steps in sorted({*paused, trainings[0].steps}):
        folders = [_judgement(t, steps) for t in trainings if _is_judged(t, steps)]
        if folders:
            hits = [_hits({"rows": _rows(folder)}, "fused") for folder in folders]
            draws = draw_resamples(len(hits[0]), _RESAMPLES, seed=0)
            share = accuracy(np.mean(hits, axis=0), draws)
            scenes = steps * trainings[0].scenes
            curve.append({"steps": steps, "scenes": scenes, "accuracy": share})
    return curve


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _hits(run: dict[str, Any], arm: str) -> NDArray[np.float64]:
    return np.array([float(is_right(row["answers"][arm], row["gold"])) for row in run["rows"]])


def _judgement(training: FuserTrainingConfig, steps: int) -> Path:
    return training.out / ("evaluation" if steps == training.steps else f"evaluation-{steps}")


def _is_judged(training: FuserTrainingConfig, steps: int) -> bool:
    return (_judgement(training, steps) / "summary.json").is_file()


if __name__ == "__main__":
    run(AblationConfig, ablate)

"""Will this episode succeed? A failure monitor from the fused cache, beside what else could warn.

    python -m mm_c2c.evaluation.monitor items=FILE bridge=FOLDER [train=FILE] [--out FILE]

At each step of an episode every monitor gives a score, higher for failure: the target's logit of
"no" over "yes" to a question over the fused cache; the same for a target that reads a true camera
caption and the instruction; how unsure the policy is of its action; a linear probe on the cache,
where there are steps to fit it on; and the number of steps that have passed, which knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.config import check_at_least_one
from mm_c2c.errors import ConfigError, InputError, UnsupportedError, run_main
from mm_c2c.evaluation.arms import Setting, chat_inputs
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.arms.relay import DescriptionAndInstruction
from mm_c2c.evaluation.arms.tuned import TunedDescription
from mm_c2c.evaluation.command import run_measurement
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.probe import (
    COMPONENTS,
    fit_best,
    fit_projection,
    hold_out,
    read_features,
)
from mm_c2c.evaluation.render import interval_text, pipe_table
from mm_c2c.evaluation.run import portable, source_name, to_asked
from mm_c2c.evaluation.statistics import Hits, auroc, draw_resamples, interval, mean
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.robot.monitor import no_over_yes
from mm_c2c.sources.base import Source, SourceInput

Scores = NDArray[np.float64]
Steps = NDArray[np.int64]

_NAMES = {
    "fused": "**fused**",
    "policy": "the policy's own uncertainty",
    "caption_relay": "target reads camera caption and instruction",
    "tuned_caption_relay": "the same, target tuned with LoRA",
    "probe": "linear probe on the cache",
    "steps": "steps passed (knows nothing)",
}


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(PairConfig):
    """Settings, beside those of the pair.

    Attributes:
        items: JSONL of items with `episode`, `step` and `success`; each step is scored once,
            whatever questions it comes with. What an episode is called before its last hyphen is
            its task, as in `push-0004`.
        train: JSONL of steps to fit the linear probe on; None leaves that monitor out.
        description_adapter: folder of a LoRA, as in `Setting`; None leaves that monitor out.
        question: what the target is asked; `yes` must mean success.
        episodes: so many, spread evenly; None takes all.
        train_limit: fit on so many items, spread evenly over the file; None takes all.
        window: steps over which a score is averaged before its maximum is taken.
        false_alarms: share of the successful episodes that may raise an alarm.
        draws: of noise, for the variance of a policy that starts from noise.
        batch_size: steps at once.
        resamples: of the bootstrap, over episodes.
        seed: of the bootstrap and the probe.
    """

    items: Path
    train: Path | None = None
    description_adapter: Path | None = None
    question: str = "Will the robot succeed?"
    episodes: int | None = None
    train_limit: int | None = None
    window: int = 3
    false_alarms: float = 0.05
    draws: int = 4
    batch_size: int = 24
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "window", "batch_size", "resamples")
        if self.draws < 2:
            raise ConfigError(f"draws must be at least 2, got {self.draws}")
        if not 0 <= self.false_alarms < 1:
            raise ConfigError(f"false_alarms must be in [0, 1), got {self.false_alarms}")


def monitor(bridge: Bridge, config: MonitorConfig, *, progress: bool = True) -> dict[str, Any]:
    """Score every step by every monitor.

    Args:
        bridge: with the frozen models.
        config: settings.
        progress: whether to show bars.

    Returns:
        Plain values: `steps`, `episodes`, `failures` (episodes), and for each monitor AUROC as
        [value, low, high]: `at_same_step`, where only looks at the same step of two episodes are
        compared, so that how long an episode has lasted tells nothing; `in_same_task`, where both
        are of one task too, so that its difficulty tells nothing; `over_steps`, of all looks;
        `fused_ahead`, by how much the fused cache is above it in each of these, on the same draws;
        by the highest and the mean smoothed score of an episode, `over_episodes_max` and
        `over_episodes_mean`; `so_far`, the first of these two from the first 1, 2, 4, ... looks
        alone; and `detection`, see `detect`.

    Raises:
        InputError: an item lacks `episode` or `success`, or all episodes end alike.
    """
    torch.manual_seed(config.seed)
    steps = pick_steps(load_items(config.items), config.episodes)
    failed = np.array([not item.success for item in steps])
    if failed.all() or not failed.any():
        raise InputError(f"{config.items}: all episodes end alike; there is nothing to tell apart")
    scores = read_scores(bridge, config, steps, progress=progress)
    return {
        "config": portable(config),
        **judge(steps, scores, config),
    }


def pick_steps(items: Sequence[Item], episodes: int | None = None) -> list[Item]:
    """One item for each step, in the order of episodes and steps.

    Raises:
        InputError: an item lacks `episode` or `success`.
    """
    found: dict[tuple[str, int], Item] = {}
    for item in items:
        if item.episode is None or item.success is None:
            raise InputError(
                f"{item.image}: a monitor wants `episode`, `step` and `success` of every item"
            )
        found.setdefault((item.episode, item.step), item)
    names = sorted({name for name, _ in found})
    if episodes is not None and episodes < len(names):
        names = [names[i * len(names) // episodes] for i in range(episodes)]
    kept = set(names)
    return [found[key] for key in sorted(found) if key[0] in kept]


def read_scores(
    bridge: Bridge, config: MonitorConfig, steps: Sequence[Item], *, progress: bool = True
) -> dict[str, Scores]:
    """What each monitor says at each step, higher for failure."""
    name = source_name(bridge, config.source)
    setting = Setting(
        bridge=bridge,
        source_name=name,
        request="",
        description_adapter=config.description_adapter,
    )
    watch: dict[str, list[Tensor]] = {"fused": [], "policy": []}
    relays: dict[str, DescriptionAndInstruction] = {}
    if all(item.description is not None and item.row.get("text") for item in steps):
        relays["caption_relay"] = DescriptionAndInstruction(setting)
        if config.description_adapter is not None:
            relays["tuned_caption_relay"] = TunedDescription(setting)
    watch |= {relay: [] for relay in relays}
    starts = range(0, len(steps), config.batch_size)
    for start in tqdm(starts, desc="steps", disable=not progress):
        asked = [to_asked(item) for item in steps[start : start + config.batch_size]]
        asked = [row._replace(question=config.question) for row in asked]
        with torch.no_grad():
            fused = bridge.fuse(Fused(setting).see(asked), [row.question for row in asked])
            watch["fused"].append(no_over_yes(bridge, fused))
            for relay, arm in relays.items():
                texts = arm.write(asked)
                prompts = [arm.prompt(*pair) for pair in zip(texts, asked, strict=True)]
                watch[relay].append(no_over_yes(arm.reader, chat_inputs(arm.reader, prompts)))
            looks = [row.look for row in asked]
            watch["policy"].append(uncertainty(setting.source, looks, config.draws))
    scores = {key: torch.cat(parts).double().numpy() for key, parts in watch.items()}
    if config.train is not None:
        train = pick_steps(load_items(config.train, config.train_limit))
        if len({item.success for item in train}) < 2:
            raise InputError(
                f"{config.train}: all episodes end alike; a probe learns nothing there"
            )
        scores["probe"] = probe_scores(setting.source, train, steps, config, progress=progress)
    scores["steps"] = np.array([float(item.step) for item in steps])
    return scores


@torch.no_grad()
def uncertainty(source: Source, looks: Sequence[SourceInput], draws: int) -> Tensor:
    """`(batch,)`: how unsure a policy is of its action.

    The entropy of its action tokens in nats, mean over them; or, of a policy that starts from noise,
    the variance of its chunk over draws of noise, mean over steps and dimensions.

    Raises:
        UnsupportedError: the source is no policy of either kind.
    """
    policy: Any = source
    if hasattr(policy, "entropy"):
        return policy.entropy(looks).mean(1).cpu()
    config: Any = getattr(getattr(policy, "model", None), "config", None)
    if not (hasattr(policy, "act") and hasattr(config, "chunk_size")):
        raise UnsupportedError(f"{source} does not act: there is no uncertainty to read")
    shape = (config.chunk_size, config.max_action_dim)
    chunks = []
    for seed in range(draws):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        chunks.append(policy.act([replace(look, noise=noise) for look in looks]))
    return torch.stack(chunks).float().var(0).mean((1, 2)).cpu()


def probe_scores(
    source: Source,
    train: Sequence[Item],
    steps: Sequence[Item],
    config: MonitorConfig,
    *,
    progress: bool = True,
) -> Scores:
    """The logit of failure of a linear probe on the whole cache, fitted on other steps."""
    found, owners = read_features(source, [*train, *steps], config.batch_size, progress=progress)
    features = torch.cat([found["prefix"], found["action"]], dim=1)[owners]
    features = fit_projection(features[: len(train)], COMPONENTS).apply(features)
    ends = ["success" if item.success else "failure" for item in train]
    probe, _ = fit_best(features[: len(train)], ends, hold_out(train, config.seed))
    logits = probe.logits(features[len(train) :]).double().numpy()
    scores: Scores = logits[:, 0] - logits[:, 1]  # `failure` comes first
    return scores


def judge(
    steps: Sequence[Item], scores: dict[str, Scores], config: MonitorConfig
) -> dict[str, Any]:
    """AUROC and detection of every monitor; see `monitor`."""
    owners = [str(item.episode) for item in steps]
    failed = np.array([not item.success for item in steps])
    starts = [i for i, name in enumerate(owners) if i == 0 or name != owners[i - 1]]
    spans = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(owners)], strict=True)]
    ends = failed[starts]
    longest = max(span.stop - span.start for span in spans)
    numbers = np.array([item.step for item in steps])
    tasks = [name.rpartition("-")[0] for name in owners]
    alike = {
        "at_same_step": numbers,
        "in_same_task": np.array([f"{t} {n}" for t, n in zip(tasks, numbers, strict=True)]),
        "over_steps": None,
    }
    by_step = draw_resamples(len(steps), config.resamples, config.seed, owners)
    by_episode = draw_resamples(len(spans), config.resamples, config.seed)

    def area(found: Scores, strata: NDArray[Any] | None, weights: Scores) -> Scores:
        return auroc(found, failed, weights, strata)

    def lead(found: Scores, strata: NDArray[Any] | None, weights: Scores) -> Scores:
        return area(scores["fused"], strata, weights) - area(found, strata, weights)

    def over_episodes(found: Sequence[float]) -> list[float]:
        values = np.asarray(found, dtype=np.float64)
        return list(interval(lambda weights: auroc(values, ends, weights), by_episode))

    monitors = {}
    for name, found in scores.items():
        runs = [smooth(found[span], config.window) for span in spans]
        horizons = [2**k for k in range(int(math.log2(longest)) + 1)]
        monitors[name] = {
            **{
                key: list(interval(partial(area, found, strata), by_step))
                for key, strata in alike.items()
            },
            "fused_ahead": {
                key: list(interval(partial(lead, found, strata), by_step))
                for key, strata in alike.items()
            },
            "over_episodes_max": over_episodes([run.max() for run in runs]),
            "over_episodes_mean": over_episodes([run.mean() for run in runs]),
            "so_far": {str(h): over_episodes([run[:h].max() for run in runs]) for h in horizons},
            "detection": detect(runs, [numbers[span] for span in spans], ends, config),
        }
    return {
        "steps": len(steps),
        "episodes": len(spans),
        "failures": int(ends.sum()),
        "monitors": monitors,
    }


def smooth(scores: Scores, window: int) -> Scores:
    """The mean of each score and those before it, at most `window` in all."""
    return np.array([scores[max(0, i + 1 - window) : i + 1].mean() for i in range(len(scores))])


def detect(
    runs: Sequence[Scores], steps: Sequence[Steps], failed: Hits, config: MonitorConfig
) -> dict[str, Any]:
    """Alarms at a rate of false ones.

    Episodes are split into two halves by turns; the threshold of either half is what so many of the
    other half's successful episodes stay below.

    Args:
        runs: smoothed scores, `(looks,)` of each episode.
        steps: the episode's steps at which they were taken, from 0.
        failed: `(episodes,)`.
        config: settings.

    Returns:
        `detected`, share of the failed episodes with an alarm, and `false_alarms`, of the successful
        ones, with intervals; `median_step` of the first alarm in a failed episode, and
        `median_share` of its looks that had passed; None where there is none.
    """
    alarms: list[int | None] = [None] * len(runs)
    for half, chosen in _halves(len(runs)):
        peaks = [run.max() for run, fails in zip(runs, failed, strict=True) if not fails]
        places = [i for i in range(len(runs)) if not failed[i]]
        others = [peak for peak, i in zip(peaks, places, strict=True) if i % 2 != half]
        limit = np.quantile(others, 1 - config.false_alarms) if others else math.inf
        for i in chosen:
            over = np.flatnonzero(runs[i] > limit)
            alarms[i] = int(over[0]) if len(over) else None
    raised = np.array([alarm is not None for alarm in alarms])
    caught = [i for i in range(len(runs)) if failed[i] and alarms[i] is not None]
    firsts = [alarms[i] or 0 for i in caught]
    moments = [steps[i][first] for first, i in zip(firsts, caught, strict=True)]
    passed = [(first + 1) / len(runs[i]) for first, i in zip(firsts, caught, strict=True)]

    def share(where: Hits) -> list[float | None]:
        draws = draw_resamples(int(where.sum()), config.resamples, config.seed)
        return list(interval(lambda weights: mean(raised[where], weights), draws))

    return {
        "detected": share(failed),
        "false_alarms": share(~failed),
        "median_step": float(np.median(moments)) if caught else None,
        "median_share": float(np.median(passed)) if caught else None,
    }


def _halves(count: int) -> Iterator[tuple[int, range]]:
    yield 0, range(0, count, 2)
    yield 1, range(1, count, 2)


def table(result: dict[str, Any]) -> str:
    """The monitors side by side, in Markdown."""

    def ahead(name: str, values: Sequence[float]) -> str:
        return "" if name == "fused" else interval_text(values, sign="+")

    def share(values: Sequence[float]) -> str:
        return interval_text([100 * value for value in values], digits=0)

    rows = [
        [
            "failure monitor",
            "AUROC, same step",
            "fused ahead by",
            "AUROC, same step and task",
            "fused ahead by",
            "AUROC, all steps",
            "episodes, highest score",
            "detected, %",
            "false alarms, %",
            "first alarm, median step",
        ]
    ]
    for name, row in result["monitors"].items():
        found, leads = row["detection"], row["fused_ahead"]
        step = "" if found["median_step"] is None else f"{found['median_step']:.0f}"
        rows.append(
            [
                _NAMES[name],
                interval_text(row["at_same_step"]),
                ahead(name, leads["at_same_step"]),
                interval_text(row["in_same_task"]),
                ahead(name, leads["in_same_task"]),
                interval_text(row["over_steps"]),
                interval_text(row["over_episodes_max"]),
                share(found["detected"]),
                share(found["false_alarms"]),
                step,
            ]
        )
    head = (
        f"{result['steps']:,} steps of {result['episodes']:,} episodes, of which "
        f"{result['failures']:,} fail; 95 % bootstrap intervals over episodes."
    )
    return f"{head}\n\n{pipe_table(rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and score."""
    run_measurement(MonitorConfig, monitor, table, __doc__, argv)


if __name__ == "__main__":
    run_main(main)

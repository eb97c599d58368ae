"""Compare arms and controls on the same items; accuracy with intervals, retention, times."""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.cache import SourceCache, zeroed
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.baselines import (
    CAPTION_TOKENS,
    MAX_NEW_TOKENS,
    arms,
    fused_answers,
    relay_prompt,
    shuffled,
    target_answers,
    timed,
)
from mm_c2c.evaluation.tasks import Item, is_right, is_right_in_a_sentence, load_items
from mm_c2c.sources.base import Source, SourceInput


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of one evaluation.

    Attributes:
        items: JSONL of questions, pictures beside it.
        source: name of the source in the bridge.
        request: what the source is asked for in a caption relay.
        limit: ask only so many; None asks all.
        batch_size: items at once, for accuracy.
        timed: items that are also run one at a time, by the clock, after two to warm up.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    items: Path
    source: str = "stickers"
    request: str = "Describe the picture."
    limit: int | None = None
    batch_size: int = 48
    timed: int = 10
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2 to shuffle, got {self.batch_size}")


def evaluate(bridge: Bridge, config: EvaluationConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run all arms and controls.

    Returns:
        Plain values, ready for JSON: for each arm `n`, `accuracy` with its 95 % interval by
        bootstrap, `in_a_sentence` (a wordy answer may name the option), and accuracy by kind;
        `retention` against the blind target and against the zeroed cache, which knows the form of
        the answers; `swap`, `time`, and the items with every answer.
    """
    items = _apart(load_items(config.items, config.limit))
    source = bridge.sources[config.source]
    answers: dict[str, list[str]] = {name: [] for name in _ARM_NAMES}
    batches = split_rows(len(items), config.batch_size)
    for rows in tqdm(batches, desc="evaluate", disable=not progress):
        batch = items[rows.start : rows.stop]
        for name, texts in _answer_batch(bridge, source, config, batch):
            answers[name] += texts
    right = {
        name: [is_right(text, item) for text, item in zip(texts, items, strict=True)]
        for name, texts in answers.items()
    }
    wordy = {
        name: [
            is_right(text, item) or is_right_in_a_sentence(text, item)
            for text, item in zip(texts, items, strict=True)
        ]
        for name, texts in answers.items()
    }
    rng = random.Random(config.seed)
    draws = [rng.choices(range(len(items)), k=len(items)) for _ in range(config.resamples)]
    return {
        "n": len(items),
        "items_file": config.items.name,
        "arms": {
            name: {
                "n": len(items),
                "accuracy": _mean(right[name]),
                "interval": _interval(draws, functools.partial(_mean_of, right[name])),
                "in_a_sentence": _mean(wordy[name]),
                "kinds": {
                    kind: _kind_row(right[name], items, kind)
                    for kind in dict.fromkeys(item.kind for item in items)
                },
            }
            for name in _ARM_NAMES
        },
        "retention": {
            f"over_{floor}": {
                "value": retention(right, floor, range(len(items))),
                "interval": _interval(draws, functools.partial(retention, right, floor)),
            }
            for floor in ("blind", "zeroed")
        },
        "swap": swap_outcomes(items, answers, batches),
        "time": _times(bridge, source, config, items),
        "items": [
            {
                "image": item.image.name,
                "kind": item.kind,
                "question": item.question,
                "answer": item.answer,
                **{name: texts[i] for name, texts in answers.items()},
            }
            for i, item in enumerate(items)
        ],
    }


_ARM_NAMES = ("fused", "blind", "caption_relay", "source", "shuffled", "zeroed")


def split_rows(count: int, batch_size: int) -> list[range]:
    """Batches of at least two where there are two: a lone row could not be shuffled."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def _answer_batch(
    bridge: Bridge, source: Source, config: EvaluationConfig, batch: Sequence[Item]
) -> Iterator[tuple[str, list[str]]]:
    pictures = [item.picture() for item in batch]
    questions = [item.question for item in batch]
    looks = [SourceInput(images=(picture,)) for picture in pictures]
    cache: SourceCache = source.prefill(looks)
    name = config.source
    yield "fused", fused_answers(bridge, {name: cache}, questions)
    yield "shuffled", fused_answers(bridge, {name: shuffled(cache)}, questions)
    yield "zeroed", fused_answers(bridge, {name: zeroed(cache)}, questions)
    yield "blind", target_answers(bridge, questions)
    captions = source.generate(
        [SourceInput(text=config.request, images=(picture,)) for picture in pictures],
        max_new_tokens=CAPTION_TOKENS,
        do_sample=False,
    )
    prompts = [relay_prompt(c.strip(), q) for c, q in zip(captions, questions, strict=True)]
    yield "caption_relay", target_answers(bridge, prompts)
    asked = [
        SourceInput(text=question, images=(picture,))
        for question, picture in zip(questions, pictures, strict=True)
    ]
    yield "source", source.generate(asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)


def _times(
    bridge: Bridge, source: Source, config: EvaluationConfig, items: Sequence[Item]
) -> dict[str, Any]:
    """Median times of each arm, one item at a time, arms in turn on each item."""
    named = arms(bridge, source, config.request)
    taken: dict[str, list[Any]] = {name: [] for name in named}
    for index, item in enumerate(items[: config.timed + 2]):
        picture = item.picture()
        for name, arm in named.items():
            answer = timed(arm, bridge, picture, item.question)
            if index >= 2:
                taken[name].append(answer)
    return {
        name: {
            "n": len(runs),
            "ttft_ms": statistics.median(run.ttft_ms for run in runs),
            "total_ms": statistics.median(run.total_ms for run in runs),
            "tokens": statistics.mean(run.tokens for run in runs),
        }
        for name, runs in taken.items()
        if runs
    }


def swap_outcomes(
    items: Sequence[Item], answers: dict[str, list[str]], batches: Sequence[range]
) -> dict[str, dict[str, float | int]]:
    """Whose answer the target gives when it is handed its neighbour's picture.

    Counted where the neighbour asks the same question and its true answer differs: `truth` has
    them all; `source_right` those where the source itself is right about both pictures.

    Returns:
        For either, `n`, and the shares that `follow` the swapped-in picture, that `stay` with the
        own one, and that do neither.
    """
    pairs = []
    for rows in batches:
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            same = items[row].question == items[other].question
            if same and items[row].answer != items[other].answer:
                pairs.append((row, other))
    knows = [is_right(text, item) for text, item in zip(answers["source"], items, strict=True)]
    return {
        "truth": _followed(pairs, items, answers["shuffled"]),
        "source_right": _followed(
            [pair for pair in pairs if knows[pair[0]] and knows[pair[1]]],
            items,
            answers["shuffled"],
        ),
    }


def _followed(
    pairs: Sequence[tuple[int, int]], items: Sequence[Item], swapped: Sequence[str]
) -> dict[str, float | int]:
    follow = [is_right(swapped[row], items[other]) for row, other in pairs]
    stay = [is_right(swapped[row], items[row]) for row, _ in pairs]
    neither = [not (a or b) for a, b in zip(follow, stay, strict=True)]
    shares = {"follow": follow, "stay": stay, "neither": neither}
    return {"n": len(pairs), **{k: _mean(v) if v else math.nan for k, v in shares.items()}}


def retention(right: dict[str, list[bool]], floor: str, rows: Sequence[int]) -> float:
    """(fused - floor) / (source - floor)."""
    fused, low, source = (_mean([right[n][i] for i in rows]) for n in ("fused", floor, "source"))
    return (fused - low) / (source - low) if source != low else math.nan


def _kind_row(right: list[bool], items: Sequence[Item], kind: str) -> dict[str, float | int]:
    hits = [hit for hit, item in zip(right, items, strict=True) if item.kind == kind]
    return {"n": len(hits), "accuracy": _mean(hits)}


def _interval(
    draws: Sequence[list[int]], statistic: Callable[[list[int]], float]
) -> tuple[float, float]:
    values = sorted(statistic(draw) for draw in draws)
    return values[int(0.025 * len(values))], values[int(0.975 * len(values))]


def _apart(items: Sequence[Item]) -> list[Item]:
    """Items in an order in which neighbours show unlike pictures and often ask alike.

    The shuffled control hands each item its neighbour's cache.
    """
    return sorted(items, key=lambda item: (item.kind, item.question, item.image))


def _mean_of(values: Sequence[bool], rows: Sequence[int]) -> float:
    return _mean([values[row] for row in rows])


def _mean(values: Sequence[bool | float]) -> float:
    return sum(values) / len(values)


def table(result: dict[str, Any]) -> str:
    """Accuracy by arm and kind, for a terminal."""
    kinds = list(next(iter(result["arms"].values()))["kinds"])
    lines = [
        f"{'arm':<14}{'all':>7}  {'95 %':<15}{'wordy':>7}" + "".join(f"{k:>10}" for k in kinds)
    ]
    for name, row in result["arms"].items():
        low, high = row["interval"]
        cells = "".join(f"{100 * row['kinds'][kind]['accuracy']:>10.1f}" for kind in kinds)
        lines.append(
            f"{name:<14}{100 * row['accuracy']:>7.1f}  {f'{100 * low:.1f} to {100 * high:.1f}':<15}"
            f"{100 * row['in_a_sentence']:>7.1f}{cells}"
        )
    lines.append(f"\nn = {result['n']}")
    for name, kept in result["retention"].items():
        low, high = kept["interval"]
        lines.append(
            f"retention {name.replace('_', ' ')}: {kept['value']:.2f} ({low:.2f} to {high:.2f})"
        )
    for name, row in result["swap"].items():
        lines.append(
            f"swapped picture ({name.replace('_', ' ')}, n = {row['n']}): "
            f"{100 * row['follow']:.1f} % follow it, {100 * row['stay']:.1f} % stay"
        )
    relay = result["time"]["caption_relay"]["ttft_ms"]
    for name, row in result["time"].items():
        lines.append(
            f"{name:<14}first token {row['ttft_ms']:>7.0f} ms ({relay / row['ttft_ms']:.1f}x the "
            f"relay's speed), total {row['total_ms']:>7.0f} ms (median of {row['n']})"
        )
    return "\n".join(lines)

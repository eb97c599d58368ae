"""What can be read off a policy's cache by a linear map: the ceiling of what a reader can find there.

    python -m mm_c2c.evaluation.probe train=FILE items=FILE bridge=FOLDER [--out FILE]

A logistic regression for each kind of question, on the cache that the fuser reads: keys without
their rotation and values of every layer, averaged over the patches and over the words, and of each
position of state and actions. Answers that training does not know are misses.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.cache import PositionKind, SourceCache
from mm_c2c.config import check_at_least_one
from mm_c2c.errors import run_main
from mm_c2c.evaluation.command import run_measurement
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.render import pipe_table, span
from mm_c2c.evaluation.run import portable, source_name
from mm_c2c.evaluation.statistics import Interval, accuracy, draw_resamples, hits_of
from mm_c2c.evaluation.tasks import Item, is_right, load_items
from mm_c2c.rope import derotate
from mm_c2c.sources.base import Source

PARTS = {"prefix only": ("prefix",), "action only": ("action",), "both": ("prefix", "action")}
"""What a probe is given, by the parts of the cache."""

COMPONENTS = 512
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 0.2
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(PairConfig):
    """Settings, beside those of the pair, of which only the source is read.

    Attributes:
        train: JSONL of questions to fit on; pictures beside it.
        items: JSONL of questions to score on.
        kinds: kinds of question that are scored; all when empty.
        components: principal components of the standardised features that are kept.
        train_limit: fit on so many questions, spread evenly over the file; None takes all.
        limit: score so many, likewise.
        batch_size: looks at once.
        resamples: of the bootstrap, over episodes where the items have them.
        seed: of the bootstrap, of the principal components, and of which episodes are held out.
    """

    train: Path
    items: Path
    kinds: tuple[str, ...] = ()
    components: int = COMPONENTS
    train_limit: int | None = None
    limit: int | None = None
    batch_size: int = 32
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "components", "batch_size", "limit", "resamples")


class Probe(NamedTuple):
    """A fitted map from features to answers.

    Attributes:
        weight: `(components, answers)`.
        bias: `(answers,)`.
        answers: in the order of the columns.
    """

    weight: Tensor
    bias: Tensor
    answers: tuple[str, ...]

    def logits(self, features: Tensor) -> Tensor:
        """`(rows, answers)` of `(rows, components)`."""
        return features @ self.weight + self.bias

    def answer(self, features: Tensor) -> list[str]:
        """The likeliest answer of each row."""
        return [self.answers[i] for i in self.logits(features).argmax(1).tolist()]


class Projection(NamedTuple):
    """Standardises features and keeps their principal components.

    Attributes:
        mean: `(width,)`.
        spread: `(width,)`: standard deviation; 1 where nothing varies.
        axes: `(width, components)`.
        kept: share of the variance that the components have.
    """

    mean: Tensor
    spread: Tensor
    axes: Tensor
    kept: float

    def apply(self, features: Tensor) -> Tensor:
        """`(rows, components)`, of mean square about 1 in all."""
        width = len(self.mean) ** 0.5
        return ((features - self.mean) / self.spread) @ self.axes / width


def probe(bridge: Bridge, config: ProbeConfig, *, progress: bool = True) -> dict[str, Any]:
    """Fit and score.

    Args:
        bridge: whose source is read; nothing of it changes.
        config: settings.
        progress: whether to show bars.

    Returns:
        Plain values: `n`; `episodes`, where intervals are over these; `variance`, the share that
        the components keep, by part; `all` and `kinds`, accuracies [value, low, high] by part.
    """
    torch.manual_seed(config.seed)
    name = source_name(bridge, config.source)
    train = load_items(config.train, config.train_limit, config.kinds)
    items = load_items(config.items, config.limit, config.kinds)
    source = bridge.sources[name]
    found, owners = read_features(source, [*train, *items], config.batch_size, progress=progress)
    count = len(train)
    shown = sorted(set(owners[:count]))
    said: dict[str, list[str]] = {}
    kept: dict[str, float] = {}
    for part, names in PARTS.items():
        if any(found[n].shape[1] == 0 for n in names):
            continue
        features = torch.cat([found[n] for n in names], dim=1)
        projection = fit_projection(features[shown], config.components)
        kept[part] = projection.kept
        features = projection.apply(features)[owners]
        said[part] = answer_kinds(train, features[:count], items, features[count:], config.seed)
    return {
        "config": portable(config),
        "variance": kept,
        **_score(items, said, config),
    }


@torch.no_grad()
def read_features(
    source: Source, items: Sequence[Item], batch_size: int, *, progress: bool = True
) -> tuple[dict[str, Tensor], list[int]]:
    """The caches of what items show, by part; what several items show is read once.

    Returns:
        `prefix` and `action`, `(looks, width)`, of width 0 where the source has no such positions;
        and which of the looks each item has.
    """
    shown: dict[str, int] = {}
    first: list[Item] = []
    owners = []
    for item in items:
        key = _shown_key(item)
        if key not in shown:
            shown[key] = len(first)
            first.append(item)
        owners.append(shown[key])
    parts: dict[str, list[Tensor]] = {"prefix": [], "action": []}
    starts = range(0, len(first), batch_size)
    for start in tqdm(starts, desc="caches", disable=not progress):
        looks = [item.look() for item in first[start : start + batch_size]]
        for name, rows in pool(source.prefill(looks)).items():
            parts[name].append(rows)
    return {name: torch.cat(rows) for name, rows in parts.items()}, owners


def _shown_key(item: Item) -> str:
    """Alike for items that show the same."""
    told = {"question", "answer", "kind", "options", "caption", "told", "turns"}
    return json.dumps({k: v for k, v in item.row.items() if k not in told}, default=str)


def pool(cache: SourceCache) -> dict[str, Tensor]:
    """A cache as one row of numbers for each row of the batch, by part.

    Returns:
        `prefix`: `(batch, 2 * states)`, means over patches and over words, 0 where there are none;
        `action`: `(batch, positions * states)`, each position of state and actions.
    """
    layers = [
        torch.cat([derotate(keys, cache.position_ids, spec), values], dim=1)
        for (keys, values), spec in zip(cache.layers, cache.rope, strict=True)
    ]
    # batch, positions, states
    states = torch.stack(layers, dim=1).permute(0, 3, 1, 2, 4).flatten(2).float()
    means = []
    for kind in (PositionKind.IMAGE, PositionKind.TEXT):
        here = (cache.kinds == kind).to(states.dtype)
        means.append(torch.einsum("bp,bps->bs", here, states) / here.sum(1).clamp(min=1)[:, None])
    acting = (cache.kinds == PositionKind.STATE) | (cache.kinds == PositionKind.ACTION)
    return {
        "prefix": torch.cat(means, dim=1).cpu(),
        "action": states[acting].view(len(states), -1).cpu(),
    }


def fit_projection(features: Tensor, components: int) -> Projection:
    """The main axes of `(rows, width)`, or all where there are fewer."""
    mean, spread = features.mean(0), features.std(0)
    spread = torch.where(spread > 1e-6, spread, 1.0)
    scaled = (features - mean) / spread
    count = min(components, *scaled.shape)
    _, _, axes = torch.pca_lowrank(scaled, q=count, center=False, niter=3)
    kept = (scaled @ axes).pow(2).sum() / scaled.pow(2).sum().clamp(min=1e-12)
    return Projection(mean, spread, axes, float(kept))


def fit(features: Tensor, answers: Sequence[str], penalty: float) -> Probe:
    """Multinomial logistic regression with an L2 penalty on the weights, by L-BFGS.

    Args:
        features: `(rows, components)`.
        answers: one a row.
        penalty: weight of half the squared norm, beside the mean cross-entropy.
    """
    known = tuple(sorted(set(answers)))
    labels = torch.tensor([known.index(answer) for answer in answers])
    weight = torch.zeros(features.shape[1], len(known), requires_grad=True)
    bias = torch.zeros(len(known), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        cost = F.cross_entropy(features @ weight + bias, labels)
        cost = cost + penalty / 2 * weight.pow(2).sum()
        cost.backward()
        return cost

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach(), known)


def fit_best(
    features: Tensor, answers: Sequence[str], held_out: NDArray[np.bool_]
) -> tuple[Probe, int]:
    """A probe of the penalty that does best on the rows held out, fitted on all.

    Returns:
        The probe, and how many of the rows held out that penalty gets right without them.
    """
    seen, hidden = (np.flatnonzero(rows).tolist() for rows in (~held_out, held_out))
    if not seen or not hidden:
        return fit(features, answers, _PENALTIES[1]), 0
    right = []
    for penalty in _PENALTIES:
        found = fit(features[seen], [answers[i] for i in seen], penalty).answer(features[hidden])
        right.append(sum(a == answers[i] for a, i in zip(found, hidden, strict=True)))
    best = max(right)
    return fit(features, answers, _PENALTIES[right.index(best)]), best


def answer_kinds(
    train: Sequence[Item], known: Tensor, items: Sequence[Item], features: Tensor, seed: int
) -> list[str]:
    """What probes answer, one probe for each kind of question.

    A kind whose wordings ask for different things gets one for each wording instead, where that does
    better on the episodes held out.

    Args:
        train: to fit on.
        known: `(train, components)`.
        items: to answer.
        features: `(items, components)`.
        seed: of what is held out.
    """
    held_out = hold_out(train, seed)
    groupings: tuple[Callable[[Item], str], ...] = (
        lambda item: item.kind,
        lambda item: f"{item.kind}: {item.question}",
    )
    tried = [_answer_groups(train, known, items, features, held_out, g) for g in groupings]
    (whole, right), (worded, right_worded) = tried
    return [
        worded[i] if right_worded[item.kind] > right[item.kind] else whole[i]
        for i, item in enumerate(items)
    ]


def _answer_groups(
    train: Sequence[Item],
    known: Tensor,
    items: Sequence[Item],
    features: Tensor,
    held_out: NDArray[np.bool_],
    group: Callable[[Item], str],
) -> tuple[list[str], Counter[str]]:
    """What a probe for each group answers, and for each kind what they get right held out."""
    said, right = [""] * len(items), Counter[str]()
    for name in dict.fromkeys(map(group, items)):
        rows = [i for i, item in enumerate(train) if group(item) == name]
        if not rows:
            continue
        best, count = fit_best(known[rows], [train[i].answer for i in rows], held_out[rows])
        right[train[rows[0]].kind] += count
        places = [i for i, item in enumerate(items) if group(item) == name]
        for place, answer in zip(places, best.answer(features[places]), strict=True):
            said[place] = answer
    return said, right


def hold_out(items: Sequence[Item], seed: int) -> NDArray[np.bool_]:
    """`(items,)`: a fifth of the episodes, or of the items that are of none."""
    groups = [item.episode or str(item.image) for item in items]
    names = sorted(set(groups))
    drawn = np.random.default_rng(seed).random(len(names)) < _HELD_OUT
    picked = dict(zip(names, drawn, strict=True))
    return np.array([picked[group] for group in groups])


def episodes_of(items: Iterable[Item]) -> list[str] | None:
    """Each item's episode; None where one is of none."""
    found = [item.episode for item in items]
    return None if None in found else [str(name) for name in found]


def _score(
    items: Sequence[Item], said: dict[str, list[str]], config: ProbeConfig
) -> dict[str, Any]:
    def share(right: NDArray[np.bool_], where: NDArray[np.bool_]) -> Interval:
        episodes = episodes_of(item for item, here in zip(items, where, strict=True) if here)
        draws = draw_resamples(int(where.sum()), config.resamples, config.seed, episodes)
        return accuracy(right[where], draws)

    hits = {
        part: hits_of([is_right(a, item.answer) for a, item in zip(answers, items, strict=True)])
        for part, answers in said.items()
    }
    kinds = {kind: np.array([i.kind == kind for i in items]) for kind in {i.kind for i in items}}
    everything = np.ones(len(items), dtype=np.bool_)
    episodes = episodes_of(items)
    return {
        "n": len(items),
        **({} if episodes is None else {"episodes": len(set(episodes))}),
        "all": {part: list(share(right, everything)) for part, right in hits.items()},
        "kinds": {
            kind: {
                "n": int(where.sum()),
                **{part: list(share(right, where)) for part, right in hits.items()},
            }
            for kind, where in sorted(kinds.items())
        },
    }


def table(result: dict[str, Any]) -> str:
    """Accuracy by kind and part, in Markdown."""
    parts = list(result["all"])
    rows = [["linear probe", "n", *parts]]
    rows.append(["all", f"{result['n']:,}", *(span(result["all"][part]) for part in parts)])
    for kind, row in result["kinds"].items():
        rows.append([kind, f"{row['n']:,}", *(span(row[part]) for part in parts)])
    return pipe_table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, fit and score."""
    run_measurement(ProbeConfig, probe, table, __doc__, argv)


if __name__ == "__main__":
    run_main(main)

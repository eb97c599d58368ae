"""`mm-c2c bench`: our fuser beside the layer-by-layer projector, at published sizes.

What is compared runs in turn within one process, and each round gives one ratio, so that whatever
slows the machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mm_c2c.align.layers import layer_map
from mm_c2c.bench.peer import LayerByLayer
from mm_c2c.cache import CacheShape
from mm_c2c.errors import ConfigError
from mm_c2c.fuser import CacheFuser, FuserConfig

PAIRS = {
    "qwen2.5-0.5b to qwen3-0.6b": (
        CacheShape(num_layers=24, num_key_value_heads=2, head_dim=64),
        CacheShape(num_layers=28, num_key_value_heads=8, head_dim=128),
    ),
    "qwen2.5-0.5b to qwen3-8b": (
        CacheShape(num_layers=24, num_key_value_heads=2, head_dim=64),
        CacheShape(num_layers=36, num_key_value_heads=8, head_dim=128),
    ),
}
"""Geometries of the caches, from the models' published `config.json`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings.

    Attributes:
        pairs: which of `PAIRS`.
        positions: aligned positions that are fused.
        hidden_size: width of the projectors, ours and the peer's.
        growth: numbers of positions at which `small` is timed alone.
        rounds: timed rounds, after one to warm up.
    """

    pairs: tuple[str, ...] = tuple(PAIRS)
    positions: int = 512
    hidden_size: int = 1024
    growth: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rounds: int = 5

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if pair not in PAIRS:
                raise ConfigError(f"no pair {pair!r}; known: {', '.join(PAIRS)}")
        for name in ("positions", "hidden_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class Ratio(NamedTuple):
    """How many times as fast as the peer: the median of the rounds, and their range."""

    median: float
    low: float
    high: float


@torch.no_grad()
def bench(config: BenchConfig, *, progress: bool = True) -> dict[str, Any]:
    """Time everything.

    Returns:
        Plain values, ready for JSON: for each pair `ms` (median) and `parameters` of the peer, of
        `c2c` (the same function, stacked) and of `small`; `speed` against the peer as [median,
        low, high]; and `growth`, the milliseconds of `small` at other numbers of positions.
    """
    result: dict[str, Any] = {"positions": config.positions, "rounds": config.rounds}
    for pair in config.pairs:
        source, target = PAIRS[pair]
        fusers = _build_fusers(source, target, config.hidden_size)
        runs = {
            name: _runner(fuser, source, target, config.positions) for name, fuser in fusers.items()
        }
        taken = _rounds(runs, config.rounds, pair, progress=progress)
        small = fusers["small"]
        growth = {str(count): _runner(small, source, target, count) for count in config.growth}
        grown = _rounds(growth, config.rounds, f"{pair}, growth", progress=progress)
        result[pair] = {
            "ms": {name: statistics.median(times) for name, times in taken.items()},
            "parameters": {
                name: sum(p.numel() for p in fuser.parameters()) for name, fuser in fusers.items()
            },
            "speed": {name: _ratio(taken["peer"], taken[name]) for name in ("c2c", "small")},
            "growth": {count: statistics.median(times) for count, times in grown.items()},
        }
    return result


def text_table(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"fusing {result['positions']} positions, median of {result['rounds']} rounds"]
    for pair, row in result.items():
        if not isinstance(row, dict):
            continue
        lines.append(f"\n{pair}\n{'':<8}{'ms':>10}{'parameters':>16}   against the peer")
        for name, taken in row["ms"].items():
            speed = row["speed"].get(name)
            against = "{:.1f}x ({:.1f} to {:.1f})".format(*speed) if speed else ""
            lines.append(f"{name:<8}{taken:>10.1f}{row['parameters'][name]:>16,}   {against}")
        grown = ", ".join(f"{count}: {taken:.1f}" for count, taken in row["growth"].items())
        lines.append(f"small, ms by positions: {grown}")
    return "\n".join(lines)


def _build_fusers(
    source: CacheShape, target: CacheShape, hidden_size: int
) -> dict[str, torch.nn.Module]:
    """The peer, the same function in our stacked form, and the default."""
    layers = layer_map("terminal", source.num_layers, target.num_layers)
    pairs = [
        int(weights.argmax()) if fed else None
        for weights, fed in zip(layers.weights, layers.mask, strict=True)
    ]
    paper = FuserConfig.c2c(source, target)
    stacked = FuserConfig(
        source=source,
        target=target,
        preset="c2c",
        layers=paper.layers,
        hidden_size=hidden_size,
        gate=paper.gate,
        raw_keys=True,
    )
    return {
        "peer": LayerByLayer(source, target, hidden_size, pairs).eval(),
        "c2c": CacheFuser(stacked).eval(),
        "small": CacheFuser(FuserConfig(source=source, target=target)).eval(),
    }


def _runner(
    fuser: torch.nn.Module, source: CacheShape, target: CacheShape, positions: int
) -> Callable[[], Tensor]:
    ours, theirs = (
        torch.randn(shape.num_layers, 1, positions, 2, shape.width) for shape in (source, target)
    )
    if isinstance(fuser, CacheFuser):
        # The peer's result is the fused cache: ours is added too.
        return lambda: theirs + fuser(ours, theirs)
    return lambda: fuser(ours, theirs)


def _rounds(
    runs: dict[str, Callable[[], Tensor]], rounds: int, label: str, *, progress: bool
) -> dict[str, list[float]]:
    """Milliseconds of each, in turn; the first round only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc=label, disable=not progress):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def _ratio(peer: list[float], ours: list[float]) -> Ratio:
    ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))

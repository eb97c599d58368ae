"""`mm-c2c bench`: our fuser and bridge beside the layer-by-layer projector, at published sizes.

What is compared runs in turn within one process, and each round gives one ratio, so that whatever
slows the machine slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm_c2c.bench.peer import LayerByLayer
from mm_c2c.bench.pipeline import Pipeline, paired_layers, time_growth, time_stages
from mm_c2c.bench.rounds import in_turn, ratio
from mm_c2c.cache import CacheShape
from mm_c2c.config import WIDE_DTYPES, check_at_least_one, check_one_of
from mm_c2c.errors import ConfigError
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.geometry import cache_layout, find
from mm_c2c.training.blank import narrow

PAIRS = {
    "qwen2.5-0.5b to qwen3-0.6b": ("Qwen2.5-0.5B", "Qwen3-0.6B"),
    "qwen2.5-0.5b to qwen3-8b": ("Qwen2.5-0.5B", "Qwen3-8B"),
}
"""Models of `geometry.yaml`, after the paper's own pairs."""
GROWING = ("SmolVLM-256M", "SmolLM2-135M")
"""The pair whose bridge is timed with more slots and more sources."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings.

    Attributes:
        pairs: which of `PAIRS`.
        positions: aligned positions that are fused.
        hidden_size: width of the projectors, ours and the peer's.
        growth: numbers of positions at which `small` is timed alone.
        sides: numbers of rows, and of columns, of slots at which a bridge is timed.
        sources: numbers of sources likewise.
        dtype: of the models that read; bfloat16 is many times faster where a CPU multiplies it, and
            many times slower where not. Fusers are in float32.
        rounds: timed rounds, after one to warm up.
        true_width: False makes all models narrow, for a test.
    """

    pairs: tuple[str, ...] = tuple(PAIRS)
    positions: int = 512
    hidden_size: int = 1024
    growth: tuple[int, ...] = (64, 128, 256, 512, 1024)
    sides: tuple[int, ...] = (2, 4, 8)
    sources: tuple[int, ...] = (1, 2, 4)
    dtype: str = "float32"
    rounds: int = 5
    true_width: bool = True

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if pair not in PAIRS:
                raise ConfigError(f"no pair {pair!r}; known: {', '.join(PAIRS)}")
        check_one_of("dtype", self.dtype, WIDE_DTYPES)
        check_at_least_one(self, "positions", "hidden_size", "rounds")


@torch.no_grad()
def bench(config: BenchConfig, *, progress: bool = True) -> dict[str, Any]:
    """Time everything.

    Returns:
        Plain values, ready for JSON. In `pairs`, for each pair: `ms` (median of fusing alone) and
        `parameters` of the peer, of `c2c` (the same function, stacked), of `small`, and of `small`
        with the peer's width; `speed` against the peer as [median, low, high]; the milliseconds of `small` by number of
        `positions` and of target `layers`; and `stages`, of `time_stages`. In `growth`, of a
        bridge: `time_growth`.
    """
    result: dict[str, Any] = {"positions": config.positions, "rounds": config.rounds, "pairs": {}}
    for pair in config.pairs:
        alone = _bench_fusers(config, pair, progress=progress)
        stages = time_stages(
            _pipeline(config, PAIRS[pair]), config.rounds, f"{pair}, stages", progress=progress
        )
        result["pairs"][pair] = {**alone, "stages": stages}
    result["growth"] = time_growth(
        _pipeline(config, GROWING), config.sides, config.sources, config.rounds, progress=progress
    )
    return result


def text_table(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"{result['positions']} positions, median of {result['rounds']} rounds"]
    for pair, row in result["pairs"].items():
        lines.append(
            f"\n{pair}\n{'fusing alone':<22}{'ms':>10}{'parameters':>16}   against the peer"
        )
        for name, taken in row["ms"].items():
            speed = row["speed"].get(name)
            against = "{:.1f}x ({:.1f} to {:.1f})".format(*speed) if speed else ""
            lines.append(f"{name:<22}{taken:>10.1f}{row['parameters'][name]:>16,}   {against}")
        lines += [f"small, ms by {name}: {_grown(row[name])}" for name in ("positions", "layers")]
        stages = row["stages"]
        lines += [f"{name:<22}{taken:>10.1f}" for name, taken in stages["ms"].items()]
        share = "{:.1%} ({:.1%} to {:.1%})".format(*stages["share"])
        speed = "{:.2f}x ({:.2f} to {:.2f})".format(*stages["first_token"])
        lines.append(f"fusing is {share} of both readings; first token {speed} against the peer")
    lines += [
        f"\na bridge's fusing, ms by {name}: {_grown(grown)}"
        for name, grown in result["growth"].items()
    ]
    return "\n".join(lines)


def _grown(taken: dict[str, float]) -> str:
    return ", ".join(f"{count}: {ms:.1f}" for count, ms in taken.items())


def _pipeline(config: BenchConfig, pair: tuple[str, str]) -> Pipeline:
    source, target = map(find, pair)
    return Pipeline(
        source,
        target,
        positions=config.positions,
        hidden_size=config.hidden_size,
        dtype=config.dtype,
        true_width=config.true_width,
    )


def _bench_fusers(config: BenchConfig, pair: str, *, progress: bool) -> dict[str, Any]:
    """The fusers of a pair alone, on random caches."""
    texts = [find(name).text for name in PAIRS[pair]]
    source, target = (
        cache_layout(text if config.true_width else narrow(text)).shape for text in texts
    )
    fusers = _build_fusers(source, target, config.hidden_size)
    count = config.positions
    runs = {name: _runner(fuser, source, target, count) for name, fuser in fusers.items()}
    taken = in_turn(runs, config.rounds, pair, progress=progress)
    positions = {
        str(number): _runner(fusers["small"], source, target, number) for number in config.growth
    }
    layers = {}
    for part in (4, 2, 1):
        shape = replace(target, num_layers=max(1, target.num_layers // part))
        fuser = CacheFuser(FuserConfig(source=source, target=shape)).eval()
        layers[str(shape.num_layers)] = _runner(fuser, source, shape, count)
    grown = {
        name: {
            number: statistics.median(times)
            for number, times in in_turn(
                more, config.rounds, f"{pair}, {name}", progress=progress
            ).items()
        }
        for name, more in (("positions", positions), ("layers", layers))
    }
    return {
        "ms": {name: statistics.median(times) for name, times in taken.items()},
        "parameters": {
            name: sum(p.numel() for p in fuser.parameters()) for name, fuser in fusers.items()
        },
        "speed": {name: ratio(taken["peer"], taken[name]) for name in fusers if name != "peer"},
        **grown,
    }


def _build_fusers(
    source: CacheShape, target: CacheShape, hidden_size: int
) -> dict[str, torch.nn.Module]:
    """The peer, the same function in our stacked form, the default, and that at equal width."""
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
    small = FuserConfig(source=source, target=target)
    return {
        "peer": LayerByLayer(source, target, hidden_size, paired_layers(source, target)).eval(),
        "c2c": CacheFuser(stacked).eval(),
        "small": CacheFuser(small).eval(),
        "small, as wide": CacheFuser(replace(small, hidden_size=hidden_size)).eval(),
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

"""How much slower a robot's control loop is with a reader beside it.

python -m mm_c2c.bench.robot [rounds=N] [steps=N] [fps=N]

The policy is the reference source, writing one action token a step on a BabyAI level; the reader
narrates and answers one question through an LLM of SmolLM2-135M's geometry. Their weights say
nothing here: the times are those of trained ones, but for the LLM's answers, which do not end early.
Episodes without and with the reader take turns within one process, and each round gives one ratio,
so that whatever slows the machine slows both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_c2c.bench.rounds import ratio
from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.config import check_at_least_one, from_command_line
from mm_c2c.errors import run_main
from mm_c2c.fuser import FuserConfig
from mm_c2c.geometry import find
from mm_c2c.link import LinkConfig
from mm_c2c.reference.models import SOURCE_FOLDER, SOURCE_NAME, load_source
from mm_c2c.robot import (
    NAMES,
    BackgroundReader,
    CacheReader,
    EpisodeEnd,
    ObservationSpec,
    SourcePolicy,
    Step,
    discrete_actions,
    make_minigrid,
    rename,
    run_episode,
)
from mm_c2c.sources.action import TokenActionSource
from mm_c2c.sources.action_bins import ActionBins
from mm_c2c.target import Target

LEVEL = "BabyAI-GoToLocal-v0"
_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CHAT = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class RobotBenchConfig:
    """Settings.

    Attributes:
        rounds: of an episode without the reader and one with it, after one to warm up.
        steps: of an episode.
        fps: at most so many steps a second; None runs as fast as it goes.
    """

    rounds: int = 7
    steps: int = 40
    fps: float | None = None

    def __post_init__(self) -> None:
        check_at_least_one(self, "rounds", "steps")


def bench(config: RobotBenchConfig) -> dict[str, Any]:
    """Time control steps.

    Returns:
        Plain values: `ms`, the median of a step of each way; `ratio`, with the reader against
        without, as [median, low, high] of the rounds' ratios; `read` and `dropped` snapshots, and
        `latency_ms`, the median age of what was read when it arrived.
    """
    torch.set_num_threads(1)
    env = make_minigrid(LEVEL)
    policy = build_policy()
    steps: dict[str, list[float]] = {"alone": [], "read": []}
    latencies: list[float] = []
    counted = {"read": 0, "dropped": 0}
    with BackgroundReader(build_reader) as reader:
        for turn in range(config.rounds + 1):
            for name, beside in (("alone", None), ("read", reader)):
                times = []
                started = time.perf_counter()
                episode = run_episode(
                    env,
                    policy,
                    beside,
                    observe=rename(NAMES),
                    seed=turn,
                    max_steps=config.steps,
                    fps=config.fps,
                    linger_s=30.0,
                )
                for event in episode:
                    if isinstance(event, Step):
                        times.append(1000 * (time.perf_counter() - started))
                        started = time.perf_counter()
                    elif not turn:
                        continue
                    elif isinstance(event, EpisodeEnd):
                        counted["read"] += event.read
                        counted["dropped"] += event.dropped
                    else:
                        latencies.append(event.latency_ms)
                if turn:
                    steps[name].append(statistics.median(times))
    return {
        "ms": {name: statistics.median(times) for name, times in steps.items()},
        "ratio": ratio(steps["read"], steps["alone"]),
        "latency_ms": statistics.median(latencies) if latencies else None,
        **counted,
        "rounds": config.rounds,
        "steps": config.steps,
        "fps": config.fps,
    }


def build_policy() -> SourcePolicy:
    """The reference source with an action token a step."""
    source = load_source()
    source.model.generation_config.eos_token_id = None  # asked to act, it would rather say nothing
    words = len(source.processor.tokenizer)
    # Every token stands for one of the seven actions.
    bins = ActionBins(vocab_size=words, low=(-0.5,), high=(6.5,), num_bins=words)
    return SourcePolicy(
        source=TokenActionSource(source.model, source.processor, bins, "bench"),
        spec=ObservationSpec(cameras=("front",)),
        to_actions=discrete_actions,
    )


def build_reader() -> CacheReader:
    """Through an LLM of random weights."""
    policy = build_policy()
    tokenizer = AutoTokenizer.from_pretrained(SOURCE_FOLDER)
    tokenizer.chat_template = _CHAT
    model = AutoModelForCausalLM.from_config(find(_LLM).text, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    target = Target(model.requires_grad_(requires_grad=False), tokenizer, _LLM)
    fuser = FuserConfig(source=policy.source.shape, target=target.shape)
    link = LinkConfig(source=SOURCE_NAME, geometry="slots", rows=9, cols=9, fuser=fuser)
    config = BridgeConfig(links=(link,), slot_token="a")
    bridge = Bridge(target, {SOURCE_NAME: policy.source}, config).eval()
    return CacheReader(bridge, policy, questions=("What will it do next?",))


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(bench(from_command_line(RobotBenchConfig, argv))) + "\n")


if __name__ == "__main__":
    run_main(main)

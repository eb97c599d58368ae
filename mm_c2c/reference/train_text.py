"""Train text-to-text fusers together, with models that come out of wheels.

    python -m mm_c2c.reference.train_text configs/text_to_text.yaml [key.sub=value ...]

A config as of `mm-c2c train`, but for its links: each is trained as a bridge of its own, on the
same questions in the same order, and saved in `out/<link>`. What the config calls
`google/gemma-3-270m` and `HuggingFaceTB/SmolLM2-135M-Instruct` is taken from the cache folder
(`mm_c2c.reference.gemma`, `mm-c2c fetch`) and keeps that name, so that a fuser can be loaded where
the models came from the Hub. It runs in one process, on the CPU.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import SourceCache
from mm_c2c.config import DTYPES, from_dict
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms.own_source import own_source
from mm_c2c.reference import gemma
from mm_c2c.reference.fetch import HUB_ID
from mm_c2c.reference.models import load_target
from mm_c2c.reference.trainer import run
from mm_c2c.run_folder import hold
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.text import TextSource
from mm_c2c.target import Target
from mm_c2c.training.config import DropConfig, ModelConfig, TrainingConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.loop import build_accelerator, cosine_rate
from mm_c2c.training.objective import Objective, draw_questions
from mm_c2c.training.run import run_loop


def load_text_source(config: ModelConfig, target: Target) -> TextSource:
    """A text source by its Hub id; the target as its own source shares the model.

    Raises:
        ConfigError: neither Gemma 3 270M nor the target, or the target in another dtype.
        FetchError: Gemma is not there; the message says how to fetch it.
    """
    dtype = DTYPES[config.dtype]
    if config.model == HUB_ID:
        if dtype != target.model.dtype:
            raise ConfigError(
                f"the target as its own source shares the model, which is in {target.model.dtype}; "
                f"its source says {dtype}"
            )
        return own_source(target)
    if config.model != gemma.NAME:
        raise ConfigError(f"expected source {gemma.NAME} or {HUB_ID}, got {config.model!r}")
    folder = gemma.gemma_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # No revision: the 4-bit copy and the Hub's weights both serve.
    return TextSource(model, tokenizer, config.model)


class Together:
    """Fusers into one target, each trained as if it were alone, on the same questions.

    The target's reading of a question, and a source's, are theirs whatever is fused; each is made
    once for all fusers. Their losses are added, and no weight has a part in two of them.

    Alone but for clipping, which is by the norm of all gradients together.

    Args:
        config: settings; each link becomes a bridge of its own, under the link's name.
        target: the frozen target.
        sources: the frozen sources, by name.

    Raises:
        ConfigError: a setting of `mm-c2c train` that this trainer has not.
    """

    def __init__(
        self, config: TrainingConfig, target: Target, sources: dict[str, TextSource]
    ) -> None:
        _check_plain(config)
        self.config, self.target, self.sources = config, target, sources
        shapes = {name: source.shape for name, source in sources.items()}
        links = config.build_links(shapes, target.shape)
        self.bridges = {}
        for name, link in zip(config.links, links, strict=True):
            torch.manual_seed(config.seed)
            prompt = BridgeConfig(links=(link,), system=config.system, slot_token=config.slot_token)
            self.bridges[name] = Bridge(target, {link.source: sources[link.source]}, prompt)
        self.fusers = nn.ModuleDict({name: b.fusers for name, b in self.bridges.items()})
        self.examples = open_examples(config.data, config.seed)
        self._losses: dict[str, list[float]] = {name: [] for name in self.bridges}

    def loss(self, number: int, rng: random.Random) -> Tensor:
        """Of a step; which examples it sees is a matter of its number alone."""
        size = self.config.batch_size
        places = range(number * size, (number + 1) * size)
        examples = [self.examples.at(place) for place in places]
        rngs = [random.Random(f"{self.config.seed}/{place}") for place in places]
        asked = draw_questions(examples, rngs, 1)
        questions = [turn.question.strip() for turn in asked.turns]
        looks = [SourceInput(text=question) for question in questions]
        with torch.no_grad():
            reading = next(iter(self.bridges.values())).read_questions(questions)
            caches = {name: self.prefill(name, looks) for name in self.sources}
        losses = []
        for name, bridge in self.bridges.items():
            fused = bridge.fuse_words(reading, {n: caches[n] for n in bridge.sources})
            objective = Objective(bridge, self.prefill, self.config.drop)
            losses.append(objective.generate(fused, asked))
            self._losses[name].append(float(losses[-1].detach()))
        return torch.stack(losses).sum()

    def prefill(self, name: str, looks: Sequence[SourceInput]) -> SourceCache:
        """What a source makes of inputs."""
        return self.sources[name].prefill(looks)

    def rate(self, step: int) -> float:
        """A warm-up and a cosine to zero."""
        phase = self.config.phases.generate
        return cosine_rate(step, phase.warmup, phase.steps)

    def gauges(self, seconds: float) -> dict[str, float]:
        """Columns of the log: each fuser's own loss."""
        means = {name: sum(found) / len(found) for name, found in self._losses.items()}
        self._losses = {name: [] for name in self.bridges}
        return means

    def save(self, weights: Mapping[str, Tensor]) -> None:
        """Each bridge in a folder of its own."""
        for name, bridge in self.bridges.items():
            own = {
                key.removeprefix(f"{name}."): weight
                for key, weight in weights.items()
                if key.startswith(f"{name}.")
            }
            bridge.save_pretrained(self.config.out / name, weights=own)


def _check_plain(config: TrainingConfig) -> None:
    """Refuse what would be left undone."""
    left = vars(DropConfig(sources=0.0))
    plain = {
        "start": config.start is None,
        "phases.reconstruct.steps": not config.phases.reconstruct.steps,
        "phases.generate.distill": not config.phases.generate.distill,
        **{f"drop.{name}": value == left[name] for name, value in vars(config.drop).items()},
        "frozen": not config.frozen,
        "packed": not config.packed,
        "data.questions": config.data.questions == 1,
        "accumulation": config.accumulation == 1,
        "precision": config.precision == "fp32",
        "kept": config.kept is None,
        "tracking": not config.tracking,
    }
    if set_all := [name for name, left_alone in plain.items() if not left_alone]:
        raise ConfigError(
            f"fusers that are trained together take no {', '.join(set_all)}; set it as "
            "configs/text_to_text.yaml has it, or train one link with mm-c2c train"
        )


def train(config: TrainingConfig) -> None:
    """Run, or go on with, one training.

    Raises:
        ConfigError: other models than this trainer knows.
    """
    if config.target.model != HUB_ID:
        raise ConfigError(f"expected target {HUB_ID}, got {config.target.model!r}")
    accelerator = build_accelerator(config.out, cpu=True)
    with hold(config.out):
        target = load_target(dtype=DTYPES[config.target.dtype])
        sources = {name: load_text_source(model, target) for name, model in config.sources.items()}
        run_loop(config, accelerator, Together(config, target, sources))


def load_bridges(folder: Path) -> dict[str, Bridge]:
    """The bridges that a training wrote, by the names of its links, on models as it had them.

    Raises:
        ConfigError: no training was written there.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{folder} holds no training of mm_c2c.reference.train_text: it has no config.json"
        )
    config = from_dict(TrainingConfig, json.loads(path.read_text(encoding="utf-8")))
    target = load_target(dtype=DTYPES[config.target.dtype])
    sources = {name: load_text_source(model, target) for name, model in config.sources.items()}
    links = {name: link.get("source", name) for name, link in config.links.items()}
    return {
        name: Bridge.from_pretrained(folder / name, target, {source: sources[source]})
        for name, source in links.items()
    }


if __name__ == "__main__":
    run(TrainingConfig, train)

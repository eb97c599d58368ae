"""`mm-c2c train CONFIG --dry-run`: the same training on random weights, and what it would cost.

The frozen models are built from their published geometry (`mm_c2c.geometry`): no weights, no data
and no tokenizer are needed. Narrow ones by default, for which six layers of little width stand;
in their published width with `--true-width`. Sources are their text decoders over random
embeddings: the vision tower is left out, in the steps and in what they cost.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from mm_c2c.cache import CacheOrigin, CacheShape, PatchGrid, PositionKind, SourceCache, read_layers
from mm_c2c.config import DTYPES
from mm_c2c.fuser import CacheFuser
from mm_c2c.geometry import Geometry, find, training_memory
from mm_c2c.link import LinkConfig
from mm_c2c.sources.base import SourceInput, full_cache
from mm_c2c.target import Target
from mm_c2c.training.config import GenerateConfig, PhasesConfig, TrainingConfig
from mm_c2c.training.data import Example, Turn
from mm_c2c.training.loop import build_accelerator, memory_bytes
from mm_c2c.training.optimizers import build_optimizers
from mm_c2c.training.run import Trainer

STEPS = 3
# Tokens that costs are reckoned with, where the data is not looked at.
QUESTION, ANSWER, DESCRIPTION = 16, 8, 48
SUSTAINED_TFLOPS = 40
"""What a run's time is reckoned with: a quarter of an RTX 4090's 165 dense bfloat16 TFLOP/s."""
_LAYERS, _INNER, _VOCAB, _PICTURE = 6, 64, 512, 64
_CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n' }}"


def dry_run(config: TrainingConfig, *, true_width: bool = False) -> dict[str, Any]:
    """Train three steps, of both phases where the config has both.

    Returns:
        Plain values: `losses`, `seconds_a_step`, `memory_bytes` (measured), `parameters` of the
        fuser in its published width, and from `estimate`: `flop`, `hours` and `true_memory_bytes`.

    Raises:
        InputError: a model whose geometry is not known.
    """
    original = config
    quiet = GenerateConfig(steps=config.phases.generate.steps or 1, warmup=0)
    phases = PhasesConfig(reconstruct=config.phases.reconstruct, generate=quiet)
    trainer = blank_trainer(replace(config, phases=phases, kept=None), true_width=true_width)
    config, accelerator = trainer.config, trainer.accelerator
    fusers = trainer.bridge.fusers
    optimizers = build_optimizers(fusers, config.optimizer.learning_rate, config.optimizer.name)
    losses, seconds = [], []
    for step in (0, *range(phases.steps - STEPS + 1, phases.steps)):
        started = time.perf_counter()
        found = 0.0
        for piece in range(config.accumulation):
            with accelerator.autocast():
                number = max(step, 0) * config.accumulation + piece
                cost = trainer.loss(number, random.Random(0)) / config.accumulation
            cost.backward()
            found += cost.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
        seconds.append(time.perf_counter() - started)
    return {
        "losses": losses,
        "seconds_a_step": min(seconds[1:]),
        "memory_bytes": memory_bytes(accelerator),
        "true_width": true_width,
        "steps": phases.steps,
        **estimate(original),
    }


def blank_trainer(config: TrainingConfig, *, true_width: bool = False) -> Trainer:
    """What a config trains, on random weights and blank examples; narrow ones two at a time."""
    target, sources = _geometries(config)
    links = _links(config, sources, target)
    config = replace(config, start=None)
    if not true_width:
        narrow_links = {
            name: {**link, "fuser": {**link.get("fuser", {}), "hidden_size": _INNER}}
            for name, link in config.links.items()
        }
        config = replace(config, links=narrow_links, batch_size=2, accumulation=1)
    accelerator = build_accelerator(config.out, precision=config.precision)
    blank = {
        name: BlankSource(
            model,
            [link for link in links if link.source == name],
            config.sources[name].dtype,
            true_width=true_width,
        )
        for name, model in sources.items()
    }
    answering = _blank_target(target, config, true_width=true_width)
    return Trainer(config, accelerator, answering, blank, _Blank())


def estimate(config: TrainingConfig) -> dict[str, Any]:
    """What a whole run costs at its published width, reckoned and not measured.

    A frozen model costs 2 operations a weight and token to read, and 2 more where gradients run
    through it (Kaplan et al., arXiv:2001.08361, without the gradients of weights); the fuser's
    weights cost 6 at each position that is fused. Gradients run through questions and answers.
    Sources read a picture, or a question, in each step: what kept caches save is not counted.
    """
    target, sources = _geometries(config)
    links = _links(config, sources, target)
    slots = sum(link.num_slots for link in links)
    questions = config.data.questions
    asked = questions * (QUESTION + ANSWER)
    with torch.device("meta"):
        fuser = sum(CacheFuser(link.fuser).num_parameters for link in links)
    fused = sum(link.num_slots or questions * QUESTION for link in links)
    read = sum(
        2 * sources[link.source].num_parameters * _positions(link, sources[link.source], questions)
        for link in links
    )
    generate = 4 * target.num_parameters * asked + 6 * fuser * fused + read
    told = 2 * target.num_parameters * questions * (DESCRIPTION + QUESTION + ANSWER)
    phases = config.phases
    flop = config.batch_size * (phases.steps * generate + phases.reconstruct.steps * told)
    rows = config.batch_size // config.accumulation * questions
    memory = training_memory(
        fuser, next(iter(sources.values())), target, rows, slots + QUESTION + ANSWER
    )
    return {
        "parameters": fuser,
        "flop": flop,
        "hours": flop / (SUSTAINED_TFLOPS * 1e12) / 3600,
        "true_memory_bytes": memory.total,
    }


def text_table(result: dict[str, Any]) -> str:
    """For a terminal."""
    width = "published width" if result["true_width"] else "narrow"
    steps, seconds = result["steps"], result["seconds_a_step"]
    lines = [
        f"{STEPS} steps on random weights ({width}), losses "
        + ", ".join(f"{loss:.3f}" for loss in result["losses"]),
        f"measured here: {seconds:.2f} s a step, {result['memory_bytes'] / 1e9:.2f} GB",
    ]
    if result["true_width"]:
        lines.append(f"so that {steps:,} steps take {steps * seconds / 3600:.1f} h here")
    lines.append(
        f"estimated for the whole run at published width: fuser of {result['parameters']:,} "
        f"parameters, {result['flop']:.1e} FLOP, {result['hours']:.1f} h at {SUSTAINED_TFLOPS} "
        f"TFLOP/s sustained, {result['true_memory_bytes'] / 1e9:.0f} GB; without vision towers"
    )
    return "\n".join(lines)


class BlankSource:
    """A text decoder of random weights, over random embeddings in the place of what it is shown.

    Args:
        geometry: the published model.
        links: what its positions must be good for.
        dtype: of its weights.
        true_width: whether to keep the published width.
    """

    def __init__(
        self, geometry: Geometry, links: Sequence[LinkConfig], dtype: str, *, true_width: bool
    ) -> None:
        text = geometry.text if true_width else narrow(geometry.text)
        self.model: Any = _build(AutoModel, text, dtype if true_width else "float32")
        self.links = links
        tokens = geometry.picture_tokens or 0
        self.side = math.isqrt(tokens if true_width else min(tokens, _PICTURE))
        self.has_pictures = bool(self.side)
        self.origin = CacheOrigin(geometry.name, None, geometry.model_type)

    @property
    def shape(self) -> CacheShape:
        """Geometry of its caches."""
        return self.prefill([SourceInput()]).shape

    @torch.no_grad()
    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Positions of each kind that the links read: patches, others by their kind, words."""
        images = max(link.images for link in self.links)
        patches = [
            (image, row, col)
            for image in range(images if self.side else 0)
            for row in range(self.side)
            for col in range(self.side)
        ]
        named = {PositionKind[kind.upper()] for link in self.links for kind in link.kinds}
        others = [kind for kind in sorted(named) for link in self.links for _ in range(link.cols)]
        words = max(len(item.text) for item in inputs)
        batch, before = len(inputs), 1 + len(patches) + len(others)
        kinds = torch.full((batch, before + words), PositionKind.TEMPLATE)
        where = torch.full((batch, before + words, 3), -1)
        spans = torch.full((batch, before + words, 2), -1)
        kinds[:, 1 : before - len(others)] = PositionKind.IMAGE
        where[:, 1 : 1 + len(patches)] = torch.tensor(patches).reshape(-1, 3)
        kinds[:, before - len(others) : before] = torch.tensor(others, dtype=torch.long)
        for row, item in enumerate(inputs):
            count = len(item.text)
            spans[row, before : before + count, 0] = torch.arange(count)
            spans[row, before : before + count, 1] = torch.arange(count) + 1
            kinds[row, before : before + count] = PositionKind.TEXT
        device, dtype = self.model.device, self.model.dtype
        size = (batch, kinds.shape[1], self.model.config.hidden_size)
        cache = full_cache(self.model)
        self.model(
            inputs_embeds=torch.randn(size, device=device, dtype=dtype),
            past_key_values=cache,
            use_cache=True,
        )
        layers, indices = read_layers(cache)
        grids = tuple(PatchGrid(self.side, self.side, image) for image in range(images))
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=torch.arange(kinds.shape[1]).expand(batch, -1).to(device),
            kinds=kinds.to(device),
            patches=where.to(device),
            grids=(grids if self.side else (),) * batch,
            spans=spans.to(device),
            texts=tuple(item.text.strip() for item in inputs),
            rope=(None,) * len(layers),  # what is random is so however it is turned
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """Nothing, as long as an answer."""
        return ["x" * ANSWER] * len(inputs)


def narrow(text: Any) -> Any:
    """A config of the same family, of few layers of little width."""
    small = copy.deepcopy(text)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    small.num_key_value_heads = min(heads, 2)
    small.num_attention_heads = 2 * small.num_key_value_heads
    small.head_dim = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ) // 4
    small.num_hidden_layers = min(text.num_hidden_layers, _LAYERS)
    if getattr(text, "layer_types", None):
        small.layer_types = text.layer_types[: small.num_hidden_layers]
    # As some families have it, whatever head_dim says.
    small.hidden_size = small.num_attention_heads * small.head_dim
    small.intermediate_size, small.vocab_size = _INNER, _VOCAB
    sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    if sections:
        small.rope_parameters = {
            **text.rope_parameters,
            "mrope_section": [section // 4 for section in sections],
        }
    return small


class _Blank:
    """Examples of the usual length, all alike but for their number."""

    def at(self, position: int) -> Example:
        """See `Examples`."""
        turns = [Turn(f"{place}".zfill(QUESTION), "x" * ANSWER) for place in range(16)]
        return Example(
            images=(),
            text=f"{position:04d}",
            state=(),
            turns=tuple(turns),
            description="x" * DESCRIPTION,
        )


def _blank_target(geometry: Geometry, config: TrainingConfig, *, true_width: bool) -> Target:
    text = geometry.text if true_width else narrow(geometry.text)
    dtype = config.target.dtype if true_width else "float32"
    model = _build(AutoModelForCausalLM, text, dtype)
    return Target(model, _byte_tokenizer(config.slot_token), geometry.name)


def _build(kind: Any, text: Any, dtype: str) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(text, dtype=DTYPES[dtype])
    return model.eval().requires_grad_(requires_grad=False)


def _byte_tokenizer(slot_token: str) -> PreTrainedTokenizerFast:
    """A token a byte, and one for the slots."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.add_tokens([slot_token])
    tokenizer.chat_template = _CHAT
    return tokenizer


def _geometries(config: TrainingConfig) -> tuple[Geometry, dict[str, Geometry]]:
    """The target's and the sources', as published."""
    sources = {name: find(model.model) for name, model in config.sources.items()}
    return find(config.target.model), sources


def _links(
    config: TrainingConfig, sources: dict[str, Geometry], target: Geometry
) -> tuple[LinkConfig, ...]:
    shapes = {name: model.layout.shape for name, model in sources.items()}
    return config.build_links(shapes, target.layout.shape)


def _positions(link: LinkConfig, source: Geometry, questions: int) -> int:
    """What a source reads for an example."""
    if link.geometry == "aligned":
        return questions * QUESTION
    return link.images * (source.picture_tokens or 0) + (link.cols if link.kinds else 0)

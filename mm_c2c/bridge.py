"""`Bridge`: sources, fusers and a target; a picture goes in, the frozen target answers.

The target's prompt is `before · slots · question · tail`. `perceive` makes the cache of the first
two parts once; `fuse` adds a question and gives everything that `target.generate` takes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from mm_c2c.align import Alignment
from mm_c2c.align.patches import (
    PatchResampler,
    ResamplerConfig,
    align_all,
    align_pooled,
    line_up,
    patch_coordinates,
)
from mm_c2c.align.tokens import align_tokens, locate_text, token_spans
from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    fork,
    join_rows,
    minds_padding,
    read_layers,
    repeat_rows,
    select_rows,
    with_layers,
)
from mm_c2c.config import from_dict
from mm_c2c.errors import (
    AlignmentError,
    ConfigError,
    InputError,
    MismatchError,
    ShapeError,
    UnsupportedError,
)
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.rope import RopeSpec, derotate, rotate
from mm_c2c.sources.base import FrozenReader, Source, SourceInput, count_positions, full_cache
from mm_c2c.sources.text import render_chat

GEOMETRIES = ("slots", "aligned")
POOLINGS = ("window", "resampler")
KINDS = tuple(kind.name.lower() for kind in PositionKind if kind != PositionKind.PAD)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# Stands for the slots while the chat template is rendered; no tokenizer ever sees it.
_SLOTS_MARK = "\ufffc"
# Tokens of each half of the prompt that tells whether a model goes on from its cache.
_PIECE = 8
# Known to give wrong output over a prefilled cache in transformers 5.23, without an error.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """One way from a source into the target.

    Attributes:
        source: name of the source.
        geometry: `slots` gives a picture, or other positions of the source, places of their own
            in the target's prompt; `aligned` adds to the words that both models read.
        fuser: the fuser's shape.
        rows: rows of slots a picture gets.
        cols: columns of slots a picture gets.
        images: pictures a row of the batch shows the source, such as a robot's cameras or the
            frames of a video; the slots of one follow those of the other. For `slots` only.
        pooling: what a slot takes of a picture's patches: `window` averages those of the finest
            view that lie where the slot lies; `resampler` learns, for each slot, what to look for
            in all of them, also where a source's queries have no place. For `slots` only.
        kinds: what the slots draw on in place of patches: positions of these kinds, such as
            `("state", "action")`, as a picture of one row in the prompt's order. With rows 1 and
            cols their number, a position gets a slot; fewer are pooled. For `slots` only.
    """

    source: str
    geometry: str
    fuser: FuserConfig
    rows: int = 4
    cols: int = 4
    images: int = 1
    pooling: str = "window"
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("geometry", GEOMETRIES), ("pooling", POOLINGS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.geometry == "aligned" and self.pooling == "resampler":
            raise ConfigError(
                "pooling 'resampler' shares patches among slots, and geometry 'aligned' has none; "
                "leave pooling at 'window' or set geometry to 'slots'"
            )
        for name in ("rows", "cols", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.geometry == "aligned" and self.images > 1:
            raise ConfigError(
                f"images counts pictures that get slots, and geometry 'aligned' has none, got "
                f"{self.images}; leave images at 1, the source may see any number"
            )
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or len(set(self.kinds)) != len(self.kinds):
            raise ConfigError(
                f"kinds must be some of {', '.join(KINDS)}, each once, got {', '.join(self.kinds)}"
            )
        if self.kinds and (self.geometry, self.rows, self.images) != ("slots", 1, 1):
            raise ConfigError(
                f"positions of kind {' and '.join(self.kinds)} stand in one line: expected geometry "
                f"'slots', rows 1 and images 1, got {self.geometry!r}, {self.rows} and "
                f"{self.images}; set cols to the number of slots"
            )

    @property
    def name(self) -> str:
        """What the link's weights are saved under."""
        return "_".join([self.source, self.geometry, *self.kinds])

    @property
    def num_slots(self) -> int:
        """Slots a row of the batch gets."""
        return self.images * self.rows * self.cols if self.geometry == "slots" else 0


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Links, and how the target is prompted.

    Attributes:
        links: in the order in which their slots stand.
        system: the system message; None leaves it to the chat template.
        slot_token: one token of the target's vocabulary; the fuser's difference is added to what
            the target makes of it.
    """

    links: tuple[LinkConfig, ...]
    system: str | None = None
    slot_token: str = " image"

    def __post_init__(self) -> None:
        names = [link.name for link in self.links]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"expected one link or more, no two alike, got {names}")


class Perception(NamedTuple):
    """What the sources saw, in the target's cache: ask it any number of questions.

    Attributes:
        input_ids: `(batch, prefix_len)`: the prompt up to the last slot.
        past_key_values: the target's fused cache of those positions.
    """

    input_ids: Tensor
    past_key_values: Cache

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.input_ids.shape[0]


class FuserInputs(NamedTuple):
    """What a link's fuser is given.

    Attributes:
        source: `(source_layers, batch, target_len, 2, source_width)`: aligned K and V.
        target: `(target_layers, batch, target_len, 2, target_width)`: the target's own.
        alignment: which source positions each of those came from.
    """

    source: Tensor
    target: Tensor
    alignment: Alignment


class FusedInputs(TypedDict):
    """Everything that `target.generate` takes; the cache covers all but the last few tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    past_key_values: Cache


class Target(FrozenReader):
    """The frozen text LLM that answers.

    Args:
        model: a causal LM.
        tokenizer: its fast tokenizer.
        name: Hub id or folder.
        revision: the Hub's commit, where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, name, revision)
        self.tokenizer = tokenizer

    @cached_property
    def minds_padding(self) -> bool:
        """Whether padding amid a prompt is felt: a window counts it, a recurrent state reads it."""
        return minds_padding(DynamicCache(config=self.model.config))

    @torch.no_grad()
    def check_continues(self) -> None:
        """Refuse a model that reads a prompt in two pieces otherwise than in one.

        Slots are read before the question. Some models with recurrent layers start afresh with the
        second piece, and transformers does not say so.
        """
        ids = torch.arange(1, 2 * _PIECE + 1, device=self.model.device).unsqueeze(0)
        whole = self.model(ids).logits[:, -1].float()
        cache = full_cache(self.model)
        self.model(ids[:, :_PIECE], past_key_values=cache)
        pieces = self.model(ids[:, _PIECE:], past_key_values=cache).logits[:, -1].float()
        misfit = float((pieces - whole).norm() / whole.norm())
        accepted = max(1e-4, 8 * torch.finfo(self.model.dtype).eps)
        if not misfit <= accepted:
            raise UnsupportedError(
                f"{self} does not go on where its cache ends: a prompt read in two pieces gives "
                f"logits {misfit:.2%} off those of one piece, accepted is {accepted:.2%}; it can "
                "be a source, not a target"
            )


class Bridge(nn.Module):
    """Sources, the fusers that are trained, and the target.

    Args:
        target: the LLM that answers.
        sources: by the names that the links use.
        config: links and prompt.
    """

    def __init__(self, target: Target, sources: Mapping[str, Source], config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        # Plain attributes: the frozen models are no submodules, are not saved and never trained.
        self.target = target
        self.sources = dict(sources)
        for link in config.links:
            if link.source not in sources:
                raise ConfigError(
                    f"a link names source {link.source!r}; sources given: {sorted(sources)}"
                )
            _check_shape(f"source {link.source!r}", link.fuser.source, sources[link.source].shape)
            _check_shape("the target", link.fuser.target, target.shape)
        if target.minds_padding:
            target.check_continues()
        self.fusers = nn.ModuleDict(
            {link.name: CacheFuser(link.fuser, _build_resampler(link)) for link in config.links}
        )
        ids = target.tokenizer(config.slot_token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(
                f"slot_token {config.slot_token!r} is {len(ids)} tokens of the target; choose one "
                "that is a single token"
            )
        self._slot_id = ids[0]
        self._prefix_memo: dict[tuple[int, ...], Cache] = {}

    # --- what the sources saw -------------------------------------------------------------

    def perceive(
        self,
        inputs: Image.Image | SourceInput | Sequence[Image.Image | SourceInput],
        text: str = "",
    ) -> Perception:
        """Look once: prefill the sources and fuse their slots.

        Args:
            inputs: a picture, or one for each row of a batch; a `SourceInput` in a picture's place
                where a source needs more, such as several pictures or a robot's state.
            text: what the sources read beside each picture; empty leaves them question-blind.

        Raises:
            InputError: `text` beside a `SourceInput`, which has its own.
        """
        given = [inputs] if isinstance(inputs, Image.Image | SourceInput) else inputs
        rows = []
        for row, item in enumerate(given):
            if not isinstance(item, SourceInput):
                rows.append(SourceInput(text=text, images=(item,)))
            elif not text:
                rows.append(item)
            else:
                raise InputError(
                    f"row {row} is a SourceInput, which has a text of its own ({item.text!r}); put "
                    f"{text!r} there"
                )
        named = {link.source for link in self.config.links if link.geometry == "slots"}
        with torch.no_grad():
            return self.fuse_slots({name: self.sources[name].prefill(rows) for name in named})

    def fuse_slots(
        self, caches: Mapping[str, SourceCache], keep: Mapping[str, Tensor] | None = None
    ) -> Perception:
        """Fuse source caches into the slots of the target's prompt.

        Args:
            caches: by source name; the slots of a source that is absent are left out.
            keep: by link name, `(batch, slots)` bool: slots that are fused, while the others stay
                the target's own; links that are not named are fused whole.
        """
        self._check_names(caches)
        links = [link for link in self.config.links if link.num_slots and link.source in caches]
        sizes = {caches[link.source].batch_size for link in links} or {1}
        if len(sizes) > 1:
            raise ShapeError(f"the sources' caches differ in batch size: {sorted(sizes)}")
        batch = sizes.pop()
        before, _ = self._template()
        ids = list(before)
        places = {}
        for link in links:
            places[link.name] = range(len(ids), len(ids) + link.num_slots)
            ids += [self._slot_id] * link.num_slots
        cache = repeat_rows(self._prefill_prefix(tuple(ids)), batch)
        # Without slots and without a system prompt there are none.
        input_ids = torch.tensor(ids, dtype=torch.long, device=self.device).expand(batch, -1)
        positions = torch.arange(len(ids), device=self.device).expand(batch, -1)
        for link in links:
            source = caches[link.source]
            index = torch.tensor(places[link.name], device=self.device).expand(batch, -1)
            alignment = self._align_slots(link, source, index)
            if keep and link.name in keep:
                alignment = replace(alignment, mask=alignment.mask & keep[link.name])
            cache = self._write(link, source, alignment, cache, positions)
        return Perception(input_ids, cache)

    def slot_inputs(self, link: LinkConfig, source: SourceCache) -> FuserInputs:
        """What the fuser of a link with slots is given, were it the only link; for a look inside.

        Args:
            link: one of the bridge's own.
            source: the source's cache.
        """
        before, _ = self._template()
        ids = (*before, *[self._slot_id] * link.num_slots)
        positions = torch.arange(len(ids), device=self.device).expand(source.batch_size, -1)
        cache = repeat_rows(self._prefill_prefix(ids), source.batch_size)
        alignment = self._align_slots(link, source, positions[:, len(before) :])
        return self._fuser_inputs(link, source, alignment, cache, positions)

    # --- questions ------------------------------------------------------------------------

    def fuse(
        self,
        perception: Perception | None,
        questions: Sequence[str],
        caches: Mapping[str, SourceCache] | None = None,
    ) -> FusedInputs:
        """Add a question to each row, and fuse the words that sources have read too.

        Args:
            perception: from `perceive`; a row serves as many questions as the others, which
                follow each other. None asks without slots.
            questions: one, or several, for each perceived row.
            caches: for `aligned` links, the sources' caches of the same questions.

        Returns:
            What `target.generate` takes. Hand it a copy of the cache to use it twice: generating
            grows it. Shorter questions are padded before the question; in front of the prompt
            where the target would feel that (`Target.minds_padding`), and then the cache covers
            all but the last token.
        """
        if isinstance(questions, str) or not questions:
            raise InputError(
                f"expected a list of questions, got the text {questions!r}"
                if questions
                else "expected at least one question, got none"
            )
        for question in questions:
            if not question.strip():
                raise InputError("the question is empty; ask something")
        caches = caches or {}
        self._check_names(caches)
        perception = perception or self.fuse_slots({})
        if not questions or len(questions) % perception.batch_size:
            raise ShapeError(
                f"{perception.batch_size} perceived rows cannot answer {len(questions)} questions: "
                "give as many for each row"
            )
        repeats = len(questions) // perception.batch_size
        cache = repeat_rows(perception.past_key_values, repeats)
        ids, mask, spans = self._question_ids(questions)
        prefix = perception.input_ids[:1].expand(len(questions), -1)
        input_ids = torch.cat([prefix, ids], dim=1)
        attention_mask = torch.cat([torch.ones_like(prefix), mask], dim=1)
        spans = torch.cat([spans.new_full((*prefix.shape, 2), -1), spans], dim=1)
        if self.target.minds_padding and not mask.all():
            # Padding between prefix and question would be felt; in front of both it is not.
            order = attention_mask.argsort(dim=1, stable=True)
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
            spans = spans.gather(1, order.unsqueeze(2).expand_as(spans))
            cache = self._prefill_by_length(cache, input_ids, attention_mask)
        links = [
            link
            for link in self.config.links
            if link.geometry == "aligned" and link.source in caches
        ]
        if links:
            cache = self._prefill_rest(cache, input_ids, attention_mask)
            positions = count_positions(attention_mask)[:, :-1]
            for link in links:
                source = caches[link.source]
                _check_texts(link.source, source.texts, questions)
                alignment = align_tokens(
                    source.spans,
                    spans[:, :-1],
                    _answer_start(source.kinds != 0),
                    _answer_start(attention_mask[:, :-1] != 0),
                )
                cache = self._write(link, source, alignment, cache, positions)
        return FusedInputs(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache
        )

    @torch.no_grad()
    def generate(
        self,
        perception: Perception | None,
        questions: Sequence[str],
        caches: Mapping[str, SourceCache] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer by `target.generate(**kwargs)`; several sequences a question follow each other."""
        fused = self.fuse(perception, questions, caches)
        out = self._generate(fused, **kwargs)
        return self.target.tokenizer.batch_decode(
            out[:, fused["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def stream(
        self,
        perception: Perception | None,
        question: str,
        caches: Mapping[str, SourceCache] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Answer one question, piece by piece as it is decoded."""
        with torch.no_grad():
            fused = self.fuse(perception, [question], caches)
        streamer = TextIteratorStreamer(
            self.target.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failure: list[BaseException] = []

        def run() -> None:
            try:
                with torch.no_grad():
                    self._generate(fused, streamer=streamer, **kwargs)
            except BaseException as error:  # noqa: BLE001, raised again in the caller's thread
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        yield from streamer
        worker.join()
        if failure:
            raise failure[0]

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.target.model.device

    # --- files ----------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the fusers and the references of the frozen models; nothing else.

        Args:
            folder: made if it is not there.
            dtype: of the saved weights; float16 halves the file.
            weights: of `fusers`, where a training that is spread over processes has gathered them;
                None takes what this bridge holds.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = self.fusers.state_dict() if weights is None else weights
        weights = {k: v.detach().to(dtype).contiguous() for k, v in found.items()}
        header = {
            "format": 1,
            "bridge": asdict(self.config),
            "target": self.target.origin._asdict(),
            "sources": {name: s.origin._asdict() for name, s in self.sources.items()},
        }
        scratch = folder / (WEIGHTS_NAME + ".part")
        save_file(weights, scratch, {"format": "pt"})
        scratch.replace(folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, target: Target, sources: Mapping[str, Source]
    ) -> Bridge:
        """Load fusers for exactly the models they were trained for.

        Raises:
            MismatchError: a file is missing or damaged, or the fusers belong to other models.
        """
        folder = Path(folder)
        header = read_header(folder)
        _check_origin("target", header["target"], target.origin)
        for name, origin in header["sources"].items():
            if name not in sources:
                raise MismatchError(f"{folder} needs a source named {name!r} ({origin['model']})")
            _check_origin(f"source {name!r}", origin, sources[name].origin)
        bridge = cls(target, sources, from_dict(BridgeConfig, header["bridge"]))
        bridge.fusers.load_state_dict(_read_weights(folder / WEIGHTS_NAME, bridge.fusers))
        return bridge.eval()

    # --- inside ---------------------------------------------------------------------------

    def _check_names(self, caches: Mapping[str, SourceCache]) -> None:
        unknown = sorted(set(caches) - set(self.sources))
        if unknown:
            raise ConfigError(
                f"no source named {unknown}; known: {', '.join(sorted(self.sources))}"
            )

    def _template(self) -> tuple[list[int], str]:
        """Tokens before the slots, and the text after the question."""
        rendered = render_chat(self.target.tokenizer, f"{_SLOTS_MARK}?", self.config.system)
        before, _, after = rendered.partition(_SLOTS_MARK)
        ids = self.target.tokenizer(before, add_special_tokens=False)["input_ids"]
        return ids, after[1:]

    def question_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """What follows the slots: each question, and what the chat template puts behind it."""
        return [self._tokens(text) for text in self._question_texts(questions)]

    def _question_texts(self, questions: Sequence[str]) -> list[str]:
        _, tail = self._template()
        return [f"\n{question.strip()}{tail}" for question in questions]

    def _tokens(self, text: str) -> list[int]:
        return self.target.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _question_ids(self, questions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded `input_ids` and mask after the slots, and spans in each question."""
        tokenizer = self.target.tokenizer
        asked = [question.strip() for question in questions]
        texts = self._question_texts(questions)
        rows = [self._tokens(text) for text in texts]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        spans = torch.full((len(rows), width, 2), -1)
        for row, (tokens, text, question) in enumerate(zip(rows, texts, asked, strict=True)):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
            spans[row, width - len(tokens) :] = locate_text(
                token_spans(tokenizer, text), text, question, start=1
            )
        return ids.to(self.device), mask.to(self.device), spans.to(self.device)

    def _prefill_prefix(self, ids: tuple[int, ...]) -> Cache:
        """The target's own cache of a fixed prefix: a pure function of the ids, kept."""
        if ids not in self._prefix_memo:
            cache = full_cache(self.target.model)
            if ids:
                with torch.no_grad():
                    self.target.model(
                        torch.tensor([ids], device=self.device),
                        past_key_values=cache,
                        **self.target.spared,
                    )
            self._prefix_memo[ids] = cache
        return self._prefix_memo[ids]

    def _prefill_rest(self, cache: Cache, input_ids: Tensor, mask: Tensor) -> Cache:
        """The target reads on, up to all but the last token."""
        cache = fork(cache)
        done = cache.get_seq_length()
        if done < input_ids.shape[1] - 1:
            self.target.model(
                input_ids[:, done:-1],
                attention_mask=mask[:, :-1],
                position_ids=count_positions(mask)[:, done:-1],
                past_key_values=cache,
                **self.target.spared,
            )
        return cache

    def _prefill_by_length(self, cache: Cache, input_ids: Tensor, mask: Tensor) -> Cache:
        """As `_prefill_rest`, for rows padded in front of what the cache holds already."""
        padding = (mask == 0).sum(1)
        parts, order = [], []
        for count in padding.unique().tolist():
            rows = (padding == count).nonzero().flatten()
            ids, real = input_ids[rows, count:], mask[rows, count:]
            parts.append(self._prefill_rest(select_rows(cache, rows), ids, real))
            order.append(rows)
        return select_rows(join_rows(parts), torch.cat(order).argsort())

    def _align_slots(self, link: LinkConfig, source: SourceCache, index: Tensor) -> Alignment:
        """What each slot takes of its row's patches; `index` as in `align_pooled`."""
        if link.kinds:
            source = line_up(source, [PositionKind[kind.upper()] for kind in link.kinds])
        _check_pictures(link, source)
        if link.pooling == "window":
            return align_pooled(source, PatchGrid(link.rows, link.cols), index, image=None)
        resampler: Any = self.fusers[link.name].resampler
        states = _source_states(link, source).flatten(2)
        alignment = align_all(source, link.rows * link.cols, index, image=None)
        return resampler(states, patch_coordinates(source), alignment)

    def _write(
        self,
        link: LinkConfig,
        source: SourceCache,
        alignment: Alignment,
        cache: Cache,
        positions: Tensor,
    ) -> Cache:
        """A cache in which one link's fuser has written its differences."""
        inputs = self._fuser_inputs(link, source, alignment, cache, positions)
        delta = self.fusers[link.name](inputs.source, inputs.target)
        layers, indices = read_layers(cache)
        own, index = _stack(layers), alignment.target_index
        delta = delta.unflatten(-1, (own.shape[2], -1)).permute(0, 1, 4, 2, 3, 5)
        delta_keys, delta_values = delta[..., 0, :], delta[..., 1, :]
        if not link.fuser.raw_keys:
            rope = self._own_rope(indices, positions)
            delta_keys = _per_spec(rotate, delta_keys, positions.gather(1, index), rope)
        keep = alignment.mask[None, :, None, :, None]
        at = index[None, :, None, :, None].expand_as(delta_keys)
        written = {}
        new_keys = own[..., 0, :].scatter_add(3, at, (delta_keys * keep).to(own.dtype))
        new_values = own[..., 1, :].scatter_add(3, at, (delta_values * keep).to(own.dtype))
        for layer, layer_index in enumerate(indices):
            written[layer_index] = LayerKV(new_keys[layer], new_values[layer])
        return with_layers(cache, written)

    def _fuser_inputs(
        self,
        link: LinkConfig,
        source: SourceCache,
        alignment: Alignment,
        cache: Cache,
        positions: Tensor,
    ) -> FuserInputs:
        """The source's aligned states, and the target's own at the same positions."""
        flat = _source_states(link, source)
        gathered = alignment.gather(flat.flatten(2)).unflatten(2, flat.shape[2:])
        aligned = gathered.permute(2, 0, 1, 3, 4, 5).flatten(4)
        layers, indices = read_layers(cache)
        own, index = _stack(layers), alignment.target_index
        picked = own.gather(
            3, index[None, :, None, :, None, None].expand(*own.shape[:3], -1, *own.shape[4:])
        )
        picked_keys = picked[..., 0, :]
        if not link.fuser.raw_keys:
            rope = self._own_rope(indices, positions)
            picked_keys = _per_spec(derotate, picked_keys, positions.gather(1, index), rope)
        states = torch.stack([picked_keys, picked[..., 1, :]], dim=-2)
        states = states.transpose(2, 3).transpose(3, 4).flatten(4)
        return FuserInputs(aligned.float(), states.float(), alignment)

    def _own_rope(self, indices: Sequence[int], positions: Tensor) -> list[RopeSpec | None]:
        """How the target's layers of those indices rotate their keys."""
        rope = self.target.rope(positions.shape[1])
        return [rope[index] for index in indices]

    def _generate(self, fused: FusedInputs, **kwargs: Any) -> Tensor:
        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            # What a config leaves open, transformers takes from the model's own.
            given = getattr(kwargs.get("generation_config"), name, None)
            own = getattr(self.target.model.generation_config, name, None)
            return own if given is None else given

        if setting("return_dict_in_generate"):
            raise UnsupportedError(
                "return_dict_in_generate: a bridge answers with texts only; for scores and the "
                "like, call bridge.target.model.generate(**bridge.fuse(...), "
                "return_dict_in_generate=True)"
            )
        for name in _REFUSED:
            if setting(name) is not None:
                raise UnsupportedError(
                    f"{name}: assisted decoding over a prefilled cache gives wrong output in "
                    "transformers 5.23; leave it out"
                )
        rows = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        cache = repeat_rows(fused["past_key_values"], rows)
        return self.target.model.generate(
            input_ids=fused["input_ids"],
            attention_mask=fused["attention_mask"],
            past_key_values=cache,
            **kwargs,
        )


def read_header(folder: Path) -> dict[str, Any]:
    """The config of a saved bridge: links, prompt, and the models it was trained for."""
    path = folder / CONFIG_NAME
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MismatchError(f"{folder} is not a saved bridge: {path.name} is missing") from error
    except json.JSONDecodeError as error:
        raise MismatchError(f"{path} is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != 1:
        raise MismatchError(f"{path} is not a saved bridge of format 1")
    lacking = [key for key in ("bridge", "target", "sources") if key not in header]
    if lacking:
        raise MismatchError(f"{path} lacks {', '.join(lacking)}")
    return header


def _read_weights(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Weights from a safetensors file, strictly those that the module has."""
    expected = module.state_dict()
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise MismatchError(f"{path} is missing or unreadable: {error}") from error
    except SafetensorError as error:
        raise MismatchError(f"{path} is damaged or cut off: {error}; fetch it again") from error
    if found.keys() != expected.keys():
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(found.keys() - expected.keys())
        raise MismatchError(f"{path}: missing weights {missing[:5]}, unknown ones {extra[:5]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise MismatchError(
                f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    return {name: tensor.float() for name, tensor in found.items()}


def _check_shape(what: str, expected: CacheShape, found: CacheShape) -> None:
    if expected != found:
        raise MismatchError(f"{what}: the fuser was made for {expected}, got {found}")


def _check_origin(what: str, expected: Mapping[str, Any], found: CacheOrigin) -> None:
    if set(expected) != set(CacheOrigin._fields):
        raise MismatchError(
            f"{what}: expected {', '.join(CacheOrigin._fields)}, got {', '.join(expected)}"
        )
    wanted = CacheOrigin(**expected)
    if wanted != found:
        raise MismatchError(
            f"{what}: the fuser was trained with {wanted.model!r} at revision {wanted.revision!r} "
            f"({wanted.model_type}), got {found.model!r} at {found.revision!r} ({found.model_type})"
        )


def _build_resampler(link: LinkConfig) -> PatchResampler | None:
    """The part of a link that learns what each slot looks for, where it has one."""
    if link.pooling == "window":
        return None
    shape = link.fuser.source
    width = shape.num_layers * 2 * shape.width
    return PatchResampler(ResamplerConfig(num_slots=link.rows * link.cols, source_width=width))


def _source_states(link: LinkConfig, source: SourceCache) -> Tensor:
    """`(batch, source_len, layers, 2, heads, head_dim)`: K as the fuser wants it, and V."""
    _check_shape(f"the cache of source {link.source!r}", link.fuser.source, source.shape)
    states = _stack(source.layers)
    if not link.fuser.raw_keys:
        keys = _per_spec(derotate, states[..., 0, :], source.position_ids, source.rope)
        states = torch.stack([keys, states[..., 1, :]], dim=-2)
    return states.permute(1, 3, 0, 4, 2, 5)


def _check_pictures(link: LinkConfig, source: SourceCache) -> None:
    """A row's slots hold so many pictures, each in any number of views."""
    for row, grids in enumerate(source.grids):
        pictures = len({grid.image for grid in grids})
        # Without a grid there may be one picture, summed up in queries: the aligner's to judge.
        if max(pictures, 1) != link.images:
            raise ShapeError(
                f"row {row} of source {link.source!r} has {pictures} pictures, its slots hold "
                f"{link.images}; show it {link.images}, or build the link with images={pictures}"
            )


def _check_texts(name: str, texts: Sequence[str], questions: Sequence[str]) -> None:
    """Spans of two different texts would overlap all the same."""
    if len(texts) != len(questions):
        raise ShapeError(f"source {name!r} has {len(texts)} rows for {len(questions)} questions")
    for text, question in zip(texts, questions, strict=True):
        if text != question.strip():
            raise InputError(f"source {name!r} read {text!r}, not {question!r}")


def _stack(layers: Sequence[LayerKV]) -> Tensor:
    """`(layers, batch, heads, seq_len, 2, head_dim)`: K at 0, V at 1."""
    try:
        return torch.stack([torch.stack([kv.keys, kv.values], dim=3) for kv in layers])
    except RuntimeError as error:
        raise AlignmentError(f"layers of unlike shape cannot be fused together: {error}") from error


def _per_spec(
    turn: Any, keys: Tensor, positions: Tensor, specs: Sequence[RopeSpec | None]
) -> Tensor:
    """Rotate or derotate `(layers, batch, heads, len, head_dim)`, layers of one kind at once."""
    if len(set(specs)) == 1:
        layers, _, heads = keys.shape[:3]
        side_by_side = keys.transpose(0, 1).flatten(1, 2)
        turned = turn(side_by_side, positions, specs[0])
        return turned.unflatten(1, (layers, heads)).transpose(0, 1)
    return torch.stack([turn(k, positions, s) for k, s in zip(keys, specs, strict=True)])


def _answer_start(real: Tensor) -> Tensor:
    """Anchors `(batch, len)`: 1 at the last real position of each row, 0 elsewhere."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = (real * places).argmax(1)
    return torch.zeros(real.shape, dtype=torch.long, device=real.device).scatter(
        1, last.unsqueeze(1), 1
    )

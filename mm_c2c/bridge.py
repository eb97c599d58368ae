"""`Bridge`: sources, fusers and a target; a picture goes in, the frozen target answers.

The target's prompt is `before · slots · question · tail`. `perceive` makes the cache of the first
two parts once; `fuse` adds a question and gives everything that `target.generate` takes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache

from mm_c2c.align import Alignment
from mm_c2c.align.tokens import align_tokens, answer_start
from mm_c2c.cache import SourceCache, fork, is_prompt, join_rows, repeat_rows, select_rows
from mm_c2c.config import from_dict
from mm_c2c.errors import ConfigError, InputError, MismatchError, ShapeError
from mm_c2c.fuser import CacheFuser
from mm_c2c.hub import fetch_folder, push_folder
from mm_c2c.link import (
    FuserInputs,
    LinkConfig,
    align_slots,
    build_fuser,
    check_caches,
    check_link,
    check_texts,
    gather_inputs,
    write_link,
)
from mm_c2c.perception import (
    FusedInputs,
    Perception,
    Reading,
    check_perception,
    source_inputs,
)
from mm_c2c.pretrained import (
    WEIGHTS_NAME,
    check_origin,
    check_shape,
    check_weights,
    read_header,
    read_weights,
    write_bridge,
)
from mm_c2c.prompt import Prompt
from mm_c2c.sources.base import Source, SourceInput, count_positions, for_source, full_cache
from mm_c2c.target import Target


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
            check_link(link, sources, target.shape)
        target.check_continues()
        self.fusers = nn.ModuleDict({link.name: build_fuser(link) for link in config.links})
        self.fusers.to(target.model.device)
        self.prompt = Prompt(target.tokenizer, config.system, config.slot_token)
        self._prefix_memo: dict[tuple[Any, ...], Cache] = {}

    def onto(self, target: Target) -> Bridge:
        """The same sources and fusers before another target, such as this one with an adapter."""
        check_shape("the target", self.target.shape, target.shape)
        other = copy.copy(self)
        other.target, other._prefix_memo = target, {}
        return other

    # --- what the sources saw -------------------------------------------------------------

    def perceive(
        self,
        inputs: Image.Image | SourceInput | Sequence[Image.Image | SourceInput],
        text: str = "",
    ) -> Perception:
        """Look once: prefill the sources and fuse their slots; gradients in training mode only.

        Args:
            inputs: a picture, or one for each row of a batch; a `SourceInput` in a picture's place
                where a source needs more, such as several pictures or a robot's state.
            text: what the sources read beside each picture; empty leaves them question-blind.

        Raises:
            InputError: no link has slots, no picture is given, or something else in its place, or
                `text` beside a `SourceInput`, which has its own.
        """
        named = {link.source for link in self.config.links if link.geometry == "slots"}
        if not named:
            raise InputError(
                "no link of this bridge has slots for what is perceived; ask by fuse(None, "
                "questions, caches), with the sources' caches of the same questions"
            )
        rows = source_inputs(inputs, text)
        with torch.no_grad():
            caches = {n: self.sources[n].prefill(for_source(self.sources, n, rows)) for n in named}
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.fuse_slots(caches)

    def fuse_slots(
        self, caches: Mapping[str, SourceCache], keep: Mapping[str, Tensor] | None = None
    ) -> Perception:
        """Fuse source caches into the slots of the target's prompt.

        Args:
            caches: by source name; the slots of a source that is absent are left out.
            keep: by link name, `(batch, slots)` bool: slots that are fused, while the others stay
                the target's own; links that are not named are fused whole.
        """
        check_caches(caches, self.sources, self.config.links, "slots")
        slots = [link for link in self.config.links if link.num_slots]
        unknown = sorted(set(keep or ()) - {link.name for link in slots})
        if unknown:
            raise ConfigError(
                f"keep: no link with slots is named {unknown}; known: "
                f"{', '.join(link.name for link in slots) or 'none'}"
            )
        links = [link for link in slots if link.source in caches]
        sizes = {caches[link.source].batch_size for link in links} or {1}
        if len(sizes) > 1:
            raise ShapeError(f"the sources' caches differ in batch size: {sorted(sizes)}")
        batch = sizes.pop()
        ids = list(self.prompt.before)
        places = {}
        for link in links:
            places[link.name] = range(len(ids), len(ids) + link.num_slots)
            ids += [self.prompt.slot_id] * link.num_slots
        cache = repeat_rows(self._prefill_prefix(tuple(ids)), batch)
        # Without slots and without a system prompt there are none.
        input_ids = torch.tensor(ids, dtype=torch.long, device=self.device).expand(batch, -1)
        positions = torch.arange(len(ids), device=self.device).expand(batch, -1)
        for link in links:
            source = caches[link.source].to(self.device)
            index = torch.tensor(places[link.name], device=self.device).expand(batch, -1)
            alignment = align_slots(link, self._fuser(link), source, index)
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
        source = source.to(self.device)
        before = self.prompt.before
        ids = (*before, *[self.prompt.slot_id] * link.num_slots)
        positions = torch.arange(len(ids), device=self.device).expand(source.batch_size, -1)
        cache = repeat_rows(self._prefill_prefix(ids), source.batch_size)
        index = positions[:, len(before) :]
        alignment = align_slots(link, self._fuser(link), source, index)
        rope = self.target.rope(len(ids))
        return gather_inputs(link, source, alignment, cache, positions, rope)

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
            caches: for `aligned` links, the sources' caches of the same questions; a link whose
                source is absent is left out.

        Returns:
            What `target.generate` takes, which leaves the cache as it is (transformers' own, by
            `target.model.generate(**fused)`, lets it grow). Shorter questions are padded before
            the question; in front of the prompt where the target would feel that
            (`Target.minds_padding`), and then the cache covers all but the last token.

        Raises:
            InputError: a question without words, or a source that has read other ones.
            ConfigError, MismatchError, ShapeError: a cache, or a number, that does not belong here.
        """
        caches = caches or {}
        check_caches(caches, self.sources, self.config.links, "aligned")
        reading = self._ask(perception, questions)
        if any(link.source in caches for link in self._aligned_links()):
            return self.fuse_words(self._read_on(reading), caches)
        return reading.inputs

    def read_questions(
        self, questions: Sequence[str], perception: Perception | None = None
    ) -> Reading:
        """The target alone reads questions, once; `fuse_words` then fuses into what it read.

        Several bridges to one target, with the same prompt, can share a reading.

        Args:
            questions: as in `fuse`.
            perception: as in `fuse`.
        """
        return self._read_on(self._ask(perception, questions))

    def fuse_words(self, reading: Reading, caches: Mapping[str, SourceCache]) -> FusedInputs:
        """Fuse the words that sources have read into the target's reading of them.

        Args:
            reading: from `read_questions`; it is not changed.
            caches: by source name, of the same questions; those without an `aligned` link are left.
        """
        check_caches(caches, self.sources, self.config.links)
        cache = reading.past_key_values
        positions = count_positions(reading.attention_mask)[:, :-1]
        for link in self._aligned_links():
            if link.source not in caches:
                continue
            source = caches[link.source].to(self.device)
            check_texts(link.source, source.texts, reading.questions)
            spans = reading.spans[:, :-1]
            # Without a chat template the last token is the question's, and has its own partners.
            begins = answer_start(reading.attention_mask[:, :-1] != 0) * (spans[..., 0] < 0)
            theirs = answer_start(is_prompt(source.kinds))
            alignment = align_tokens(source.spans, spans, theirs, begins)
            cache = self._write(link, source, alignment, cache, positions)
        return reading._replace(past_key_values=cache).inputs

    @torch.no_grad()
    def generate(
        self,
        perception: Perception | None,
        questions: Sequence[str],
        caches: Mapping[str, SourceCache] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer by `target.generate(**kwargs)`; several sequences a question follow each other.

        Arguments and errors are those of `fuse` and of `Target.generate`.
        """
        fused = self.fuse(perception, questions, caches)
        new = self.target.generate(fused, **kwargs)[:, fused["input_ids"].shape[1] :]
        return self.target.tokenizer.batch_decode(new, skip_special_tokens=True)

    def stream(
        self,
        perception: Perception | None,
        question: str,
        caches: Mapping[str, SourceCache] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Answer one question, piece by piece as it is decoded; as `generate` otherwise."""
        with torch.no_grad():
            fused = self.fuse(perception, [question], caches)
        yield from self.target.stream(fused, **kwargs)

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
        found = self.fusers.state_dict() if weights is None else weights
        weights = {k: v.detach().to(dtype).contiguous() for k, v in found.items()}
        read = {link.source for link in self.config.links}
        header = {
            "format": 1,
            "bridge": asdict(self.config),
            "target": self.target.origin._asdict(),
            "sources": {name: self.sources[name].origin._asdict() for name in sorted(read)},
        }
        write_bridge(Path(folder), header, weights)

    def push_to_hub(
        self,
        repo_id: str,
        evaluation: str | Path | None = None,
        *,
        licence: str | None = None,
        dtype: torch.dtype = torch.float32,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload fuser",
    ) -> str:
        """Send the fusers to the Hub, with a model card.

        Args:
            repo_id: `user/name`; made if it is not there.
            evaluation: folder of a run of `mm-c2c evaluate` of these weights, for the card.
            licence: of the weights, by the Hub's name, such as `apache-2.0`.
            dtype: of the saved weights.
            private: whether a new repository is.
            token: of the Hub; None takes the one that is logged in.
            revision: branch; None is the main one.
            commit_message: of the commit.

        Returns:
            The commit's address.
        """
        from mm_c2c.evaluation.card import write_card  # which is built on bridges

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.save_pretrained(folder, dtype)
            run = None if evaluation is None else Path(evaluation)
            write_card(folder, run, licence=licence, name=repo_id)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        target: Target,
        sources: Mapping[str, Source],
        revision: str | None = None,
    ) -> Bridge:
        """Load fusers for exactly the models they were trained for.

        Args:
            folder: of a saved bridge, or a repository of the Hub, `user/name`.
            target: the LLM that answers.
            sources: by the names that the links use.
            revision: branch, tag or commit of the repository.

        Raises:
            FetchError: a repository could not be had.
            MismatchError: a file is missing or damaged, or the fusers belong to other models.
        """
        folder = fetch_folder(folder, revision)
        header = read_header(folder)
        check_origin("target", header["target"], target.origin)
        for name, origin in header["sources"].items():
            if name not in sources:
                raise MismatchError(f"{folder} needs a source named {name!r} ({origin['model']})")
            check_origin(f"source {name!r}", origin, sources[name].origin)
        config = from_dict(BridgeConfig, header["bridge"])
        if unnamed := sorted({link.source for link in config.links} - set(header["sources"])):
            raise MismatchError(f"{folder} does not say which models {unnamed} are; fetch it again")
        bridge = cls(target, sources, config)
        weights = read_weights(folder / WEIGHTS_NAME, bridge.fusers)
        check_weights(folder, header, weights)
        bridge.fusers.load_state_dict(weights)
        return bridge.eval()

    # --- inside ---------------------------------------------------------------------------

    def _ask(self, perception: Perception | None, questions: Sequence[str]) -> Reading:
        """Questions behind what was perceived, which is all that the cache holds, padding apart."""
        ids, mask, spans = (part.to(self.device) for part in self.prompt.read(questions))
        perception = self.fuse_slots({}) if perception is None else perception
        check_perception(perception, self.target.shape)
        if len(questions) % perception.batch_size:
            raise ShapeError(
                f"{perception.batch_size} perceived rows cannot answer {len(questions)} questions: "
                "give as many for each row"
            )
        cache = repeat_rows(perception.past_key_values, len(questions) // perception.batch_size)
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
        return Reading(input_ids, attention_mask, cache, spans, tuple(questions))

    def _read_on(self, reading: Reading) -> Reading:
        """All but the last token is read."""
        cache = self._prefill_rest(
            reading.past_key_values, reading.input_ids, reading.attention_mask
        )
        return reading._replace(past_key_values=cache)

    def _aligned_links(self) -> list[LinkConfig]:
        return [link for link in self.config.links if link.geometry == "aligned"]

    def question_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """What follows the slots: each question, and what the chat template puts behind it."""
        return [self.prompt.tokens(question) for question in questions]

    def _prefill_prefix(self, ids: tuple[int, ...]) -> Cache:
        """The target's own cache of a fixed prefix, kept by device and dtype of the model."""
        key = (ids, self.device, self.target.model.dtype)
        if key not in self._prefix_memo:
            cache = full_cache(self.target.model)
            if ids:
                with torch.no_grad():
                    self.target.model(
                        torch.tensor([ids], device=self.device),
                        past_key_values=cache,
                        **self.target.spared,
                    )
            self._prefix_memo[key] = cache
        return self._prefix_memo[key]

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

    def _fuser(self, link: LinkConfig) -> CacheFuser:
        fuser: Any = self.fusers[link.name]
        return fuser

    def _write(
        self,
        link: LinkConfig,
        source: SourceCache,
        alignment: Alignment,
        cache: Cache,
        positions: Tensor,
    ) -> Cache:
        rope = self.target.rope(positions.shape[1])
        return write_link(link, self._fuser(link), source, alignment, cache, positions, rope)

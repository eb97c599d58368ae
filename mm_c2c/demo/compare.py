"""Ask about a picture, all arms side by side, each answer shown as it is made."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_c2c.cache import CacheOrigin, CacheShape, SourceCache
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import MAX_NEW_TOKENS, Asked, Setting, build_arm
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.arms.relay import CaptionRelay
from mm_c2c.evaluation.clock import Answer, Stopwatch, timed
from mm_c2c.perception import Perception
from mm_c2c.sources.base import Source, SourceInput

COLUMNS = {
    "fused": ("Fused cache", "The text LLM never sees the picture; it is handed a cache."),
    "caption_relay": ("Caption relay", "The text LLM reads a caption instead."),
    "caption_relay_options": (
        "Caption relay, answers shown",
        "It also reads which answers such a question can have.",
    ),
    "question_aware_relay": (
        "Question-aware relay",
        "In the words that a search found best; a caption already written is read again.",
    ),
    "blind": ("Blind", "The text LLM alone, with nothing."),
    "source": ("Source alone", "The small vision model answers itself."),
}
"""Arm to title and what it is, in the order in which they answer."""
MAX_QUESTION = 300
MODELS = threading.Lock()
"""Held by whoever uses the models: they serve one at a time."""


@dataclass
class Look:
    """A `Source` for one picture, which looks at it once, captions it once, and is fused once.

    Attributes:
        setting: the pair that is asked.
        picture: RGB.
        perceived: how often the picture has been looked at.
    """

    setting: Setting
    picture: Image.Image
    perceived: int = 0
    _caption: list[str] | None = None

    @property
    def shape(self) -> CacheShape:
        """Of the source."""
        return self.setting.source.shape

    @property
    def origin(self) -> CacheOrigin:
        """Of the source."""
        return self.setting.source.origin

    @cached_property
    def cache(self) -> SourceCache:
        """The cache of the picture."""
        with torch.no_grad():
            cache = self.setting.source.prefill([SourceInput(images=(self.picture,))])
        self.perceived += 1
        return cache

    @property
    def is_captioned(self) -> bool:
        """Whether a caption is kept that a relay would read again."""
        return self._caption is not None

    @cached_property
    def slots(self) -> Perception:
        """What the fuser writes into the target's cache."""
        with torch.no_grad():
            return self.setting.bridge.fuse_slots({self.setting.source_name: self.cache})

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """See `cache`; the picture is the look's own."""
        del inputs
        return self.cache

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The source's answers; a caption is written at the first call."""
        source = self.setting.source
        if inputs[0].text != self.setting.request or kwargs.get("streamer"):
            return source.generate(inputs, **kwargs)
        if self._caption is None:
            self._caption = source.generate(inputs, **kwargs)
        return self._caption


@dataclass(frozen=True, kw_only=True)
class LookSetting(Setting):
    """A setting in which the source is a `Look`, so that every arm shares it."""

    look: Look

    @property
    def source(self) -> Source:
        """The look."""
        return self.look


@dataclass(frozen=True)
class FusedOnce(Fused):
    """The fused arm, over slots that are kept from one question to the next."""

    look: Look

    def see(self, asked: Sequence[Asked]) -> Perception:
        """The look's slots."""
        del asked
        return self.look.slots


class Column(NamedTuple):
    """One arm's answer, so far or whole.

    Attributes:
        text: the answer so far.
        answer: with its times, once it is whole.
        positions: what the target's cache holds beyond the question, in positions.
        num_bytes: what was handed to the target beside the question, in bytes.
        is_cut: whether the answer stopped only at the limit of its tokens.
    """

    text: str = ""
    answer: Answer | None = None
    positions: int = 0
    num_bytes: int = 0
    is_cut: bool = False


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


class _Live(Stopwatch):
    """A stopwatch that also shows the answer so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.texts: queue.Queue[str | None] = queue.Queue()
        self.stopped = threading.Event()
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    @property
    def is_cut(self) -> bool:
        """Whether the last token was the last that was allowed, and ends nothing."""
        last = self._ids[-1] if len(self._ids) >= MAX_NEW_TOKENS else None
        return last is not None and last not in self._tokenizer.all_special_ids

    def put(self, value: Tensor) -> None:
        """See `Stopwatch`."""
        if self.stopped.is_set():
            raise _StoppedError
        is_answer = self._prompt_seen
        super().put(value)
        if is_answer:
            self._ids += value.flatten().tolist()
            (text,) = self._tokenizer.batch_decode([self._ids], skip_special_tokens=True)
            self.texts.put(text.strip())


def check_question(question: str | None) -> str:
    """A question that can be asked.

    Raises:
        InputError: it is empty or too long.
    """
    question = (question or "").strip()
    if not question:
        raise InputError("The question is empty: type one, or press a suggested one.")
    if len(question) > MAX_QUESTION:
        raise InputError(
            f"The question has {len(question)} characters; ask in at most {MAX_QUESTION}."
        )
    return question


def columns_of(setting: Setting, options: Sequence[str]) -> list[str]:
    """The arms that can answer.

    Without `setting.prompts` there is no question-aware relay, and the relay that shows the answers
    stands in for it; that one needs to know them.
    """
    stand_in = (
        "question_aware_relay" if setting.prompts else "caption_relay_options" * bool(options)
    )
    return [name for name in COLUMNS if "relay" not in name or name in ("caption_relay", stand_in)]


def compare(
    look: Look, question: str | None, options: Sequence[str] = ()
) -> Iterator[dict[str, Column]]:
    """Let one arm after the other answer.

    Args:
        look: the picture; what was seen for an earlier question is used again.
        question: what is asked.
        options: answers that such a question can have, where that is known.

    Yields:
        The columns so far, by arm, at every token. Closing the iterator stops the models.

    Raises:
        InputError: see `check_question`.
    """
    setting = LookSetting(**vars(look.setting), look=look)
    asked = Asked(SourceInput(images=(look.picture,)), check_question(question), tuple(options))
    columns: dict[str, Column] = {}
    for name in columns_of(setting, options):
        for column in _stream(name, setting, asked):
            columns[name] = column
            yield dict(columns)


def _stream(name: str, setting: LookSetting, asked: Asked) -> Iterator[Column]:
    """One arm's column, growing."""
    arm = FusedOnce(setting, setting.look) if name == "fused" else build_arm(name, setting)
    source: Any = setting.look.setting.source
    own = source.processor.tokenizer if name == "source" else setting.bridge.target.tokenizer
    live = _Live(own)
    done: list[Answer] = []
    failure: list[Exception] = []
    reads_again = setting.look.is_captioned

    def run() -> None:
        try:
            with MODELS:
                done.append(timed(arm, setting.bridge, asked, live))
        except _StoppedError:
            pass
        except Exception as error:  # noqa: BLE001, raised again in the caller's thread
            failure.append(error)
        finally:
            live.texts.put(None)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield Column()
        while (text := live.texts.get()) is not None:
            yield Column(text)
    finally:
        # Whoever comes next waits until this arm is gone.
        live.stopped.set()
        worker.join()
    if failure:
        raise failure[0]
    answer = done[0]
    if reads_again and answer.relayed is not None:
        # Its time is not counted either: the caption was written for an earlier answer.
        written = setting.bridge.target.tokenizer(answer.answer, add_special_tokens=False)
        answer = answer._replace(tokens=len(written["input_ids"]))
    yield _whole(name, arm, setting, asked, answer)._replace(is_cut=live.is_cut)


def _whole(name: str, arm: Any, setting: LookSetting, asked: Asked, answer: Answer) -> Column:
    """The column with what the target was handed."""
    positions = num_bytes = 0
    if name == "fused":
        positions = sum(link.num_slots for link in setting.bridge.config.links)
        num_bytes = setting.look.cache.num_bytes
    elif isinstance(arm, CaptionRelay) and answer.relayed is not None:
        read, bare = (
            setting.bridge.target.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (arm.prompt(answer.relayed, asked), asked.question)
        )
        positions = len(read) - len(bare)
        num_bytes = len(answer.relayed.encode())
    return Column(answer.answer, answer, positions, num_bytes)


def facts(columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """The columns that are whole, as plain values."""
    return {
        name: {
            **column.answer._asdict(),
            "cache_positions": column.positions,
            "num_bytes": column.num_bytes,
            "is_cut": column.is_cut,
        }
        for name, column in columns.items()
        if column.answer is not None
    }


def columns_html(columns: Mapping[str, Column], look: Look) -> str:
    """All columns as cards, side by side where there is room."""
    cards = "".join(_card(name, column) for name, column in columns.items())
    times = "once" if look.perceived == 1 else f"{look.perceived} times"
    said = "; ".join(f"{COLUMNS[name][0]}: {c.text or 'nothing'}" for name, c in columns.items())
    # A screen reader is told the answers when all are there, not each token.
    whole = all(column.answer for column in columns.values())
    return (
        f'<p class="seen">This picture was perceived <b>{times}</b>. A further question on it is '
        f'answered from the same cache.</p><div class="cards">{cards}</div>'
        f'<p class="unseen" role="status">{html.escape(said) if whole else ""}</p>'
    )


def _card(name: str, column: Column) -> str:
    title, what = COLUMNS[name]
    numbers = caption = ""
    if column.answer is not None:
        answer = column.answer
        rows = {
            "first token": f"{answer.ttft_ms:,.0f} ms",
            "total": f"{answer.total_ms:,.0f} ms",
            "tokens written": str(answer.tokens),
            "positions added": str(column.positions),
            "handed over": f"{column.num_bytes:,} bytes",
        }
        numbers = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
        numbers = f"<dl>{numbers}</dl>"
        if answer.relayed is not None:
            caption = f'<p class="caption">It reads: “{html.escape(answer.relayed)}”</p>'
    text = html.escape(column.text) or ("(nothing)" if column.answer else "…")
    if column.is_cut:
        text += f' … <small class="cut">(cut after {MAX_NEW_TOKENS} tokens)</small>'
    return (
        f'<section class="card {name}"><h3>{title}</h3><p class="what">{what}</p>'
        f'<p class="answer">{text}</p>{caption}{numbers}</section>'
    )

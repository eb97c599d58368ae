"""Ask about a picture, all arms side by side, each answer shown as it is made."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_c2c.bridge import Bridge
from mm_c2c.cache import CacheOrigin, CacheShape, SourceCache
from mm_c2c.errors import InputError
from mm_c2c.evaluation.arms import Asked, Setting, build_arm
from mm_c2c.evaluation.arms.relay import CaptionRelay
from mm_c2c.evaluation.clock import Answer, Stopwatch, timed
from mm_c2c.sources.base import Source, SourceInput

COLUMNS = {
    "fused": ("Fused cache", "The text LLM never sees the picture; it is handed a cache."),
    "caption_relay": ("Caption relay", "The text LLM reads a caption instead."),
    "caption_relay_options": ("Caption relay, options shown", "And the answers there can be."),
    "blind": ("Blind", "The text LLM alone, with nothing."),
    "source": ("Source alone", "The small vision model answers itself."),
}
"""Arm to title and what it is, in the order in which they answer."""
MAX_QUESTION = 300


@dataclass
class Look:
    """A `Source` for one picture, which looks at it once and captions it once.

    Attributes:
        source: the model that looks.
        picture: RGB.
        request: what the source is asked for when it writes a caption.
        perceived: how often the picture has been looked at.
    """

    source: Source
    picture: Image.Image
    request: str
    perceived: int = 0
    _cache: SourceCache | None = None
    _caption: list[str] | None = None

    @property
    def shape(self) -> CacheShape:
        """Of the source."""
        return self.source.shape

    @property
    def origin(self) -> CacheOrigin:
        """Of the source."""
        return self.source.origin

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """The cache of the picture, made at the first call."""
        if self._cache is None:
            self._cache = self.source.prefill(inputs)
            self.perceived += 1
        return self._cache

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The source's answers; a caption is written at the first call."""
        if inputs[0].text != self.request or kwargs.get("streamer"):
            return self.source.generate(inputs, **kwargs)
        if self._caption is None:
            self._caption = self.source.generate(inputs, **kwargs)
        return self._caption


@dataclass(frozen=True, kw_only=True)
class LookSetting(Setting):
    """A setting in which the source is a `Look`, so that every arm shares it."""

    look: Look

    @property
    def source(self) -> Source:
        """The look."""
        return self.look


class Column(NamedTuple):
    """One arm's answer, so far or whole.

    Attributes:
        text: the answer so far.
        answer: with its times, once it is whole.
        positions: what the target's cache holds beyond the question, in positions.
        num_bytes: what was handed to the target beside the question, in bytes.
    """

    text: str = ""
    answer: Answer | None = None
    positions: int = 0
    num_bytes: int = 0


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


def compare(
    bridge: Bridge, source_name: str, look: Look, question: str, options: Sequence[str] = ()
) -> Iterator[dict[str, Column]]:
    """Let one arm after the other answer.

    Args:
        bridge: both frozen models and the fuser.
        source_name: the source that looks.
        look: the picture; what was seen for an earlier question is used again.
        question: what is asked.
        options: answers that such a question can have; without them the arm that shows them to
            the target is left out.

    Yields:
        The columns so far, by arm, at every token. Closing the iterator stops the models.
    """
    setting = LookSetting(bridge=bridge, source_name=source_name, request=look.request, look=look)
    asked = Asked(look.picture, check_question(question), tuple(options))
    columns: dict[str, Column] = {}
    for name in COLUMNS:
        if name == "caption_relay_options" and not options:
            continue
        for column in _stream(name, setting, asked):
            columns[name] = column
            yield dict(columns)


def _stream(name: str, setting: LookSetting, asked: Asked) -> Iterator[Column]:
    """One arm's column, growing."""
    arm = build_arm(name, setting)
    source: Any = setting.look.source
    own = source.processor.tokenizer if name == "source" else setting.bridge.target.tokenizer
    live = _Live(own)
    done: list[Answer] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
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
        # The models serve one arm at a time: whoever comes next waits until this one is gone.
        live.stopped.set()
        worker.join()
    if failure:
        raise failure[0]
    yield _whole(name, arm, setting, asked, done[0])


def _whole(name: str, arm: Any, setting: LookSetting, asked: Asked, answer: Answer) -> Column:
    """The column with what the target was handed."""
    positions = num_bytes = 0
    if name == "fused":
        positions = sum(link.num_slots for link in setting.bridge.config.links)
        num_bytes = setting.look.prefill([]).num_bytes
    elif isinstance(arm, CaptionRelay) and answer.relayed is not None:
        read, bare = (
            setting.bridge.target.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (arm.prompt(answer.relayed, asked), asked.question)
        )
        positions = len(read) - len(bare)
        num_bytes = len(answer.relayed.encode())
    return Column(answer.answer, answer, positions, num_bytes)


def columns_html(columns: Mapping[str, Column], look: Look) -> str:
    """All columns as cards, side by side where there is room."""
    cards = "".join(_card(name, column) for name, column in columns.items())
    times = "1 time" if look.perceived == 1 else f"{look.perceived} times"
    return (
        f'<p class="seen">Picture perceived: <b>{times}</b>. A further question on it is answered '
        f'from the same cache.</p><div class="cards" aria-live="polite">{cards}</div>'
    )


def _card(name: str, column: Column) -> str:
    title, what = COLUMNS[name]
    facts = caption = ""
    if column.answer is not None:
        answer = column.answer
        rows = {
            "first token": f"{answer.ttft_ms:.0f} ms",
            "total": f"{answer.total_ms:.0f} ms",
            "tokens written": str(answer.tokens),
            "cache positions added": str(column.positions),
            "handed over": f"{column.num_bytes:,} bytes",
        }
        facts = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
        facts = f"<dl>{facts}</dl>"
        if answer.relayed is not None:
            caption = f'<p class="caption">It reads: “{html.escape(answer.relayed)}”</p>'
    text = html.escape(column.text) or ("(nothing)" if column.answer else "…")
    return (
        f'<section class="card {name}"><h3>{title}</h3><p class="what">{what}</p>'
        f'<p class="answer">{text}</p>{caption}{facts}</section>'
    )

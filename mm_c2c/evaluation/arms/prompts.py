"""How a relay is worded, and what stands for the best wording until a search has found it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from mm_c2c.config import from_dict
from mm_c2c.errors import ConfigError, InputError

GENERIC_REQUEST = "Describe the picture."
OPTIONS_LINE = "Answer with one of: {options}."


@dataclass(frozen=True, kw_only=True)
class Example:
    """One solved question, for the target to go by.

    Attributes:
        caption: what the source wrote about its picture.
        question: what was asked.
        answer: the true answer.
        options: answers that this kind of question can have.
    """

    caption: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RelayPrompt:
    """The words of a relay.

    Attributes:
        request: what the source is asked for; `{question}` stands for the question, for a source
            that can keep it in view as it writes.
        template: what the target reads; `{caption}` and `{question}` stand for both.
        options_line: a line after the question where it has options, `{options}` stands for them;
            empty leaves them unsaid.
        examples: solved questions before the one that is asked, worded alike.
    """

    request: str = GENERIC_REQUEST
    template: str = "The picture shows: {caption}\n{question}"
    options_line: str = ""
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        _check(self.request, allowed={"question"}, needed=set())
        _check(self.template, allowed={"caption", "question"}, needed={"caption", "question"})
        _check(self.options_line, allowed={"options"}, needed=set())

    def ask_source(self, question: str) -> str:
        """What the source is asked for."""
        return self.request.format(question=question)

    def ask_target(self, caption: str, question: str, options: Sequence[str] = ()) -> str:
        """What the target reads."""
        solved = [
            f"{self._word(e.caption, e.question, e.options)}\n{e.answer}" for e in self.examples
        ]
        return "\n\n".join([*solved, self._word(caption, question, options)])

    def _word(self, caption: str, question: str, options: Sequence[str]) -> str:
        text = self.template.format(caption=caption, question=question)
        if not (self.options_line and options):
            return text
        return f"{text}\n{self.options_line.format(options=', '.join(options))}"


def _check(text: str, allowed: set[str], needed: set[str]) -> None:
    """Only the fields that are filled in; a lone brace is refused too."""
    try:
        found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ConfigError(f"{text!r} is no template: {error}") from error
    if not needed <= found <= allowed:
        raise ConfigError(
            f"{text!r} has the fields {sorted(found)}; allowed are {sorted(allowed)}, needed are "
            f"{sorted(needed)}"
        )


def read_winner(path: Path) -> RelayPrompt:
    """The prompt that `mm-c2c prompts` found best.

    Raises:
        InputError: the file was not written by it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["winner"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no result of `mm-c2c prompts --out FILE` ({error!r}); run that first"
        ) from error
    return from_dict(RelayPrompt, found)

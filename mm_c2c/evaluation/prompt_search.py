"""Which words a caption relay does best with: prompts scored on items of the training split.

`mm-c2c prompts items=FILE --out FILE` writes the table and the winner, which the arm
`question_aware_relay` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.config import check_at_least_one, to_dict
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.evaluation.arms import captions, target_answers
from mm_c2c.evaluation.arms.prompts import OPTIONS_LINE, Example, RelayPrompt
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.run import portable, source_name, to_asked
from mm_c2c.evaluation.statistics import accuracy, draw_resamples, hits_of
from mm_c2c.evaluation.tasks import Item, is_right, is_right_in_a_sentence, load_items
from mm_c2c.run_folder import make_room, write_json

T = TypeVar("T")

_READ = "Read the description of a picture, then answer the question in one or two words."
_TEMPLATES = (
    RelayPrompt().template,
    f"{_READ}\nDescription: {{caption}}\nQuestion: {{question}}",
    "Description: {caption}\nQuestion: {question}\nAnswer:",
    "{question}\nThe picture shows: {caption}",
)


@dataclass(frozen=True, kw_only=True)
class PromptSearchConfig(PairConfig):
    """Settings, beside those of the pair.

    Attributes:
        items: JSONL of questions about pictures that no result is measured on.
        requests: what the source is asked for, each with every prompt; `{question}` stands for the
            question, for a source that can keep it in view.
        templates: what the target reads, as in `RelayPrompt`; each also with the options shown,
            and each of these also after solved examples.
        examples: how many; taken from items that are not scored, of as many kinds as there are.
        limit: score on so many items, spread evenly over the file.
        batch_size: items at once.
        resamples: of the bootstrap, over episodes, or over pictures where there are none.
        seed: of the bootstrap.
    """

    items: Path
    requests: tuple[str, ...] = (RelayPrompt().request,)
    templates: tuple[str, ...] = _TEMPLATES
    examples: int = 3
    limit: int = 140
    batch_size: int = 48
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.requests or not self.templates:
            raise ConfigError("requests and templates must hold at least one each")
        check_at_least_one(self, "examples", "limit", "batch_size", "resamples")


def search_prompts(
    bridge: Bridge, config: PromptSearchConfig, out: Path | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Score every prompt; the source writes once for each request.

    Args:
        bridge: with the frozen models; its fusers take no part.
        config: settings.
        out: where to write the result as JSON.
        progress: whether to show a bar.

    Returns:
        Plain values: `n`; `table`, best first, each row a `prompt` with `accuracy` and
        `in_a_sentence` as [value, low, high]; `winner`, the prompt with the most answers right in
        a sentence, and among those with the most exact ones; the first of equals.

    Raises:
        InputError: too few items to take examples from, or no folder for `out` can be made.
    """
    scored, shown = _split(load_items(config.items), config)
    if out is not None:
        make_room(out)
    clusters = [item.sampled_with for item in scored]
    draws = draw_resamples(len(scored), config.resamples, config.seed, clusters)
    table: list[dict[str, Any]] = []
    total = 4 * len(config.requests) * len(config.templates)
    with tqdm(total=total, desc="prompts", disable=not progress) as bar:
        for request in config.requests:
            asking = RelayPrompt(request=request)
            written = _write(bridge, asking, scored, config)
            examples = tuple(
                Example(caption=text, question=i.question, answer=i.answer, options=i.options)
                for text, i in zip(_write(bridge, asking, shown, config), shown, strict=True)
            )
            for prompt in _prompts(request, config.templates, examples):
                said = _answer(bridge, prompt, written, scored, config)
                exact = hits_of([is_right(a, i.answer) for a, i in zip(said, scored, strict=True)])
                wordy = exact | hits_of(
                    [
                        is_right_in_a_sentence(a, i.answer, i.options)
                        for a, i in zip(said, scored, strict=True)
                    ]
                )
                row = {
                    "prompt": to_dict(prompt),
                    "accuracy": list(accuracy(exact, draws)),
                    "in_a_sentence": list(accuracy(wordy, draws)),
                }
                table.append(row)
                bar.update()
    table.sort(key=lambda row: (-row["in_a_sentence"][0], -row["accuracy"][0]))
    result = {
        "config": portable(config),
        "n": len(scored),
        "table": table,
        "winner": table[0]["prompt"],
    }
    if out is not None:
        write_json(out, result)
    return result


def text_table(result: dict[str, Any]) -> str:
    """For a terminal, best first."""
    lines = ["   all  wordy  95 %          prompt"]
    for row in result["table"]:
        value, low, high = row["in_a_sentence"]
        prompt = row["prompt"]
        shown = [repr(prompt["request"]), repr(prompt["template"])]
        shown += ["options shown"] * bool(prompt["options_line"])
        shown += [f"{len(prompt['examples'])} examples"] * bool(prompt["examples"])
        span = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"{100 * row['accuracy'][0]:6.1f} {100 * value:6.1f}  {span:<13} {', '.join(shown)}"
        )
    return "\n".join([*lines, "", f"n = {result['n']}"])


def _prompts(
    request: str, templates: Sequence[str], examples: tuple[Example, ...]
) -> list[RelayPrompt]:
    """Each template bare, with options, with examples and with both."""
    return [
        RelayPrompt(request=request, template=template, options_line=line, examples=solved)
        for template in templates
        for line in ("", OPTIONS_LINE)
        for solved in ((), examples)
    ]


def _split(items: Sequence[Item], config: PromptSearchConfig) -> tuple[list[Item], list[Item]]:
    """Items to score on, spread evenly, and others to show solved, a kind in turn."""
    picked = {i * len(items) // config.limit for i in range(config.limit)}
    rest = [item for index, item in enumerate(items) if index not in picked]
    kinds: dict[str, int] = {}
    turns = []
    for item in rest:
        turns.append(kinds.setdefault(item.kind, 0))
        kinds[item.kind] += 1
    order = sorted(range(len(rest)), key=lambda index: turns[index])
    if len(rest) < config.examples:
        raise InputError(
            f"{config.items} holds {len(items)} items: {config.limit} to score on leave "
            f"{len(rest)} of {config.examples} examples; lower limit or give more items"
        )
    return [items[i] for i in sorted(picked)], [rest[i] for i in order[: config.examples]]


def _write(
    bridge: Bridge, prompt: RelayPrompt, items: Sequence[Item], config: PromptSearchConfig
) -> list[str]:
    """The source's captions."""
    source = bridge.sources[source_name(bridge, config.source)]
    written = []
    for batch in _batches(items, config.batch_size):
        requests = [prompt.ask_source(item.question) for item in batch]
        asked = [to_asked(item) for item in batch]
        written += captions(source, requests, asked)
    return written


def _answer(
    bridge: Bridge,
    prompt: RelayPrompt,
    written: Sequence[str],
    items: Sequence[Item],
    config: PromptSearchConfig,
) -> list[str]:
    """The target's answers."""
    texts = [
        prompt.ask_target(text, item.question, item.options)
        for text, item in zip(written, items, strict=True)
    ]
    batches = _batches(texts, config.batch_size)
    return [answer for batch in batches for answer in target_answers(bridge, batch)]


def _batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]

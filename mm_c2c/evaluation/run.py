"""Ask every arm the same questions, and keep each answer.

A run's folder: `config.json`, `answers.jsonl` (one line an item), `times.jsonl` (one line an item
that ran by the clock), `summary.json`. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.config import WIDE_DTYPES, check_one_of, to_dict
from mm_c2c.errors import ConfigError
from mm_c2c.evaluation.arms import (
    ARMS,
    FILES,
    MAX_NEW_TOKENS,
    SOURCE_WORDS,
    Arm,
    Asked,
    Setting,
    build_arm,
)
from mm_c2c.evaluation.arms.fused import reads_actions
from mm_c2c.evaluation.arms.prompts import GENERIC_REQUEST
from mm_c2c.evaluation.clock import timed
from mm_c2c.evaluation.results import JsonLines, claim, hold, write_json
from mm_c2c.evaluation.summary import summarise
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.pretrained import fingerprint

_WARM_UP = 2
DECODINGS = ("free", "choice")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of one evaluation.

    Attributes:
        items: JSONL of questions, pictures beside it.
        bridge: folder of a saved bridge, such as `mm-c2c train` writes, or a repository of the
            Hub; the command loads it with the models that it names. None is the reference bridge.
        source_model: folder of the bridge's source, where it does not lie where the bridge says.
        target_model: folder of its target, likewise.
        dtype: of the target's weights, `float32` or `bfloat16`, in all arms alike; the command
            loads it so.
        source: name of the source in the bridge; None takes the only one.
        arms: which to run, by name; when empty all that the items and the source have something
            for, without those whose own file (`prompts` and the four below it) is not given.
        kinds: kinds of question that are asked; all when empty.
        request: what the source is asked for when it writes a caption.
        prompts: as in `Setting`.
        adapter: as in `Setting`.
        description_adapter: as in `Setting`.
        connector: as in `Setting`.
        own_bridge: as in `Setting`.
        decoding: `free`, or `choice`: every arm can only answer with one of the item's options,
            those of its kind where the item lists none; an item without any is answered freely.
        answer_tokens: how many tokens an answer may have.
        limit: ask only so many; None asks all.
        batch_size: items at once, for accuracy.
        timed: items that are also run one at a time, by the clock, after two to warm up.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    items: Path
    bridge: str | None = None
    source_model: str | None = None
    target_model: str | None = None
    dtype: str = "float32"
    source: str | None = None
    arms: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    request: str = GENERIC_REQUEST
    prompts: Path | None = None
    adapter: Path | None = None
    description_adapter: Path | None = None
    connector: Path | None = None
    own_bridge: Path | None = None
    decoding: str = "free"
    answer_tokens: int = MAX_NEW_TOKENS
    limit: int | None = None
    batch_size: int = 48
    timed: int = 10
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2 to shuffle, got {self.batch_size}")
        if self.answer_tokens < 1:
            raise ConfigError(f"answer_tokens must be at least 1, got {self.answer_tokens}")
        check_one_of("dtype", self.dtype, WIDE_DTYPES)
        check_one_of("decoding", self.decoding, DECODINGS)
        if self.bridge is None and (self.source_model or self.target_model):
            raise ConfigError(
                "source_model and target_model say where the models of a bridge lie; give "
                "bridge=FOLDER too"
            )


def evaluate(
    bridge: Bridge, config: EvaluationConfig, out: Path | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Run all arms and controls.

    Args:
        bridge: with the frozen models.
        config: settings.
        out: folder of the run; what stands there already is not asked again. None keeps nothing.
        progress: whether to show bars.

    Returns:
        The summary, see `summarise`.

    Raises:
        ConfigError: the folder holds a run with other settings, or another process writes in it.
    """
    with hold(out):
        return _run(bridge, config, out, progress=progress)


def _run(
    bridge: Bridge, config: EvaluationConfig, out: Path | None, *, progress: bool
) -> dict[str, Any]:
    items = _apart(load_items(config.items, config.limit, config.kinds))
    given = {key: getattr(config, key) for key in FILES.values()}
    source = source_name(bridge, config.source)
    setting = Setting(
        bridge=bridge,
        source_name=source,
        request=config.request,
        among_options=config.decoding == "choice",
        answer_tokens=config.answer_tokens,
        **given,
    )
    arms = {n: build_arm(n, setting) for n in config.arms or _possible_arms(items, setting)}
    settings = {**portable(config), "source": source}
    settings["kinds"] = settings["kinds"] or None  # as runs have it that knew no kinds
    settings["decoding"] = config.decoding if setting.among_options else None  # likewise
    if config.answer_tokens == MAX_NEW_TOKENS:
        settings["answer_tokens"] = None  # likewise
    # What the target has, whoever loaded it; likewise.
    dtype = str(bridge.target.model.dtype).removeprefix("torch.")
    settings["dtype"] = None if dtype == "float32" else dtype
    settings["fuser"] = fingerprint(bridge.fusers.state_dict())
    settings |= {key: path and _fingerprint_files(path) for key, path in given.items()}
    if out is not None:
        claim(out, settings)
    batches = split_rows(len(items), config.batch_size)
    answers = JsonLines(out / "answers.jsonl" if out else None, [rows.stop for rows in batches])
    for rows in tqdm(batches, desc="answers", disable=not progress):
        if rows.stop > len(answers.rows):
            batch = items[rows.start : rows.stop]
            answers.append(_answer_rows(arms, batch, among_options=setting.among_options))
    turns = items[: config.timed + _WARM_UP]
    times = JsonLines(out / "times.jsonl" if out else None, range(1, len(turns) + 1))
    for item in tqdm(turns[len(times.rows) :], desc="times", disable=not progress):
        times.append([_time_row(arms, bridge, item)])
    summary = {
        "config": settings,
        **summarise(answers.rows, times.rows[_WARM_UP:], batches, config.resamples, config.seed),
    }
    if out is not None:
        write_json(out / "summary.json", summary)
    return summary


def split_rows(count: int, batch_size: int) -> list[range]:
    """Batches of at least two where there are two: a lone row could not be shuffled."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def portable(config: Any) -> dict[str, Any]:
    """A config's values, for a result that is read on other machines.

    Paths are cut to folder and name; where a bridge's models lay is left out.
    """
    values = to_dict(config)
    for key, value in vars(config).items():
        if isinstance(value, Path) or (key == "bridge" and value):
            values[key] = "/".join(Path(value).parts[-2:])
    return {**values, "source_model": None, "target_model": None}


def source_name(bridge: Bridge, name: str | None) -> str:
    """The source of that name, or the only one.

    Raises:
        ConfigError: there is none of that name, or None and several.
    """
    known = ", ".join(bridge.sources)
    if name is None:
        if len(bridge.sources) > 1:
            raise ConfigError(f"the bridge has several sources; give source= one of {known}")
        return next(iter(bridge.sources))
    if name not in bridge.sources:
        raise ConfigError(f"the bridge has no source {name!r}; known: {known}")
    return name


def _possible_arms(items: Sequence[Item], setting: Setting) -> list[str]:
    """Those that the items have words for, the source can serve, and files are given for."""
    left_out = {name for name, key in FILES.items() if getattr(setting, key) is None}
    described = all(item.description is not None for item in items)
    instructed = all(item.row.get("text") for item in items)
    left_out |= {name for name in ARMS if "description" in name and not described}
    left_out |= {name for name in ARMS if "instruction" in name and not instructed}
    if not instructed:
        left_out |= {"tuned_description", "true_description_options"}
    if hasattr(setting.source, "act"):
        left_out.update(SOURCE_WORDS)
    if not getattr(setting.source, "takes_questions", True):
        left_out |= {"source", "answer_relay", "question_aware_relay"}
    parts = {reads_actions(link) for link in setting.bridge.config.links}
    if parts != {True, False}:
        left_out |= {"prefix_only", "action_only"}
    return [name for name in ARMS if name not in left_out]


def _answer_rows(
    arms: dict[str, Arm], batch: Sequence[Item], *, among_options: bool
) -> list[dict[str, Any]]:
    asked = [to_asked(item) for item in batch]
    replies = {name: arm.answer(asked) for name, arm in arms.items()}
    return [
        {
            "image": item.image.name,
            "kind": item.kind,
            "question": item.question,
            "gold": item.answer,
            **({"human_answers": item.human_answers} if item.human_answers else {}),
            **({"told": item.told} if item.told is not None else {}),
            **({"episode": item.episode} if item.episode is not None else {}),
            **(_choice(item) if among_options else {}),
            "answers": {name: texts[i].answer for name, texts in replies.items()},
            "relayed": {n: t[i].relayed for n, t in replies.items() if t[i].relayed is not None},
        }
        for i, item in enumerate(batch)
    ]


def _choice(item: Item) -> dict[str, Any]:
    """How many options an answer had, and whether the item itself lists them."""
    return {
        "options": len(set(item.options)),
        "lists_options": bool(item.row.get("options")),
    }


def _time_row(arms: dict[str, Arm], bridge: Bridge, item: Item) -> dict[str, Any]:
    """One item by the clock, arm after arm, so that what slows the machine slows all."""
    row: dict[str, Any] = {"image": item.image.name, "question": item.question}
    for name, arm in arms.items():
        answer = timed(arm, bridge, to_asked(item))
        row[name] = {k: v for k, v in answer._asdict().items() if k not in ("answer", "relayed")}
    return row


def to_asked(item: Item) -> Asked:
    """An item as an arm gets it, what it shows read from disk."""
    return Asked(item.look(), item.question, item.options, item.description)


def _fingerprint_files(path: Path) -> str:
    """Which bytes a file has, or all files of a folder."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; configs/README.md says what makes it")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _apart(items: Sequence[Item]) -> list[Item]:
    """Items in an order in which neighbours show unlike pictures and often ask alike.

    The shuffled control hands each item its neighbour's cache. Of episodes, which neighbours meet
    is drawn: those of the same step would know how long it has lasted, and so what to expect.
    """

    def place(item: Item) -> tuple[str, ...]:
        name = item.image.name
        drawn = hashlib.sha256(name.encode()).hexdigest() if item.episode is not None else ""
        return item.kind, item.question, drawn, str(item.image)

    ordered = sorted(items, key=place)
    for here in range(1, len(ordered)):
        episode = ordered[here - 1].episode
        others = (at for at in range(here, len(ordered)) if ordered[at].episode != episode)
        if episode is not None and (at := next(others, here)) != here:
            ordered.insert(here, ordered.pop(at))
    return ordered

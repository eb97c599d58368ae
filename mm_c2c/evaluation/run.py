"""Ask every arm the same questions, and keep each answer.

A run's folder: `config.json`, `answers.jsonl` (one line an item), `times.jsonl` (one line an item
that ran by the clock), `summary.json`. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_c2c.bridge import Bridge
from mm_c2c.config import check_at_least_one, check_one_of, to_dict
from mm_c2c.errors import ConfigError, InputError
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
from mm_c2c.evaluation.pair import PairConfig
from mm_c2c.evaluation.summary import summarise
from mm_c2c.evaluation.tasks import Item, load_items
from mm_c2c.pretrained import fingerprint, fingerprint_weights
from mm_c2c.reference.models import HERE
from mm_c2c.run_folder import ELSEWHERE, JsonLines, claim, hold, write_json

_WARM_UP = 2
DECODINGS = ("free", "choice")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(PairConfig):
    """Settings of one evaluation, beside those of the pair.

    Attributes:
        items: JSONL of questions, pictures beside it.
        arms: which to run, by name; when empty all that the items and the source have something
            for, without those whose own file (`FILES`) is not given.
        kinds: kinds of question that are asked; all when empty.
        request: what the source is asked for when it writes a caption.
        prompts: as in `Setting`.
        adapter: as in `Setting`.
        description_adapter: as in `Setting`.
        connector: as in `Setting`.
        aligned_bridge: as in `Setting`.
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
    arms: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    request: str = GENERIC_REQUEST
    prompts: Path | None = None
    adapter: Path | None = None
    description_adapter: Path | None = None
    connector: Path | None = None
    aligned_bridge: Path | None = None
    own_bridge: Path | None = None
    decoding: str = "free"
    answer_tokens: int = MAX_NEW_TOKENS
    limit: int | None = None
    batch_size: int = 48
    timed: int = 10
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "answer_tokens", "batch_size", "limit", "resamples")
        check_one_of("decoding", self.decoding, DECODINGS)


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
    items = ordered(load_items(config.items, config.limit, config.kinds))
    others = _others(items)
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
    if "shuffled" not in arms:
        others = [None] * len(items)
    settings = {
        **portable(config),
        "source": source,
        # What the target has, whoever loaded it.
        "dtype": str(bridge.target.model.dtype).removeprefix("torch."),
        "fuser": fingerprint(bridge.fusers.state_dict()),
        "models": weights_of(bridge),
        "items_fingerprint": fingerprint_files(config.items),
        **{key: path and fingerprint_files(path) for key, path in given.items()},
    }
    if out is not None:
        claim(out, settings, EvaluationConfig)

    def asked(at: int) -> Asked:
        other = others[at]
        return to_asked(items[at], None if other is None else items[other])

    count = len(items)
    ends = [min(a + config.batch_size, count) for a in range(0, count, config.batch_size)]
    folder, choice = config.items.parent, setting.among_options
    known = [_asked_row(items[at], others[at], folder, choice=choice) for at in range(count)]
    answers = JsonLines(out / "answers.jsonl" if out else None, ends)
    _check_rows(answers, known, arms)
    for end in tqdm(ends, desc="answers", disable=not progress):
        if end > len(answers.rows):
            here = range(len(answers.rows), end)
            replies = _reply(arms, [asked(at) for at in here])
            answers.append([known[at] | reply for at, reply in zip(here, replies, strict=True)])
    turns = _spread(count, config.timed)
    times = JsonLines(out / "times.jsonl" if out else None, range(1, len(turns) + 1))
    todo = turns[len(times.rows) :]
    for at in range(_WARM_UP) if todo else ():  # this process is cold, whatever an earlier one did
        _time_row(arms, bridge, items[at], asked(at))
    for at in tqdm(todo, desc="times", disable=not progress):
        times.append([_time_row(arms, bridge, items[at], asked(at))])
    summary = {
        "config": settings,
        **summarise(answers.rows, times.rows, config.resamples, config.seed),
    }
    if out is not None:
        write_json(out / "summary.json", summary)
    return summary


def reference_config() -> EvaluationConfig:
    """What `mm-c2c evaluate` asks of the reference bridge: the shipped scenes."""
    return EvaluationConfig(
        items=HERE / "unseen_style" / "items.jsonl",
        prompts=HERE / "prompts.json",
        connector=HERE / "soft_prompt",
        aligned_bridge=HERE / "aligned",
    )


def portable(config: Any) -> dict[str, Any]:
    """A config's values, for a result that is read on other machines.

    Paths are cut to folder and name; where a bridge's models lay is left out.
    """
    values = to_dict(config)
    for key, value in vars(config).items():
        if isinstance(value, Path) or (key == "bridge" and value):
            values[key] = "/".join(Path(value).parts[-2:])
    return {**values, "source_model": None, "target_model": None}


def _spread(count: int, timed: int) -> list[int]:
    """Rows to time, of all kinds of question; the first ones warm up."""
    left = max(0, count - _WARM_UP)
    few = min(left, timed)
    return [_WARM_UP + number * left // few for number in range(few)]


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
    if None in _others(items):
        left_out.add("shuffled")
    parts = {reads_actions(link) for link in setting.bridge.config.links}
    if parts != {True, False}:
        left_out |= {"prefix_only", "action_only"}
    return [name for name in ARMS if name not in left_out]


def _reply(arms: dict[str, Arm], asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """What every arm says, and had to go by, row by row."""
    replies = {name: arm.answer(asked) for name, arm in arms.items()}
    return [
        {
            "answers": {name: texts[i].answer for name, texts in replies.items()},
            "relayed": {n: t[i].relayed for n, t in replies.items() if t[i].relayed is not None},
        }
        for i in range(len(asked))
    ]


def _asked_row(item: Item, other: int | None, folder: Path, *, choice: bool) -> dict[str, Any]:
    """What was asked, as `answers.jsonl` has it."""
    return {
        # As the file has it: of two folders' pictures of one name it says which.
        "image": Path(os.path.relpath(item.image, folder)).as_posix(),
        "kind": item.kind,
        "question": item.question,
        "gold": item.answer,
        "options": item.options,
        **({"human_answers": item.human_answers} if item.human_answers else {}),
        **({"told": item.told} if item.told is not None else {}),
        **({"episode": item.episode} if item.episode is not None else {}),
        **({"lists_options": bool(item.row.get("options"))} if choice else {}),
        **({"shuffled_with": other} if other is not None else {}),
    }


def _check_rows(kept: JsonLines, asked: list[dict[str, Any]], arms: Collection[str]) -> None:
    """Refuse what was kept of other questions, or of other arms."""
    for number, (row, wanted) in enumerate(zip(kept.rows, asked, strict=False), 1):
        same = all(row.get(key) == wanted[key] for key in ("image", "question", "gold"))
        if not same or set(row.get("answers", ())) != set(arms):
            raise InputError(
                f"{kept.path}, line {number}: expected answers of {', '.join(arms)} to "
                f"{wanted['question']!r} about {wanted['image']}, got {reprlib.repr(row)}{ELSEWHERE}"
            )


def _time_row(arms: dict[str, Arm], bridge: Bridge, item: Item, asked: Asked) -> dict[str, Any]:
    """One item by the clock, arm after arm, so that what slows the machine slows all."""
    row: dict[str, Any] = {"image": item.image.name, "question": item.question}
    for name, arm in arms.items():
        answer = timed(arm, bridge, asked)
        row[name] = {k: v for k, v in answer._asdict().items() if k not in ("answer", "relayed")}
    return row


def to_asked(item: Item, other: Item | None = None) -> Asked:
    """An item as an arm gets it, what it and another one show read from disk."""
    shown = None if other is None else other.look()
    return Asked(item.look(), item.question, item.options, item.description, shown)


def weights_of(bridge: Bridge) -> str:
    """Tells the frozen models of a bridge from the same ones with other weights."""
    readers: list[Any] = [bridge.target, *bridge.sources.values()]
    found = [fingerprint_weights(reader.model) for reader in readers]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def fingerprint_files(path: Path) -> str:
    """Which bytes a file has, or all files of a folder.

    Raises:
        ConfigError: there is neither.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; configs/README.md says what makes it")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def ordered(items: Sequence[Item]) -> list[Item]:
    """Items in an order in which neighbours often ask alike; what they show differs by chance.

    Items of the same step of two episodes would know how long the other has lasted, and so what to
    expect: which ones meet is drawn.
    """

    def place(item: Item) -> tuple[str, ...]:
        name = item.image.name
        drawn = hashlib.sha256(name.encode()).hexdigest() if item.episode is not None else ""
        return item.kind, item.question, drawn, str(item.image)

    return sorted(items, key=place)


def _others(items: Sequence[Item]) -> list[int | None]:
    """Whose look each item is handed in the control `shuffled`: the next one's, going round.

    The next that shows another picture, and is of another episode; None where there is none.
    """

    def unlike(one: Item, other: Item) -> bool:
        apart = one.episode is None or one.episode != other.episode
        return one.image != other.image and apart

    count = len(items)
    return [
        next((i % count for i in range(at + 1, at + count) if unlike(item, items[i % count])), None)
        for at, item in enumerate(items)
    ]

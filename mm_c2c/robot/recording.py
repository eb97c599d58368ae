"""Episodes as folders: written while they happen, read back as the same events.

    FOLDER/episode.json      a header: names, types and shapes, and what the recorder was told
    FOLDER/events.jsonl      one event a line, in order, each with its checksum
    FOLDER/images/CAMERA/000000.webp    lossless

A step's pictures are written before its line: what a run that was killed leaves can be read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_c2c.errors import ConfigError, InputError, MismatchError, UnsupportedError
from mm_c2c.robot.events import (
    Answer,
    EpisodeEnd,
    Event,
    Monitor,
    Narration,
    ReaderFailure,
    Step,
)
from mm_c2c.robot.observation import ACTION, IMAGES, STATE, TASK

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset

FORMAT = "mm_c2c.episode.1"
HEADER_NAME = "episode.json"
EVENTS_NAME = "events.jsonl"
_FRAME = "frame"
_KINDS: Mapping[str, Any] = {
    kind.__name__: kind for kind in (Narration, Answer, Monitor, ReaderFailure, EpisodeEnd)
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """An episode that was recorded.

    Attributes:
        events: in the order in which they happened.
        features: LeRobot's names of what each step holds, with `dtype` and `shape`.
        about: what the recorder was told.
    """

    events: tuple[Event, ...]
    features: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps alone."""
        return tuple(event for event in self.events if isinstance(event, Step))

    @property
    def task(self) -> str:
        """The instruction at the first step."""
        task: str = self.steps[0].observation[TASK]
        return task

    @property
    def end(self) -> EpisodeEnd | None:
        """How it ended; None where the recording breaks off."""
        last = self.events[-1]
        return last if isinstance(last, EpisodeEnd) else None

    def past(self, index: int) -> list[Any]:
        """The actions before a step."""
        return [step.action for step in self.steps[:index]]


def record(
    events: Iterable[Event], folder: str | Path, about: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Hand events on, and write them as they pass.

    Args:
        events: of one episode, such as `run_episode` gives.
        folder: a new one.
        about: what else to keep, as JSON has it, such as the level and the seed.

    Raises:
        InputError: the folder holds something, a later step is unlike the first, or a camera is
            called as the scene from outside is.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; record into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    features: dict[str, Any] | None = None
    with (folder / EVENTS_NAME).open("w", encoding="utf-8") as file:
        for event in events:
            if isinstance(event, Step):
                found = _features(event)
                if features is None:
                    features = found
                    header = {"format": FORMAT, "features": features, "about": dict(about or {})}
                    text = json.dumps({**header, "crc32": _checksum(header)}, indent=2)
                    (folder / HEADER_NAME).write_text(text + "\n", encoding="utf-8")
                elif found != features:
                    raise InputError(
                        f"step {event.index} has {found}, but the episode began with {features}"
                    )
                line = _write_step(event, folder)
            else:
                line = {"kind": type(event).__name__, **dataclasses.asdict(event)}
            file.write(json.dumps({**line, "crc32": _checksum(line)}) + "\n")
            file.flush()
            yield event


def load_episode(folder: str | Path) -> Episode:
    """Read what `record` wrote.

    A last line that was cut off is left out, as a run that was killed leaves it.

    Raises:
        MismatchError: a file is missing or damaged, or the folder holds something else.
    """
    folder = Path(folder)
    header = _read_header(folder)
    try:
        text = (folder / EVENTS_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MismatchError(f"{folder / EVENTS_NAME} is missing or damaged: {error}") from error
    *lines, _ = text.split("\n")
    events = []
    for number, text in enumerate(lines, 1):
        where = f"{folder / EVENTS_NAME}, line {number}"
        line = _read_line(text, where)
        try:
            kind = line.pop("kind")
            if kind == "Step":
                events.append(_read_step(line, folder, header["features"]))
            else:
                events.append(_KINDS[kind](**line))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, MismatchError):
                raise
            raise MismatchError(f"{where}: no event of this version: {error!r}") from error
    if not any(isinstance(event, Step) for event in events):
        raise MismatchError(f"{folder} holds no step: the recording broke off before the first")
    return Episode(events=tuple(events), features=header["features"], about=header["about"])


def export_lerobot(
    episodes: Iterable[Episode],
    repo_id: str,
    *,
    fps: int,
    root: str | Path | None = None,
    robot_type: str | None = None,
) -> LeRobotDataset:
    """Episodes as a new LeRobot dataset (format v3), pictures as images.

    Frames seen from outside, tokens, and what a reader said are left out: LeRobot has no names for
    them.

    Args:
        episodes: with the same features.
        repo_id: `user/name`.
        fps: steps a second.
        root: folder; None takes LeRobot's own place.
        robot_type: LeRobot's word for the robot.

    Raises:
        UnsupportedError: LeRobot is not installed.
        ConfigError: there is no episode, or they have other features than the first.
    """
    try:
        from lerobot.datasets import LeRobotDataset
    except ImportError as error:
        raise UnsupportedError(
            f"the export needs LeRobot ({error}): pip install lerobot, on Python 3.12"
        ) from error
    episodes = list(episodes)
    if not episodes or any(episode.features != episodes[0].features for episode in episodes):
        raise ConfigError(
            f"expected episodes of the same features, got {[e.features for e in episodes]}"
        )
    features = {
        key: {**feature, "shape": tuple(feature["shape"])}
        for key, feature in episodes[0].features.items()
        if key != _FRAME
    }
    dataset = LeRobotDataset.create(
        repo_id, fps, features, root=root, robot_type=robot_type, use_videos=False
    )
    for episode in episodes:
        for step in episode.steps:
            action = np.asarray(step.action, features[ACTION]["dtype"])
            observed = {key: step.observation[key] for key in features if key != ACTION}
            dataset.add_frame(
                {
                    **observed,
                    ACTION: action.reshape(features[ACTION]["shape"]),
                    TASK: step.observation[TASK],
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return dataset


def _pictures(step: Step) -> dict[str, NDArray[np.uint8]]:
    """A step's pictures by name: of the cameras, and the frame."""
    found = {key: value for key, value in step.observation.items() if key.startswith(IMAGES)}
    if step.frame is None:
        return found
    if IMAGES + _FRAME in found:
        raise InputError(
            f"the scene from outside is recorded as {_FRAME!r}: give the camera of that name another"
        )
    return {**found, _FRAME: step.frame}


def _features(step: Step) -> dict[str, Any]:
    """As LeRobot describes them."""
    features: dict[str, Any] = {
        key: {
            "dtype": "image",
            "shape": list(pixels.shape),
            "names": ["height", "width", "channels"],
        }
        for key, pixels in _pictures(step).items()
    }
    numbers = {ACTION: np.asarray(step.action)}
    if STATE in step.observation:
        numbers[STATE] = step.observation[STATE]
    for key, value in numbers.items():
        shape = list(value.shape) or [1]
        features[key] = {"dtype": str(value.dtype), "shape": shape, "names": None}
    return features


def _image_path(folder: Path, name: str, index: int) -> Path:
    return folder / "images" / name.removeprefix(IMAGES) / f"{index:06d}.webp"


def _write_step(step: Step, folder: Path) -> dict[str, Any]:
    """The pictures into their files; all else as a line."""
    sums = {}
    for name, pixels in _pictures(step).items():
        path = _image_path(folder, name, step.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            # The least effort: the robot waits for it.
            Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=0, method=0)
            data = file.getvalue()
        path.write_bytes(data)
        sums[name] = f"{zlib.crc32(data):08x}"
    state = step.observation.get(STATE)
    line = {
        "kind": "Step",
        "index": step.index,
        TASK: step.observation[TASK],
        STATE: None if state is None else state.tolist(),
        ACTION: np.asarray(step.action).tolist(),
        "tokens": None if step.tokens is None else step.tokens.tolist(),
        "reward": step.reward,
        "terminated": step.terminated,
        "truncated": step.truncated,
        "images": sums,
    }
    if not math.isfinite(step.reward) or not np.isfinite(np.asarray(step.action)).all():
        raise InputError(f"step {step.index}: expected finite numbers, got {line}")
    return line


def _read_step(line: dict[str, Any], folder: Path, features: Mapping[str, Any]) -> Step:
    index = int(line["index"])
    pictures = {}
    for name, expected in line["images"].items():
        path = _image_path(folder, name, index)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MismatchError(f"{path} is missing or unreadable: {error}") from error
        found = f"{zlib.crc32(data):08x}"
        if found != expected:
            raise MismatchError(f"{path} is damaged: expected checksum {expected}, got {found}")
        pictures[name] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    frame = pictures.pop(_FRAME, None)
    observation: dict[str, Any] = dict(pictures)
    if line[STATE] is not None:
        observation[STATE] = np.array(line[STATE], features[STATE]["dtype"])
    observation[TASK] = line[TASK]
    action = np.array(line[ACTION], features[ACTION]["dtype"])
    return Step(
        index=index,
        observation=observation,
        action=action if action.ndim else action[()],
        tokens=None if line["tokens"] is None else np.array(line["tokens"], np.int64),
        reward=line["reward"],
        terminated=line["terminated"],
        truncated=line["truncated"],
        frame=frame,
    )


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MismatchError(
            f"{folder} is not a recorded episode: {HEADER_NAME} is missing or damaged: {error}"
        ) from error
    header = _read_line(text, str(path))
    if header.get("format") != FORMAT:
        raise MismatchError(f"{path}: expected format {FORMAT!r}, got {header.get('format')!r}")
    return header


def _read_line(text: str, where: str) -> dict[str, Any]:
    """A line as it was written, without its checksum."""
    try:
        line = json.loads(text)
        expected = line.pop("crc32")
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise MismatchError(f"{where}: damaged: {error!r}") from error
    found = _checksum(line)
    if found != expected:
        raise MismatchError(f"{where}: damaged: expected checksum {expected}, got {found}")
    return dict(line)


def _checksum(line: Mapping[str, Any]) -> str:
    """Of the values, however they are laid out."""
    return f"{zlib.crc32(json.dumps(line, sort_keys=True).encode()):08x}"

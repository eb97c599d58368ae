"""Episodes that are written, killed, damaged, read again, and handed to LeRobot."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from robots import STEPS, TASK, ColourRoom, build_policy

from mm_c2c.errors import ConfigError, InputError, MismatchError, UnsupportedError
from mm_c2c.robot import (
    Answer,
    EpisodeEnd,
    Event,
    Monitor,
    Narration,
    ReaderFailure,
    Step,
    export_lerobot,
    load_episode,
    record,
    run_episode,
)

SAID = (
    Narration(step=0, latency_ms=1.5, text='it turns "left"\n'),
    Answer(step=1, question="where ?", text="ü"),
    Monitor(step=1, success=0.1, smoothed=1 / 3, alarm=True, reason="stuck"),
    ReaderFailure(step=2, message="no"),
)


@pytest.fixture(scope="module")
def happened() -> list[Event]:
    """Steps of a policy, with something said after each."""
    *steps, end = run_episode(ColourRoom(), build_policy(), seed=1)
    said = itertools.zip_longest(steps, SAID)
    return [*(event for pair in said for event in pair if event is not None), end]


@pytest.fixture
def folder(happened: list[Event], tmp_path: Path) -> Path:
    assert list(record(happened, tmp_path / "episode", {"level": "room"})) == happened
    return tmp_path / "episode"


def plain(event: Event) -> Any:
    """What can be compared: arrays as their type, shape and bytes."""
    if not isinstance(event, Step):
        return event

    def bare(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return str(value.dtype), value.shape, value.tobytes()
        return {k: bare(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {key: bare(value) for key, value in vars(event).items()}


def test_a_replay_gives_the_same_events_again(happened: list[Event], folder: Path) -> None:
    episode = load_episode(folder)
    assert list(map(plain, episode.events)) == list(map(plain, happened))
    assert len(episode.steps) == STEPS
    assert episode.about == {"level": "room"}
    assert episode.task == TASK
    assert episode.end == EpisodeEnd(steps=STEPS, success=True, reward=0.1)
    assert [a.tobytes() for a in episode.past(2)] == [s.action.tobytes() for s in episode.steps[:2]]


def test_a_discrete_action_comes_back_as_a_number(happened: list[Event], tmp_path: Path) -> None:
    first = happened[0]
    step = Step(**{**vars(first), "action": np.int64(4), "tokens": None, "frame": None})
    list(record([step], tmp_path))
    (again,) = load_episode(tmp_path).events
    assert plain(again) == plain(step)
    assert isinstance(again.action, np.int64)


def test_a_policy_does_the_same_on_what_was_recorded(folder: Path) -> None:
    policy = build_policy()
    episode = load_episode(folder)
    step = episode.steps[2]
    decision = policy.decide(step.observation, episode.past(2))
    assert decision.actions[0].tobytes() == step.action.tobytes()


def test_what_a_killed_run_leaves_can_be_read(happened: list[Event], tmp_path: Path) -> None:
    stream = record(happened, tmp_path / "killed")
    for _ in range(3):
        next(stream)
    # No close, no end: what is on the disk now is what a kill would leave.
    file = tmp_path / "killed" / "events.jsonl"
    for cut in (0, 1, 40):
        text = file.read_text("utf-8")
        file.write_text(text[: len(text) - cut], "utf-8")
        episode = load_episode(tmp_path / "killed")
        kept = 3 if cut == 0 else 2
        assert list(map(plain, episode.events)) == list(map(plain, happened[:kept]))
        assert episode.end is None


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "episode.json").unlink(), "not a recorded episode"),
        (lambda f: change(f / "episode.json", "room", "roof"), "damaged: expected checksum"),
        (lambda f: (f / "episode.json").write_text("[]"), "episode.json: damaged"),
        (lambda f: (f / "events.jsonl").unlink(), "events.jsonl is missing"),
        (lambda f: (f / "events.jsonl").write_bytes(b"\xff\n"), "missing or damaged"),
        (lambda f: (f / "events.jsonl").write_text(""), "holds no step"),
        (lambda f: change(f / "events.jsonl", '"reward": 0.0', '"reward": 1.0'), "line 1: damaged"),
        (lambda f: change(f / "events.jsonl", '{"kind"', '{kind"'), "line 1: damaged"),
        (lambda f: (f / "images/front/000001.webp").unlink(), "000001.webp is missing"),
        (
            lambda f: Image.new("RGB", (56, 40)).save(f / "images/wrist/000002.webp"),
            "wrist/000002.webp is damaged: expected checksum",
        ),
    ],
)
def test_a_damaged_recording_is_refused(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(MismatchError, match=message):
        load_episode(folder)


def test_an_event_of_another_version_is_refused(folder: Path) -> None:
    from mm_c2c.robot.recording import _checksum

    with (folder / "events.jsonl").open("a") as file:
        line = {"kind": "Dance", "step": 1}
        file.write(json.dumps({**line, "crc32": _checksum(line)}) + "\n")
    with pytest.raises(MismatchError, match="no event of this version: KeyError"):
        load_episode(folder)
    header = {"format": "mm_c2c.episode.0"}
    (folder / "episode.json").write_text(json.dumps({**header, "crc32": _checksum(header)}))
    with pytest.raises(MismatchError, match=r"expected format 'mm_c2c\.episode\.1', got '.*0'"):
        load_episode(folder)


def test_what_cannot_be_recorded_is_refused(happened: list[Event], tmp_path: Path) -> None:
    first, second = (event for event in happened[:3] if isinstance(event, Step))
    other = Step(**{**vars(second), "frame": None})
    with pytest.raises(InputError, match=r"step 1 has .* but the episode began with"):
        list(record([first, other], tmp_path / "a"))
    with pytest.raises(InputError, match="is not empty"):
        next(record([first], tmp_path / "a"))
    wild = Step(**{**vars(first), "reward": float("nan")})
    with pytest.raises(InputError, match="step 0: expected finite numbers"):
        list(record([wild], tmp_path / "b"))
    pixels = first.observation["observation.images.front"]
    clash = {**first.observation, "observation.images.frame": pixels}
    with pytest.raises(InputError, match=r"recorded as 'frame': give the camera .* another"):
        list(record([Step(**{**vars(first), "observation": clash})], tmp_path / "c"))
    bare = Step(**{**vars(first), "observation": clash, "frame": None})
    list(record([bare], tmp_path / "d"))
    assert plain(load_episode(tmp_path / "d").events[0]) == plain(bare)


# --- LeRobot, by a stand-in of the same signatures ------------------------------------------


class StandIn:
    """`LeRobotDataset` of LeRobot 0.6.1 as far as it is called: its signatures and its checks."""

    def __init__(self, features: dict[str, Any]) -> None:
        self.features = features
        self.frames: list[dict[str, Any]] = []
        self.episodes: list[list[dict[str, Any]]] = []
        self.finalized = False

    @classmethod
    def create(
        cls,
        repo_id: str,
        fps: int,
        features: dict[str, Any],
        root: Path | None = None,
        robot_type: str | None = None,
        use_videos: bool = True,
    ) -> StandIn:
        made = cls(features)
        made.about = (repo_id, fps, root, robot_type, use_videos)
        return made

    def add_frame(self, frame: dict[str, Any]) -> None:
        assert set(frame) == {*self.features, "task"}
        for name, feature in self.features.items():
            value = frame[name]
            assert isinstance(value, np.ndarray)
            assert value.shape == feature["shape"]
            assert isinstance(feature["shape"], tuple)
            if feature["dtype"] != "image":
                assert value.dtype == np.dtype(feature["dtype"])
        assert isinstance(frame["task"], str)
        self.frames.append(frame)

    def save_episode(self) -> None:
        self.episodes.append(self.frames)
        self.frames = []

    def finalize(self) -> None:
        self.finalized = True


@pytest.fixture
def lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    package, datasets = ModuleType("lerobot"), ModuleType("lerobot.datasets")
    datasets.LeRobotDataset = StandIn
    monkeypatch.setitem(sys.modules, "lerobot", package)
    monkeypatch.setitem(sys.modules, "lerobot.datasets", datasets)


@pytest.mark.usefixtures("lerobot")
def test_episodes_become_a_lerobot_dataset(
    happened: list[Event], folder: Path, tmp_path: Path
) -> None:
    episode = load_episode(folder)
    dataset = export_lerobot([episode, episode], "me/room", fps=10, root=tmp_path / "out")
    assert dataset.about == ("me/room", 10, tmp_path / "out", None, False)
    assert dataset.features["observation.images.front"]["shape"] == (40, 56, 3)
    assert dataset.features["action"] == {"dtype": "float64", "shape": (2,), "names": None}
    assert list(dataset.features) == [
        "observation.images.front",
        "observation.images.wrist",
        "action",
        "observation.state",
    ]
    assert [len(frames) for frames in dataset.episodes] == [STEPS, STEPS]
    frame, step = dataset.episodes[1][3], episode.steps[3]
    assert frame["task"] == TASK
    assert np.array_equal(frame["action"], step.action)
    assert np.array_equal(frame["observation.state"], step.observation["observation.state"])
    assert dataset.finalized


def test_lerobot_itself_reads_what_was_exported(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("lerobot.datasets", reason="make test-lerobot has LeRobot")
    episode = load_episode(folder)
    export_lerobot([episode, episode], "me/room", fps=10, root=tmp_path / "out")
    dataset = datasets.LeRobotDataset("me/room", root=tmp_path / "out")
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (2, 2 * STEPS, 10)
    read, step = dataset[STEPS + 3], episode.steps[3]
    assert (int(read["episode_index"]), int(read["frame_index"])) == (1, 3)
    assert read["task"] == TASK
    assert np.array_equal(read["action"].numpy(), step.action.astype(np.float32))  # as it reads all
    for name in ("observation.images.front", "observation.images.wrist"):
        pixels = (read[name] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, step.observation[name])
    assert np.array_equal(read["observation.state"], step.observation["observation.state"])


@pytest.mark.usefixtures("lerobot")
def test_discrete_actions_are_exported_as_one_number(happened: list[Event], tmp_path: Path) -> None:
    step = Step(**{**vars(happened[0]), "action": np.int64(4)})
    list(record([step], tmp_path))
    dataset = export_lerobot([load_episode(tmp_path)], "me/room", fps=10)
    assert dataset.episodes[0][0]["action"].tolist() == [4]
    with pytest.raises(ConfigError, match="same features"):
        export_lerobot([], "me/room", fps=10)


def test_the_export_says_that_it_needs_lerobot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lerobot.datasets", None)
    with pytest.raises(UnsupportedError, match=r"needs LeRobot .* pip install lerobot"):
        export_lerobot([load_episode(folder)], "me/room", fps=10)

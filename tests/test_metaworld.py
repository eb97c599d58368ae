"""The Meta-World policy: its questions against plain references, its training, its episodes.

What needs the simulator is skipped where Meta-World is not installed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.geometry import find
from mm_c2c.reference.metaworld import make_items, rollouts
from mm_c2c.reference.metaworld.demonstrations import (
    STRIDE,
    demonstrate,
    expert_of,
    read_shard,
    save_shard,
    shards_of,
)
from mm_c2c.reference.metaworld.policy import CHUNK, EXECUTED, load_policy, to_actions
from mm_c2c.reference.metaworld.questions import (
    HORIZON,
    KINDS,
    OPTIONS,
    Moment,
    answers,
    caption,
    direction,
    failure,
    gripper_motion,
    questions,
)
from mm_c2c.reference.metaworld.tasks import (
    IMAGE_KEY,
    IMAGE_PIXELS,
    STATE_KEY,
    TASKS,
    MetaWorldEnv,
    Truth,
    read_truth,
)
from mm_c2c.reference.metaworld.train_policy import PolicyTrainingConfig, read_frames, train
from mm_c2c.sources.base import SourceInput


@pytest.fixture(scope="module")
def renderer() -> Iterator[None]:
    """Lets MuJoCo render without a screen; what asks for it is skipped where that cannot be done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", "egl")  # read once, by the first import
        pytest.importorskip("metaworld", reason='needs Meta-World: pip install "mm-c2c[metaworld]"')
        # In a process of its own: an import that fails halfway would be found again as it is.
        tried = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8)"]
        if subprocess.run(tried, capture_output=True, check=False).returncode:
            pytest.skip("needs EGL, which MuJoCo renders with: apt-get install libegl1")
        yield


simulator = pytest.mark.usefixtures("renderer")


def moment(task: str = "push", *, reason: str = "nothing", **changes: Any) -> Moment:
    """The hand open, 10 cm above the object, half way, moving down and closing."""
    place = np.array([0.1, 0.6, 0.02])
    base = {
        "truth": Truth(place + np.array([0, 0, 0.1]), 1.0, place, np.array([0.0, 0.8, 0.02])),
        "touching": False,
        "moved": np.array([0.01, 0.0, -0.06]),
        "gripper_change": -0.4,
        "progress": 0.5,
    }
    return Moment(task=task, reason=reason, **{**base, **changes})


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ((0.03, 0.0, 0.0), "right"),
        ((-0.03, 0.01, 0.0), "left"),
        ((0.0, 0.03, 0.02), "forward"),
        ((0.0, -0.03, 0.0), "back"),
        ((0.01, 0.0, 0.03), "up"),
        ((0.0, 0.0, -0.03), "down"),
        ((0.009, 0.0, 0.0), None),  # hardly moves
        ((0.03, 0.025, 0.0), None),  # between right and forward
    ],
)
def test_the_direction_is_the_longest_axis(moved: tuple[float, ...], expected: str | None) -> None:
    assert direction(np.array(moved)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [(-0.1, "closing"), (0.1, "opening"), (0.07, "staying"), (-0.07, "staying")],
)
def test_the_gripper_moves_where_its_opening_changes(change: float, expected: str) -> None:
    assert gripper_motion(change) == expected


def test_answers_of_an_episode_that_succeeded() -> None:
    assert answers(moment()) == {
        "task": "pushing the puck",
        "object": "puck",
        "motion": "down",
        "gripper": "closing",
        "touching": "no",
        "progress": "half way",
        "success": "yes",
        "why": "nothing",
        "narration": "The robot is pushing the puck; the hand moves down and the gripper is closing.",
    }
    assert answers(moment(progress=0.0))["progress"] == "just begun"
    assert answers(moment(progress=0.99))["progress"] == "nearly done"


def test_what_a_failed_episode_was_about_is_not_asked() -> None:
    assert answers(moment(reason="wrong place", moved=np.zeros(3), touching=True)) == {
        "gripper": "closing",
        "touching": "yes",
        "success": "no",
        "why": "wrong place",
    }


@pytest.mark.parametrize(
    ("task", "metres", "expected"),
    [
        ("push", 0.02, "missed grasp"),
        ("push", 0.2, "wrong place"),
        ("reach", 0.0, "wrong place"),  # whose object is its goal, which nothing moves
    ],
)
def test_a_thing_that_stayed_was_not_grasped(task: str, metres: float, expected: str) -> None:
    raw = np.zeros((5, 39))
    raw[-1, 4] = metres  # along x
    assert failure(task, raw, done=False) == expected
    assert failure(task, raw, done=True) == "nothing"


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_is_asked_once_and_answered_by_an_option(task: str) -> None:
    asked = questions(moment(task), random.Random(0))
    assert [q.kind for q in asked] == list(KINDS)
    assert all(q.answer in OPTIONS[q.kind] for q in asked if q.kind != "narration")
    assert set(OPTIONS) == set(KINDS) - {"narration"}


@pytest.mark.parametrize("task", TASKS)
def test_a_caption_shows_the_scene_and_not_the_instruction(task: str) -> None:
    text = caption(moment(task))
    assert f"The gripper is open, 10 cm from the {TASKS[task].object}: above the" in text
    assert TASKS[task].instruction not in text
    assert TASKS[task].doing not in text


def test_a_caption_tells_every_side_and_touch() -> None:
    place = np.array([0.0, 0.7, 0.1])
    truth = Truth(place + np.array([-0.1, -0.1, 0.0]), 0.3, place, place)
    text = caption(moment("door-open", truth=truth, touching=True))
    assert "closed, 14 cm from the door: left of, short of the door. It touches something." in text
    assert "at the door" in caption(moment("door-open", truth=Truth(place, 0.6, place, place)))


def test_the_object_of_the_reach_task_is_its_goal() -> None:
    raw = np.arange(39, dtype=np.float64)
    assert read_truth("push", raw).object.tolist() == [4, 5, 6]
    assert read_truth("reach", raw).object.tolist() == [36, 37, 38]
    assert read_truth("push", raw).hand.tolist() == [0, 1, 2]
    assert read_truth("push", raw).gripper == 3


def episode(length: int, *, success: bool, rng: np.random.Generator) -> dict[str, Any]:
    """A demonstration of random numbers."""
    frames = -(-length // STRIDE)
    return {
        "images": rng.integers(0, 255, (frames, IMAGE_PIXELS, IMAGE_PIXELS, 3)).astype(np.uint8),
        "frame_steps": np.arange(frames) * STRIDE,
        "raw": rng.standard_normal((length, 39)).astype(np.float32),
        "labels": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        "success": np.arange(length) == (length - 1 if success else -1),
    }


def test_a_shard_gives_back_its_episodes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episodes = [episode(length, success=True, rng=rng) for length in (7, 11)]
    save_shard(tmp_path / "train-push-0000.safetensors", episodes)
    (path,) = shards_of(tmp_path, "train", "push")
    for got, expected in zip(read_shard(path), episodes, strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], torch.from_numpy(value))
    with pytest.raises(InputError, match=r"no shard train-reach-\*; run `demonstrations` first"):
        shards_of(tmp_path, "train", "reach")


def test_frames_hold_what_the_expert_does_next(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    failed, done = (episode(11, success=flag, rng=rng) for flag in (False, True))
    save_shard(tmp_path / "train-push-0000.safetensors", [failed, done])
    frames = read_frames(tmp_path, "train", "push")
    assert len(frames.states) == 4  # of the one that succeeded
    for row, step in enumerate((0, 3, 6, 9)):
        plain = [done["labels"][min(step + ahead, 10)] for ahead in range(CHUNK)]
        torch.testing.assert_close(frames.chunks[row], torch.from_numpy(np.stack(plain)))
        raw = torch.from_numpy(done["raw"][step])
        torch.testing.assert_close(frames.states[row], raw[:4])
        torch.testing.assert_close(frames.places[row], raw[[0, 1, 2, 4, 5, 6, 36, 37, 38]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of two steps, of random demonstrations."""
    folder = tmp_path_factory.mktemp("metaworld")
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        for task in TASKS:
            path = folder / f"{split}-{task}-0000.safetensors"
            save_shard(path, [episode(6, success=True, rng=rng)])
    config = PolicyTrainingConfig(
        data=folder,
        out=folder / "out",
        hidden_size=32,
        expert_size=16,
        num_layers=2,
        tower_layers=1,
        steps=2,
        batch_size=6,
        draws=2,
        warmup=1,
        save_every=2,
        log_every=1,
    )
    train(config)
    return config.out


def test_a_trained_policy_acts_and_is_read(trained: Path) -> None:
    policy = load_policy(trained / "policy")
    inputs = [
        SourceInput(
            text=task.instruction,
            images=(rollouts.picture_of({IMAGE_KEY: np.zeros((96, 96, 3), np.uint8)}),),
            state=torch.zeros(4),
        )
        for task in TASKS.values()
    ]
    acted = policy.act(inputs)
    actions = to_actions(acted, policy.processor)
    assert actions.shape == (len(TASKS), CHUNK, 4)
    assert np.abs(actions).max() <= 1
    back = policy.processor.normalize(torch.from_numpy(actions), "actions")
    inside = np.abs(actions) < 1
    torch.testing.assert_close(back[inside], acted[inside], rtol=1e-4, atol=1e-4)
    cache = policy.prefill(inputs)
    assert cache.shape == policy.shape == find(str(trained / "policy")).layout.shape
    assert find(str(trained / "policy")).picture_tokens == 36


def test_a_training_is_logged(trained: Path) -> None:
    head, *rows = (trained / "log.csv").read_text().splitlines()
    assert head == "step,seconds,loss,flow_loss,place_loss,dev_flow_loss,dev_place_loss"
    assert len(rows) == 2


def test_a_batch_has_as_many_frames_of_each_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a multiple of 6 tasks, got 8"):
        PolicyTrainingConfig(data=tmp_path, out=tmp_path, batch_size=8)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="no task 'pull'; there are reach, push"):
        MetaWorldEnv("pull")


def test_without_the_simulator_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(UnsupportedError, match=r'pip install "mm-c2c\[metaworld\]"'):
        MetaWorldEnv("push")


def kept_episode(*, success: bool) -> dict[str, Any]:
    """An episode of the policy: the hand goes right by 1 cm a step; three looks in ten steps."""
    raw = np.zeros((11, 39), np.float32)
    raw[:, 0] = np.arange(11) / 100
    raw[:, 3] = 1
    return {
        "images": np.zeros((3, IMAGE_PIXELS, IMAGE_PIXELS, 3), np.uint8),
        "frame_steps": np.arange(3) * EXECUTED,
        "chunks": np.zeros((3, CHUNK, 4), np.float32),
        "touching": np.array([False, False, True]),
        "raw": raw,
        "success": np.arange(11) == (10 if success else -1),
        "actions": np.zeros((11, 4), np.float32),
    }


def test_a_moment_is_what_came_of_a_look(tmp_path: Path) -> None:
    save_shard(tmp_path / "unseen-push-0000.safetensors", [kept_episode(success=True)])
    (found,) = read_shard(tmp_path / "unseen-push-0000.safetensors")
    first, _, last = (make_items.moment_of("push", found, look) for look in range(3))
    assert first.moved == pytest.approx([HORIZON / 100, 0, 0])
    assert last.moved == pytest.approx([0.02, 0, 0])  # the episode ends
    assert (first.touching, last.touching) == (False, True)
    assert (first.progress, last.progress) == (0, 0.8)
    assert first.done


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Three episodes of each task, of which the last failed."""
    for task in TASKS:
        for number, success in enumerate((True, True, False)):
            path = tmp_path / f"unseen-{task}-{number:04d}.safetensors"
            save_shard(path, [kept_episode(success=success)])
    return tmp_path


@pytest.mark.parametrize("steered", [False, True])
def test_items_tell_what_was_done_beside_what_was_told(
    episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, steered: bool
) -> None:
    out = tmp_path / "items"
    arguments = ["make_items", "--rollouts", str(episodes), "--split", "unseen", "--looks", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out), *["--steered"] * steered])
    make_items.main()
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {row["episode"] for row in rows} == {f"{t}-{n:04d}" for t in TASKS for n in (0, 1, 2)}
    for row in rows:
        task = row["episode"][:-5]
        told = rollouts.steer(task) if steered else task
        assert row["text"] == row["instruction"] == TASKS[told].instruction
        assert row["success"] == (not row["episode"].endswith("2"))
        assert row["state"] == [row["step"] / 100, 0, 0, 1]
        assert (out / row["image"]).exists()
        if row["kind"] == "task":
            assert row["success"]
            assert row["answer"] == TASKS[task].doing
        believed = {"task": TASKS[told].doing, "object": TASKS[told].object} if steered else {}
        assert row.get("told") == believed.get(row["kind"])
    assert any(row["kind"] == "why" for row in rows) != steered


def test_items_of_some_tasks_only(
    episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["make_items", "--rollouts", str(episodes), "--split", "unseen"]
    arguments += ["--tasks", "push", "reach", "--out", str(tmp_path / "items")]
    monkeypatch.setattr(sys, "argv", arguments)
    make_items.main()
    lines = (tmp_path / "items" / "items.jsonl").read_text().splitlines()
    assert {json.loads(line)["episode"][:-5] for line in lines} == {"push", "reach"}


def test_looks_end_at_a_step(
    episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["make_items", "--rollouts", str(episodes), "--split", "unseen", "--every", "4"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--until", "7", "--out", str(tmp_path / "items")])
    make_items.main()
    lines = (tmp_path / "items" / "items.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {0, 4}


def test_looks_at_fixed_steps_are_those_of_all_episodes() -> None:
    rng = random.Random(0)
    assert make_items.pick_looks([0, 4, 8, 12, 16, 20], 2, 8, rng) == [0, 2, 4]
    assert make_items.pick_looks([0, 4], 2, 8, rng) == [0]
    found = make_items.pick_looks([0, 4, 8, 12, 16, 20], 4, None, rng)
    assert len(found) == 4
    assert found == sorted(set(found))


def test_each_answer_of_a_kind_gets_the_same_share() -> None:
    rows = [{"kind": "success", "answer": "yes" if i % 5 else "no"} for i in range(40)]
    rows += [{"kind": "narration", "answer": str(i)} for i in range(9)]
    kept = make_items.share_out(rows, 10)
    shares = [row["answer"] for row in kept if row["kind"] == "success"]
    assert (shares.count("yes"), shares.count("no")) == (5, 5)
    assert sum(row["kind"] == "narration" for row in kept) == 9


def test_successes_are_counted_with_their_intervals(episodes: Path) -> None:
    counts = rollouts.count_successes(episodes, "unseen", policy="tiny", steered=False)
    for task in TASKS:
        row = counts["tasks"][task]
        assert (row["episodes"], row["success"]) == (3, pytest.approx(2 / 3))
    assert counts["mean"]["success"] == pytest.approx(2 / 3)
    assert (counts["mean"]["low"], counts["mean"]["high"]) == (0, 1)


class Oracle:
    """Acts like the expert, in the policy's place; told nothing but the tasks in turn."""

    def __init__(self, envs: dict[str, MetaWorldEnv]) -> None:
        self.envs = envs
        self.looks = 0
        self.processor = self
        self.actions_mean, self.actions_std = [0.0] * 4, [1.0] * 4

    def act(self, inputs: list[SourceInput]) -> Tensor:
        self.looks += 1
        acting = [task for task, env in self.envs.items() if not env.success]
        plans = [expert_of(task)(self.envs[task].raw) for task in acting]
        return torch.tensor(np.stack(plans), dtype=torch.float32)[:, None].expand(-1, CHUNK, -1)


@simulator
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_an_expert_in_the_policys_place_succeeds() -> None:
    envs = {task: MetaWorldEnv(task) for task in ("reach", "door-open")}
    told = {task: TASKS[task].instruction for task in envs}
    found = rollouts.act_together(Oracle(envs), envs, told, seed=3)  # type: ignore[arg-type]
    for kept in found.values():
        assert kept["success"].tolist() == [False] * (len(kept["raw"]) - 1) + [True]
        assert len(kept["images"]) == -(-(len(kept["raw"]) - 1) // EXECUTED)
        assert kept["frame_steps"].tolist() == [i * EXECUTED for i in range(len(kept["images"]))]
    assert found["door-open"]["touching"][-1]
    assert not found["door-open"]["touching"][0]


@simulator
@pytest.mark.filterwarnings("ignore")
def test_an_environment_shows_lerobots_names_and_the_same_for_a_seed() -> None:
    env = MetaWorldEnv("push")
    first, _ = env.reset(seed=5)
    assert set(first) == {IMAGE_KEY, STATE_KEY, "task"}
    assert first[IMAGE_KEY].shape == (96, 96, 3)
    assert first[IMAGE_KEY].dtype == np.uint8
    assert first["task"] == "push the puck to the green ball"
    hand = first[STATE_KEY].copy()
    after, _, terminated, truncated, info = env.step(np.array([0, 1.0, 0, -1.0]))
    assert (terminated, truncated, info) == (False, False, {"success": False})
    assert after[STATE_KEY][1] > hand[1]
    again, _ = env.reset(seed=5)
    np.testing.assert_array_equal(again[IMAGE_KEY], first[IMAGE_KEY])
    np.testing.assert_array_equal(again[STATE_KEY], first[STATE_KEY])
    assert not np.array_equal(env.reset(seed=6)[0][IMAGE_KEY], first[IMAGE_KEY])
    with pytest.raises(InputError, match=r"expected an action of \(4,\), got \(3,\)"):
        env.step(np.zeros(3))


@simulator
@pytest.mark.filterwarnings("ignore")
def test_demonstrations_are_labelled_by_the_expert() -> None:
    env, expert = MetaWorldEnv("window-close"), expert_of("window-close")
    found = demonstrate(env, expert, seed=4)
    assert found["success"][-1]
    assert not found["success"][0]
    assert len(found["images"]) == -(-len(found["raw"]) // STRIDE)
    raw = found["raw"].astype(np.float64)
    np.testing.assert_allclose(found["labels"][10], expert(raw[10]), atol=1e-4)

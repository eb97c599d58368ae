"""An episode as a film, and the demo that makes one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from robots import STEPS, ColourRoom, build_policy

from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.reference.babyai.levels import Camera, instruction_text
from mm_c2c.robot import (
    NAMES,
    Answer,
    EpisodeEnd,
    Event,
    Monitor,
    Narration,
    ReaderFailure,
    Step,
    load_episode,
    make_minigrid,
    rename,
    run_episode,
)
from mm_c2c.robot.film import action_text, draw_step, write_film
from mm_c2c.robot.shipped import load_policy, load_reader, tiny_reader

DEMOS = Path(__file__).parent.parent / "demos"


@pytest.fixture(scope="module")
def happened() -> list[Event]:
    """Something is said after the third step."""
    *steps, end = run_episode(ColourRoom(), build_policy(), seed=1)
    said = [
        Narration(step=1, text="a sentence that is far too long for one line " * 4),
        Answer(step=1, question="where ?", text="left"),
        Monitor(step=1, success=0.2, smoothed=0.2, alarm=True, reason="stuck"),
        ReaderFailure(step=1, message="broken"),
    ]
    return [*steps[:3], *said, *steps[3:], end]


def test_a_film_has_a_picture_a_step(happened: list[Event], tmp_path: Path) -> None:
    write_film(happened, tmp_path / "a.gif", fps=4)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == STEPS
        assert film.info["duration"] == 250
        film.seek(STEPS - 1)
        assert film.info["duration"] > 1000


def test_a_film_keeps_the_colours_that_only_one_frame_has(
    happened: list[Event], tmp_path: Path
) -> None:
    first, *rest = happened
    assert isinstance(first, Step)
    assert first.frame is not None
    purple = np.broadcast_to(np.uint8([130, 80, 190]), first.frame.shape)
    events = [Step(**{**vars(first), "frame": purple}), *rest]
    write_film(events, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        shown = np.asarray(film.convert("RGB")).astype(int)[300, 200]
    assert np.abs(shown - [130, 80, 190]).max() < 12


def test_what_was_said_shows_from_the_step_at_which_it_arrived(happened: list[Event]) -> None:
    silent = [event for event in happened if isinstance(event, Step | EpisodeEnd)]
    for index in range(STEPS):
        box = (0, 420, 640, 500)  # the lines, above the strip
        spoken, bare = (draw_step(events, index).crop(box) for events in (happened, silent))
        assert (ImageChops.difference(spoken, bare).getbbox() is not None) == (index >= 2)
    edge = draw_step(happened, 2).crop((625, 420, 640, 500))
    assert len(edge.getcolors()) == 1  # the long sentence stays inside


def test_the_scene_is_the_frame(happened: list[Event]) -> None:
    drawn = np.asarray(draw_step(happened, 2))
    assert (drawn[300, 200] == 80).all()  # 40 a step


def test_actions_are_named_or_told_in_numbers() -> None:
    assert action_text(np.int64(1), ("left", "right")) == "right"
    assert action_text(np.int64(5), ("left", "right")) == "+5.00"
    assert action_text(np.array([0.5, -1])) == "+0.50  -1.00"


def test_what_cannot_be_shown_is_refused(happened: list[Event], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.avi: expected \.gif or \.mp4"):
        write_film(happened, tmp_path / "a.avi")
    with pytest.raises(InputError, match=r"no folder .*none to write a\.gif into"):
        write_film(happened, tmp_path / "none" / "a.gif")
    with pytest.raises(InputError, match="without a step"):
        write_film(happened[-1:], tmp_path / "a.gif")


def test_an_mp4_wants_imageio_and_its_ffmpeg(
    happened: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack_ffmpeg(*_: Any, **__: Any) -> None:
        raise OSError("no backend")

    bare, backends = ModuleType("imageio"), ModuleType("imageio.v3")
    bare.v3, backends.imwrite = backends, lack_ffmpeg
    monkeypatch.setitem(sys.modules, "imageio.v3", backends)
    for found, why in ((bare, "no backend"), (None, "halted")):
        monkeypatch.setitem(sys.modules, "imageio", found)
        with pytest.raises(UnsupportedError, match=rf"{why}.*pip install imageio\[ffmpeg\]"):
            write_film(happened, tmp_path / "a.mp4")


def test_any_token_policy_can_stand_before_the_tiny_target() -> None:
    (first, *_) = run_episode(ColourRoom(), build_policy(), seed=1)
    reader = tiny_reader(build_policy())
    seen = reader.perceive(first.observation, [], first.tokens)
    assert len(reader.answer(seen, ["where ?", "what ?"])) == 2


def test_a_version_without_a_reader_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_c2c.robot.shipped.READER_FOLDER", Path("nowhere"))
    with pytest.raises(UnsupportedError, match=r"no reader .* ships with this version"):
        load_reader()


def test_the_shipped_policy_sees_what_its_training_showed() -> None:
    """The pictures of minigrid's wrapper are those of the camera that made the demonstrations."""
    pytest.importorskip("minigrid", reason="the level needs minigrid: pip install mm-c2c[robot]")
    env = make_minigrid("BabyAI-GoToLocal-v0")
    raw, _ = env.reset(seed=5)
    symbols = env.unwrapped.gen_obs()["image"]
    assert np.array_equal(np.asarray(Camera().picture(symbols)), raw["image"])
    policy = load_policy()
    first = next(run_episode(env, policy, observe=rename(NAMES), seed=5))
    inputs = policy.inputs(first.observation, [2])
    assert inputs.text == instruction_text(raw["mission"], [2])
    assert policy.source.origin.model == "mm_c2c/reference/babyai/policy"
    assert first.tokens.shape == (4,)


def test_the_demo_narrates_records_and_writes_a_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("minigrid", reason="the demo needs minigrid: pip install mm-c2c[robot]")
    monkeypatch.syspath_prepend(str(DEMOS))  # the process beside the loop imports it too
    main = importlib.import_module("robot").main
    out, folder = tmp_path / "a.gif", tmp_path / "episode"
    command = ["--tiny", "--max-steps", "4", "--fps", "8", "--ask", "Why?"]
    assert main([*command, "--out", str(out), "--record", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "task: " in said
    assert "said of step" in said
    assert "Why?" in said
    assert "success looks" in said
    assert out.stat().st_size > 1000
    assert len(load_episode(folder).steps) <= 4
    assert main(["--alone", "--out", str(out), "--max-steps", "2"]) == 0
    assert "said" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.avi"], "expected .gif or .mp4"),
        (["--out", "nowhere/a.gif"], "there is no folder nowhere"),
        (["--level", "BabyAI-Nowhere-v0"], "there is no level 'BabyAI-Nowhere-v0'"),
    ],
)
def test_the_demo_refuses_in_a_line_before_anything_moves(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("minigrid", reason="the demo needs minigrid: pip install mm-c2c[robot]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DEMOS))
    assert importlib.import_module("robot").main(["--alone", *words]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_an_interrupt_ends_the_demo_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt  # SIGINT itself may be ignored where the tests run

    monkeypatch.syspath_prepend(str(DEMOS))
    demo = importlib.import_module("robot")
    monkeypatch.setattr(demo, "run", interrupt)
    assert demo.main([]) == 130

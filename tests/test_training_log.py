"""Curves of trainings."""

import errno
from pathlib import Path

import pytest

from mm_c2c.errors import ConfigError, InputError
from mm_c2c.reference import models
from mm_c2c.training.log import append_log, cut_log, plot, read_log


def test_the_shipped_logs_are_whole_and_fall() -> None:
    for folder in (models.SOURCE_FOLDER, models.BRIDGE_FOLDER):
        log = read_log(folder / "log.csv")
        assert log["step"] == sorted(set(log["step"]))
        loss = next(values for name, values in log.items() if name.endswith("loss"))
        assert loss[-1] < loss[0] / 2


def test_a_resumed_training_writes_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    cut_log(path, 0)  # nothing was logged yet
    for step in (5, 10, 15):
        append_log(path, {"step": step, "seconds": 2 * step, "loss": 1 / step})
    cut_log(path, 10)
    append_log(path, {"step": 15, "seconds": 3, "loss": 0.5})
    log = read_log(path)
    assert log["step"] == [5, 10, 15]
    assert log["loss"] == pytest.approx([0.2, 0.1, 0.5])


def test_a_log_cut_to_nothing_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    append_log(path, {"step": 5, "loss": 1.0})
    cut_log(path, 0)
    append_log(path, {"step": 5, "loss": 1.0, "open_gates": 0.5})
    assert read_log(path) == {"step": [5], "loss": [1], "open_gates": [0.5]}
    path.write_text("")  # killed between opening it and writing
    cut_log(path, 5)
    append_log(path, {"step": 5, "loss": 2.0})
    assert read_log(path) == {"step": [5], "loss": [2]}


def test_a_row_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for step in (5, 10):
        append_log(path, {"step": step, "loss": 1.0})
    for torn in ("1", "15,0."):
        with path.open("a") as file:
            file.write(torn)
        assert read_log(path)["step"] == [5, 10]
        cut_log(path, 15)
        assert path.read_text() == "step,loss\n5,1\n10,1\n"


def test_a_log_that_cannot_be_cut_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    for step in (5, 10):
        append_log(path, {"step": step, "loss": 1.0})
    before = path.read_text()

    def fail(self: Path, text: str, **settings: str) -> None:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        cut_log(path, 5)
    assert path.read_text() == before


def test_a_log_of_many_steps_can_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for step in (1_000_001, 1_000_002):
        append_log(path, {"step": step, "loss": 1.0})
    cut_log(path, 1_000_001)
    assert read_log(path)["step"] == [1_000_001]


def test_a_log_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,seconds,loss\n")
    with pytest.raises(ConfigError, match="holds no steps"):
        read_log(tmp_path / "log.csv")


def test_a_panel_is_drawn_for_each_log(tmp_path: Path) -> None:
    plot([models.SOURCE_FOLDER / "log.csv"] * 2, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,loss\n5,x\n", "cannot be read as a log"),
        (b"step,loss\n5\n", "cannot be read as a log"),
        (b"\xff\xfe\n", "cannot be read as a log"),
        (b"loss\n5\n", "expected a column step, got loss"),
        (None, "cannot be read as a log"),
    ],
)
def test_what_is_no_log_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"log\.csv .*{message}"):
        read_log(path)

"""Curves of trainings."""

from pathlib import Path

import pytest

from mm_c2c.errors import ConfigError
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


def test_a_log_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,seconds,loss\n")
    with pytest.raises(ConfigError, match="holds no steps"):
        read_log(tmp_path / "log.csv")


def test_a_panel_is_drawn_for_each_log(tmp_path: Path) -> None:
    plot([models.SOURCE_FOLDER / "log.csv"] * 2, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

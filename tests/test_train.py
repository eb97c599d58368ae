"""`mm-c2c train` on tiny models that are loaded from disk, as any others are."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rigs import ROOT, TINY, assert_same, go, weights

from mm_c2c import Bridge
from mm_c2c.cli import main
from mm_c2c.config import load_config, override
from mm_c2c.errors import ConfigError, TrainingError, UnsupportedError
from mm_c2c.training import checkpoints
from mm_c2c.training.config import TrainingConfig
from mm_c2c.training.log import read_log
from mm_c2c.training.loop import build_accelerator
from mm_c2c.training.models import load_source, load_target
from mm_c2c.training.run import Trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(tiny_settings: list[str]) -> TrainingConfig:
    return load_config(TrainingConfig, TINY, tiny_settings)


def test_tiny_yaml_trains_two_steps_and_resumes(
    tiny_settings: list[str], config: TrainingConfig, tmp_path: Path
) -> None:
    assert main(["train", str(TINY), *tiny_settings]) == 0
    before = weights(config.out)
    assert main(["train", str(TINY), *tiny_settings, "phases.generate.steps=4"]) == 0
    after = weights(config.out)
    log = read_log(config.out / "log.csv")
    assert log["step"] == [1, 2, 3, 4, 5, 6]
    assert all(speed > 0 for speed in log["tokens_per_s"])
    assert log["open_gates"] == [1.0] * 6
    assert any(not before[name].equal(after[name]) for name in before)
    bridge = Bridge.from_pretrained(
        config.out / "bridge",
        load_target(config.target),
        {"eyes": load_source(config.sources["eyes"])},
    )
    frozen = load_target(config.target).model.state_dict()
    assert all(w.equal(frozen[n]) for n, w in bridge.target.model.state_dict().items())


def launch_two(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert "on 2 processes" in done.stderr


def test_two_processes_give_the_weights_of_one(
    tiny_settings: list[str], config: TrainingConfig, tmp_path: Path
) -> None:
    settings = [*tiny_settings, "batch_size=4", "optimizer.name=adamw"]
    expected = go(override(config, ["batch_size=4", "optimizer.name=adamw"]))
    two = [*settings, f"out={tmp_path / 'two'}"]
    # accelerate's own launcher starts several CPU processes through MPI only.
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mm_c2c.cli"]
    launch_two([*launch, "train", str(TINY), *two], {"ACCELERATE_USE_CPU": "true"})
    torch.testing.assert_close(weights(tmp_path / "two"), expected, atol=1e-5, rtol=0)
    logged, single = (read_log(folder / "log.csv") for folder in (tmp_path / "two", config.out))
    assert logged["loss"] == pytest.approx(single["loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_weights_sharded_over_two_processes_are_those_of_one_also_resumed(
    tiny_settings: list[str], config: TrainingConfig, tmp_path: Path, strategy: str
) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed")
    expected = go(override(config, ["batch_size=4", "optimizer.name=adamw"]))
    settings = [*tiny_settings, "batch_size=4", "optimizer.name=adamw", f"out={tmp_path / 'two'}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", f"--main_process_port={port}", "--num_processes=2"]
    launch += [f"--config_file={ROOT / 'configs' / 'accelerate' / strategy}.yaml"]
    for stop in (["phases.generate.steps=0"], []):
        command = [*launch, str(ROOT / "tests/sharded.py"), "train", str(TINY), *settings, *stop]
        launch_two(command, {"DS_ACCELERATOR": "cpu"})
    torch.testing.assert_close(weights(tmp_path / "two"), expected, atol=1e-5, rtol=0)
    logged = read_log(tmp_path / "two" / "log.csv")
    assert logged["step"] == [1, 2, 3, 4]
    # Of weights in parts no process could tell.
    assert ("open_gates" in logged) == (strategy == "deepspeed")


def test_pieces_of_a_step_give_the_weights_of_the_whole(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = override(config, ["batch_size=4", "optimizer.name=adamw"])
    whole = go(config)
    pieces = go(override(config, ["accumulation=4", f"out={tmp_path / 'pieces'}"]))
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)


@contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """The user stops what comes to this piece."""
    loss = Trainer.loss

    def stop(self: Trainer, current: int, rng: Any) -> torch.Tensor:
        if current == number:
            raise KeyboardInterrupt
        return loss(self, current, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "loss", stop)
        yield


def test_a_stopped_training_ends_as_one_that_was_not(
    config: TrainingConfig, tmp_path: Path
) -> None:
    expected = go(replace(config, out=tmp_path / "whole"))
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        go(config)
    assert_same(go(config), expected)


def test_a_training_pauses_where_it_is_told_to(config: TrainingConfig, tmp_path: Path) -> None:
    expected = go(replace(config, out=tmp_path / "whole"))
    train(config, until=3)
    assert read_log(config.out / "log.csv")["step"] == [1, 2, 3]
    train(config)
    assert_same(weights(config.out), expected)


def test_a_training_goes_on_from_sharded_checkpoints(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What FSDP and DeepSpeed take, on one process: accelerate's own files in place of `last.pt`.
    monkeypatch.setattr(
        checkpoints, "SHARDED", (build_accelerator(tmp_path, cpu=True).distributed_type,)
    )
    config = override(config, ["optimizer.name=adamw"])
    expected = go(replace(config, out=tmp_path / "whole"))
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        go(config)
    assert [path.name for path in config.out.glob("step*")] == ["step-00000003"]
    assert_same(go(config), expected)


def test_a_process_killed_amid_a_checkpoint_leaves_the_last_one_whole(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = go(replace(config, out=tmp_path / "whole"))
    save = torch.save

    def die(state: Any, path: Path) -> None:
        save(state, path)
        if state["step"] == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside a thread of the progress bar
        child = os.fork()
    if not child:
        monkeypatch.setattr(torch, "save", die)
        go(config)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (config.out / "last.part").exists()
    assert torch.load(config.out / "last.pt", weights_only=True)["step"] == 2
    assert_same(go(config), expected)


def test_a_full_disk_stops_with_the_last_checkpoint_whole(config: TrainingConfig) -> None:
    go(override(config, ["phases.generate.steps=0"]))
    size = (config.out / "last.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(TrainingError, match=r"step 3: .* Make room\. .* of step 2, is whole"):
            go(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(config.out / "last.pt", weights_only=True)["step"] == 2
    assert not (config.out / "last.part").exists()


def test_steps_that_are_not_finite_stop_or_are_left_out(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss = Trainer.loss

    def poison(self: Trainer, number: int, rng: Any) -> torch.Tensor:
        return loss(self, number, rng) * (math.nan if number == 2 else 1.0)

    monkeypatch.setattr(Trainer, "loss", poison)
    with pytest.raises(TrainingError, match=r"step 3: .* of step 2, is whole: .*on_nan=skip"):
        go(config)
    found = go(override(config, ["on_nan=skip", f"out={tmp_path / 'skip'}"]))
    assert all(weight.isfinite().all() for weight in found.values())
    lost = read_log(tmp_path / "skip" / "log.csv")["loss"]
    assert [math.isnan(value) for value in lost] == [False, False, True, False]


def test_bfloat16_products_leave_float32_weights(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, cast = Trainer.loss, []

    def look(self: Trainer, number: int, rng: Any) -> torch.Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return loss(self, number, rng)

    monkeypatch.setattr(Trainer, "loss", look)
    found = go(override(config, ["precision=bf16", "optimizer.name=adamw"]))
    assert cast == [True] * 4
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    gates = found["eyes_slots.gate_logits"]
    assert not gates.equal(gates.bfloat16().float())  # finer than bfloat16 could tell


def test_settings_are_kept_with_what_came_of_them_and_changes_are_said(
    config: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    go(config)
    path = config.out / "config.json"
    before = path.read_text()
    assert "other settings" not in caplog.text
    with pytest.raises(ConfigError, match="at most 3 steps"):
        go(override(config, ["phases.generate.steps=1", "phases.generate.warmup=0", "seed=9"]))
    assert path.read_text() == before
    caplog.clear()
    more = config.phases.generate.steps + 1
    go(override(config, [f"phases.generate.steps={more}", "seed=9"]))
    assert f"phases.generate.steps: {more - 1} -> {more}, seed: 0 -> 9" in caplog.text
    assert json.loads(path.read_text())["seed"] == 9


def test_what_cannot_be_is_refused(config: TrainingConfig, tiny_settings: list[str]) -> None:
    for setting, message in (
        ("precision=fp16", "precision must be one of fp32, bf16"),
        ("links.eyes.row=3", r"unknown key 'links.eyes.row'; did you mean 'rows'"),
        ("links.eyes.source=ears", "names source 'ears'; sources: eyes"),
        ("phases.generate.warmup=5", r"steps \(2\) must exceed warmup \(5\)"),
        ("drop.sources=1.5", r"drop.sources must be in \[0, 1\]"),
        ("tracking=[aim]", "tracking must be one of tensorboard, wandb"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(config, [setting])
    with pytest.raises(ConfigError, match="cannot be cut into 1 processes x 3 pieces"):
        go(override(config, ["accumulation=3"]))
    with pytest.raises(UnsupportedError, match="pip install wandb"):
        build_accelerator(config.out, tracking=["wandb"], cpu=True)

"""The loop of all trainings, on a layer of a few weights."""

from __future__ import annotations

import errno
import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_c2c.errors import ConfigError, TrainingError
from mm_c2c.training import checkpoints
from mm_c2c.training.log import read_log
from mm_c2c.training.loop import Loop, build_accelerator
from mm_c2c.training.optimizers import StackedMuon

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    """Four steps of two pieces each, a checkpoint after every other."""
    return Loop(
        out=tmp_path,
        steps=4,
        save_every=2,
        log_every=1,
        seed=0,
        accumulation=2,
        accelerator=build_accelerator(tmp_path, cpu=True),
    )


class Training:
    """A layer that is trained with dropout, which draws from torch's generator.

    Attributes:
        pieces: whose loss was asked for.
        results: what was to be saved.
        stop_at: a piece that the user stops.
    """

    def __init__(self, rows: int = 2, *, bias: bool = False, kind: Any = torch.optim.AdamW) -> None:
        self.layer = nn.Linear(3, rows, bias=bias)
        self.kind = kind
        nn.init.constant_(self.layer.weight, 0.5)
        self.pieces: list[int] = []
        self.results: list[dict[str, Tensor]] = []
        self.stop_at = -1

    def loss(self, number: int, rng: random.Random) -> Tensor:
        if number == self.stop_at:
            raise KeyboardInterrupt
        self.pieces.append(number)
        shown = nn.functional.dropout(torch.full((4, 3), rng.random()))
        return self.layer(shown).square().mean()

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        self.results.append({name: weight.clone() for name, weight in weights.items()})

    def run(self, loop: Loop, save: Callable[[Mapping[str, Tensor]], None] | None = None) -> None:
        # One that was stopped amid a step has counted some of its pieces.
        loop = replace(loop, accelerator=build_accelerator(loop.out, cpu=True))
        self.optimizers = [self.kind(self.layer.parameters(), lr=0.1)]
        loop.run(self.layer, self.optimizers, lambda step: 1.0, self.loss, save or self.keep)


def test_what_draws_from_torch_goes_on_to_the_bit(loop: Loop, tmp_path: Path) -> None:
    whole, stopped, again = Training(), Training(), Training()
    whole.run(replace(loop, out=tmp_path / "whole"))
    stopped.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        stopped.run(loop)
    torch.manual_seed(7)  # whatever was drawn meanwhile
    again.run(loop)
    assert again.pieces == [4, 5, 6, 7]
    assert again.layer.weight.equal(whole.layer.weight)


def test_seeds_processes_and_pieces_draw_apart(loop: Loop) -> None:
    drawn = set()
    for seed, process, piece in itertools.product(range(2), repeat=3):
        alone: Any = SimpleNamespace(process_index=process)
        replace(loop, seed=seed, accelerator=alone)._seed_torch(piece)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 8


def test_a_result_that_was_not_written_is_written_when_started_again(loop: Loop) -> None:
    first, again = Training(), Training()

    def fill(weights: Mapping[str, Tensor]) -> None:
        if len(first.pieces) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        first.keep(weights)

    message = r"step 4: the result could not .*No space left.* checkpoint of this step.* is whole"
    with pytest.raises(TrainingError, match=message):
        first.run(loop, fill)
    assert len(first.results) == 1
    again.run(loop)
    assert again.pieces == []
    (result,) = again.results
    assert result["weight"].equal(first.layer.weight)


def test_an_error_in_making_the_result_is_no_full_disk(loop: Loop) -> None:
    def fail(weights: Mapping[str, Tensor]) -> None:
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer") as caught:
        Training().run(loop, fail)
    assert not isinstance(caught.value, TrainingError)


def test_a_training_stopped_before_its_first_checkpoint_logs_no_step_twice(loop: Loop) -> None:
    loop = replace(loop, save_every=100)
    stopped = Training()
    stopped.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        stopped.run(loop)
    assert read_log(loop.out / "log.csv")["step"] == [1, 2, 3]
    Training().run(loop)
    assert read_log(loop.out / "log.csv")["step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rows": 1}, r"weight weight: expected shape \(1, 3\), got shape \(2, 3\)"),
        ({"bias": True}, r"weight bias: expected shape \(2,\), got none"),
        (
            {"kind": StackedMuon},
            "optimizer 1: expected 1 weights with lr, momentum, got 1 weights with betas, eps, lr",
        ),
    ],
)
def test_what_another_training_left_is_refused(
    loop: Loop, other: dict[str, Any], message: str
) -> None:
    Training().run(loop)
    beginning = Training(**other)
    untouched = beginning.layer.weight.clone()
    with pytest.raises(ConfigError, match=rf"last\.pt .* {message}.*delete it to start anew"):
        beginning.run(replace(loop, steps=6))
    assert beginning.layer.weight.equal(untouched)
    assert read_log(loop.out / "log.csv")["step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_optimizers_is_refused(loop: Loop, before: int, now: int) -> None:
    def run(count: int) -> None:
        layer = nn.Linear(3, 2)
        sets = [[layer.weight, layer.bias]] if count == 1 else [[layer.weight], [layer.bias]]
        loop.run(
            layer,
            [torch.optim.AdamW(parameters) for parameters in sets],
            lambda step: 1.0,
            lambda number, rng: layer(torch.ones(3)).sum(),
            lambda weights: None,
        )

    run(before)
    message = f"optimizer 1: expected {3 - now} weights .*, got {3 - before} weights"
    with pytest.raises(ConfigError, match=message):
        run(now)


def test_a_resumed_training_has_the_optimizer_settings_that_it_is_given(loop: Loop) -> None:
    def build(decay: float) -> Training:
        return Training(kind=functools.partial(torch.optim.AdamW, weight_decay=decay))

    build(0.1).run(replace(loop, steps=2))
    resumed = build(0.5)
    resumed.run(loop)
    assert [group["weight_decay"] for group in resumed.optimizers[0].param_groups] == [0.5]


def test_a_log_that_cannot_be_written_names_the_last_checkpoint(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, row: Mapping[str, float]) -> None:
        if row["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mm_c2c.training.checkpoints.append_log", fail)
    with pytest.raises(TrainingError, match=r"log\.csv could not be .*checkpoint, of step 2, is"):
        Training().run(loop)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_checkpoint_is_named_and_left(loop: Loop, size: int) -> None:
    Training().run(loop)
    path = loop.out / "last.pt"
    path.write_bytes(damaged := path.read_bytes()[:size])
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read .*delete it to start anew"):
        Training().run(replace(loop, steps=6))
    assert path.read_bytes() == damaged
    assert read_log(loop.out / "log.csv")["step"] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_cut_is_named_and_left(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    Training().run(loop)
    log = loop.out / "log.csv"
    log.write_text(damaged := log.read_text().replace("\n4,", "\nfour,"))
    with pytest.raises(TrainingError, match=r"log\.csv could not be cut .*'four'.*start again"):
        Training().run(replace(loop, steps=6))
    assert log.read_text() == damaged

    def fail(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log.write_text(damaged.replace("four", "4"))
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(TrainingError, match=r"could not be cut to 4 steps .*No space.*make room"):
        Training().run(replace(loop, steps=6))
    assert read_log(log)["step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("now", "left"), [("sharded", "last.pt"), ("whole", "step-00000004")])
def test_checkpoints_of_whole_and_of_sharded_weights_are_told_apart(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, now: str, left: str
) -> None:
    kinds = {"whole": (), "sharded": (loop.accelerator.distributed_type,)}
    for name in ("whole", "sharded") if now == "sharded" else ("sharded", "whole"):
        monkeypatch.setattr(checkpoints, "SHARDED", kinds[name])
        if name == now:
            with pytest.raises(
                ConfigError, match=f"holds {left}, .* and in this one they are {now}"
            ):
                Training().run(replace(loop, steps=6))
        else:
            Training().run(loop)
    assert read_log(loop.out / "log.csv")["step"] == [1, 2, 3, 4]


class Stumbling(Training):
    """Whose loss is no number in all steps but the first."""

    def loss(self, number: int, rng: random.Random) -> Tensor:
        return super().loss(number, rng) * (math.nan if number > 1 else 1.0)


def test_where_there_is_no_checkpoint_yet_none_is_named(loop: Loop) -> None:
    message = r"step 2: .* No checkpoint was written yet: start again from the beginning"
    with pytest.raises(TrainingError, match=message):
        Stumbling().run(loop)


def test_steps_without_numbers_are_skipped_only_so_long(loop: Loop) -> None:
    loop = replace(loop, on_nan="skip", steps=105, save_every=40)
    with pytest.raises(
        TrainingError, match=r"step 101: .*of the 99 steps before\. .*of step 80, is"
    ):
        Stumbling().run(loop)
    Stumbling().run(replace(loop, out=loop.out / "shorter", steps=100))


@pytest.mark.filterwarnings("ignore")  # what it imports warns of itself
def test_tensorboard_is_told_what_the_log_is_also_when_resumed(loop: Loop) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    def run(steps: int) -> None:
        accelerator = build_accelerator(loop.out, tracking=["tensorboard"], cpu=True)
        told = replace(loop, accelerator=accelerator, steps=steps, settings={"seed": 0, "a.b": "c"})
        training = Training()
        optimizers = [training.kind(training.layer.parameters(), lr=0.1)]
        told.run(training.layer, optimizers, lambda step: 1.0, training.loss, training.keep)

    run(2)
    run(4)
    events = EventMultiplexer().AddRunsFromDirectory(str(loop.out)).Reload()
    found = {event.step: event.value for run in events.Runs() for event in _losses(events, run)}
    log = read_log(loop.out / "log.csv")
    assert found == pytest.approx(dict(zip(log["step"], log["loss"], strict=True)), rel=1e-5)
    assert len(found) == 4


def _losses(events: Any, run: str) -> list[Any]:
    return events.Scalars(run, "loss") if "loss" in events.Runs()[run]["scalars"] else []

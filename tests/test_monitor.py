"""Readers of policies: what a probe and a monitor find in a policy's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from intent_rigs import NAME, ask, build_reader, build_rows, write
from PIL import Image
from torch import Tensor

from mm_c2c import Bridge, SourceInput
from mm_c2c.cache import PositionKind
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.evaluation import monitor, probe
from mm_c2c.evaluation.arms import Asked, Setting
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.statistics import hits_of
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.robot.monitor import _first_tokens
from mm_c2c.sources.base import count_positions


@pytest.fixture
def reader(tiny_llava: Any, tiny_target: Any, tiny_target_tokenizer: Any) -> Bridge:
    return build_reader(tiny_llava, tiny_target, tiny_target_tokenizer)


@pytest.fixture
def rows(reader: Bridge, pictures: list[Image.Image], tmp_path: Path) -> list[dict[str, Any]]:
    return build_rows(reader, pictures, tmp_path)


@pytest.fixture
def items(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    return write(tmp_path / "items.jsonl", rows)


@pytest.fixture
def setting(reader: Bridge) -> Setting:
    return Setting(bridge=reader, source_name=NAME, request="")


@pytest.fixture
def asked(rows: list[dict[str, Any]], pictures: list[Image.Image]) -> list[Asked]:
    return ask(rows, pictures)


# --- probe -----------------------------------------------------------------------------------


def test_a_probe_pools_words_and_patches_and_takes_each_action(
    reader: Bridge, asked: list[Asked]
) -> None:
    longer = replace(asked[1].look, text="go to the left of the blue circle")
    both = probe.pool(reader.sources[NAME].prefill([asked[0].look, longer]))
    width = reader.sources[NAME].shape.num_layers * 2 * reader.sources[NAME].shape.width
    assert both["prefix"].shape == (2, 2 * width)
    assert both["action"].shape == (2, 2 * width)
    cache = reader.sources[NAME].prefill([longer])
    alone = probe.pool(cache)
    for name, rows in alone.items():
        torch.testing.assert_close(both[name][1:], rows, rtol=1e-4, atol=1e-4)
    heads = cache.shape.width
    words = (
        cache.layers[0].values[0].transpose(0, 1).flatten(1)[cache.kinds[0] == PositionKind.TEXT]
    )
    torch.testing.assert_close(alone["prefix"][0, width + heads : width + 2 * heads], words.mean(0))


def test_a_probe_is_the_minimum_of_its_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=generator)
    answers = ["abc"[int(i)] for i in (features[:, 0] > 0.4).long() + (features[:, 1] > 0).long()]
    found = probe.fit(features, answers, penalty=0.1)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    labels = torch.tensor([found.answers.index(a) for a in answers])
    logits = features @ weight + bias
    cost = -logits.log_softmax(1)[range(90), labels].mean() + 0.05 * weight.pow(2).sum()
    cost.backward()
    for gradient in (weight.grad, bias.grad):
        assert gradient is not None
        assert gradient.abs().max() < 1e-3
    loose, right = probe.fit_best(features, answers, np.arange(90) % 5 == 0)
    assert right >= 13
    assert sum(a == b for a, b in zip(loose.answer(features), answers, strict=True)) >= 70


def test_a_probe_finds_in_the_actions_what_is_there_alone(
    reader: Bridge, rows: list[dict[str, Any]], items: Path, tmp_path: Path
) -> None:
    unseen = [{**row, "episode": f"unseen {row['episode']}"} for row in rows[:12]]
    config = probe.ProbeConfig(
        train=items, items=write(tmp_path / "unseen.jsonl", unseen), resamples=20
    )
    found = probe.probe(reader, config, progress=False)
    assert (found["n"], found["episodes"]) == (12, 4)
    right = {part: row[0] for part, row in found["all"].items()}
    assert right["action only"] == right["both"] == 1.0
    assert right["prefix only"] < 0.8
    assert found["kinds"]["turn"]["n"] == 12
    assert found["config"]["train"] == f"{tmp_path.name}/items.jsonl"
    assert "| turn | 12 |" in probe.table(found)


# --- monitor ---------------------------------------------------------------------------------


@torch.no_grad()
def test_no_over_yes_is_what_a_plain_forward_says(setting: Setting, asked: list[Asked]) -> None:
    bridge = setting.bridge
    fused = bridge.fuse(Fused(setting).see(asked), ["is it ?", "will it be red ?"])
    before = fused["past_key_values"].get_seq_length()
    found = monitor.no_over_yes(bridge, fused)
    assert fused["past_key_values"].get_seq_length() == before
    mask = fused["attention_mask"]
    logits = bridge.target.model(
        fused["input_ids"][:, before:],
        attention_mask=mask,
        position_ids=count_positions(mask)[:, before:],
        past_key_values=fused["past_key_values"],
    ).logits[:, -1]
    chances = logits.softmax(1)
    no, yes = (chances[:, _first_tokens(bridge, word)].sum(1) for word in ("no", "yes"))
    torch.testing.assert_close(found, (no / yes).log(), rtol=1e-4, atol=1e-4)


def test_a_policy_is_unsure_by_the_entropy_of_its_own_tokens(
    reader: Bridge, asked: list[Asked], bridge: Bridge
) -> None:
    policy: Any = reader.sources[NAME]
    look = asked[0].look
    text = f"USER: <image>\n{look.text}\nASSISTANT:"
    encoded = policy.processor(images=[look.images[0]], text=[text], return_tensors="pt")
    chances = policy.model(**encoded).logits[0, -1].softmax(-1)
    expected = -(chances * chances.log()).sum()
    torch.testing.assert_close(policy.entropy([look])[0, 0], expected, rtol=1e-4, atol=1e-4)
    found = monitor.uncertainty(policy, [look], draws=2)
    torch.testing.assert_close(found, policy.entropy([look]).mean(1))
    with pytest.raises(UnsupportedError, match="does not act"):
        monitor.uncertainty(bridge.sources["stickers"], [look], draws=2)


def test_a_policy_that_starts_from_noise_is_unsure_by_how_its_chunks_vary() -> None:
    class Policy:
        model = SimpleNamespace(config=SimpleNamespace(chunk_size=2, max_action_dim=3))

        def act(self, looks: list[SourceInput]) -> Tensor:
            return torch.stack([look.noise * float(look.text) for look in looks])

    found = monitor.uncertainty(Policy(), [SourceInput(text=t) for t in ("0", "1", "2")], 200)
    assert found[0] == 0
    assert 0.8 < found[1] < 1.2
    torch.testing.assert_close(found[2], 4 * found[1])


def test_a_monitor_scores_each_step_once_and_by_every_monitor(
    reader: Bridge, rows: list[dict[str, Any]], items: Path, tmp_path: Path
) -> None:
    twice = write(tmp_path / "twice.jsonl", [*rows, *rows])
    config = monitor.MonitorConfig(items=twice, train=items, batch_size=5, resamples=20)
    found = monitor.monitor(reader, config, progress=False)
    assert (found["steps"], found["episodes"], found["failures"]) == (24, 8, 4)
    assert list(found["monitors"]) == ["fused", "policy", "caption_relay", "probe", "steps"]
    assert found["monitors"]["steps"]["over_steps"][0] == 0.5  # all episodes are of one length
    assert found["monitors"]["steps"]["at_same_step"][0] == 0.5
    assert "| **fused** |" in monitor.table(found)
    few = monitor.pick_steps(load_items(twice), episodes=2)
    assert [(item.episode, item.step) for item in few] == [
        (name, step) for name in ("e0", "e4") for step in range(3)
    ]
    with pytest.raises(InputError, match="all episodes end alike"):
        monitor.monitor(reader, replace(config, episodes=2), progress=False)
    bare = write(tmp_path / "bare.jsonl", [{**rows[0], "success": None}])
    with pytest.raises(InputError, match="wants `episode`"):
        monitor.pick_steps(load_items(bare))


def test_a_monitor_that_knows_is_told_from_one_that_does_not(items: Path, tmp_path: Path) -> None:
    steps = monitor.pick_steps(load_items(items))
    failed = np.array([not item.success for item in steps])
    late = failed & np.array([item.step == 2 for item in steps])
    scores = {"probe": failed * 1.0, "fused": -1.0 * failed, "policy": late * 1.0}
    config = monitor.MonitorConfig(items=items, window=1, resamples=50)
    found = monitor.judge(steps, scores, config)["monitors"]
    assert found["probe"]["over_steps"] == [1.0, 1.0, 1.0]
    assert found["probe"]["at_same_step"] == [1.0, 1.0, 1.0]
    assert found["probe"]["fused_ahead"]["at_same_step"] == [-1.0, -1.0, -1.0]  # always wrong
    assert found["policy"]["fused_ahead"]["at_same_step"][0] == pytest.approx(-2 / 3)
    assert found["policy"]["fused_ahead"]["over_steps"][0] == pytest.approx(-2 / 3)
    assert found["fused"]["fused_ahead"]["in_same_task"] == [0.0, 0.0, 0.0]
    assert found["fused"]["over_episodes_max"][0] == 0.0
    detection = found["probe"]["detection"]
    assert detection["detected"][0] == 1.0
    assert detection["false_alarms"][0] == 0.0
    assert (detection["median_step"], detection["median_share"]) == (0.0, pytest.approx(1 / 3))
    assert found["policy"]["detection"]["median_step"] == 2.0
    # It knows at the third step, which the first two do not show.
    assert found["policy"]["so_far"]["2"][0] == 0.5
    assert found["policy"]["over_episodes_max"][0] == 1.0
    np.testing.assert_allclose(monitor.smooth(np.array([4.0, 0.0, 2.0]), 2), [4, 2, 1])


def test_what_tells_the_task_alone_tells_nothing_in_one_task(items: Path) -> None:
    """Of pushes three of four fail, of reaches one."""
    steps = [
        item._replace(episode=f"{task}-{number:04d}", step=step, success=number in kept)
        for task, kept in (("push", {3}), ("reach", {1, 2, 3}))
        for number in range(4)
        for step, item in enumerate(load_items(items)[:2])
    ]
    pushes = np.array([float(str(item.episode).startswith("push")) for item in steps])
    scores = {"fused": pushes, "steps": np.array([float(item.step) for item in steps])}
    found = monitor.judge(steps, scores, monitor.MonitorConfig(items=items, resamples=20))
    fused = found["monitors"]["fused"]
    assert fused["at_same_step"][0] == pytest.approx(0.75)
    assert fused["in_same_task"][0] == 0.5


def test_false_alarms_are_kept_on_episodes_that_set_no_threshold() -> None:
    rng = np.random.default_rng(0)
    failed = hits_of([i >= 400 for i in range(800)])
    runs = [rng.normal(size=4) + 5 * fails * (np.arange(4) > 0) for fails in failed]
    config = monitor.MonitorConfig(items=Path("x"), resamples=20, false_alarms=0.1)
    found = monitor.detect(runs, [np.arange(0, 8, 2)] * 800, failed, config)
    assert 0.06 < found["false_alarms"][0] < 0.14
    assert found["detected"][0] > 0.9
    assert found["median_step"] == 2.0  # the second look

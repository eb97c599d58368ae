"""The Robot tab, without a browser, on the tiny policy: steps, questions, what it looked at."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from robots import STEPS, TASK, ColourRoom, build_policy, build_reader

from mm_c2c import Bridge
from mm_c2c.demo import robot
from mm_c2c.demo.page import build_page
from mm_c2c.demo.robot import Show, answers_html, ask_step, find_step, load_show, step_html, titled
from mm_c2c.demo.serve import Exposure, launch
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.evaluation.arms import Setting, target_answers
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.reference.scenes import CAPTION_REQUEST
from mm_c2c.robot import Narration, SourcePolicy, record, run_episode
from mm_c2c.robot.attention import action_attention


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Show:
    """Two episodes, of which the second broke off; the first was narrated."""
    folder = tmp_path_factory.mktemp("episodes")
    policy = build_policy()
    for name, steps in (("a", None), ("b", 2)):
        events = list(run_episode(ColourRoom(), policy, seed=1, max_steps=steps))
        events.insert(2, Narration(step=1, text="it <b>turns</b>"))
        list(record(events[:-1] if name == "b" else events, folder / name))
    return Show(build_reader(), titled(sorted(folder.iterdir())))


def test_episodes_have_titles(show: Show) -> None:
    first, second = show.episodes
    assert first == f"1. {TASK} ({STEPS} steps, done)"
    assert second == f"2. {TASK} (2 steps, broken off)"
    assert find_step(show, second, 99)[1].index == 1
    assert find_step(show, second, 0)[1].index == 0
    with pytest.raises(InputError, match="There is no episode 'mine': choose one of"):
        find_step(show, "mine", 1)


def test_every_arm_answers_about_the_step(show: Show) -> None:
    title, *_ = show.episodes
    answers = ask_step(show, title, 2, "where is it ?")
    episode, step = find_step(show, title, 2)
    seen = show.reader.perceive(step.observation, episode.past(1), step.tokens)
    assert answers["fused"] == show.reader.answer(seen, ["where is it ?"])[0]
    others = {ask_step(show, title, number, "where is it ?")["fused"] for number in (1, 3, 4, 5)}
    assert others != {answers["fused"]}
    told = f"The robot was told: {TASK}\nwhere is it ?"
    bridge = show.reader.bridge
    assert answers["instruction"] == target_answers(bridge, [told])[0]
    assert answers["blind"] == target_answers(bridge, ["where is it ?"])[0]
    assert "<script>" not in answers_html(answers | {"fused": "<script>"})
    with pytest.raises(InputError, match="is empty"):
        ask_step(show, title, 1, " ")


def test_a_step_shows_the_scene_the_view_and_where_it_looked(show: Show) -> None:
    title, *_ = show.episodes
    shown = step_html(show, title, 2)
    assert shown.count("<img ") == shown.count("alt=") == 3
    assert f"Step 2 of {STEPS}" in shown
    assert "it &lt;b&gt;turns" in shown
    assert "Said live" not in step_html(show, title, 1)


def test_the_attention_is_that_of_the_position_that_chooses(show: Show) -> None:
    """Against a plain forward over prompt and tokens, whose positions are looked up by hand."""
    policy: SourcePolicy = show.reader.policy
    _, step = find_step(show, next(iter(show.episodes)), 1)
    before = policy.decide(step.observation, [])
    heat = action_attention(policy, step.observation, [], step.tokens)
    source = policy.source
    inputs = policy.inputs(step.observation, [])
    text = source.render(inputs)
    encoded = source.processor(images=list(inputs.images), text=[text], return_tensors="pt")
    source.model.set_attn_implementation("eager")
    out = source.model(
        torch.cat([encoded["input_ids"], torch.from_numpy(step.tokens)[None]], dim=1),
        pixel_values=encoded["pixel_values"],
        output_attentions=True,
    )
    source.model.set_attn_implementation("sdpa")
    last = encoded["input_ids"].shape[1] - 1
    rows = torch.stack([layer[0, :, last] for layer in out.attentions]).mean((0, 1))
    images = (encoded["input_ids"][0] == source.model.config.image_token_id).nonzero().flatten()
    expected = rows[images[: len(images) // 2]].view(4, 4)
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(policy.decide(step.observation, []).actions, before.actions)
    assert source.model.config._attn_implementation == "sdpa"


def test_a_policy_without_action_tokens_has_no_such_map(show: Show) -> None:
    class Chunks:
        def act(self, inputs):
            return torch.zeros(1, 1, 2)

    policy = SourcePolicy(source=Chunks(), spec=show.reader.policy.spec, to_actions=lambda a: a[0])
    _, step = find_step(show, next(iter(show.episodes)), 1)
    with pytest.raises(UnsupportedError, match="Chunks writes no action tokens"):
        action_attention(policy, step.observation, [], None)


def test_where_nothing_ships_the_tab_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, show: Show
) -> None:
    monkeypatch.setattr(robot, "EPISODES_FOLDER", tmp_path)
    assert "No recorded episodes ship" in load_show()
    monkeypatch.setattr(robot, "EPISODES_FOLDER", next(iter(show.episodes.values())).parent)
    monkeypatch.setattr("mm_c2c.robot.shipped.READER_FOLDER", tmp_path / "none")
    assert str(load_show()).startswith("No reader of the robot policy ships")
    monkeypatch.setattr(robot, "load_tiny_reader", build_reader)
    assert list(load_show(tiny=True).episodes) == list(show.episodes)


# Gradio leaves its event loops and sockets to the garbage collector, which complains of them.
@pytest.fixture
def client(
    bridge: Bridge, show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    setting = Setting(bridge=bridge, source_name=SOURCE_NAME, request=CAPTION_REQUEST)
    page = build_page(setting, show=show)
    url = launch(page, Exposure(), wait=False)
    caller = Client(url, verbose=False, download_files=str(tmp_path / "got"))
    yield caller
    caller.close()
    page.close(verbose=False)
    del caller, page
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_the_tab_answers_through_the_api(client: Client, show: Show) -> None:
    title, *_ = show.episodes
    shown = client.predict(title, 2, api_name="/robot_step")
    assert f"Step 2 of {STEPS}" in (shown[0] if isinstance(shown, tuple | list) else shown)
    html, answers = client.predict(title, 2, "where is it ?", api_name="/ask_robot")
    assert answers == ask_step(show, title, 2, "where is it ?")
    assert "Instruction only" in html
    with pytest.raises(AppError, match="not in the list of choices"):
        client.predict("/etc/passwd", 1, "where ?", api_name="/ask_robot")

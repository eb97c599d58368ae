"""The loop of environment, policy and reader; what is shown to a policy, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from robot_readers import Scripted, build_nothing
from robots import (
    SPEC,
    STEPS,
    TASK,
    ColourRoom,
    build_bridge,
    build_policy,
    build_reader,
)

from mm_c2c.cache import PositionKind
from mm_c2c.errors import ConfigError, InputError, ShapeError, UnsupportedError
from mm_c2c.robot import (
    NAMES,
    Answer,
    BackgroundReader,
    CacheReader,
    EpisodeEnd,
    FailureMonitor,
    Monitor,
    MonitorConfig,
    Narration,
    ObservationSpec,
    ReaderFailure,
    Reading,
    Snapshot,
    SourcePolicy,
    Step,
    check_observation,
    make_minigrid,
    rename,
    run_episode,
    yes_probability,
)


@pytest.fixture(scope="module")
def policy() -> SourcePolicy:
    return build_policy()


@pytest.fixture(scope="module")
def scripted() -> Iterator[BackgroundReader]:
    """One process for the tests that do not end it."""
    with BackgroundReader(Scripted) as reader:
        yield reader


def observation(**changes: Any) -> dict[str, Any]:
    pixels = np.zeros((4, 6, 3), np.uint8)
    return {
        "observation.images.front": pixels,
        "observation.images.wrist": pixels,
        "observation.state": np.zeros(2, np.float32),
        "task": TASK,
    } | changes


# --- observations --------------------------------------------------------------------------


def test_an_observation_is_copied_in_one_form() -> None:
    pixels = np.full((4, 6, 3), 0.5)
    given = observation(**{"observation.images.front": pixels, "observation.state": [1, 2]})
    checked = check_observation(given, SPEC)
    assert list(checked) == list(SPEC.keys)
    assert checked["observation.images.front"].dtype == np.uint8
    assert (checked["observation.images.front"] == 128).all()
    assert checked["observation.state"].dtype == np.float32
    given["observation.images.wrist"][:] = 9  # an environment may write into its own arrays
    assert not checked["observation.images.wrist"].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"observation.image.front": 0}, InputError, r"expected an observation with .*front"),
        ({"observation.images.front": np.zeros((4, 6))}, ShapeError, r"width, 3\), got \(4, 6\)"),
        ({"observation.images.front": np.zeros((3, 4, 6))}, ShapeError, "channels come last"),
        ({"observation.images.wrist": np.zeros((4, 6, 3), int)}, InputError, "wrist.*got int64"),
        ({"observation.images.front": np.full((4, 6, 3), 255.0)}, InputError, "0, 1.*divide by"),
        ({"observation.images.front": np.full((4, 6, 3), np.nan)}, InputError, "got nan"),
        ({"observation.state": np.zeros(3)}, ShapeError, r"expected \(2,\), got \(3,\)"),
        ({"observation.state": [0, np.inf]}, InputError, "finite"),
        ({"task": " "}, InputError, "expected an instruction"),
    ],
)
def test_an_observation_that_cannot_be_shown_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_observation(observation(**changes), SPEC)


def test_a_misspelt_key_is_named() -> None:
    given = observation()
    given["observation.images.frnt"] = given.pop("observation.images.front")
    with pytest.raises(InputError, match=r"'observation.images.frnt' should be '.*front'"):
        check_observation(given, SPEC)
    with pytest.raises(InputError, match=r"no \['mission'\], it has \['image'\]"):
        rename(NAMES)({"image": 0})


@pytest.mark.parametrize("settings", [{"cameras": ()}, {"cameras": ("a", "a")}])
def test_a_policy_needs_cameras_that_differ(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one camera or more"):
        ObservationSpec(**settings)
    with pytest.raises(ConfigError, match="state_dim"):
        ObservationSpec(cameras=("a",), state_dim=0)


# --- policies ------------------------------------------------------------------------------


def test_a_policy_is_read_at_what_it_decided(policy: SourcePolicy) -> None:
    seen = check_observation(observation(), SPEC)
    decision = policy.decide(seen, [])
    assert decision.actions.shape == (2, 2)
    cache = policy.read(seen, [], decision.tokens)
    assert cache.texts == ("pick the cat after 0",)
    assert (cache.kinds[0, -2:] == PositionKind.ACTION).all()
    own = policy.read(seen, [], None)
    torch.testing.assert_close(own.layers[1].keys, cache.layers[1].keys, rtol=0, atol=0)
    assert policy.read(seen, [1], decision.tokens).texts == ("pick the cat after 1",)
    other = policy.read(seen, [], decision.tokens[::-1].copy())
    assert not torch.equal(other.layers[1].keys, cache.layers[1].keys)


def test_a_policy_without_a_readable_cache_acts_and_says_so(policy: SourcePolicy) -> None:
    class Blind:
        act = staticmethod(policy.source.act)

    blind = dataclasses.replace(policy, source=Blind())
    seen = check_observation(observation(), SPEC)
    assert np.array_equal(blind.decide(seen, []).actions, policy.decide(seen, []).actions)
    with pytest.raises(UnsupportedError, match="Blind acts but has no `prefill`"):
        blind.read(seen, [], None)
    with pytest.raises(UnsupportedError, match="object has no `act`"):
        dataclasses.replace(policy, source=object())


# --- the loop ------------------------------------------------------------------------------


def run(policy: SourcePolicy, reader: BackgroundReader | None = None, **settings: Any) -> list:
    return list(run_episode(ColourRoom(), policy, reader, seed=3, **settings))


def test_an_episode_is_a_stream_of_steps(policy: SourcePolicy) -> None:
    *steps, end = run(policy)
    assert [step.index for step in steps] == list(range(STEPS))
    assert end == EpisodeEnd(steps=STEPS, success=True, reward=0.1)
    assert [step.terminated for step in steps] == [False] * 4 + [True]
    # A horizon of two: decided at every other step.
    assert [step.tokens is not None for step in steps] == [True, False, True, False, True]
    assert np.array_equal(steps[1].action, steps[0].action / 2)
    # The frame and the observation are those before the action.
    assert steps[0].frame[0, 0, 0] == 0
    moved = steps[0].action.astype(np.float32)
    assert np.array_equal(steps[1].observation["observation.state"], moved)
    past = [step.action for step in steps[:2]]
    again = policy.decide(steps[2].observation, past)
    assert np.array_equal(again.actions[0], steps[2].action)


def test_a_policy_is_told_what_it_did_before(policy: SourcePolicy) -> None:
    told: list[list[Any]] = []

    def note(task: str, past: Any) -> str:
        told.append(list(past))
        return task

    steps = run(dataclasses.replace(policy, instruct=note))[:-1]
    assert [len(past) for past in told] == [0, 2, 4]
    done = [step.action.tobytes() for step in steps[:4]]
    assert [action.tobytes() for action in told[-1]] == done


def test_an_episode_can_be_cut_short_and_paced(policy: SourcePolicy) -> None:
    started = time.monotonic()
    *steps, end = run(policy, max_steps=2, fps=10)
    assert time.monotonic() - started >= 0.2
    assert (steps[-1].truncated, steps[-1].terminated) == (True, False)
    assert (end.steps, end.success) == (2, False)
    with pytest.raises(ConfigError, match="fps must be above 0"):
        run(policy, fps=0)
    with pytest.raises(ConfigError, match="max_steps must be at least 1, or None, got 0"):
        run(policy, max_steps=0)


def test_a_policy_that_decides_on_no_action_is_refused(policy: SourcePolicy) -> None:
    idle = dataclasses.replace(policy, to_actions=lambda acted: np.zeros((0, 2)))
    with pytest.raises(ShapeError, match="step 0: expected one action or more"):
        run(idle)


def test_what_the_environment_says_of_success_counts(policy: SourcePolicy) -> None:
    class Honest(ColourRoom):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"is_success": False}

    *_, end = run_episode(Honest(), policy)
    assert (end.success, end.reward) == (False, 0.1)


def test_actions_with_and_without_a_reader_are_equal(policy: SourcePolicy) -> None:
    alone = [event for event in run(policy) if isinstance(event, Step)]
    with BackgroundReader(build_reader) as reader:
        events = run(policy, reader, fps=5, linger_s=60)
    beside = [event for event in events if isinstance(event, Step)]
    assert [step.action.tobytes() for step in beside] == [step.action.tobytes() for step in alone]
    for one, other in zip(alone, beside, strict=True):
        assert one.observation["observation.images.front"].tobytes() == (
            other.observation["observation.images.front"].tobytes()
        )
    # What the process says is what a reader here says of the same steps.
    said = [event for event in events if isinstance(event, Reading)]
    assert not [event for event in said if isinstance(event, ReaderFailure)]
    here = build_reader()
    for event in said:
        if isinstance(event, Narration):
            past = [step.action for step in alone[: event.step]]
            taken = alone[event.step]
            seen = here.perceive(taken.observation, past, taken.tokens)
            assert here.answer(seen, [here.narrate, *here.questions])[0] == event.text
            assert event.latency_ms > 0
    assert events[-1].read == len([e for e in said if isinstance(e, Narration)]) > 0
    assert events[-1].read + events[-1].dropped == 3


# --- a reader beside it --------------------------------------------------------------------


def offer(reader: BackgroundReader, episode: int, step: int, task: Any) -> None:
    given = observation(task=task)
    reader.offer(
        Snapshot(episode=episode, step=step, observation=given, past=(), tokens=None, taken_s=0.0)
    )


def test_the_newest_snapshot_wins_and_the_others_are_counted(scripted: BackgroundReader) -> None:
    episode = scripted.begin()
    offer(scripted, episode, 0, "wait 0.5")
    time.sleep(0.2)  # it is being read
    for step in range(1, 5):
        started = time.monotonic()
        offer(scripted, episode, step, "wait 0")
        assert time.monotonic() - started < 0.1
    assert scripted.poll() == []
    assert [event.step for event in scripted.finish(30)] == [0, 4]
    assert (scripted.read, scripted.dropped) == (2, 3)


def test_a_question_is_asked_of_the_next_snapshot_that_is_read(scripted: BackgroundReader) -> None:
    episode = scripted.begin()
    scripted.ask("why ?")
    for step in range(2):
        offer(scripted, episode, step, "answer")
        (said,) = scripted.finish(30)
        assert said.text == ("answer why ?" if step == 0 else "answer")


def test_what_is_read_late_is_not_told_of_the_next_episode(scripted: BackgroundReader) -> None:
    offer(scripted, scripted.begin(), 0, "wait 0.3")
    time.sleep(0.1)
    episode = scripted.begin()
    offer(scripted, episode, 7, "wait 0")
    assert [event.step for event in scripted.finish(30)] == [7]
    assert (scripted.read, scripted.dropped) == (1, 0)


def test_a_failure_to_read_is_told_and_the_next_is_read(scripted: BackgroundReader) -> None:
    episode = scripted.begin()
    offer(scripted, episode, 0, "fail")
    (failure,) = scripted.finish(30)
    assert isinstance(failure, ReaderFailure)
    assert (failure.step, failure.message) == (0, "ValueError: cannot read this")
    offer(scripted, episode, 1, "fail")
    assert isinstance(scripted.finish(30)[0], Narration)


def test_a_reader_that_ends_is_told_and_the_robot_goes_on(policy: SourcePolicy) -> None:
    with BackgroundReader(Scripted) as reader:
        events = list(run_episode(ColourRoom("end"), policy, reader, fps=10))
    (failure,) = [event for event in events if isinstance(event, ReaderFailure)]
    assert "ended with exit code 3" in failure.message
    assert events[-1].steps == STEPS
    assert events[-1].success
    assert events[-1].read == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing", "TypeError: a reader gives a list of readings, got None"),
        ("words", "a reader gives a list of readings, got .'it turns left'"),
        ("unsent", "pickle"),
        ("unread", "ValueError: invalid literal"),
    ],
)
def test_what_is_no_reading_is_told_and_the_next_is_read(
    scripted: BackgroundReader, task: str, message: str
) -> None:
    episode = scripted.begin()
    offer(scripted, episode, 4, task)
    (failure,) = scripted.finish(30)
    assert isinstance(failure, ReaderFailure)
    assert failure.step == 4
    assert re.search(message, failure.message)
    offer(scripted, episode, 5, "wait 0")
    assert isinstance(scripted.finish(30)[0], Narration)


def test_a_snapshot_that_cannot_be_sent_is_told(scripted: BackgroundReader) -> None:
    episode = scripted.begin()
    offer(scripted, episode, 0, threading.Lock())
    (failure,) = scripted.finish(30)
    assert "cannot pickle" in failure.message
    offer(scripted, episode, 1, "wait 0")
    assert isinstance(scripted.finish(30)[0], Narration)


def test_a_reader_that_ended_is_told_of_in_every_episode_after_it() -> None:
    with BackgroundReader(Scripted) as reader:
        offer(reader, reader.begin(), 41, "end 0.5")
        time.sleep(0.2)  # it ends amid the next episode
        for _ in range(2):
            offer(reader, reader.begin(), 7, "wait 0")
            (failure,) = reader.finish(30)
            assert isinstance(failure, ReaderFailure)
            assert (failure.step, failure.message[-11:]) == (0, "exit code 3")
            assert (reader.read, reader.dropped) == (0, 1)


def test_a_reading_that_takes_too_long_is_told(scripted: BackgroundReader) -> None:
    offer(scripted, scripted.begin(), 3, "wait 1")
    (failure,) = scripted.finish(0.1)
    assert isinstance(failure, ReaderFailure)
    assert (failure.step, failure.message) == (3, "not read 0.1 s after the robot stood")
    scripted.begin()
    assert scripted.finish(0) == []  # what the last episode left is not waited for


def test_closing_stops_a_reading(scripted: BackgroundReader) -> None:
    reader = BackgroundReader(Scripted)
    offer(reader, reader.begin(), 0, "wait 60")
    time.sleep(0.2)
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 10
    assert reader.poll() == []  # it was stopped, not lost


def test_a_reader_that_cannot_start_says_why() -> None:
    with pytest.raises(UnsupportedError, match="could not start: OSError: no weights here"):
        BackgroundReader(build_nothing)


# --- what is read --------------------------------------------------------------------------


def test_a_reading_has_a_narration_answers_and_the_monitor(policy: SourcePolicy) -> None:
    reader = build_reader()
    seen = check_observation(observation(), SPEC)
    tokens = policy.decide(seen, []).tokens

    def snapshot(episode: int, step: int) -> Snapshot:
        return Snapshot(
            episode=episode, step=step, observation=seen, past=(), tokens=tokens, taken_s=0.0
        )

    narration, standing, asked, monitor = reader(snapshot(1, 4), ["what is it ?"])
    assert isinstance(narration, Narration)
    assert isinstance(standing, Answer)
    assert (standing.question, asked.question) == ("where is it ?", "what is it ?")
    look = reader.perceive(seen, (), tokens)
    texts = reader.answer(look, [reader.narrate, "where is it ?", "what is it ?"])
    assert [narration.text, standing.text, asked.text] == texts
    # With a threshold of 1 the alarm always goes off, and the reason is asked once an episode.
    assert monitor.alarm
    assert monitor.reason is not None
    assert reader(snapshot(1, 5))[-1].reason is None
    assert reader(snapshot(2, 0))[-1].reason is not None


def test_a_bridge_of_two_sources_reads_no_policy(policy: SourcePolicy) -> None:
    bridge = build_bridge(policy)
    links = (*bridge.config.links, dataclasses.replace(bridge.config.links[0], source="other"))
    bridge.config = dataclasses.replace(bridge.config, links=links)
    with pytest.raises(ConfigError, match=r"\['other', 'robot'\]"):
        CacheReader(bridge, policy)


def test_the_monitor_compares_yes_with_no(policy: SourcePolicy) -> None:
    """Against the likelihood of both words as whole answers' first tokens, from a plain forward."""
    reader = build_reader()
    bridge = reader.bridge
    seen = check_observation(observation(), SPEC)
    look = reader.perceive(seen, (), policy.decide(seen, []).tokens)
    got = yes_probability(bridge, look, "Will it succeed?")
    fused = bridge.fuse(look, ["Will it succeed?"])
    out = bridge.target.model.generate(
        **fused, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    said = out.logits[0][0].softmax(0)

    def chance(*forms: str) -> torch.Tensor:
        tokenizer = bridge.target.tokenizer
        return said[[*{tokenizer(form)["input_ids"][0] for form in forms}]].sum()

    yes, no = chance("yes", "Yes", " yes", " Yes"), chance("no", "No", " no", " No")
    torch.testing.assert_close(torch.tensor(got), yes / (yes + no))


def test_the_monitor_smooths_and_asks_why_when_it_falls(
    policy: SourcePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    chances = iter([0.9, 0.1, 0.1, 1.0, 0.0])
    monkeypatch.setattr("mm_c2c.robot.monitor.yes_probability", lambda *_: next(chances))
    reader = build_reader()
    seen = check_observation(observation(), SPEC)
    look = reader.perceive(seen, (), None)
    watch = FailureMonitor(reader.bridge, MonitorConfig(threshold=0.4, smoothing=0.5))
    said = [watch.update(look, step) for step in range(5)]
    smoothed = [0.9, 0.5, 0.3, 0.65, 0.325]
    assert [event.smoothed for event in said] == pytest.approx(smoothed)
    assert [event.alarm for event in said] == [False, False, True, False, True]
    assert [event.reason is not None for event in said] == [False, False, True, False, True]
    assert isinstance(said[0], Monitor)


@pytest.mark.parametrize("settings", [{"threshold": 1.5}, {"smoothing": 0}])
def test_a_monitor_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MonitorConfig(**settings)


# --- minigrid ------------------------------------------------------------------------------


def test_a_level_of_minigrid_is_an_environment_of_the_loop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("minigrid", reason="the level needs minigrid: pip install mm-c2c[robot]")
    env = make_minigrid("BabyAI-GoToLocal-v0")
    raw, _ = env.reset(seed=3)
    seen = check_observation(rename(NAMES)(raw), ObservationSpec(cameras=("front",)))
    assert seen["task"] == "go to the red key"
    assert seen["observation.images.front"].shape == (56, 56, 3)
    assert env.render().shape == (256, 256, 3)
    for seed in range(40):  # minigrid itself would tell of layouts that it refuses
        env.reset(seed=seed)
    assert capsys.readouterr().out == ""


# --- what it costs -------------------------------------------------------------------------


def test_the_bench_compares_steps_with_and_without_a_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("minigrid", reason="the bench needs minigrid: pip install mm-c2c[robot]")
    from mm_c2c.bench import robot as bench_robot

    monkeypatch.setattr(bench_robot, "build_reader", Scripted)
    result = bench_robot.bench(bench_robot.RobotBenchConfig(rounds=2, steps=2))
    low, high = result["ratio"][1:]
    assert 0 < low <= result["ratio"][0] <= high
    assert result["read"] + result["dropped"] == 4  # without the round that warms up
    assert result["latency_ms"] > 0
    with pytest.raises(ConfigError, match="rounds must be at least 1, got 0"):
        bench_robot.RobotBenchConfig(rounds=0)

"""Questions about episodes of BabyAI: their truth, and which of them are asked."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from babyai_episodes import BALL, KEY, episode, put_next_episode, step

from mm_c2c.reference.babyai import questions
from mm_c2c.reference.babyai.make_items import (
    WATCHED,
    Moment,
    Row,
    about_ends,
    about_failures,
    about_hands,
    about_sentences,
    balance,
    carrying,
    moments,
    thin,
    watch,
    watched,
)
from mm_c2c.reference.babyai.questions import (
    WORDINGS,
    Question,
    answers,
    ask,
    failure,
    goals,
    offset,
    side_of,
)
from mm_c2c.reference.babyai.rollouts import POLICY, Episode, Thing, load_policy
from mm_c2c.sources.action import TokenActionSource


@pytest.fixture(scope="module")
def policy() -> TokenActionSource:
    return load_policy(POLICY)


@pytest.fixture
def put_next() -> Episode:
    return put_next_episode()


# --- truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "expected"),
    [(0, (2, -3)), (1, (-3, -2)), (2, (-2, 3)), (3, (3, 2))],  # right, down, left, up
)
def test_places_are_told_as_the_agent_sees_them(direction: int, expected: tuple[int, int]) -> None:
    """The thing is 2 columns to the right in the room and 3 rows above."""
    there = step("left", 4, 5, direction)
    thing = Thing("red", "ball", 6, 2)
    assert offset(there, thing) == expected
    assert side_of(there, thing) == ("right" if expected[1] > 0 else "left")


def test_ahead_is_a_side_and_behind_is_none() -> None:
    assert side_of(step("left", 3, 5, 3), BALL) == "straight ahead"
    assert side_of(step("left", 3, 5, 1), BALL) is None


def test_what_it_reached_is_known_in_hindsight(put_next: Episode) -> None:
    assert goals(put_next) == [
        ("pick it up", BALL, 1),
        ("put down", KEY, 6),
    ]
    first, last = answers(put_next, 0), answers(put_next, 6)
    narration = "It turns left to pick up the red ball on its left."
    assert first == {
        "held": "nothing",
        "hands": "no",
        "task": "put next to",
        "success": "yes",
        "next": "turn left",
        "after": "pick up",
        "third": "turn right",
        "progress": "just begun",
        "object": "red ball",
        "colour": "red",
        "intent": "pick it up",
        "side": "left",
        "narration": narration,
    }
    assert (last["next"], last["held"], last["progress"]) == (
        "put down",
        "red ball",
        "nearly there",
    )
    assert (last["object"], last["side"]) == ("blue key", "straight ahead")
    assert "after" not in last
    assert last["narration"].endswith("to put the red ball next to the blue key straight ahead.")


def test_a_thing_put_beside_two_others_was_put_next_to_neither_in_particular(
    put_next: Episode,
) -> None:
    between = Thing("grey", "box", 4, 4)
    steps = [dataclasses.replace(s, things=(*s.things, between)) for s in put_next.steps]
    crowded = dataclasses.replace(put_next, steps=tuple(steps))
    assert [goal.thing for goal in goals(crowded)] == [BALL]
    assert "object" not in answers(crowded, 6)


def test_the_truth_does_not_come_from_the_instruction() -> None:
    """Told to fetch the key, it took the ball: it went for the ball, and did not succeed."""
    wrong = episode(
        "PickupLoc",
        step("left", 3, 2, 0, BALL, KEY),
        step("pickup", 3, 2, 3, BALL, KEY),
        step("toggle", 3, 2, 3, KEY, carrying="red ball"),
        step(None, 3, 2, 3, KEY, carrying="red ball"),
        success=False,
        mission="pick up the blue key",
    )
    found = answers(wrong, 0)
    assert (found["object"], found["success"]) == ("red ball", "no")
    assert "progress" not in found
    assert "next" not in answers(wrong, 2)  # no name for that action
    assert "object" not in answers(wrong, 2)


def test_a_task_of_going_somewhere_ends_in_front_of_it() -> None:
    there = episode(
        "GoToLocal", step("forward", 3, 4, 3, BALL, KEY), step(None, 3, 2, 3, BALL, KEY)
    )
    assert goals(there) == [("go to it", BALL, 0)]
    lost = dataclasses.replace(there, success=False)
    assert goals(lost) == []


def test_what_went_wrong_is_judged_by_the_instruction(put_next: Episode) -> None:
    """The same deeds under instructions that ask for them, or for something else."""

    def told(mission: str) -> str:
        return failure(dataclasses.replace(put_next, mission=mission, success=False))

    assert failure(put_next) == "nothing"
    assert told("put the blue key next to the red ball") == "wrong object"
    assert told("put the red ball next to the grey box") == "wrong object"
    assert told("put the red ball next to the blue key") == "stuck"


def test_to_stop_in_front_of_another_thing_is_to_take_it_for_the_right_one() -> None:
    there = step("done", 3, 2, 3, BALL, KEY)
    stopped = episode(
        "GoToLocal", there, step(None, 3, 2, 3, BALL), success=False, mission="go to the blue key"
    )
    assert failure(stopped) == "wrong object"
    elsewhere = dataclasses.replace(stopped, end=step(None, 3, 2, 0, BALL))
    assert failure(elsewhere) == "stuck"
    waiting = dataclasses.replace(stopped, steps=(dataclasses.replace(there, action=0),))
    assert failure(waiting) == "stuck"


@pytest.mark.parametrize(
    ("mission", "after", "expected"),
    [
        ("pick up the red key", 12, "turned away"),
        ("pick up a key on your left", 12, "turned away"),
        ("pick up the red key", 11, "stuck"),  # in view until the twelfth step from the end
        ("pick up the blue key", 12, "stuck"),  # never in view
        ("pick up the red ball", 12, "stuck"),
    ],
)
def test_what_was_in_view_and_is_no_longer_was_turned_away_from(
    mission: str, after: int, expected: str
) -> None:
    pytest.importorskip("minigrid", reason="numbers of objects come from minigrid")
    view = np.ones((7, 7, 3), dtype=np.uint8) * np.array([1, 0, 0], dtype=np.uint8)
    view[1, 6] = (5, 0, 0)  # a red key
    seen = step("left", 3, 3, 0, KEY, view=view.tobytes().hex())
    lost = [step("left", 3, 3, 0, KEY)] * after
    end = step(None, 3, 3, 0, KEY)
    assert failure(episode("PickupLoc", seen, *lost, end, success=False, mission=mission)) == (
        expected
    )


def test_every_answer_is_one_of_its_options(put_next: Episode) -> None:
    rng = random.Random(0)
    for number in range(len(put_next.steps)):
        for question in ask(answers(put_next, number), rng):
            assert question.kind == "narration" or question.answer in question.options
            assert question.question in sum(questions.WORDINGS.values(), ())


def test_captions_tell_what_the_camera_shows_and_no_more() -> None:
    pytest.importorskip("minigrid", reason="numbers of objects come from minigrid")
    view = np.ones((7, 7, 3), dtype=np.uint8) * np.array([1, 0, 0], dtype=np.uint8)
    view[3, 5] = (2, 5, 0)  # a wall ahead
    view[1, 6] = (5, 0, 0)  # a red key, two to the left
    view[4, 3] = (6, 2, 0)  # a blue ball, three ahead and one to the right
    view[3, 6] = (7, 4, 0)  # held: a yellow box
    seen = step("left", 0, 0, 0, view=view.tobytes().hex(), carrying="yellow box")
    assert questions.in_view(seen) == [("red key", 0, -2), ("blue ball", 3, 1)]
    assert questions.caption(seen) == (
        "In view: a red key 2 to the left, a blue ball 3 ahead and 1 to the right. "
        "A wall is right ahead. The robot holds a yellow box."
    )
    nothing = questions.caption(step("left", 0, 0, 0))
    assert nothing == "No object is in view. The robot holds nothing."


def test_swapped_instructions_name_another_object(put_next: Episode) -> None:
    told = dataclasses.replace(put_next, mission="put the red ball next to the blue key")
    assert questions.swapped_mission(told, 0, "grey box") == (
        "put the grey box next to the blue key"
    )
    assert questions.swapped_mission(told, 4, "grey box") == "put the red ball next to the grey box"
    assert questions.swapped_mission(told, 4, "red ball") is None
    went = dataclasses.replace(told, level="GoToLocal")
    twice = dataclasses.replace(went.steps[0], things=(BALL, BALL))
    went = dataclasses.replace(went, steps=(twice,))
    assert questions.swapped_mission(went, 0, "red ball") == "go to a red ball"


# --- items ------------------------------------------------------------------------------------


def rows_of(episode: Episode, counts: dict[str, int]) -> list[Row]:
    moment = Moment(episode=episode, number=0, mission="", text="", tokens=())
    return [
        Row(moment, Question("next", "?", answer, ()))
        for answer, count in counts.items()
        for _ in range(count)
    ]


def test_steps_with_something_in_the_hands_are_asked_what_it_is(
    put_next: Episode, policy: TokenActionSource
) -> None:
    numbers = [n for n, step in enumerate(put_next.steps) if step.carrying]
    found = moments([put_next], policy, random.Random(0), 99, carrying)
    assert [moment.number for moment in found] == numbers
    rows = about_hands(found, random.Random(0))
    assert {row.question.kind for row in rows} == {"hands", "object", "colour"}
    held = [row for row in rows if row.question.answer == put_next.steps[numbers[0]].carrying]
    assert len(held) == len(numbers)
    assert not moments([put_next], policy, random.Random(0), 0, carrying)


def test_what_goes_wrong_is_asked_of_every_moment(
    put_next: Episode, policy: TokenActionSource
) -> None:
    failed = dataclasses.replace(
        put_next, seed=2, success=False, mission="put the red ball next to the grey box"
    )
    found = moments([put_next, failed], policy, random.Random(0), 3)
    rows = about_failures(found, random.Random(0))
    assert [row.moment for row in rows] == found
    assert [row.question.answer for row in rows] == ["nothing"] * 3 + ["wrong object"] * 3
    assert {row.question.kind for row in rows} == {"why"}


def test_how_it_ends_is_asked_in_all_words_where_a_monitor_looks(
    put_next: Episode, policy: TokenActionSource
) -> None:
    failed = dataclasses.replace(
        put_next,
        seed=2,
        steps=put_next.steps * 9,
        success=False,
        mission="put the red ball next to the grey box",
    )
    found = moments([failed], policy, random.Random(0), 99, watched)
    assert [moment.number for moment in found] == list(WATCHED)
    rows = about_ends(found[:1])
    assert [(row.question.question, row.question.answer) for row in rows] == [
        *((words, "no") for words in WORDINGS["success"]),
        *((words, "wrong object") for words in WORDINGS["why"]),
    ]
    assert len(moments([failed], policy, random.Random(0), 4, watched)) == 4


def test_sentences_are_asked_for_in_every_wording(
    put_next: Episode, policy: TokenActionSource
) -> None:
    found = moments([put_next], policy, random.Random(0), 3)
    rows = about_sentences(found, 5)
    assert [row.moment for row in rows] == [moment for moment in found for _ in range(5)]
    told = [answers(put_next, moment.number)["narration"] for moment in found]
    assert [row.question.answer for row in rows[::5]] == told
    first, second = WORDINGS["narration"]
    asked = [row.question.question for row in rows[:5]]
    assert asked == [first, second, first, second, first]


def test_of_sentences_a_share_is_kept(put_next: Episode, policy: TokenActionSource) -> None:
    rows = about_sentences(moments([put_next], policy, random.Random(0), 2), 500)
    assert len(thin(rows, random.Random(0), 1.0)) == 1000
    assert 400 < len(thin(rows, random.Random(0), 0.5)) < 600


def test_balanced_items_take_answers_in_turn(put_next: Episode) -> None:
    rows = rows_of(put_next, {"turn left": 50, "turn right": 3, "go forward": 40})
    found = Counter(row.question.answer for row in balance(rows, 20, random.Random(0)))
    assert found["turn right"] == 3
    assert sorted(found.values()) == [3, 8, 9]


def test_answers_that_are_given_far_oftener_are_thinned(put_next: Episode) -> None:
    rows = rows_of(put_next, {"turn left": 100, "turn right": 100, "go forward": 4000})
    found = Counter(row.question.answer for row in thin(rows, random.Random(0), 1.0))
    assert (found["turn left"], found["turn right"]) == (100, 100)
    assert 150 < found["go forward"] < 250


def test_a_monitor_looks_at_the_same_steps_of_all_episodes(
    put_next: Episode, policy: TokenActionSource
) -> None:
    """However long they last, and at none twice."""
    long = dataclasses.replace(put_next, seed=2, steps=put_next.steps * 9, success=False)
    found = watch([put_next, long], policy, random.Random(0), 1)
    looks: dict[int, list[int]] = {put_next.seed: [], long.seed: []}
    for row in found:
        looks[row.moment.episode.seed].append(row.moment.number)
    assert looks[long.seed] == list(WATCHED)
    assert looks[put_next.seed] == [n for n in WATCHED if n < len(put_next.steps)]

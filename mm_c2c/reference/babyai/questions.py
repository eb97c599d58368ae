"""Questions about what the policy is doing, with truth from the simulator and from what it did.

Nothing here reads the instruction: which object it goes for is the one that it in fact reached.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from mm_c2c.reference.babyai.levels import ACTIONS, AGENT_CELL, LEVELS
from mm_c2c.reference.babyai.rollouts import Episode, Step, Thing

COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
THING_KINDS = ("ball", "box", "key")
NAMES = tuple(f"{colour} {kind}" for colour in COLOURS for kind in THING_KINDS)
SIDES = ("left", "right", "straight ahead")
INTENTS = ("go to it", "pick it up", "put down")
STAGES = ("just begun", "half way", "nearly there")
TASKS = tuple(level.task for level in LEVELS.values())
REASONS = ("nothing", "wrong object", "turned away", "stuck")
_LAST_STEPS = 12

MOTIONS = {
    "left": "turn left",
    "right": "turn right",
    "forward": "go forward",
    "pickup": "pick up",
    "drop": "put down",
}
"""Actions that are asked for, by their name in `ACTIONS`."""

_VECTORS = ((1, 0), (0, 1), (-1, 0), (0, -1))

WORDINGS = {
    "next": ("What will the robot do next?", "Which move comes next?", "Next move?"),
    "after": ("What will it do after that?", "Which move comes second?"),
    "third": ("What will it do three moves from now?", "Which move comes third?"),
    "object": ("Which object is it going for?", "What is it heading for?", "Which is its goal?"),
    "colour": ("Which colour does its goal have?", "What colour is it going for?"),
    "side": ("On which side is its goal?", "Where does its goal lie?"),
    "hands": ("Is it holding something?", "Has it something in its hands?"),
    "held": ("What does it hold?", "What is in its hands?"),
    "intent": ("What will it do at its goal?", "What does it want there?"),
    "task": ("Which task is this?", "What was it asked to do?"),
    "progress": ("How far along is it?", "How much is done?"),
    "success": ("Will it succeed?", "Is this going to end well?"),
    "why": ("What will go wrong?", "What goes wrong?"),
    "narration": ("What is the robot up to?", "Describe it in one sentence."),
}
"""Questions by their wording's name; `after` and `third` are of kind `ahead`, `held` of `hands`."""

KINDS = {"after": "ahead", "third": "ahead", "held": "hands"}
OPTIONS = {
    "next": tuple(MOTIONS.values()),
    "after": tuple(MOTIONS.values()),
    "third": tuple(MOTIONS.values()),
    "object": NAMES,
    "colour": COLOURS,
    "side": SIDES,
    "hands": ("yes", "no"),
    "held": ("nothing", *NAMES),
    "intent": INTENTS,
    "task": TASKS,
    "progress": STAGES,
    "success": ("yes", "no"),
    "why": REASONS,
    "narration": (),
}
"""All answers that a question can have; none for free narration."""


class Question(NamedTuple):
    """A question about one step.

    Attributes:
        kind: such as `next`.
        question: the words.
        answer: the truth.
        options: all answers it could have.
    """

    kind: str
    question: str
    answer: str
    options: tuple[str, ...]


class Goal(NamedTuple):
    """What the policy reached next, known in hindsight.

    Attributes:
        intent: one of `INTENTS`.
        thing: which object.
        step: whose action got there.
    """

    intent: str
    thing: Thing
    step: int


def goals(episode: Episode) -> list[Goal]:
    """What it picked up, put things next to, and went to, in order.

    A thing that was put down beside several others, or beside none, has no goal; and what stands
    in front of it at the end is one only if the task was to go somewhere and that was it.
    """
    states = (*episode.steps, episode.end)
    found = []
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        place = in_front(before)
        if before.carrying is None and after.carrying is not None:
            (thing,) = (t for t in before.things if (t.x, t.y) == place)
            found.append(Goal(INTENTS[1], thing, number))
        if before.carrying is not None and after.carrying is None:
            beside = [t for t in before.things if abs(t.x - place[0]) + abs(t.y - place[1]) == 1]
            if len(beside) == 1:
                found.append(Goal(INTENTS[2], beside[0], number))
    if episode.success and not found:
        ahead = [t for t in episode.end.things if (t.x, t.y) == in_front(episode.end)]
        found += [Goal(INTENTS[0], thing, len(episode.steps) - 1) for thing in ahead]
    return found


def in_front(step: Step) -> tuple[int, int]:
    """The cell that the agent faces."""
    ahead = _VECTORS[step.direction]
    return step.x + ahead[0], step.y + ahead[1]


def offset(step: Step, thing: Thing) -> tuple[int, int]:
    """How many cells a thing lies ahead of the agent and to its right; negative: behind, left."""
    ahead = _VECTORS[step.direction]
    dx, dy = thing.x - step.x, thing.y - step.y
    return dx * ahead[0] + dy * ahead[1], dy * ahead[0] - dx * ahead[1]


def side_of(step: Step, thing: Thing) -> str | None:
    """One of `SIDES`; None where it lies straight behind."""
    forward, right = offset(step, thing)
    if right:
        return SIDES[1] if right > 0 else SIDES[0]
    return SIDES[2] if forward > 0 else None


def answers(episode: Episode, number: int) -> dict[str, str]:
    """The true answers about a step, by the name of a wording; what has no truth is left out."""
    step, steps = episode.steps[number], episode.steps
    found = {
        "held": step.carrying or "nothing",
        "hands": "yes" if step.carrying else "no",
        "task": LEVELS[episode.level].task,
        "success": "yes" if episode.success else "no",
    }
    for wording, ahead in (("next", 0), ("after", 1), ("third", 2)):
        if number + ahead < len(steps):
            motion = MOTIONS.get(ACTIONS[steps[number + ahead].action])
            if motion:
                found[wording] = motion
    if episode.success:
        found["progress"] = STAGES[min(2, 3 * number // len(steps))]
    goal = next((goal for goal in goals(episode) if goal.step >= number), None)
    if goal:
        found |= {"object": goal.thing.name, "colour": goal.thing.colour, "intent": goal.intent}
        side = side_of(step, goal.thing)
        if side:
            found["side"] = side
        if "next" in found:
            found["narration"] = narrate(found)
    return found


def failure(episode: Episode) -> str:
    """Why an episode fails, one of `REASONS`; `nothing` where it succeeds.

    `wrong object`: it picks up, puts something next to, or stops in front of a thing that its
    instruction does not ask for. `turned away`: it had in view what was asked for, and at the end
    no longer. `stuck`: the rest, which do the same over and over until time is out.
    """
    if episode.success:
        return REASONS[0]
    asked = episode.mission.removeprefix("put ").split(" next to ")
    done = goals(episode)
    if episode.level == "PutNextLocal":
        parts = {INTENTS[1]: asked[0], INTENTS[2]: asked[1]}
        wrong = any(not parts[goal.intent].endswith(goal.thing.name) for goal in done)
    else:  # to pick up the right one is to succeed, and so is to stand in front of it
        end = in_front(episode.end)
        stopped = ACTIONS[episode.steps[-1].action] == "done"
        wrong = bool(done) or (stopped and any((t.x, t.y) == end for t in episode.end.things))
    if wrong:
        return REASONS[1]
    seen = [
        any(_is_asked(name, part) for name, _, _ in in_view(step) for part in asked)
        for step in episode.steps
    ]
    return REASONS[2] if any(seen) and not any(seen[-_LAST_STEPS:]) else REASONS[3]


def _is_asked(name: str, phrase: str) -> bool:
    """Whether a thing is called so in part of an instruction, which may leave out its colour."""
    colour, kind = name.split()
    return name in phrase or (
        kind in phrase and not any(c in phrase for c in COLOURS if c != colour)
    )


SENTENCE_PARTS = {
    "move": r"\b(turns left|turns right|goes forward|reaches out|opens its hands)\b",
    "intent": r"\bto (go to|pick up|put)\b",
    "colour": rf"\bthe (\w+) (?:{'|'.join(THING_KINDS)})\b",
    "kind": rf"\bthe \w+ ({'|'.join(THING_KINDS)})\b",
    "side": r"\b(on its left|on its right|straight ahead|behind it)\b",
}
"""What a sentence of `narrate` says, and where."""


def narrate(found: dict[str, str]) -> str:
    """One sentence of the true answers about a step."""
    verbs = {
        "turn left": "turns left",
        "turn right": "turns right",
        "go forward": "goes forward",
        "pick up": "reaches out",
        "put down": "opens its hands",
    }
    intents = {
        INTENTS[0]: f"to go to the {found['object']}",
        INTENTS[1]: f"to pick up the {found['object']}",
        INTENTS[2]: f"to put the {found['held']} next to the {found['object']}",
    }
    places = {"left": " on its left", "right": " on its right", "straight ahead": " straight ahead"}
    place = places.get(found.get("side", ""), " behind it")
    return f"It {verbs[found['next']]} {intents[found['intent']]}{place}."


def ask(found: dict[str, str], rng: random.Random) -> list[Question]:
    """Every question that has an answer, each in one of its wordings.

    Args:
        found: from `answers`.
        rng: picks the wordings.
    """
    return [
        Question(
            KINDS.get(wording, wording), rng.choice(WORDINGS[wording]), answer, OPTIONS[wording]
        )
        for wording, answer in found.items()
    ]


def in_view(step: Step) -> list[tuple[str, int, int]]:
    """What the camera shows: name, cells ahead, cells to the right; the nearest first.

    What the agent holds is not among them.
    """
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT

    symbols = step.symbols()
    found = []
    for column in range(symbols.shape[0]):
        for row in range(symbols.shape[1]):
            kind = IDX_TO_OBJECT[symbols[column, row, 0]]
            if kind in THING_KINDS and (column, row) != AGENT_CELL:
                name = f"{IDX_TO_COLOR[symbols[column, row, 1]]} {kind}"
                found.append((name, AGENT_CELL[1] - row, column - AGENT_CELL[0]))
    return sorted(found, key=lambda thing: (thing[1] + abs(thing[2]), thing))


def caption(step: Step) -> str:
    """A true description of what the camera shows, without knowledge of the instruction."""
    from minigrid.core.constants import OBJECT_TO_IDX

    seen = [f"a {name} {_place(forward, right)}" for name, forward, right in in_view(step)]
    parts = [f"In view: {', '.join(seen)}." if seen else "No object is in view."]
    column, row = AGENT_CELL
    if step.symbols()[column, row - 1, 0] == OBJECT_TO_IDX["wall"]:
        parts.append("A wall is right ahead.")
    parts.append(f"The robot holds {f'a {step.carrying}' if step.carrying else 'nothing'}.")
    return " ".join(parts)


def _place(forward: int, right: int) -> str:
    ahead = f"{forward} ahead" if forward else ""
    aside = f"{abs(right)} to the {'right' if right > 0 else 'left'}" if right else ""
    return " and ".join(part for part in (ahead, aside) if part)


def swapped_mission(episode: Episode, number: int, name: str) -> str | None:
    """An instruction of the same form that names another object as the goal.

    Args:
        episode: whose mission is changed.
        number: the step from which on.
        name: the other object's.

    Returns:
        None where that would name one object twice.
    """
    step = episode.steps[number]
    article = "a" if sum(thing.name == name for thing in step.things) > 1 else "the"
    if episode.level != "PutNextLocal":
        verb = "go to" if episode.level == "GoToLocal" else "pick up"
        return f"{verb} {article} {name}"
    moved, _, fixed = episode.mission.removeprefix("put ").partition(" next to ")
    moved, fixed = (moved, f"{article} {name}") if step.carrying else (f"{article} {name}", fixed)
    if moved.partition(" ")[2] == fixed.partition(" ")[2]:
        return None
    return f"put {moved} next to {fixed}"

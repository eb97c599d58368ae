"""Recorded episodes of a robot: each step seen, asked about, and looked into."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from mm_c2c.demo.compare import MODELS, check_question
from mm_c2c.demo.pair import picture_html
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.evaluation.arms import target_answers
from mm_c2c.evaluation.attribution import overlay
from mm_c2c.reference.babyai.levels import ACTIONS
from mm_c2c.robot import CacheReader, Episode, Narration, Step, load_episode
from mm_c2c.robot.attention import action_attention
from mm_c2c.robot.film import action_text
from mm_c2c.robot.observation import IMAGES, TASK
from mm_c2c.robot.shipped import (
    EPISODES_FOLDER,
    QUESTIONS,
    load_reader,
    load_tiny_reader,
)

ARMS = {
    "fused": ("Fused cache", "The text LLM is handed the policy's cache: what it saw and decided."),
    "instruction": ("Instruction only", "It reads what the robot was told, and nothing else."),
    "blind": ("Blind", "It has nothing but the question."),
}
"""Arm to title and what it is."""


class Show(NamedTuple):
    """What the tab plays.

    Attributes:
        reader: answers about a step.
        episodes: folders by their titles.
        questions: to begin with.
    """

    reader: CacheReader
    episodes: Mapping[str, Path]
    questions: tuple[str, ...] = QUESTIONS


def load_show(*, tiny: bool = False) -> Show | str:
    """The episodes that ship, and what reads them; or why there is nothing to show.

    Args:
        tiny: a target of random weights.
    """
    folders = sorted(path for path in EPISODES_FOLDER.glob("*") if path.is_dir())
    if not folders:
        return "No recorded episodes ship with this version: record some with `demos/robot.py`."
    try:
        reader = load_tiny_reader() if tiny else load_reader()
    except UnsupportedError as error:
        return f"{str(error)[:1].upper()}{str(error)[1:]}."
    return Show(reader, titled(folders))


def titled(folders: list[Path]) -> dict[str, Path]:
    """Folders by a title that says what was to be done and whether it was."""
    titles = {}
    for number, folder in enumerate(folders, 1):
        episode = episode_of(folder)
        outcome = "broken off"
        if episode.end is not None:
            outcome = "done" if episode.end.success else "not done"
        titles[f"{number}. {episode.task} ({len(episode.steps)} steps, {outcome})"] = folder
    return titles


@functools.lru_cache(maxsize=16)
def episode_of(folder: Path) -> Episode:
    """Read once."""
    return load_episode(folder)


def find_step(show: Show, title: str, number: float) -> tuple[Episode, Step]:
    """One step of one of the episodes that are shown.

    Args:
        show: what the tab plays.
        title: of the episode.
        number: from 1; more than there are is the last one.

    Raises:
        InputError: there is no episode of that title.
    """
    if title not in show.episodes:
        raise InputError(f"There is no episode {title!r}: choose one of {', '.join(show.episodes)}")
    episode = episode_of(show.episodes[title])
    index = min(max(int(number), 1), len(episode.steps)) - 1
    return episode, episode.steps[index]


@torch.no_grad()
def ask_step(show: Show, title: str, number: float, question: str | None) -> dict[str, str]:
    """Every arm's answer about one step.

    Raises:
        InputError: there is no such episode, or the question cannot be asked.
    """
    question = check_question(question)
    episode, step = find_step(show, title, number)
    bridge = show.reader.bridge
    told = f"The robot was told: {step.observation[TASK]}\n{question}"
    with MODELS:
        seen = show.reader.perceive(step.observation, episode.past(step.index), step.tokens)
        (fused,) = show.reader.answer(seen, [question])
        instruction, blind = (target_answers(bridge, [text])[0] for text in (told, question))
    return {"fused": fused, "instruction": instruction, "blind": blind}


def step_html(show: Show, title: str, number: float) -> str:
    """The scene, what the robot saw, what it looked at, and what it did."""
    episode, step = find_step(show, title, number)
    camera = next(value for key, value in step.observation.items() if key.startswith(IMAGES))
    seen = Image.fromarray(camera)
    large = seen.resize((320, round(320 * seen.height / seen.width)), Image.Resampling.NEAREST)
    action = html.escape(action_text(step.action, ACTIONS))
    figures = {"What the robot sees": large}
    if step.frame is not None:
        figures = {"The scene": Image.fromarray(step.frame), **figures}
    try:
        with MODELS:
            heat = action_attention(
                show.reader.policy, step.observation, episode.past(step.index), step.tokens
            )
        share = 100 * float(heat.sum())
        figures[
            f"What the policy looked at as it chose “{action}”: {share:.0f} % of its attention "
            "went to the picture, the rest to words"
        ] = overlay(large, heat)
    except UnsupportedError:
        pass  # a policy without action tokens has no one position that chooses
    drawn = "".join(
        f"<figure>{picture_html(picture, caption)}<figcaption>{caption}</figcaption></figure>"
        for caption, picture in figures.items()
    )
    said = [e.text for e in episode.events if isinstance(e, Narration) and e.step == step.index]
    spoken = f'<p class="caption">Said live: “{html.escape(said[-1])}”</p>' if said else ""
    return (
        f'<p class="seen" role="status">Told: <b>{html.escape(step.observation[TASK])}</b>. Step '
        f"{step.index + 1} of {len(episode.steps)}: <b>{action}</b>.</p>"
        f'<div class="figures">{drawn}</div>{spoken}'
    )


def answers_html(answers: Mapping[str, str]) -> str:
    """The arms side by side."""
    cards = "".join(
        f'<section class="card {name}"><h3>{ARMS[name][0]}</h3><p class="what">{ARMS[name][1]}</p>'
        f'<p class="answer">{html.escape(text) or "(nothing)"}</p></section>'
        for name, text in answers.items()
    )
    said = "; ".join(f"{ARMS[name][0]}: {text or 'nothing'}" for name, text in answers.items())
    return (
        f'<div class="cards">{cards}</div><p class="unseen" role="status">{html.escape(said)}</p>'
    )

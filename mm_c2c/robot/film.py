"""An episode as a moving picture: the scene, what the robot sees, what was said, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.robot.events import Answer, EpisodeEnd, Event, Monitor, Narration, ReaderFailure, Step
from mm_c2c.robot.observation import IMAGES, TASK

# Pixels. Left the scene, right what the robot sees, below what was said and the strip.
_WIDTH, _HEIGHT, _MARGIN = 640, 560, 20
_TOP, _SCENE, _CAMERA = 64, 352, 208
_SAID, _STRIP = 430, 506
_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#1f2430", "#6b7280", "#e2e5ec"
_SPOKEN, _ANSWERED, _ALARM, _FAILED, _NOW = "#4f46e5", "#0d9488", "#dc2626", "#6b7280", "#f59e0b"
_HOLD_MS = 2000


def write_film(
    events: Sequence[Event],
    path: str | Path,
    *,
    fps: float = 3.0,
    action_names: Sequence[str] = (),
) -> None:
    """Write an episode as a GIF or an MP4.

    Args:
        events: of one episode.
        path: ends in `.gif`, or `.mp4` where imageio with its ffmpeg is installed.
        fps: steps a second.
        action_names: of the discrete actions.

    Raises:
        InputError: see `check_film`, or there is no step.
        UnsupportedError: an MP4 without imageio and its ffmpeg.
    """
    path = Path(path)
    check_film(path)
    steps = sum(isinstance(event, Step) for event in events)
    if not steps:
        raise InputError("an episode without a step cannot be shown")
    pictures = [draw_step(events, index, action_names=action_names) for index in range(steps)]
    if path.suffix == ".gif":
        # Of all frames, since things come into view.
        some = pictures[:: -(-len(pictures) // 16)]
        joined = Image.fromarray(np.concatenate([np.asarray(picture) for picture in some]))
        palette = joined.quantize(256)
        frames = [
            picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
        ]
        durations = [round(1000 / fps)] * steps
        durations[-1] += _HOLD_MS
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )
        return
    try:
        import imageio.v3 as imageio

        imageio.imwrite(path, np.stack([np.asarray(picture) for picture in pictures]), fps=fps)
    except (ImportError, OSError) as error:  # the latter where it has no ffmpeg
        raise UnsupportedError(
            f"an MP4 needs imageio ({error}): pip install imageio[ffmpeg], or write a .gif"
        ) from error


def check_film(path: Path) -> None:
    """Refuse a path to which no film can be written, best before an episode is acted.

    Raises:
        InputError: the ending is neither `.gif` nor `.mp4`, or the folder is not there.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise InputError(f"{path.name}: expected .gif or .mp4")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} into")


def draw_step(
    events: Sequence[Event], index: int, *, action_names: Sequence[str] = ()
) -> Image.Image:
    """One step, with what had been said by then.

    Args:
        events: of one episode.
        index: of the step.
        action_names: of the discrete actions.

    Returns:
        RGB, of the same size for all.
    """
    steps = [event for event in events if isinstance(event, Step)]
    step = steps[index]
    arrivals = _arrivals(events)
    said = [event for at, event in arrivals if at <= index]
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, 14), step.observation[TASK], _INK, _font(22))
    pen.text((_MARGIN, 42), f"step {index + 1} of {len(steps)}", _FAINT, _font(13))
    cameras = [value for key, value in step.observation.items() if key.startswith(IMAGES)]
    scene = cameras[0] if step.frame is None else step.frame
    _paste(picture, scene, (_MARGIN, _TOP), _SCENE)
    right = _MARGIN + _SCENE + _MARGIN
    pen.text((right, _TOP - 2), "what the robot sees", _FAINT, _font(13))
    _paste(picture, cameras[0], (right, _TOP + 18), _CAMERA)
    pen.text((right, _TOP + _CAMERA + 30), "what it does", _FAINT, _font(13))
    pen.text((right, _TOP + _CAMERA + 46), action_text(step.action, action_names), _INK, _font(20))
    _draw_end(pen, events, is_last=index == len(steps) - 1)
    _draw_monitor(pen, right, [event for event in said if isinstance(event, Monitor)])
    _draw_said(pen, said)
    _draw_strip(pen, arrivals, len(steps), index)
    return picture


def action_text(action: Any, action_names: Sequence[str] = ()) -> str:
    """An action in few words: its name, or its numbers."""
    numbers = np.asarray(action)
    if not numbers.ndim and int(numbers) < len(action_names):
        return action_names[int(numbers)]
    return "  ".join(f"{number:+.2f}" for number in np.atleast_1d(numbers))


def _arrivals(events: Sequence[Event]) -> list[tuple[int, Event]]:
    """Each event with the step after which it arrived."""
    at, found = 0, []
    for event in events:
        at = event.index if isinstance(event, Step) else at
        found.append((at, event))
    return found


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _paste(picture: Image.Image, pixels: Any, corner: tuple[int, int], side: int) -> None:
    """Fitted into a square; coarse pictures keep their edges."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    place = (corner[0] + (side - image.width) // 2, corner[1] + (side - image.height) // 2)
    picture.paste(image, place)
    box = (place[0] - 1, place[1] - 1, place[0] + image.width, place[1] + image.height)
    ImageDraw.Draw(picture).rectangle(box, outline=_LINE)


def _draw_end(pen: ImageDraw.ImageDraw, events: Sequence[Event], *, is_last: bool) -> None:
    end = events[-1]
    if is_last and isinstance(end, EpisodeEnd):
        text, colour = ("done", _ANSWERED) if end.success else ("not done", _ALARM)
        pen.text((_WIDTH - _MARGIN, 16), text, colour, _font(20), anchor="ra")


def _draw_monitor(pen: ImageDraw.ImageDraw, right: int, watched: Sequence[Monitor]) -> None:
    """A bar from 0 to 1."""
    if not watched:
        return
    last = watched[-1]
    top, width = _TOP + _CAMERA + 84, _WIDTH - _MARGIN - right
    colour = _ALARM if last.alarm else _ANSWERED
    pen.text((right, top), "will it succeed?", _FAINT, _font(13))
    pen.text((right + width, top), f"{100 * last.smoothed:.0f} %", colour, _font(13), anchor="ra")
    pen.rounded_rectangle((right, top + 20, right + width, top + 30), 5, fill=_LINE)
    if last.smoothed > 0.05:
        pen.rounded_rectangle(
            (right, top + 20, right + round(width * last.smoothed), top + 30), 5, fill=colour
        )


def _draw_said(pen: ImageDraw.ImageDraw, said: Sequence[Event]) -> None:
    """The last narration and what was answered or went wrong with it."""
    spoken = [event for event in said if isinstance(event, Narration)]
    lines: list[tuple[str, str]] = []
    if spoken:
        lines.append((_SPOKEN, f"“{spoken[-1].text}”"))
    alarms = [e for e in said if isinstance(e, Monitor) and e.reason is not None]
    answers = [event for event in said if isinstance(event, Answer)]
    failures = [event for event in said if isinstance(event, ReaderFailure)]
    if failures and failures[-1] is said[-1]:
        lines.append((_FAILED, failures[-1].message))
    elif alarms and alarms[-1] in said[-6:]:
        lines.append((_ALARM, f"alarm: {alarms[-1].reason}"))
    elif answers:
        lines.append((_ANSWERED, f"{answers[-1].question}  {answers[-1].text}"))
    for row, (colour, text) in enumerate(lines):
        font = _font(18 if row == 0 else 15)
        short = " ".join(text.split())
        while pen.textlength(short, font) > _WIDTH - 2 * _MARGIN:
            short = short[:-2].rstrip() + "…"
        pen.text((_MARGIN, _SAID + 28 * row), short, colour, font)


def _draw_strip(
    pen: ImageDraw.ImageDraw, arrivals: Sequence[tuple[int, Event]], steps: int, index: int
) -> None:
    """Time from left to right; a mark where something was said."""
    left, right = _MARGIN, _WIDTH - _MARGIN
    span = (right - left) / steps
    middle = _STRIP + 10
    pen.rounded_rectangle((left, middle - 3, right, middle + 3), 3, fill=_LINE)
    pen.rounded_rectangle((left, middle - 3, left + span * (index + 1), middle + 3), 3, fill=_NOW)
    rows = {Narration: (_SPOKEN, -11), Answer: (_ANSWERED, 11), ReaderFailure: (_FAILED, 11)}
    for at, event in arrivals:
        colour, height = rows.get(type(event), (None, 0))
        if isinstance(event, Monitor) and event.alarm:
            colour, height = _ALARM, 0
        if colour is None:
            continue
        x, y = left + span * (at + 0.5), middle + height
        filled = colour if at <= index else None
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=filled, outline=colour)
    words = (("said", _SPOKEN), ("answered", _ANSWERED), ("alarm", _ALARM))
    x = float(left)
    for word, colour in words:
        pen.ellipse((x, _STRIP + 33, x + 8, _STRIP + 41), fill=colour)
        pen.text((x + 13, _STRIP + 29), word, _FAINT, _font(13))
        x += 30 + pen.textlength(word, _font(13))

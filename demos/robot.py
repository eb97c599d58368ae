"""A robot on a BabyAI level, narrated while it acts; then a film of it.

python demos/robot.py [--tiny | --alone] [--level BabyAI-GoToLocal-v0] [--seed N] [--out robot.gif]

The policy never sees the text LLM, which reads the policy's cache in a process beside it. `--tiny`:
a text LLM of random weights, without a download; what it says means nothing. `--alone`: none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from mm_c2c.errors import MMC2CError
from mm_c2c.reference.babyai.levels import ACTIONS
from mm_c2c.robot import (
    NAMES,
    BackgroundReader,
    CacheReader,
    make_minigrid,
    record,
    rename,
    run_episode,
)
from mm_c2c.robot.events import Answer, EpisodeEnd, Event, Monitor, Narration, ReaderFailure, Step
from mm_c2c.robot.film import action_text, check_film, write_film
from mm_c2c.robot.shipped import load_policy, load_reader, load_tiny_reader


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader = parser.add_mutually_exclusive_group()
    reader.add_argument("--tiny", action="store_true", help="an LLM of random weights: no download")
    reader.add_argument("--alone", action="store_true", help="no reader")
    parser.add_argument("--level", default="BabyAI-GoToLocal-v0", help="of minigrid")
    parser.add_argument("--seed", type=int, default=2_000_001, help="of the level")
    parser.add_argument("--max-steps", type=int, default=64)
    parser.add_argument("--fps", type=float, default=2.0, help="steps a second, at most")
    parser.add_argument("--ask", action="append", default=[], help="a further question, once")
    parser.add_argument("--out", type=Path, default=Path("robot.gif"), help=".gif or .mp4")
    parser.add_argument("--record", type=Path, help="a new folder for the episode")
    args = parser.parse_args(argv)
    try:
        run(args)
    except MMC2CError as error:
        print(f"robot: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    quiet()
    check_film(args.out)
    env, policy = make_minigrid(args.level), load_policy()
    events: list[Event] = []
    with ExitStack() as stack:
        reader = None
        if not args.alone:
            reader = stack.enter_context(BackgroundReader(partial(build_reader, tiny=args.tiny)))
            for question in args.ask:
                reader.ask(question)
        episode = run_episode(
            env,
            policy,
            reader,
            observe=rename(NAMES),
            seed=args.seed,
            max_steps=args.max_steps,
            fps=args.fps,
            linger_s=60.0,
        )
        if args.record:
            episode = record(episode, args.record, {"level": args.level, "seed": args.seed})
        for event in episode:
            if not events:
                print(f"task: {event.observation['task']}")
            events.append(event)
            print(describe(event), flush=True)
    write_film(events, args.out, action_names=ACTIONS)
    print(f"film: {args.out}")


def build_reader(*, tiny: bool) -> CacheReader:
    """In the process beside the loop."""
    quiet()
    return load_tiny_reader() if tiny else load_reader()


def quiet() -> None:
    """Without transformers' bars for loads that take a second."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def describe(event: Event) -> str:
    """An event as a line of the terminal."""
    match event:
        case Step():
            return f"{event.index:3}  {action_text(event.action, ACTIONS)}"
        case Narration():
            return f"       said of step {event.step} after {event.latency_ms:.0f} ms: {event.text}"
        case Answer():
            return f"       {event.question} {event.text}"
        case Monitor():
            alarm = f", alarm: {event.reason}" if event.reason is not None else ""
            return f"       success looks {100 * event.smoothed:.0f} % likely{alarm}"
        case ReaderFailure():
            return f"       the reader failed at step {event.step}: {event.message}"
        case EpisodeEnd():
            outcome = "succeeded" if event.success else "did not succeed"
            return (
                f"{outcome} after {event.steps} steps; {event.read} snapshots read, "
                f"{event.dropped} dropped for newer ones"
            )
    raise TypeError(event)


if __name__ == "__main__":
    sys.exit(main())

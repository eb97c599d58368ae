"""How the page of `mm-c2c demo` bears many visitors at once, and how late its first token comes.

python -m mm_c2c.bench.visitors [visitors=N] [seconds=S] [rounds=N] [tiny=true]

The page runs in a process of its own. First one visitor alone: the page and the library take turns
on the same pictures, and each turn gives one ratio of the times to the first fused token. Then all
visitors at once, each with a picture and questions of its own, asking again as soon as an answer is
there; every answer of every arm is compared with what the library says in this process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import Status

from mm_c2c.bench.rounds import ratio
from mm_c2c.config import check_at_least_one, from_command_line
from mm_c2c.demo.compare import Look, compare, facts
from mm_c2c.demo.pair import (
    ITEMS,
    known,
    load_tiny_bridge,
    open_picture,
    reference_setting,
    suggestions,
)
from mm_c2c.errors import ConfigError, MMC2CError, run_main
from mm_c2c.evaluation.arms import Setting
from mm_c2c.reference.models import load_bridge

NUM_QUESTIONS = 3
_POLL_S = 0.02
_MEMORY_S = 1.0
_START_S = 600.0
# A first word, not the sign that none is there yet.
_FUSED_WORD = re.compile(r'<section class="card fused">.*?<p class="answer">(?!…)[^<]')


class PageError(MMC2CError, RuntimeError):
    """The page did not start."""


@dataclass(frozen=True, kw_only=True)
class VisitorsConfig:
    """Settings.

    Attributes:
        visitors: who ask at once, each a picture of its own.
        seconds: how long they go on asking; what was asked by then is waited for.
        rounds: of one page's and one library's answer when nobody else asks, after one to warm up.
        tiny: a target of random weights: no download.
    """

    visitors: int = 20
    seconds: float = 300.0
    rounds: int = 7
    tiny: bool = False

    def __post_init__(self) -> None:
        pictures = len(_pictures())
        if not 1 <= self.visitors <= pictures:
            raise ConfigError(
                f"visitors must be from 1 to {pictures}, a picture each, got {self.visitors}"
            )
        if self.seconds <= 0:
            raise ConfigError(f"seconds must be more than 0, got {self.seconds}")
        check_at_least_one(self, "rounds")


class Visit(NamedTuple):
    """A visitor's picture and what the library says about it.

    Attributes:
        picture: its path.
        expected: by question, what every arm says.
    """

    picture: Path
    expected: dict[str, dict[str, Any]]


@dataclass
class Tally:
    """What the visitors met; filled by their threads.

    Attributes:
        asked: questions.
        answered: those that got an answer of every arm.
        mixed_up: answers unlike the library's, with the question.
        refused: what the page said instead of answering, and how often.
        lost: questions that ended without either.
        waited: questions whose visitor had to wait in line.
        told: those of them whose visitor was told its place in the line.
        seconds: from asking to the whole answer.
    """

    asked: int = 0
    answered: int = 0
    mixed_up: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    waited: int = 0
    told: int = 0
    seconds: list[float] = field(default_factory=list)


def bench(config: VisitorsConfig) -> dict[str, Any]:
    """Ask the page, alone and all at once.

    Returns:
        Plain values. `first_token`: `ms` of the page, from asking to the first fused word there,
        and of the library; `ratio`, page against library, as [median, low, high] of the rounds.
        `crowd`: the counts of `Tally`; `latency_s` at percentiles; `memory_mb`, resident, of the
        page at the start, in the middle, at the end and at most.

    Raises:
        PageError: the page did not start.
    """
    setting = reference_setting(load_tiny_bridge() if config.tiny else load_bridge())
    visits = [_visit(setting, path) for path in _pictures()[: config.visitors]]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_page(Path(folder), tiny=config.tiny) as served,
    ):
        url, process = served
        first_token = _first_token(setting, url, config.rounds)
        crowd = _crowd(url, process, visits, config.seconds)
    return {
        "first_token": first_token,
        "crowd": crowd,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **vars(config),
    }


def _pictures() -> list[Path]:
    return sorted(ITEMS.parent.glob("*.webp"))


def _visit(setting: Setting, path: Path) -> Visit:
    """Let the library answer what the visitor will ask."""
    look = Look(setting, open_picture(str(path)))
    questions = suggestions(look.picture)[:NUM_QUESTIONS]
    return Visit(path, {question: _library_says(look, question) for question in questions})


def _library_says(look: Look, question: str) -> dict[str, Any]:
    *_, columns = compare(look, question, known().options.get(question, ()))
    return _said(facts(columns))


def _said(numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was said, and the captions that were read, without the times."""
    return {name: [column["answer"], column["relayed"]] for name, column in numbers.items()}


@contextmanager
def serve_page(folder: Path, *, tiny: bool) -> Iterator[tuple[str, psutil.Process]]:
    """The page, served by another process: its address, and the process.

    Args:
        folder: where the page may keep uploads.
        tiny: a target of random weights.

    Raises:
        PageError: it did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mm_c2c.cli", "demo", "--port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder)}
    # Only the result goes to standard output.
    server = subprocess.Popen([*command, *["--tiny"] * tiny], env=environment, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise PageError(f"the page did not start: {' '.join(command)}")
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def _first_token(setting: Setting, url: str, rounds: int) -> dict[str, Any]:
    """Time to the first fused word, of the page and of the library, in turns."""
    client = Client(url, verbose=False, download_files=False)
    taken: dict[str, list[float]] = {"page": [], "library": []}
    # A picture is perceived at its first question only, so that each turn takes the next one.
    for turn, path in zip(range(rounds + 1), itertools.cycle(_pictures())):
        picture = open_picture(str(path))
        question = suggestions(picture)[0]
        started = time.perf_counter()
        job = client.submit(handle_file(str(path)), question, api_name="/ask")
        for shown, _ in job:
            if _FUSED_WORD.search(shown):
                break
        page = time.perf_counter() - started
        job.result()  # the models are free again
        started = time.perf_counter()
        answers = compare(Look(setting, picture), question)
        for columns in answers:
            if columns["fused"].text:
                break
        library = time.perf_counter() - started
        answers.close()  # type: ignore[attr-defined]
        if turn:
            taken["page"].append(1000 * page)
            taken["library"].append(1000 * library)
    client.close()
    return {
        "ms": {name: statistics.median(times) for name, times in taken.items()},
        "ratio": ratio(taken["page"], taken["library"]),
    }


def _crowd(url: str, page: psutil.Process, visits: list[Visit], seconds: float) -> dict[str, Any]:
    """All visitors at once."""
    tally, lock, memory = Tally(), threading.Lock(), [_resident_mb(page)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_MEMORY_S):
            memory.append(_resident_mb(page))

    watcher = threading.Thread(target=watch)
    watcher.start()
    deadline = time.monotonic() + seconds
    try:
        with ThreadPoolExecutor(len(visits)) as pool:
            for future in [
                pool.submit(_keep_asking, url, visit, deadline, tally, lock) for visit in visits
            ]:
                future.result()
    finally:
        over.set()
        watcher.join()
    memory.append(_resident_mb(page))
    return {
        **{key: value for key, value in vars(tally).items() if key != "seconds"},
        "latency_s": _percentiles(tally.seconds),
        "memory_mb": {
            "start": memory[0],
            "middle": memory[len(memory) // 2],
            "end": memory[-1],
            "most": max(memory),
        },
    }


def _keep_asking(
    url: str, visit: Visit, deadline: float, tally: Tally, lock: threading.Lock
) -> None:
    """One visitor, from the first question to the last."""
    client = Client(url, verbose=False, download_files=False)
    for question in itertools.cycle(visit.expected):
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        job = client.submit(handle_file(str(visit.picture)), question, api_name="/ask")
        waited = told = False
        while not job.done():
            status = job.status()
            if status.code is Status.IN_QUEUE:
                waited = True
                told = told or status.rank is not None
            time.sleep(_POLL_S)
        with lock:
            tally.asked += 1
            tally.waited += waited
            tally.told += told
            try:
                said = _said(job.result()[1])
            except AppError as error:
                tally.refused[str(error)] += 1
                continue
            except Exception:  # noqa: BLE001, whatever broke, the question is lost, and counted
                tally.lost += 1
                continue
            tally.answered += 1
            tally.seconds.append(time.monotonic() - started)
            if said != visit.expected[question]:
                tally.mixed_up.append(f"{visit.picture.name}: {question} -> {said}")
    client.close()


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 2**20)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Of the whole answers, by the nearest rank; empty where there was none."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        f"p{share}": ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 99)
    } | {"most": ordered[-1]}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(bench(from_command_line(VisitorsConfig, argv))) + "\n")


if __name__ == "__main__":
    run_main(main)

"""A reader beside the control loop: a process of its own, which never makes the loop wait."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mm_c2c.errors import UnsupportedError
from mm_c2c.robot.events import ReaderFailure, Reading
from mm_c2c.robot.observation import Observation

# The control loop gets the processor first.
_NICENESS = 19
_STOP_S = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What a policy saw and decided: enough to read it again in another process.

    Attributes:
        episode: counts them, from 1.
        step: of the episode.
        observation: as `check_observation` gives it.
        past: all actions before it.
        tokens: `(num_tokens,)`: the action tokens, where the policy writes them.
        taken_s: `time.monotonic()` of the decision.
    """

    episode: int
    step: int
    observation: Observation
    past: Sequence[Any]
    tokens: NDArray[np.int64] | None
    taken_s: float


Read = Callable[[Snapshot, Sequence[str]], list[Reading]]
"""Reads a snapshot; the strings are questions that were asked beside the standing ones."""


class BackgroundReader:
    """Reads the newest snapshot in a process of its own; older ones that wait are dropped.

    Nothing here waits for the reader but the constructor, `finish` and `close`.

    Args:
        build: makes what reads, in that process; a function of a module, or `functools.partial` of
            one. A script that uses it needs the usual `if __name__ == "__main__"`.
        start_timeout_s: how long loading may take.

    Attributes:
        read: snapshots read in this episode.
        dropped: snapshots of this episode that a newer one replaced, or that came after the
            process had ended.

    Raises:
        UnsupportedError: what reads could not be made.
    """

    def __init__(self, build: Callable[[], Read], *, start_timeout_s: float = 300.0) -> None:
        self.read = self.dropped = 0
        self._episode = 0
        self._waiting: Snapshot | None = None
        self._reading: Snapshot | None = None
        self._ended: str | None = None  # why nothing is read any more
        self._asked: list[str] = []
        self._arrived: list[Reading] = []
        self._changed = threading.Condition()
        # Spawned: a fork of a process that has run torch can hang.
        context = get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, build), daemon=True)
        self._process.start()
        child.close()
        try:
            ready = self._pipe.poll(start_timeout_s)
            failure = self._pipe.recv() if ready else f"not ready after {start_timeout_s:g} s"
        except EOFError:
            self._process.join()
            failure = f"its process ended with exit code {self._process.exitcode}"
        if failure is not None:
            self._stop_process()
            raise UnsupportedError(f"the reader could not start: {failure}")
        self._courier = threading.Thread(target=self._carry, daemon=True)
        self._courier.start()

    def begin(self) -> int:
        """Start an episode: what is still to come of the last one is forgotten.

        Where nothing is read any more, the first that arrives is a `ReaderFailure` that says why.

        Returns:
            The episode's number, for its snapshots.
        """
        with self._changed:
            self._episode += 1
            self.read = self.dropped = 0
            self._waiting = None
            self._arrived.clear()
            if self._ended is not None:
                self._arrived.append(ReaderFailure(step=0, message=self._ended))
            return self._episode

    def offer(self, snapshot: Snapshot) -> None:
        """Hand over the newest snapshot; one that still waits is dropped."""
        with self._changed:
            if self._ended is not None:
                self.dropped += 1
                return
            self.dropped += self._waiting is not None
            self._waiting = snapshot
            self._changed.notify_all()

    def ask(self, question: str) -> None:
        """Ask once more than the standing questions, of the next snapshot that is read."""
        with self._changed:
            self._asked.append(question)

    def poll(self) -> list[Reading]:
        """What has arrived since the last call."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            return arrived

    def finish(self, timeout_s: float) -> list[Reading]:
        """Wait until the last snapshot is read, but no longer than that.

        Returns:
            What has arrived; at last a `ReaderFailure`, where the time was too short.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._awaited() is None, timeout_s)
            late = self._awaited()
            if late is not None:
                message = f"not read {timeout_s:g} s after the robot stood"
                self._arrived.append(ReaderFailure(step=late.step, message=message))
        return self.poll()

    def close(self) -> None:
        """Stop at once, whatever is being read."""
        with self._changed:
            self._ended = self._ended or "the reader was closed"
            self._changed.notify_all()
        self._stop_process()
        self._courier.join()
        self._pipe.close()

    def __enter__(self) -> BackgroundReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _stop_process(self) -> None:
        self._process.terminate()
        self._process.join(_STOP_S)
        self._process.kill()
        self._process.join()

    def _awaited(self) -> Snapshot | None:
        """What of this episode is being read, or else waits for it."""
        if self._ended is not None:
            return None
        if self._reading is not None and self._reading.episode == self._episode:
            return self._reading
        return self._waiting

    def _carry(self) -> None:
        """One snapshot after the other to the process, and back what it says."""
        while (taken := self._take()) is not None:
            snapshot, _ = taken
            try:
                said = self._exchange(pickle.dumps(taken))
                if said is None:
                    self._lose(snapshot)
                    return
                answer: list[Reading] | str = pickle.loads(said)
            except Exception as error:  # noqa: BLE001, reported as an event
                answer = _describe(error)
            if isinstance(answer, str):
                answer = [ReaderFailure(step=snapshot.step, message=answer)]
            latency_ms = 1000 * (time.monotonic() - snapshot.taken_s)
            with self._changed:
                if snapshot.episode == self._episode:
                    self.read += 1
                    self._arrived += [replace(event, latency_ms=latency_ms) for event in answer]

    def _exchange(self, message: bytes) -> bytes | None:
        """What the process answers; None where it is gone."""
        try:
            self._pipe.send_bytes(message)
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            return None

    def _take(self) -> tuple[Snapshot, list[str]] | None:
        with self._changed:
            self._reading = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._waiting)
            if self._ended or self._waiting is None:
                return None
            self._reading, self._waiting = self._waiting, None
            questions, self._asked = self._asked, []
            return self._reading, questions

    def _lose(self, snapshot: Snapshot) -> None:
        """The process is gone: say so, unless it was stopped."""
        self._process.join()
        with self._changed:
            if self._ended is None:
                self._ended = f"the reader's process ended with exit code {self._process.exitcode}"
                step = snapshot.step if snapshot.episode == self._episode else 0
                self._arrived.append(ReaderFailure(step=step, message=self._ended))
            self.dropped += self._waiting is not None
            self._reading = self._waiting = None
            self._changed.notify_all()


def _serve(pipe: Connection[Any, Any], build: Callable[[], Read]) -> None:
    """The reader's process: one answer for each message, whatever happens."""
    # An interrupt is for the robot's process, which then closes this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Leave in good order, also amid a reading.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    torch.set_num_threads(1)
    try:
        read = build()
    except Exception as error:  # noqa: BLE001, raised again in the robot's process
        pipe.send(_describe(error))
        return
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    pipe.send(None)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(read, message))


def _answer(read: Read, message: bytes) -> bytes:
    """The readings of one message, or in words why there are none."""
    said: list[Reading] | str
    try:
        said = read(*pickle.loads(message))
        if not isinstance(said, list) or not all(isinstance(event, Reading) for event in said):
            raise TypeError(f"a reader gives a list of readings, got {said!r}")
        return pickle.dumps(said)
    except Exception as error:  # noqa: BLE001, reported as an event
        return pickle.dumps(_describe(error))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

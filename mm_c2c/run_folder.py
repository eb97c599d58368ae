"""Files of a run that survive being stopped."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mm_c2c.errors import ConfigError, InputError

ELSEWHERE = "; give another folder, or delete this one to start anew"
"""What to do where a folder holds another run, or a damaged one."""


class JsonLines:
    """Rows that are kept as they come, one JSON object a line.

    What an earlier run left is read back, as far as it is whole.

    Args:
        path: the file; None keeps rows in memory only.
        ends: counts of rows at which the file may end; rows beyond the last such count came from
            a write that was cut off and are dropped.
    """

    def __init__(self, path: Path | None, ends: Sequence[int]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        found = read_rows(path)
        whole = max((end for end in ends if end <= len(found)), default=0)
        self.rows = found[:whole]
        scratch = path.with_suffix(".part")
        scratch.write_text(_lines(self.rows), encoding="utf-8")
        scratch.replace(path)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, in the file too."""
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(rows))


@contextmanager
def hold(folder: Path | None) -> Iterator[None]:
    """Keep a run's folder to this process, so that no other one writes between its lines.

    The system lets go of the lock when the process ends, however it ends: the file `.lock` that
    stays behind stops nobody.

    Args:
        folder: made if it is not there; None holds nothing.

    Raises:
        ConfigError: another process holds it.
        InputError: it cannot be made.
    """
    if folder is None:
        yield
        return
    make_folder(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"another process is writing its run into {folder}; wait until it is done, or give "
            "another folder"
        ) from error
    with lock:
        yield


def claim(folder: Path, settings: dict[str, Any], kind: type[Any] | None = None) -> None:
    """Take a folder for a run, or go on with the run in it if its settings are the same.

    Args:
        folder: of the run.
        settings: plain values.
        kind: their dataclass; a key that the folder's `config.json` lacks had the default, and
            where there is none, no value that is known.

    Raises:
        ConfigError: they are not, or what they were is not known.
        InputError: they cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / "answers.jsonl").exists():
            raise ConfigError(f"{folder} holds answers, and no {path.name} says of what{ELSEWHERE}")
        write_json(path, settings)
        return
    found = _defaults(kind) | read_object(path, ELSEWHERE)
    if changed := sorted(key for key in found if settings.get(key) != found[key]):
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(changed)} differ){ELSEWHERE}"
        )


def _defaults(kind: type[Any] | None) -> dict[str, Any]:
    """Those of a dataclass that has any, as JSON reads them back."""
    fields = () if kind is None else dataclasses.fields(kind)
    given = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def read_summary(run: Path, command: str = "mm-c2c evaluate --out") -> dict[str, Any]:
    """What a finished run came to.

    Args:
        run: its folder.
        command: what writes such folders.

    Raises:
        InputError: it is not finished, or its summary is damaged.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise InputError(f"{run} holds no finished run ({path.name}); make one with {command}")
    return read_object(path, f"; make it anew with {command}")


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The names and values of a JSON file.

    Args:
        path: the file.
        advice: what to do where it cannot be read.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}){advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected names and values, got {reprlib.repr(found)}{advice}")
    return found


def make_room(path: Path) -> None:
    """Make the folder of a file that is to be written after long work, before the work.

    Raises:
        InputError: it cannot be made, or the file is a folder.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise InputError(f"expected a file to write to, got the folder {path}")


def make_folder(folder: Path) -> None:
    """Make a folder that is to be written to, if it is not there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_json(path: Path, values: Any) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    scratch.replace(path)


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, up to the first that is cut off.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    rows = []
    # Not `splitlines`: JSON may hold other line breaks as they are.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: expected names and values, got {reprlib.repr(row)}"
            )
        rows.append(row)
    return rows

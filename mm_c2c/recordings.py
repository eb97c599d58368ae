"""Reading recordings."""

from __future__ import annotations

import io
import wave

import numpy as np
from numpy.typing import NDArray

from mm_c2c.errors import InputError

SAMPLING_RATE = 16_000
"""Samples a second, of every recording that a source is given."""
_SCALE = 32_768


def read_wav(data: bytes) -> NDArray[np.float32]:
    """Samples of a WAV file, `(samples,)` in [-1, 1], as `SourceInput` takes them.

    Args:
        data: of a file of 16-bit samples, mono, at `SAMPLING_RATE`.

    Raises:
        InputError: it is none, one of another form, or cut off.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            expected = file.getnframes()
            samples = file.readframes(expected)
    except (wave.Error, EOFError) as error:
        raise InputError(f"no WAV file that can be read: {error}") from error
    if form != (1, 2, SAMPLING_RATE):
        raise InputError(
            f"expected a WAV of 1 channel, 16 bit and {SAMPLING_RATE} Hz, got {form[0]} channels, "
            f"{8 * form[1]} bit and {form[2]} Hz; convert it first"
        )
    if len(samples) != 2 * expected:
        raise InputError(
            f"the WAV is cut off: expected {expected} samples, as its header says, got "
            f"{len(samples) // 2}"
        )
    return np.frombuffer(samples, "<i2").astype(np.float32) / np.float32(_SCALE)


def write_wav(samples: NDArray[np.float32]) -> bytes:
    """A WAV file as `read_wav` reads it; samples beyond [-1, 1] are cut."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        whole = (samples * _SCALE).round().clip(-_SCALE, _SCALE - 1)
        file.writeframes(whole.astype("<i2").tobytes())
    return data.getvalue()

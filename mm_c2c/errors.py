"""The errors that users of this library meet.

    MMC2CError
    ├── ConfigError (ValueError)        a setting that cannot be built from
    ├── ShapeError (ValueError)         tensors or geometries that do not fit together
    ├── AlignmentError (ValueError)     positions that cannot be matched
    ├── InputError (ValueError)         a picture, question or file handed in by a user
    ├── UnsupportedError (ValueError)   a model or a decoding mode this library refuses
    ├── MismatchError (ValueError)      a fuser, cache or weights made for other models
    ├── TrainingError (RuntimeError)    a training that cannot go on
    └── FetchError (OSError)            weights or data that could not be had

Each is also a built-in, so that callers who do not know this module can still catch it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class MMC2CError(Exception):
    """Base of all errors raised by `mm_c2c`."""


class ConfigError(MMC2CError, ValueError):
    """A configuration value is out of range or unknown."""


class ShapeError(MMC2CError, ValueError):
    """Tensors or model geometries do not fit together."""


class AlignmentError(MMC2CError, ValueError):
    """Source positions or layers cannot be matched to target ones."""


class InputError(MMC2CError, ValueError):
    """A picture, a question or a file handed in by the user cannot be used."""


class UnsupportedError(MMC2CError, ValueError):
    """A model or a decoding mode that is known not to work, and is refused."""


class MismatchError(MMC2CError, ValueError):
    """A fuser, a cache or weights belong to other models than the ones at hand."""


class TrainingError(MMC2CError, RuntimeError):
    """A training cannot go on: a loss that is no number, a disk that is full."""


class FetchError(MMC2CError, OSError):
    """Weights or data could not be downloaded or found."""


def run_main(main: Callable[[], object]) -> None:
    """Run a script; an error of this library ends it in one line, with status 1."""
    try:
        main()
    except MMC2CError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")

"""Observations by LeRobot's names, checked, and as a source reads them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mm_c2c.errors import ConfigError, InputError, ShapeError
from mm_c2c.sources.base import SourceInput

IMAGES = "observation.images."
STATE = "observation.state"
TASK = "task"
ACTION = "action"

Observation = Mapping[str, Any]
"""`observation.images.<camera>`: `(height, width, 3)`; `observation.state`: `(state_dim,)`;
`task`: the instruction."""


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """What a policy must be shown.

    Attributes:
        cameras: in the policy's own order, without `observation.images.`.
        state_dim: width of the state; None where the policy has none.
    """

    cameras: tuple[str, ...]
    state_dim: int | None = None

    def __post_init__(self) -> None:
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ConfigError(f"expected one camera or more, no two alike, got {self.cameras}")
        if self.state_dim is not None and self.state_dim < 1:
            raise ConfigError(f"state_dim must be at least 1, or None, got {self.state_dim}")

    @property
    def keys(self) -> tuple[str, ...]:
        """The names that an observation has."""
        state = () if self.state_dim is None else (STATE,)
        return (*(IMAGES + camera for camera in self.cameras), *state, TASK)


def rename(names: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What turns an environment's own observations into LeRobot's names.

    Args:
        names: own key to LeRobot's; what is not named is left out.
    """

    def observe(observation: Mapping[str, Any]) -> dict[str, Any]:
        missing = sorted(names.keys() - observation.keys())
        if missing:
            raise InputError(
                f"the environment's observation has no {missing}, it has {sorted(observation)}"
            )
        return {named: observation[own] for own, named in names.items()}

    return observe


def check_observation(observation: Observation, spec: ObservationSpec) -> dict[str, Any]:
    """The observation as it is shown to the policy, snapped for the reader, and recorded.

    Args:
        observation: pictures uint8, or float in [0, 1].
        spec: what the policy must be shown.

    Returns:
        A copy: pictures uint8, the state float32.

    Raises:
        InputError: a key is missing or unknown, or a value out of range.
        ShapeError: a picture or the state has another shape.
    """
    missing = [key for key in spec.keys if key not in observation]
    unknown = [key for key in observation if key not in spec.keys]
    if missing or unknown:
        close = [difflib.get_close_matches(key, unknown, n=1) for key in missing]
        hint = "".join(
            f"; {found[0]!r} should be {key!r}"
            for key, found in zip(missing, close, strict=True)
            if found
        )
        raise InputError(
            f"expected an observation with {list(spec.keys)}, got {sorted(observation)}{hint}"
        )
    if not isinstance(observation[TASK], str) or not observation[TASK].strip():
        raise InputError(f"{TASK}: expected an instruction, got {observation[TASK]!r}")
    checked: dict[str, Any] = {
        IMAGES + camera: _pixels(IMAGES + camera, observation[IMAGES + camera])
        for camera in spec.cameras
    }
    if spec.state_dim is not None:
        state = np.array(observation[STATE], dtype=np.float32)
        if state.shape != (spec.state_dim,):
            raise ShapeError(f"{STATE}: expected ({spec.state_dim},), got {state.shape}")
        if not np.isfinite(state).all():
            raise InputError(f"{STATE}: expected finite numbers, got {state.tolist()}")
        checked[STATE] = state
    checked[TASK] = observation[TASK].strip()
    return checked


def to_input(observation: Observation, spec: ObservationSpec, text: str) -> SourceInput:
    """What a source reads of an observation that `check_observation` gave, with its instruction."""
    state = observation.get(STATE)
    return SourceInput(
        text=text,
        images=tuple(Image.fromarray(observation[IMAGES + camera]) for camera in spec.cameras),
        state=None if state is None else torch.from_numpy(state),
    )


def _pixels(key: str, value: Any) -> NDArray[np.uint8]:
    pixels = np.array(value)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        channels_first = pixels.ndim == 3 and pixels.shape[0] == 3
        hint = "; channels come last here" if channels_first else ""
        raise ShapeError(f"{key}: expected (height, width, 3), got {pixels.shape}{hint}")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputError(f"{key}: expected uint8, or float in [0, 1], got {pixels.dtype}")
    # Not `<`, so that NaN is refused too.
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError(
            f"{key}: expected float in [0, 1], got {pixels.min():g} to {pixels.max():g}; divide by "
            "255, or give uint8"
        )
    scaled: NDArray[np.uint8] = (255 * pixels).round().astype(np.uint8)
    return scaled

"""minigrid's levels as environments of the loop."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_c2c.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import gymnasium

NAMES: Mapping[str, str] = {"image": "observation.images.front", "mission": "task"}
"""For `rename`."""


def make_minigrid(level: str, cell_pixels: int = 8) -> gymnasium.Env[Any, Any]:
    """A level in which the robot sees the 7 x 7 cells before it as a picture.

    Args:
        level: its id in Gymnasium, such as `BabyAI-GoToLocal-v0`.
        cell_pixels: of the picture.

    Raises:
        InputError: there is no such level.
        UnsupportedError: minigrid is not installed.
    """
    try:
        import gymnasium
        import minigrid  # noqa: F401  registers the levels
        from minigrid.wrappers import RGBImgPartialObsWrapper
    except ImportError as error:
        raise UnsupportedError(
            f'the level needs minigrid ({error}): pip install "mm-c2c[robot]"'
        ) from error

    class Quiet(RGBImgPartialObsWrapper):  # type: ignore[misc,unused-ignore]
        def reset(self, **settings: Any) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints each layout it refuses
                return super().reset(**settings)

    try:
        env = gymnasium.make(level, render_mode="rgb_array", disable_env_checker=True)
    except gymnasium.error.Error as error:
        raise InputError(f"there is no level {level!r}: {error}") from error
    return Quiet(env, tile_size=cell_pixels)

"""BabyAI levels: seeds, what the policy sees, and the instruction it reads."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_c2c.config import check_one_of
from mm_c2c.errors import ConfigError, InputError, UnsupportedError

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
"""minigrid's, by their number."""

VIEW_CELLS = 7
CELL_PIXELS = 8
VIEW_PIXELS = VIEW_CELLS * CELL_PIXELS
AGENT_CELL = (VIEW_CELLS // 2, VIEW_CELLS - 1)
"""Column and row of the agent in its own view: bottom centre, looking up."""

# An instruction may speak of the start ("on your left"), and nothing but the text remembers it.
_PAST_ACTIONS = 24
_FACING_UP = 3


class Level(NamedTuple):
    """A family of tasks.

    Attributes:
        env: its id in Gymnasium.
        task: what it is called in questions and answers.
    """

    env: str
    task: str


LEVELS = {
    "GoToLocal": Level("BabyAI-GoToLocal-v0", "go to"),
    "PickupLoc": Level("BabyAI-PickupLoc-v0", "pick up"),
    "PutNextLocal": Level("BabyAI-PutNextLocal-v0", "put next to"),
}

EASY = (
    "BabyAI-GoToObj-v0",
    "BabyAI-GoToLocalS6N2-v0",
    "BabyAI-GoToLocalS8N3-v0",
    "BabyAI-PutNextLocalS5N3-v0",
)
"""Levels with few objects, which training begins with."""

SEEDS = {
    "train": range(1_000_000),
    "development": range(1_000_000, 2_000_000),
    "unseen": range(2_000_000, 3_000_000),
}
"""Seeds of episodes by their use."""


def make_env(env_id: str) -> Any:
    """A level's environment, without wrappers.

    Raises:
        UnsupportedError: minigrid is not installed.
    """
    try:
        import gymnasium
        import minigrid  # noqa: F401  registers the levels
    except ImportError as error:
        raise UnsupportedError(
            f'BabyAI levels need a package ({error}): pip install "mm-c2c[robot]"'
        ) from error
    return gymnasium.make(env_id, disable_env_checker=True).unwrapped


def reset(env: Any, seed: int) -> dict[str, Any]:
    """Start an episode; returns its first observation."""
    with contextlib.redirect_stdout(io.StringIO()):  # minigrid prints each layout it refuses
        observation, _ = env.reset(seed=seed)
    return observation


def instruction_text(mission: str, past: Sequence[int]) -> str:
    """What the policy reads: the mission, and its own last actions, one word each.

    Args:
        mission: such as `go to the red ball`.
        past: numbers of all actions since the start.
    """
    words = [ACTIONS[action] for action in past[-_PAST_ACTIONS:]]
    return f"{mission}. past: {' '.join(words) if words else 'none'}"


class Camera:
    """Draws the agent's partial view from its symbols, as minigrid's own wrapper renders it.

    A cell is drawn once and kept, which makes it many times faster than rendering.
    """

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int, int, bool], NDArray[np.uint8]] = {}

    def picture(self, view: NDArray[np.uint8]) -> Image.Image:
        """The view as a picture of `VIEW_PIXELS` squared."""
        return Image.fromarray(self.pixels(view[None])[0])

    def pixels(self, views: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Views to pixels.

        Args:
            views: `(batch, columns, rows, 3)`: object, colour and state of each cell, as in an
                observation's `image`.

        Returns:
            `(batch, height, width, 3)` RGB.
        """
        if views.shape[1:] != (VIEW_CELLS, VIEW_CELLS, 3):
            raise InputError(
                f"expected views of (batch, {VIEW_CELLS}, {VIEW_CELLS}, 3), got {views.shape}"
            )
        flat = views.reshape(-1, 3).astype(np.int64)
        is_agent = np.zeros(views.shape[:3], dtype=bool)
        is_agent[:, AGENT_CELL[0], AGENT_CELL[1]] = True
        keys = ((flat[:, 0] * 16 + flat[:, 1]) * 16 + flat[:, 2]) * 2 + is_agent.ravel()
        found, index = np.unique(keys, return_inverse=True)
        tiles = np.stack([self._tile(int(key)) for key in found])[index]
        grid = tiles.reshape(*views.shape[:3], CELL_PIXELS, CELL_PIXELS, 3)
        # batch, column, row, y, x -> batch, row, y, column, x
        return grid.transpose(0, 2, 3, 1, 4, 5).reshape(-1, VIEW_PIXELS, VIEW_PIXELS, 3)

    def _tile(self, key: int) -> NDArray[np.uint8]:
        kind, colour, state, agent = key // 512, key // 32 % 16, key // 2 % 16, bool(key % 2)
        place = (kind, colour, state, agent)
        if place not in self._tiles:
            from minigrid.core.grid import Grid
            from minigrid.core.world_object import WorldObj

            unseen = kind == 0
            tile = Grid.render_tile(
                None if unseen else WorldObj.decode(kind, colour, state),
                agent_dir=_FACING_UP if agent else None,
                highlight=not unseen,
                tile_size=CELL_PIXELS,
            )
            self._tiles[place] = tile.astype(np.uint8)
        return self._tiles[place]


def seeds(split: str, first: int, count: int) -> range:
    """`count` seeds of a split, from its `first` on.

    Raises:
        ConfigError: an unknown split, or more seeds than it has.
    """
    check_one_of("split", split, SEEDS)
    picked = SEEDS[split][first : first + count]
    if len(picked) < count:
        raise ConfigError(f"{split} has no seeds {first} to {first + count}")
    return picked

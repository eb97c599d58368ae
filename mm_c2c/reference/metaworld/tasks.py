"""Six tasks of Meta-World, seen through one camera, under LeRobot's names of observations.

The simulator is an extra: pip install "mm-c2c[metaworld]". MuJoCo renders without a screen where
`MUJOCO_GL=egl` (or `osmesa`) is set before the first import.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_c2c.errors import InputError, UnsupportedError

CAMERA = "corner2"
IMAGE_KEY = f"observation.images.{CAMERA}"
STATE_KEY = "observation.state"
IMAGE_PIXELS = 96
STATE_DIM = 4
ACTION_DIM = 4
# Meta-World's own limit is 500; its experts need 40 to 100.
MAX_STEPS = 200
# First seed of each split; an episode's seed is its number after that.
# `reader` is for episodes of the policy that a reader is trained on.
SPLITS = {"train": 0, "dev": 100_000, "unseen": 200_000, "reader": 300_000}

# LeRobot's place of `corner2`, above the right shoulder; turned upright and nearer to the table.
_CAMERA_POSITION = (0.75, 0.075, 0.7)
_CAMERA_TARGET = (0.0, 0.7, 0.14)
_CAMERA_FOVY = 42.0


class Task(NamedTuple):
    """One task.

    Attributes:
        environment: Meta-World's name of it.
        instruction: what the policy is told.
        object: what the hand goes for.
        doing: what the policy does, as a gerund.
    """

    environment: str
    instruction: str
    object: str
    doing: str


TASKS = {
    "reach": Task("reach-v3", "reach the red ball", "red ball", "reaching for the red ball"),
    "push": Task("push-v3", "push the puck to the green ball", "puck", "pushing the puck"),
    "drawer-open": Task("drawer-open-v3", "open the drawer", "drawer", "opening the drawer"),
    "button-press": Task("button-press-v3", "press the button", "button", "pressing the button"),
    "door-open": Task("door-open-v3", "open the door", "door", "opening the door"),
    "window-close": Task("window-close-v3", "close the window", "window", "closing the window"),
}


class Truth(NamedTuple):
    """What the simulator knows and the policy is not told; metres, x to the right, z up.

    Attributes:
        hand: `(3,)` position of the hand.
        gripper: opening, 0 closed to 1 open.
        object: `(3,)` position of what the hand goes for.
        goal: `(3,)` where it belongs.
    """

    hand: NDArray[np.float64]
    gripper: float
    object: NDArray[np.float64]
    goal: NDArray[np.float64]


def read_truth(task: str, raw: NDArray[np.float64]) -> Truth:
    """Take apart Meta-World's own observation `(39,)`; the reach task's object is its goal."""
    goal = raw[36:39]
    return Truth(raw[:3], float(raw[3]), goal if task == "reach" else raw[4:7], goal)


class MetaWorldEnv:
    """One task with Gymnasium's `reset` and `step`, and a picture in each observation.

    An observation has `observation.images.corner2` `(96, 96, 3)` uint8, `observation.state` `(4,)`
    float32 (the hand's position in metres and the gripper's opening, as in LeRobot) and `task`, the
    instruction. An action `(4,)` in [-1, 1] moves the hand by up to a centimetre along x, y and z;
    its last number closes the gripper where it is positive.

    Attributes:
        raw: Meta-World's own observation `(39,)` of the present step.
        success: whether the task has been done at the present step.

    Args:
        task: a key of `TASKS`.

    Raises:
        InputError: there is no such task.
        UnsupportedError: Meta-World or MuJoCo is not installed.
    """

    def __init__(self, task: str) -> None:
        if task not in TASKS:
            raise InputError(f"no task {task!r}; there are {', '.join(TASKS)}")
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as ENVIRONMENTS
        except ImportError as error:
            raise UnsupportedError(
                f'Meta-World needs packages ({error}): pip install "mm-c2c[metaworld]"'
            ) from error
        self.task = task
        # Its base class, which is what the table is typed by, takes no seed.
        kind: Any = ENVIRONMENTS[f"{TASKS[task].environment}-goal-observable"]
        self._env: Any = kind(seed=0)
        # Draw places anew at each reset, from the environment's own generator.
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        model = self._env.model
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        model.cam_pos[camera] = _CAMERA_POSITION
        model.cam_quat[camera] = _look_at(_CAMERA_POSITION, _CAMERA_TARGET)
        model.cam_fovy[camera] = _CAMERA_FOVY
        # Without shadows and smoothing a frame takes a fifteenth of the time on a CPU.
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        self._renderer = mujoco.Renderer(model, IMAGE_PIXELS, IMAGE_PIXELS)
        for effect in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{effect}")] = 0
        self.raw: NDArray[np.float64] = np.zeros(39)
        self.success = False
        self._steps = 0

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode of a seed: `(observation, info)`."""
        import mujoco

        self._env.seed(seed)
        self._env.reset()
        # A reset moves joints and marks, and leaves what follows from them as it was.
        mujoco.mj_forward(self._env.model, self._env.data)
        self.raw = self._env._get_obs()
        self._steps, self.success = 0, False
        return self.observe(), {}

    def step(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Act: `(observation, reward, terminated, truncated, info)`; ends when the task is done."""
        reward = self.advance(action)
        truncated = self._steps >= MAX_STEPS
        return self.observe(), reward, self.success, truncated, {"success": self.success}

    def advance(self, action: NDArray[np.floating[Any]]) -> float:
        """Act without rendering, for the steps of a chunk that nobody looks at."""
        if action.shape != (ACTION_DIM,):
            raise InputError(f"expected an action of ({ACTION_DIM},), got {action.shape}")
        clipped = np.clip(action, -1, 1).astype(np.float32)
        self.raw, reward, _, _, info = self._env.step(clipped)
        self._steps += 1
        self.success = bool(info["success"])
        return float(reward)

    def observe(self) -> dict[str, Any]:
        """What the policy is shown now."""
        return {IMAGE_KEY: self.render(), STATE_KEY: state_of(self.raw), "task": self.instruction}

    def render(self) -> NDArray[np.uint8]:
        """The camera's picture, `(96, 96, 3)`."""
        self._renderer.update_scene(self._env.data, camera=CAMERA)
        frame: NDArray[np.uint8] = self._renderer.render().copy()
        return frame

    @property
    def touching(self) -> bool:
        """Whether the robot touches what stands on the table."""
        import mujoco

        model, data = self._env.model, self._env.data
        bodies = model.geom_bodyid[data.contact.geom]
        base, last = (
            mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name) for name in ("base", "mocap")
        )
        # The table and the robot come first among the bodies.
        return bool(
            ((bodies.min(1) >= base) & (bodies.min(1) < last) & (bodies.max(1) > last)).any()
        )

    @property
    def instruction(self) -> str:
        """What the policy is told."""
        return TASKS[self.task].instruction

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


def state_of(raw: NDArray[np.float64]) -> NDArray[np.float32]:
    """The part `(4,)` of Meta-World's observation that a policy is given, as in LeRobot."""
    state: NDArray[np.float32] = raw[:STATE_DIM].astype(np.float32)
    return state


def picture_of(observation: dict[str, Any]) -> Image.Image:
    """The camera's picture."""
    return Image.fromarray(observation[IMAGE_KEY])


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> NDArray[np.float64]:
    """The quaternion of an upright camera, which looks along its own -z."""
    import mujoco

    ahead = np.subtract(target, position)
    ahead /= np.linalg.norm(ahead)
    right = np.cross(ahead, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, ahead), -ahead], axis=1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.flatten())
    return quaternion

"""A robot in a loop of environment, policy and reader, and its episodes as files.

with BackgroundReader(build_reader) as reader:  # a function that makes a `CacheReader`
    for event in run_episode(env, policy, reader, observe=rename(NAMES)):
        print(event)
"""

from mm_c2c.robot.background import BackgroundReader, Snapshot
from mm_c2c.robot.events import (
    Answer,
    EpisodeEnd,
    Event,
    Monitor,
    Narration,
    ReaderFailure,
    Reading,
    Step,
)
from mm_c2c.robot.levels import NAMES, make_minigrid
from mm_c2c.robot.loop import run_episode
from mm_c2c.robot.monitor import FailureMonitor, MonitorConfig, yes_probability
from mm_c2c.robot.observation import ObservationSpec, check_observation, rename
from mm_c2c.robot.policy import Decision, Policy, SourcePolicy, discrete_actions
from mm_c2c.robot.reader import CacheReader
from mm_c2c.robot.recording import Episode, export_lerobot, load_episode, record

__all__ = [
    "NAMES",
    "Answer",
    "BackgroundReader",
    "CacheReader",
    "Decision",
    "Episode",
    "EpisodeEnd",
    "Event",
    "FailureMonitor",
    "Monitor",
    "MonitorConfig",
    "Narration",
    "ObservationSpec",
    "Policy",
    "ReaderFailure",
    "Reading",
    "Snapshot",
    "SourcePolicy",
    "Step",
    "check_observation",
    "discrete_actions",
    "export_lerobot",
    "load_episode",
    "make_minigrid",
    "record",
    "rename",
    "run_episode",
    "yes_probability",
]

"""The policy that ships, its levels, and the bridge that reads it."""

from __future__ import annotations

from functools import partial

import torch

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.errors import UnsupportedError
from mm_c2c.fuser import FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.reference.babyai import rollouts
from mm_c2c.reference.babyai.levels import instruction_text
from mm_c2c.robot.monitor import MonitorConfig
from mm_c2c.robot.observation import ObservationSpec
from mm_c2c.robot.policy import SourcePolicy, discrete_actions
from mm_c2c.robot.reader import CacheReader

HERE = rollouts.POLICY.parent
POLICY_ID = "mm_c2c/reference/babyai/policy"
READER_FOLDER = HERE / "reader"
EPISODES_FOLDER = HERE / "episodes"
# As the reader's training words them.
QUESTIONS = (
    "What will the robot do next?",
    "Which object is it going for?",
    "What does it hold?",
    "Which task is this?",
    "How far along is it?",
    "Will it succeed?",
    "What will go wrong?",
)
NARRATE = "What is the robot up to?"
WATCH = MonitorConfig(question="Will it succeed?", reason="What will go wrong?")


def load_policy() -> SourcePolicy:
    """The BabyAI policy; it looks again after the first action of each chunk."""
    source = rollouts.load_policy(rollouts.POLICY)
    # Not where it was installed: a bridge says which policy it was trained for.
    source.origin = source.origin._replace(model=POLICY_ID)
    return SourcePolicy(
        source=source,
        spec=ObservationSpec(cameras=("front",)),
        to_actions=discrete_actions,
        instruct=instruction_text,
    )


def load_reader() -> CacheReader:
    """The bridge from that policy into SmolLM2-135M-Instruct.

    Raises:
        UnsupportedError: it is not there.
    """
    if not READER_FOLDER.is_dir():
        raise UnsupportedError(
            f"no reader of the robot policy ships with this version: {READER_FOLDER} is not there; "
            "--tiny runs with one of random weights"
        )
    from mm_c2c.pretrained import read_header
    from mm_c2c.reference.models import load_target

    policy = load_policy()
    (name,) = read_header(READER_FOLDER)["sources"]
    bridge = Bridge.from_pretrained(READER_FOLDER, load_target(), {name: policy.source})
    return CacheReader(bridge, policy, narrate=NARRATE, questions=QUESTIONS[:1], monitor=WATCH)


def load_tiny_reader() -> CacheReader:
    """The policy before a tiny target of random weights: no download, no sense.

    For trying loop, film and page; what this target says means nothing.
    """
    return tiny_reader(load_policy())


def tiny_reader(policy: SourcePolicy) -> CacheReader:
    """Any policy with patches and action tokens before that target."""
    from mm_c2c.reference.models import tiny_target

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = tiny_target()
    fuser = FuserConfig(source=policy.source.shape, target=target.shape, hidden_size=32, rank=8)
    link = partial(LinkConfig, source="robot", geometry="slots", fuser=fuser)
    links = (
        link(images=len(policy.spec.cameras), rows=7, cols=7),
        link(kinds=("action",), rows=1, cols=4),
    )
    bridge = Bridge(
        target, {"robot": policy.source}, BridgeConfig(links=links, slot_token="a")
    ).eval()
    return CacheReader(bridge, policy, narrate=NARRATE, questions=QUESTIONS[:1], monitor=WATCH)

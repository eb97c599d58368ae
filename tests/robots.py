"""A tiny robot: an environment of coloured pictures, a policy with action tokens, readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from families_views import build_llava
from tiny_vlm import build_frozen, special_ids, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.robot import (
    CacheReader,
    MonitorConfig,
    ObservationSpec,
    SourcePolicy,
)
from mm_c2c.sources.action import TokenActions, TokenActionSource
from mm_c2c.sources.action_bins import ActionBins

TASK = "pick the cat"
SPEC = ObservationSpec(cameras=("front", "wrist"), state_dim=2)
STEPS = 5


class ColourRoom(gymnasium.Env):
    """Two cameras of noise and a state that the actions move; over after `STEPS` steps."""

    render_mode = "rgb_array"
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    observation_space = gymnasium.spaces.Dict()

    def __init__(self, task: str = TASK) -> None:
        self.task = task

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.state = np.zeros(2, np.float32)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self.state = self.state + np.asarray(action, np.float32)
        self.steps += 1
        done = self.steps == STEPS
        return self._observe(), 0.1 * done, done, False, {}

    def render(self) -> np.ndarray:
        frame = np.full((24, 32, 3), 40 * self.steps, np.uint8)
        frame[4:8, 4:12] = (200, 30, 7 * self.steps)
        return frame

    def _observe(self) -> dict[str, Any]:
        def picture(height: int, width: int) -> np.ndarray:
            return self.np_random.integers(0, 256, (height, width, 3), dtype=np.uint8)

        return {
            "observation.images.front": picture(40, 56),
            "observation.images.wrist": picture(30, 30),
            "observation.state": self.state,
            "task": self.task,
        }


def both_actions(acted: TokenActions) -> np.ndarray:
    """A horizon of two: the action, and half of it."""
    action = acted.actions[0].numpy()
    return np.stack([action, action / 2])


def with_past(task: str, past: Sequence[Any]) -> str:
    return f"{task} after {len(past)}"


def build_policy() -> SourcePolicy:
    vlm = build_llava()
    vlm.model.generation_config.eos_token_id = None
    words = len(vlm.processor.tokenizer)
    bins = ActionBins(vocab_size=words, low=(-1.0, 0.0), high=(1.0, 0.5), num_bins=words)
    source = TokenActionSource(vlm.model, vlm.processor, bins, "tiny/robot")
    return SourcePolicy(source=source, spec=SPEC, to_actions=both_actions, instruct=with_past)


def build_bridge(policy: SourcePolicy) -> Bridge:
    """Patches and action tokens into a tiny Llama, through fusers that change what it says."""
    tokenizer = train_tokenizer(
        ["<pad>", "</s>"],
        merges=60,
        chat_template="{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
        unk_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **special_ids(tokenizer),
    )
    target = Target(build_frozen(lambda: LlamaForCausalLM(config), seed=1), tokenizer, "tiny")
    fuser = FuserConfig(source=policy.source.shape, target=target.shape, hidden_size=16, rank=4)
    links = (
        LinkConfig(source="robot", geometry="slots", images=2, rows=2, cols=2, fuser=fuser),
        LinkConfig(
            source="robot", geometry="slots", kinds=("action",), rows=1, cols=2, fuser=fuser
        ),
    )

    bridge = Bridge(target, {"robot": policy.source}, BridgeConfig(links=links, slot_token="a"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in bridge.fusers.named_parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if "gate" in name:
            parameter.data.fill_(3.0)  # open: what it says depends on the step
    return bridge.eval()


def build_reader() -> CacheReader:
    policy = build_policy()
    monitor = MonitorConfig(threshold=1.0)
    return CacheReader(build_bridge(policy), policy, questions=("where is it ?",), monitor=monitor)

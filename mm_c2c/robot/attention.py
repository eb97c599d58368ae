"""What a policy looked at when it chose its action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_c2c.align.patches import finest_patches
from mm_c2c.errors import UnsupportedError
from mm_c2c.evaluation.attribution import eager
from mm_c2c.robot.observation import Observation
from mm_c2c.robot.policy import SourcePolicy
from mm_c2c.sources.vlm import VLMSource


@torch.no_grad()
def action_attention(
    policy: SourcePolicy,
    observation: Observation,
    past: Sequence[Any],
    tokens: NDArray[np.int64] | None,
) -> Tensor:
    """The policy's attention at the position that chooses the first action token.

    Args:
        policy: one that writes action tokens; it is not changed.
        observation: as `check_observation` gives it.
        past: all actions before it.
        tokens: `(num_tokens,)`: what it wrote there; None lets it act.

    Returns:
        `(rows, cols)` over the finest view of the first camera: shares of the attention, mean over
        layers and heads; what is missing to 1 went to words.

    Raises:
        UnsupportedError: the policy writes no action tokens.
    """
    source = policy.source
    if not isinstance(source, VLMSource):
        raise UnsupportedError(
            f"{type(source).__name__} writes no action tokens: no one position chooses its action"
        )
    inputs = policy.inputs(observation, past)
    encoded = source._known(source._encode([inputs], [source.render(inputs)]))
    with eager(source.model):
        attentions = source.model(**encoded, output_attentions=True).attentions
    shares = torch.stack([layer[0, :, -1].mean(0) for layer in attentions]).mean(0)
    return shares[finest_patches(policy.read(observation, past, tokens), 0)]

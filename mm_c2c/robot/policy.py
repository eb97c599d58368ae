"""What the loop needs of a policy: to decide, and to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mm_c2c.cache import SourceCache
from mm_c2c.errors import UnsupportedError
from mm_c2c.robot.observation import TASK, Observation, ObservationSpec, to_input
from mm_c2c.sources.action import TokenActions
from mm_c2c.sources.base import Source, SourceInput


class Decision(NamedTuple):
    """What a policy decided.

    Attributes:
        actions: `(horizon,)` of a discrete action space or `(horizon, action_dim)`: what the
            environment is given, one after the other, before the policy is asked again.
        tokens: `(num_tokens,)`: the action as the policy wrote it; None where it writes no tokens.
    """

    actions: NDArray[Any]
    tokens: NDArray[np.int64] | None = None


class Policy(Protocol):
    """A policy that acts, and whose cache can be read.

    It remembers nothing: `past` is all that was done since the episode began.
    """

    @property
    def spec(self) -> ObservationSpec:
        """What it must be shown."""

    def decide(self, observation: Observation, past: Sequence[Any]) -> Decision:
        """What to do now."""

    def read(
        self, observation: Observation, past: Sequence[Any], tokens: NDArray[np.int64] | None
    ) -> SourceCache:
        """The cache of what it saw and decided; it acts the same whether it is read or not."""


class ActingSource(Source, Protocol):
    """A source with actions, such as `TokenActionSource` and `PI0Source`."""

    def act(self, inputs: Sequence[SourceInput]) -> Any:
        """`TokenActions`, or an action chunk `(batch, action_horizon, action_dim)`."""


@dataclass(frozen=True, kw_only=True)
class SourcePolicy:
    """An action source as a policy of the loop.

    Attributes:
        source: with `act`, and to be read with `prefill`.
        spec: what it must be shown.
        to_actions: of what `act` gave for a batch of one, to `Decision.actions`.
        instruct: the words that the policy reads, of the task and the past actions; None takes the
            task alone.
    """

    source: ActingSource
    spec: ObservationSpec
    to_actions: Callable[[Any], NDArray[Any]]
    instruct: Callable[[str, Sequence[Any]], str] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.source, "act"):
            raise UnsupportedError(
                f"{type(self.source).__name__} has no `act`: a policy is an action source, such as "
                "TokenActionSource or PI0Source"
            )

    @torch.no_grad()
    def decide(self, observation: Observation, past: Sequence[Any]) -> Decision:
        """See `Policy`."""
        acted = self.source.act([self.inputs(observation, past)])
        tokens = acted.tokens[0].cpu().numpy() if isinstance(acted, TokenActions) else None
        return Decision(self.to_actions(acted), tokens)

    @torch.no_grad()
    def read(
        self, observation: Observation, past: Sequence[Any], tokens: NDArray[np.int64] | None
    ) -> SourceCache:
        """See `Policy`.

        Raises:
            UnsupportedError: the policy keeps no cache that could be read.
        """
        prefill: Any = getattr(self.source, "prefill", None)
        if prefill is None:
            raise UnsupportedError(
                f"{type(self.source).__name__} acts but has no `prefill`: it keeps no cache that "
                "could be read; mm_c2c.sources.action.backbone_source reads a policy's backbone"
            )
        wrote = None if tokens is None else torch.from_numpy(tokens)
        return prefill([replace(self.inputs(observation, past), action_tokens=wrote)])

    def inputs(self, observation: Observation, past: Sequence[Any]) -> SourceInput:
        """What the source reads."""
        text = observation[TASK]
        return to_input(
            observation, self.spec, self.instruct(text, past) if self.instruct else text
        )


def discrete_actions(acted: TokenActions) -> NDArray[np.int64]:
    """`(1,)`: the first action token as the number of a discrete action."""
    actions: NDArray[np.int64] = acted.actions[0, :1].round().long().numpy()
    return actions

"""Action tokens to actions, for policies that write tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_c2c.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActionBins:
    """Action tokens to actions, as OpenVLA has them (arXiv:2406.09246, section 3.2).

    The last `num_bins` tokens of the vocabulary stand for equal steps of [-1, 1], the largest
    first. A token that is none of them counts as the nearest one, as in OpenVLA.

    Attributes:
        vocab_size: tokens of the vocabulary without those that only pad the embedding (32000 for
            OpenVLA, whose embedding has 32064).
        low: what -1 stands for in each dimension: the data's 1st percentile, `q01`.
        high: what 1 stands for: `q99`.
        scaled: False where a dimension (the gripper) stays in [-1, 1]; all scaled when empty.
        num_bins: edges of the steps, so that there is one value fewer than tokens.
    """

    vocab_size: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    scaled: tuple[bool, ...] = ()
    num_bins: int = 256

    def __post_init__(self) -> None:
        if not self.low or len(self.low) != len(self.high):
            raise ConfigError(
                f"low and high need one number for each dimension of an action, got "
                f"{len(self.low)} and {len(self.high)}"
            )
        if self.scaled and len(self.scaled) != len(self.low):
            raise ConfigError(f"scaled has {len(self.scaled)} entries, low has {len(self.low)}")
        if not 2 <= self.num_bins <= self.vocab_size:
            raise ConfigError(
                f"num_bins must be in [2, vocab_size={self.vocab_size}], got {self.num_bins}"
            )

    @classmethod
    def from_config(cls, config: Any, dataset: str | None = None) -> ActionBins:
        """What a policy's `config.json` says, in OpenVLA's own manner.

        Args:
            config: with `n_action_bins`, and `norm_stats`: `{dataset: {"action": {"q01", "q99",
                "mask"}}}`, `mask` where not every dimension is scaled.
            dataset: whose statistics hold, where there are several.

        Raises:
            ConfigError: one of these is missing or wrong.
        """
        stats = getattr(config, "norm_stats", None)
        if not isinstance(stats, Mapping) or not stats:
            raise ConfigError(
                "a policy with n_action_bins needs norm_stats in its config: "
                f'{{dataset: {{"action": {{"q01", "q99"}}}}}}, got {stats!r}'
            )
        if dataset is None and len(stats) == 1:
            (dataset,) = stats
        if dataset not in stats:
            raise ConfigError(
                f"norm_stats has the data sets {', '.join(stats)}, and the actions are those of "
                f"{dataset!r}; build the source with ActionBins.from_config(config, dataset)"
            )
        try:
            action = stats[dataset]["action"]
            low, high = tuple(action["q01"]), tuple(action["q99"])
            scaled = tuple(action.get("mask") or ())
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"norm_stats of {dataset}: expected an action with q01 and q99, got {error!r}"
            ) from error
        # OpenVLA's embedding has tokens at its end that only pad it.
        padding = getattr(config, "pad_to_multiple_of", None) or 0
        vocab_size = config.get_text_config(decoder=True).vocab_size - padding
        return cls(
            vocab_size=vocab_size,
            low=low,
            high=high,
            scaled=scaled,
            num_bins=config.n_action_bins,
        )

    def tokens(self, steps: Tensor) -> Tensor:
        """Token ids of steps, counted from the last token; and the steps of token ids."""
        return self.vocab_size - 1 - steps

    def decode(self, tokens: Tensor) -> Tensor:
        """Actions `(..., action_dim)` float64 in the robot's units, of token ids so shaped.

        On the CPU, since not every device has float64.
        """
        tokens = tokens.cpu()
        edges = torch.linspace(-1, 1, self.num_bins, dtype=torch.float64)
        centres = (edges[:-1] + edges[1:]) / 2
        normalised = centres[self.tokens(tokens).clamp(0, self.num_bins - 2)]
        low, high = edges.new_tensor(self.low), edges.new_tensor(self.high)
        actions = 0.5 * (normalised + 1) * (high - low) + low
        scaled = torch.tensor(self.scaled or [True] * len(self.low))
        return torch.where(scaled, actions, normalised)

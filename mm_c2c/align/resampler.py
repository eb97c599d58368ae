"""A learned resampler: slots that look for what they take of an image's patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_c2c.align import Alignment
from mm_c2c.config import check_at_least_one
from mm_c2c.errors import ShapeError

# Half a period of the finest wave is 1/128 of the image: finer than any grid in use (64 x 64).
NUM_FREQUENCIES = 8


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Everything needed to rebuild a `PatchResampler` before its weights are loaded.

    Attributes:
        num_slots: slots an image gets.
        source_width: channels of the source's states.
        width: channels in which slots and patches are compared.
        asked: whether other positions of the source say what the slots look for.
        hidden_size: width of what reads those positions.
    """

    num_slots: int
    source_width: int
    width: int = 64
    asked: bool = False
    hidden_size: int = 128

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_slots", "source_width", "width", "hidden_size")


class Asking(NamedTuple):
    """The positions that say what slots look for, such as a policy's actions.

    Attributes:
        mask: `(batch, source_len)` bool; one or more in every row.
        places: `(batch, source_len, 2)` in [0, 1]: where each stands among them.
    """

    mask: Tensor
    places: Tensor


class PatchResampler(nn.Module):
    """Learned slots that attend over an image's patches (as BLIP-2's and Perceiver's queries).

    One head, and no projection of what is read: the fuser has its own.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.num_slots, config.width))
        self.source_in = nn.Linear(config.source_width, config.width, bias=False)
        self.place_in = nn.Linear(4 * NUM_FREQUENCIES, config.width)
        self.asker = Asker(config) if config.asked else None

    def forward(
        self,
        states: Tensor,
        coordinates: Tensor,
        alignment: Alignment,
        asking: Asking | None = None,
    ) -> Alignment:
        """Find how much each slot takes of each patch.

        Args:
            states: `(batch, source_len, source_width)`.
            coordinates: `(batch, source_len, 2)` in [0, 1], from `patch_coordinates`.
            alignment: which positions each slot may read, such as `align_all` gives; a weight
                says only yes (above 0) or no. Of several images, each one's slots ask the same.
            asking: what the slots look for depends on these, if the resampler is asked.

        Returns:
            The alignment with the attention's weights, through which gradients flow.
        """
        batch, num_slots = alignment.mask.shape
        if batch != states.shape[0] or not num_slots or num_slots % self.config.num_slots:
            raise ShapeError(
                f"expected an alignment of (batch={states.shape[0]}, a multiple of "
                f"num_slots={self.config.num_slots}), got {tuple(alignment.mask.shape)}"
            )
        if (asking is None) != (self.asker is None):
            raise ShapeError(
                f"a resampler with asked={self.config.asked} takes "
                f"{'no' if asking else 'the'} positions that ask"
            )
        normalised = _normalise(states.float())
        queries = self.queries
        if self.asker is not None:
            queries = queries + self.asker(normalised, asking)
        keys = _normalise(self.source_in(normalised) + self.place_in(_fourier(coordinates)))
        scores = queries @ keys.transpose(1, 2) / math.sqrt(self.config.width)
        scores = scores.repeat(1, num_slots // self.config.num_slots, 1)
        unreadable = alignment.weights == 0
        # Finite, for a slot that may read nothing would else be 0 / 0.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.gather(2, alignment.source_index).masked_fill(unreadable, lowest)
        weights = scores.softmax(2).masked_fill(unreadable, 0)
        return replace(alignment, weights=weights)


class Asker(nn.Module):
    """What slots look for, read off other positions of the source; nothing at the start.

    Each position is read with its place among them, so that an order of actions is not a heap.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.state_in = nn.Linear(config.source_width, hidden)
        self.place_in = nn.Linear(4 * NUM_FREQUENCIES, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, config.num_slots * config.width, bias=False)
        nn.init.zeros_(self.out.weight)
        self.num_slots = config.num_slots

    def forward(self, states: Tensor, asking: Asking) -> Tensor:
        """Differences to the queries: `(batch, num_slots, width)`.

        Args:
            states: `(batch, source_len, source_width)`, normalised.
            asking: which of them are read.
        """
        read = F.gelu(self.state_in(states) + self.place_in(_fourier(asking.places)))
        mask = asking.mask.unsqueeze(2)
        mean = (read * mask).sum(1) / mask.sum(1)
        wanted: Tensor = self.out(F.gelu(self.middle(mean)))
        return wanted.unflatten(1, (self.num_slots, -1))


def _normalise(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])


def _fourier(coordinates: Tensor) -> Tensor:
    """`(..., 2)` in [0, 1] to sines and cosines, `(..., 4 * NUM_FREQUENCIES)`."""
    octaves = torch.arange(NUM_FREQUENCIES, device=coordinates.device)
    angles = (coordinates.unsqueeze(-1) * math.pi * 2**octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

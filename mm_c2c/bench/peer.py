"""The paper's projector in plain PyTorch: one small network after another, layer by layer.

Fu et al., arXiv:2510.03215. For each target layer, once for K and once for V:

    u = FFN(W_in [source; target]);  P = W_out FFN(u);  weight = sigmoid(W_w FFN(u));
    gate = one number;  K' = K + gate * weight * P

As in the paper's own code (github.com/thu-nics/C2C, `C2CProjector`), without dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_c2c.cache import CacheShape


class ResidualFFN(nn.Module):
    """`x + W_down gelu(W_up norm(x))`, without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """`(tokens, width)`, as it came in."""
        return states + self.down(F.gelu(self.up(self.norm(states))))


class LayerProjector(nn.Module):
    """One target layer's K, or V."""

    def __init__(self, source: CacheShape, target: CacheShape, hidden_size: int) -> None:
        super().__init__()
        self.heads = target.num_key_value_heads
        self.enter = nn.Linear(source.width + target.width, hidden_size)
        self.read = ResidualFFN(hidden_size)
        self.project = ResidualFFN(hidden_size)
        self.leave = nn.Linear(hidden_size, target.width)
        self.weigh = ResidualFFN(hidden_size)
        self.leave_weight = nn.Linear(hidden_size, self.heads)
        self.gate_logit = nn.Parameter(torch.tensor(2.0))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """`(tokens, source_width)` and `(tokens, target_width)` to `(tokens, target_width)`."""
        states = self.read(self.enter(torch.cat([source, target], dim=-1)))
        projected = self.leave(self.project(states))
        weight = torch.sigmoid(self.leave_weight(self.weigh(states)))
        difference = projected.unflatten(-1, (self.heads, -1)) * weight.unsqueeze(-1)
        # A step at inference, as in the paper.
        gate = (torch.sigmoid(self.gate_logit) > 0.5).to(target.dtype)
        return target + gate * difference.flatten(-2)


class LayerByLayer(nn.Module):
    """All layers of a target, one after another.

    Args:
        source: geometry of the source's cache.
        target: geometry of the target's.
        hidden_size: width of the projectors; the paper's is 1024.
        pairs: the source layer of each target layer; None where it has none.
    """

    def __init__(
        self,
        source: CacheShape,
        target: CacheShape,
        hidden_size: int,
        pairs: list[int | None],
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.keys, self.values = (
            nn.ModuleList(
                nn.Identity() if pair is None else LayerProjector(source, target, hidden_size)
                for pair in pairs
            )
            for _ in range(2)
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Fused K and V.

        Args:
            source: `(source_layers, batch, target_len, 2, source_width)`.
            target: `(target_layers, batch, target_len, 2, target_width)`.

        Returns:
            Shaped like `target`.
        """
        fused = []
        for layer, pair in enumerate(self.pairs):
            if pair is None:
                fused.append(target[layer])
                continue
            keys = self.keys[layer](source[pair, ..., 0, :], target[layer, ..., 0, :])
            values = self.values[layer](source[pair, ..., 1, :], target[layer, ..., 1, :])
            fused.append(torch.stack([keys, values], dim=-2))
        return torch.stack(fused)

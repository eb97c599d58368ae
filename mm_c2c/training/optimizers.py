"""What moves a fuser's weights: AdamW, or Muon for its matrices.

Muon makes momentum orthogonal (Jordan et al., github.com/KellerJordan/Muon). `torch.optim.Muon`
takes single matrices only; the fuser's are stacked `(layers, in, out)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

OPTIMIZERS = ("muon", "adamw")
_BETAS = (0.9, 0.98)
# The quintic iteration whose slope at 0 is steepest, as published with Muon.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Root mean square of an update before the learning rate: AdamW's own (Liu et al., 2502.16982).
_UPDATE_RMS = 0.2


class StackedMuon(torch.optim.Optimizer):
    """Steps of equal size in every direction of a matrix's momentum.

    Args:
        params: matrices, `(..., in, out)`.
        lr: learning rate, on the scale of AdamW's.
        momentum: Nesterov momentum.
        dtype: in which momentum is made orthogonal; Muon as published takes bfloat16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                mean = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(mean, group["momentum"])
                update = orthogonalise(update, dtype=self.dtype).to(param.dtype)
                size = _UPDATE_RMS * max(param.shape[-2:]) ** 0.5
                param.add_(update, alpha=-group["lr"] * size)


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrices with all singular values near 1, by Newton-Schulz iteration.

    Args:
        matrices: `(..., rows, cols)`.
        steps: iterations.
        dtype: of the products, and of what is returned.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _is_fuser_matrix(name: str, param: nn.Parameter) -> bool:
    del param
    return name.endswith("weight")


def mixes_channels(name: str, param: nn.Parameter) -> bool:
    """Whether a whole model's parameter is for Muon: a matrix, and no embedding."""
    return param.ndim == 2 and "embed" not in name


def build_optimizers(
    module: nn.Module,
    rate: float,
    name: str = "muon",
    weight_decay: float = 0.01,
    is_matrix: Callable[[str, nn.Parameter], bool] = _is_fuser_matrix,
    dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """Optimisers of what of a module is trained.

    Args:
        module: the parameters that ask for gradients are trained.
        rate: learning rate, on the scale of AdamW's.
        name: `adamw`, or `muon` for the weights, with AdamW for biases and gates.
        weight_decay: AdamW's.
        is_matrix: which parameters Muon moves, by name and shape; a fuser's are its weights.
        dtype: of Muon's products.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for key, param in module.named_parameters():
        if param.requires_grad:
            (matrices if name == "muon" and is_matrix(key, param) else rest).append(param)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(StackedMuon(matrices, rate, dtype=dtype))
    if rest:
        adam = torch.optim.AdamW(rest, rate, betas=_BETAS, weight_decay=weight_decay)
        optimizers.append(adam)
    return optimizers

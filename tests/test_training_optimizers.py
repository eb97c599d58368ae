"""Muon on stacked matrices."""

from __future__ import annotations

import torch
from torch import nn

from mm_c2c.training.optimizers import StackedMuon, build_optimizers, orthogonalise


def test_singular_values_come_near_one_and_directions_stay() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 8)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The same singular vectors: what is left in their frame is diagonal.
    inner = u.mT @ found @ vh.mT
    torch.testing.assert_close(
        inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-5, rtol=0
    )


def test_a_stack_steps_as_its_matrices_alone() -> None:
    torch.manual_seed(0)
    start, pull = torch.randn(4, 16, 12), torch.randn(4, 16, 12)
    stacked = nn.Parameter(start.clone())
    single = [nn.Parameter(matrix.clone()) for matrix in start]
    ours = StackedMuon([stacked], lr=0.1)
    apart = StackedMuon(single, lr=0.1)
    for _ in range(3):
        stacked.grad = pull.clone()
        for param, grad in zip(single, pull, strict=True):
            param.grad = grad.clone()
        ours.step()
        apart.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]))


def test_agrees_with_torchs_own_on_one_matrix() -> None:
    torch.manual_seed(0)
    start, pull = torch.randn(32, 8), torch.randn(32, 8)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    ours = StackedMuon(params[:1], lr=0.01)
    theirs = torch.optim.Muon(
        params[1:], lr=0.01, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for param in params:
            param.grad = pull.clone()
        ours.step()
        theirs.step()
    # torch iterates in bfloat16.
    torch.testing.assert_close(params[0], params[1], atol=2e-3, rtol=0)
    assert (params[0] - start).abs().mean() > 2e-3


def test_steps_as_published_when_iterating_in_bfloat16() -> None:
    torch.manual_seed(0)
    start, pull = torch.randn(32, 8), torch.randn(32, 8)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    exact = StackedMuon(params[:1], lr=0.01)
    (ours, _) = build_optimizers(_Holder(params[1]), 0.01, dtype=torch.bfloat16)
    theirs = torch.optim.Muon(
        params[2:], lr=0.01, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for optimizer, param in zip((exact, ours, theirs), params, strict=True):
        param.grad = pull.clone()
        optimizer.step()
    assert params[1].dtype == torch.float32
    torch.testing.assert_close(params[1], params[2], atol=5e-4, rtol=0)
    assert not torch.equal(params[1], params[0])
    torch.testing.assert_close(params[1], params[0], atol=5e-4, rtol=0)


class _Holder(nn.Module):
    """A matrix and a bias, by the names that a fuser's have."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(8))


def test_a_matrix_without_a_gradient_stays() -> None:
    param = nn.Parameter(torch.ones(2, 4, 4))
    StackedMuon([param], lr=0.1).step()
    assert torch.equal(param.detach(), torch.ones(2, 4, 4))

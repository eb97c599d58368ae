"""Training's view into text models of many families."""

from __future__ import annotations

import pytest
import torch
from text_families import FAMILIES, build

from mm_c2c.training.objective import attention_returns


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_attention_layer_returns_a_state_a_position(name: str) -> None:
    """And no recurrent layer or MLP is taken for one; nothing is left on the model."""
    model = build(FAMILIES[name], 300)
    with attention_returns(model) as returned:
        model(torch.arange(10).reshape(2, 5))
    # Some families' last layers attend to what an earlier one holds.
    count = len(FAMILIES[name].fused) + getattr(model.config, "num_kv_shared_layers", 0)
    assert [tuple(states.shape) for states in returned] == [
        (2, 5, model.config.hidden_size)
    ] * count
    model(torch.arange(10).reshape(2, 5))
    assert len(returned) == count

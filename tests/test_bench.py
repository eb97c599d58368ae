"""The peer computes what our stacked form computes, and the bench compares them in one run."""

from typing import Any

import pytest
import torch

from mm_c2c.bench import run
from mm_c2c.bench.peer import LayerByLayer, LayerProjector
from mm_c2c.bench.run import BenchConfig, bench, text_table
from mm_c2c.cache import CacheShape
from mm_c2c.cli import main
from mm_c2c.errors import ConfigError
from mm_c2c.fuser import CacheFuser

SOURCE = CacheShape(num_layers=2, num_key_value_heads=3, head_dim=5)
TARGET = CacheShape(num_layers=4, num_key_value_heads=2, head_dim=6)


@pytest.fixture
def tiny_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.PAIRS, "tiny", (SOURCE, TARGET))


def copy_weights(fuser: CacheFuser, peer: LayerByLayer) -> None:
    """The stacked weights into the plain layers; K's blocks come first."""
    stacks: Any = fuser.projection
    names = {
        "enter": stacks.enter,
        "up": stacks.block[0],
        "down": stacks.block[2],
        "leave": stacks.leave,
        "weight_up": stacks.weight_block[0],
        "weight_down": stacks.weight_block[2],
    }
    for part, projectors in enumerate((peer.keys, peer.values)):
        for layer, projector in enumerate(projectors):
            assert isinstance(projector, LayerProjector)
            row = part * TARGET.num_layers + layer
            for name, stack in names.items():
                plain = getattr(projector, name)
                plain.weight.copy_(stack.weight[row].T)
                plain.bias.copy_(stack.bias[row, 0])
            projector.gate_logit.copy_(fuser.gate_logits[layer, part])


@torch.no_grad()
def test_the_peer_is_the_same_function() -> None:
    torch.manual_seed(0)
    fusers: Any = run._build_fusers(SOURCE, TARGET, 16)
    for parameter in fusers["c2c"].parameters():
        parameter.normal_(std=0.5)
    copy_weights(fusers["c2c"], fusers["peer"])
    source = torch.randn(2, 2, 3, 2, SOURCE.width)
    target = torch.randn(4, 2, 3, 2, TARGET.width)
    expected = target + fusers["c2c"](source, target)
    torch.testing.assert_close(fusers["peer"](source, target), expected)
    assert not torch.equal(expected[3], target[3])
    # Terminal: the target's first layers have no partner.
    assert fusers["peer"].pairs == [None, None, 0, 1]
    assert torch.equal(fusers["peer"](source, target)[0], target[0])


@pytest.mark.usefixtures("tiny_pairs")
def test_a_bench_times_all_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    config = BenchConfig(pairs=("tiny",), positions=8, hidden_size=16, growth=(4, 8), rounds=2)
    result = bench(config, progress=False)
    row = result["tiny"]
    assert list(row["ms"]) == ["peer", "c2c", "small"]
    for speed in row["speed"].values():
        assert 0 < speed.low <= speed.median <= speed.high
    assert list(row["growth"]) == ["4", "8"]
    assert "against the peer" in text_table(result)
    assert main(["bench", "pairs=[tiny]", "positions=8", "hidden_size=16", "rounds=1"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_an_unknown_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"known: qwen2\.5-0\.5b to qwen3-0\.6b"):
        BenchConfig(pairs=("none",))

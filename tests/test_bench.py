"""The peer computes what our stacked form computes, and the bench compares them in one run."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from mm_c2c.bench import run
from mm_c2c.bench.peer import LayerByLayer, LayerProjector
from mm_c2c.bench.pipeline import Pipeline, time_growth, time_stages
from mm_c2c.bench.run import BenchConfig, bench, text_table
from mm_c2c.cache import CacheShape, read_layers
from mm_c2c.cli import main
from mm_c2c.errors import ConfigError
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.geometry import find
from mm_c2c.training.blank import blank_target

SOURCE = CacheShape(num_layers=2, num_key_value_heads=3, head_dim=5)
TARGET = CacheShape(num_layers=4, num_key_value_heads=2, head_dim=6)


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(
        find("SmolVLM-256M"),
        find("Qwen3-0.6B"),
        positions=8,
        hidden_size=16,
        dtype="float32",
        true_width=False,
    )


def copy_weights(fuser: CacheFuser, peer: LayerByLayer) -> None:
    """The stacked weights into the plain layers; K's blocks come first."""
    stacks: Any = fuser.projection
    names = {"enter": stacks.enter, "leave": stacks.leave, "leave_weight": stacks.weigh[1]}
    ffns = {"read": stacks.read, "project": stacks.project, "weigh": stacks.weigh[0]}
    for part, projectors in enumerate((peer.keys, peer.values)):
        fed = [layer for layer, pair in enumerate(peer.pairs) if pair is not None]
        for place, layer in enumerate(fed):
            projector: Any = projectors[layer]
            assert isinstance(projector, LayerProjector)
            row = part * len(fed) + place
            for name, stack in names.items():
                plain = getattr(projector, name)
                plain.weight.copy_(stack.weight[row].T)
                plain.bias.copy_(stack.bias[row, 0])
            for name, ffn in ffns.items():
                plain = getattr(projector, name)
                plain.norm.weight.copy_(ffn.scale[row, 0])
                plain.up.weight.copy_(ffn.up_weight[row].T)
                plain.down.weight.copy_(ffn.down_weight[row].T)
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


@torch.no_grad()
def test_the_peer_writes_into_the_cache_what_a_bridge_of_the_same_weights_writes(
    pipeline: Pipeline,
) -> None:
    shapes = pipeline.link.fuser.source, pipeline.link.fuser.target
    paper = replace(FuserConfig.c2c(*shapes), hidden_size=16)
    pipeline.bridge = pipeline.build([replace(pipeline.link, fuser=paper)])
    fuser: Any = pipeline.bridge.fusers[pipeline.link.name]
    torch.manual_seed(0)
    for parameter in fuser.parameters():
        parameter.normal_(std=0.5)
    fuser.gate_logits.fill_(1.0)
    copy_weights(fuser, pipeline.peer)
    pipeline.look()
    pipeline.read()
    caches = []
    for fuse in (pipeline.fuse, pipeline.fuse_by_peer):
        fuse()
        caches.append(read_layers(pipeline.fused["past_key_values"])[0])
        assert pipeline.decode().shape[1] == pipeline.reading.input_ids.shape[1] + 1
    own = read_layers(pipeline.reading.past_key_values)[0]
    for ours, peers, alone in zip(*caches, own, strict=True):
        assert ours.keys.shape[2] > len(pipeline.words)  # and what the template adds
        torch.testing.assert_close(ours.keys, peers.keys)
        torch.testing.assert_close(ours.values, peers.values)
        changed = (ours.values != alone.values).any(-1).all(1)[0]
        assert changed.tolist() == [False, *[True] * len(pipeline.words)]


def test_stages_and_growth_are_timed(pipeline: Pipeline) -> None:
    stages = time_stages(pipeline, 2, "tiny", progress=False)
    assert list(stages["ms"])[:4] == ["source reads", "target reads", "fusing", "first token"]
    for found in (stages["share"], stages["first_token"]):
        assert 0 < found.low <= found.median <= found.high
    grown = time_growth(pipeline, (1, 2), (1, 3), 1, progress=False)
    assert {name: list(taken) for name, taken in grown.items()} == {
        "slots": ["1", "4"],
        "sources": ["1", "3"],
    }


def test_layers_that_share_weights_compute_what_layers_with_the_same_weights_do() -> None:
    geometry = find("Qwen3-0.6B")
    shared = blank_target(geometry, "float32", true_width=False, shared=True).model
    apart = blank_target(geometry, "float32", true_width=False).model
    assert shared.num_parameters() < apart.num_parameters()
    own = dict(shared.named_parameters())
    for name, weight in apart.named_parameters():
        weight.copy_(own[re.sub(r"layers\.\d+", "layers.0", name)])
    ids = torch.arange(6).unsqueeze(0)
    ours, theirs = (model(ids, use_cache=True) for model in (shared, apart))
    torch.testing.assert_close(ours.logits, theirs.logits)
    for mine, other in zip(
        read_layers(ours.past_key_values)[0], read_layers(theirs.past_key_values)[0], strict=True
    ):
        torch.testing.assert_close(mine.keys, other.keys)


def test_a_bench_times_all_in_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.PAIRS, "tiny", ("SmolVLM-256M", "Qwen3-0.6B"))
    config = BenchConfig(
        pairs=("tiny",),
        positions=8,
        hidden_size=16,
        growth=(4, 8),
        sides=(1, 2),
        rounds=2,
        true_width=False,
    )
    result = bench(config, progress=False)
    row = result["pairs"]["tiny"]
    assert list(row["ms"]) == ["peer", "c2c", "small", "small, as wide"]
    for speed in row["speed"].values():
        assert 0 < speed.low <= speed.median <= speed.high
    assert [list(row[name]) for name in ("positions", "layers")] == [["4", "8"], ["1", "3", "6"]]
    assert list(result["growth"]["slots"]) == ["1", "4"]
    assert "of both readings; first token" in text_table(result)
    command = ["pairs=[tiny]", "positions=8", "hidden_size=16", "rounds=1", "true_width=false"]
    assert main(["bench", *command]) == 0
    assert "tiny" in capsys.readouterr().out


def test_an_unknown_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"known: qwen2\.5-0\.5b to qwen3-0\.6b"):
        BenchConfig(pairs=("none",))

"""Bridges that read pi0: two cameras, its state and its actions, in the target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import CHUNK, WORDS, assert_reading_changes_nothing
from torch import Tensor

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import PositionKind
from mm_c2c.errors import AlignmentError
from mm_c2c.link import align_slots
from mm_c2c.rope import derotate
from mm_c2c.sources import Source, SourceInput
from mm_c2c.sources.action import PI0Source
from mm_c2c.sources.vlm import VLMSource


@pytest.fixture
def two_cameras(observations: list[SourceInput]) -> list[SourceInput]:
    """Two cameras and a state in each row, instructions of unlike length."""
    first, second = observations
    return [first, dataclasses.replace(second, images=first.images[::-1])]


def robot_bridge(
    source: Source, target_model: Any, tokenizer: Any, *, pooling: str = "window"
) -> Bridge:
    """Slots for two cameras of pi0, and one for each of state and actions; random weights."""
    target = Target(target_model, tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    asking = ("state", "action") if pooling == "asked" else ()
    pooling = "resampler" if asking else pooling
    both = {"source": "robot", "geometry": "slots", "fuser": fuser, "pooling": pooling}
    links = (
        LinkConfig(**both, rows=2, cols=2, images=2, asking=asking),
        LinkConfig(**both, kinds=("state", "action"), rows=1, cols=1 + CHUNK),
    )
    bridge = Bridge(target, {"robot": source}, BridgeConfig(links=links, slot_token="a")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.normal_(std=0.5, generator=generator)
    return bridge


@torch.no_grad()
def test_a_policy_and_a_model_that_sees_fuse_together_in_any_order(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_llava: Any,
    tiny_target: Any,
    tiny_target_tokenizer: Any,
) -> None:
    processor, model = tiny_llava
    eyes = VLMSource(model, processor, "tiny/llava")
    robot = robot_bridge(pi0, tiny_target, tiny_target_tokenizer)
    target = robot.target
    fuser = FuserConfig(source=eyes.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="eyes", geometry="slots", rows=2, cols=2, fuser=fuser)
    config = BridgeConfig(links=(*robot.config.links, link), slot_token="a")
    bridge = Bridge(target, {"eyes": eyes, "robot": pi0}, config).eval()
    other = Bridge(target, {"robot": pi0, "eyes": eyes}, config).eval()
    for weight in bridge.parameters():
        weight.normal_(std=0.5)
    other.load_state_dict(bridge.state_dict())
    shown = [SourceInput(images=row.images[:1]) for row in two_cameras]
    caches = {"robot": pi0.prefill(two_cameras), "eyes": eyes.prefill(shown)}
    seen = bridge.fuse_slots(caches)
    turned = other.fuse_slots(dict(reversed(caches.items())))
    assert torch.equal(seen.input_ids, turned.input_ids)
    for one, two in zip(seen.past_key_values.layers, turned.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)
    for name, slots in (("robot", 8 + 1 + CHUNK), ("eyes", 4)):
        alone = bridge.fuse_slots({name: caches[name]})
        left_out = seen.input_ids.shape[1] - alone.input_ids.shape[1]
        assert left_out == 4 + 8 + 1 + CHUNK - slots
        assert len(bridge.generate(alone, ["what ?"] * 2, max_new_tokens=2, do_sample=False)) == 2


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["window", "resampler", "asked"])
def test_a_closed_bridge_leaves_the_target_as_it_is_whatever_pi0_saw_and_did(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pooling: str,
) -> None:
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer, pooling=pooling)
    caches = {"robot": pi0.prefill(two_cameras)}
    heard = bridge.fuse(bridge.fuse_slots(caches), list(WORDS))
    for fuser in bridge.fusers.values():
        fuser.close()
    seen = bridge.fuse_slots(caches)
    own = tiny_target(seen.input_ids[:1]).past_key_values
    for got, expected in zip(seen.past_key_values.layers, own.layers, strict=True):
        for row in range(2):
            torch.testing.assert_close(got.keys[row], expected.keys[0], rtol=0, atol=0)
            torch.testing.assert_close(got.values[row], expected.values[0], rtol=0, atol=0)
    own.batch_repeat_interleave(2)
    fused = bridge.fuse(seen, list(WORDS))
    alone = tiny_target(**{**fused, "past_key_values": own}).logits
    logits = tiny_target(**fused).logits
    torch.testing.assert_close(logits, alone, rtol=0, atol=0)
    assert ((tiny_target(**heard).logits - logits)[:, -1].abs().amax(1) > 0.01).all()


@torch.no_grad()
def test_state_and_actions_of_pi0_get_a_slot_each(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
) -> None:
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer)
    cache = pi0.prefill(two_cameras)
    taken: list[Tensor] = []
    bridge.fusers["robot_slots_state_action"].register_forward_pre_hook(
        lambda _module, args: taken.append(args[0])
    )
    seen = bridge.fuse_slots({"robot": cache})
    assert (seen.input_ids[0] == bridge.prompt.slot_id).sum() >= 2 * 4 + 1 + CHUNK
    for layer, (keys, values) in enumerate(cache.layers):
        bare = derotate(keys, cache.position_ids, cache.rope[layer])
        for row in range(2):
            here = cache.kinds[row] >= PositionKind.STATE
            for part, states in enumerate((bare, values)):
                expected = states[row, 0, here]
                torch.testing.assert_close(taken[0][layer, row, :, part], expected)

    # Another state changes its slot and the actions', which attend to it, not the pictures'.
    moved = dataclasses.replace(two_cameras[0], state=torch.zeros(3))
    there = bridge.fuse_slots({"robot": pi0.prefill([moved])}).past_key_values.layers[2].keys
    change = (there[0] - seen.past_key_values.layers[2].keys[0]).abs().amax((0, 2))
    assert ((change > 1e-4).nonzero().flatten() == torch.arange(-5, 0) + len(change)).all()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["window", "resampler", "asked"])
@pytest.mark.parametrize("missing", [0, 1])
def test_rows_of_pi0_do_not_feel_each_other_in_the_target(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tmp_path: Path,
    pooling: str,
    missing: int,
) -> None:
    """In a padded batch, turned round, alone, and from a saved bridge; also without a camera."""
    two_cameras[1] = dataclasses.replace(
        two_cameras[1], images=two_cameras[1].images[: 2 - missing]
    )
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer, pooling=pooling)
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, bridge.target, bridge.sources)
    assert loaded.config == bridge.config
    cache = pi0.prefill(two_cameras)
    assert (cache.kinds == PositionKind.PAD).any()
    both = bridge.fuse_slots({"robot": cache}).past_key_values
    again = loaded.fuse_slots({"robot": cache}).past_key_values
    torch.testing.assert_close(again.layers[2].keys, both.layers[2].keys, rtol=0, atol=0)
    for rows in ([1, 0], [0], [1]):
        some = bridge.perceive([two_cameras[row] for row in rows])
        for got, expected in zip(some.past_key_values.layers, both.layers, strict=True):
            torch.testing.assert_close(got.keys, expected.keys[rows], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.values, expected.values[rows], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["resampler", "asked"])
def test_slots_that_actions_ask_look_elsewhere_when_it_acts_otherwise(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pooling: str,
) -> None:
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer, pooling=pooling)
    assert ("robot_slots_by_state_action" in bridge.fusers) == (pooling == "asked")
    look = two_cameras[0]
    other = dataclasses.replace(look, noise=torch.full((CHUNK, 8), 2.0))
    caches = [pi0.prefill([each]) for each in (look, other)]
    here = caches[0].kinds[0] == PositionKind.IMAGE
    for kv, again in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(kv.values[..., here, :], again.values[..., here, :])
    link = bridge.config.links[0]
    index = torch.arange(link.num_slots).unsqueeze(0)
    fuser = bridge.fusers[link.name]
    weights = [align_slots(link, fuser, cache, index).weights for cache in caches]  # type: ignore[arg-type]
    assert ((weights[0] - weights[1]).abs().max() > 1e-3) == (pooling == "asked")


def test_a_row_that_does_not_act_cannot_ask(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
) -> None:
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer, pooling="asked")
    cache = pi0.prefill(two_cameras)
    quiet = dataclasses.replace(cache, kinds=cache.kinds.clone())
    quiet.kinds[1, quiet.kinds[1] >= PositionKind.STATE] = PositionKind.TEMPLATE
    with pytest.raises(
        AlignmentError, match=r"row 1 of .* has no position of kind STATE or ACTION"
    ):
        bridge.fuse_slots({"robot": quiet})


def test_answering_from_pi0_leaves_its_actions_as_they_are(
    pi0: PI0Source,
    two_cameras: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
) -> None:
    bridge = robot_bridge(pi0, tiny_target, tiny_target_tokenizer)
    encoded = pi0._encode(two_cameras)
    del encoded["offset_mapping"]

    def read_and_answer() -> Any:
        seen = bridge.perceive(two_cameras)
        assert len(bridge.generate(seen, list(WORDS), max_new_tokens=3, do_sample=False)) == 2
        return pi0.prefill(two_cameras)

    assert_reading_changes_nothing(
        pi0.model, lambda: pi0.model.sample_actions(**encoded), read_and_answer
    )

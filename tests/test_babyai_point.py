"""Slots that a policy's actions ask, taught to look at what it goes for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.align import Alignment
from mm_c2c.cache import read_layers
from mm_c2c.link import align_slots
from mm_c2c.reference.babyai.levels import AGENT_CELL, Camera, seeds
from mm_c2c.reference.babyai.point import aims, teach
from mm_c2c.reference.babyai.questions import answers, in_view
from mm_c2c.reference.babyai.rollouts import POLICY, Episode, load_policy, look_again, roll_out
from mm_c2c.reference.babyai.warm_up_reader import ToldThings, take
from mm_c2c.reference.train_fuser import last_states
from mm_c2c.sources.action import TokenActionSource


@pytest.fixture(scope="module")
def policy() -> TokenActionSource:
    return load_policy(POLICY)


@pytest.fixture(scope="module")
def episodes(policy: TokenActionSource) -> list[Episode]:
    pytest.importorskip("minigrid", reason="episodes need minigrid: pip install mm-c2c[robot]")
    return list(roll_out(policy, "GoToLocal", seeds("train", 0, 12)))


def build(policy: TokenActionSource, target: Target, *, plain: bool) -> Bridge:
    """A slot that actions ask; before it, those of cells, or of words."""
    fuser = FuserConfig(source=policy.shape, target=target.shape, hidden_size=24, rank=12)
    links = (
        LinkConfig(source="p", geometry="slots", fuser=fuser, rows=7, cols=7),
        LinkConfig(
            source="p",
            geometry="slots",
            fuser=fuser,
            rows=1,
            cols=1,
            pooling="resampler",
            asking=() if plain else ("action",),
        ),
    )
    config = BridgeConfig(links=links[: 1 if plain else 2], slot_token="a")
    return Bridge(target, {"p": policy}, config)


@pytest.fixture
def target(tiny_target: Any, tiny_target_tokenizer: Any) -> Target:
    return Target(tiny_target, tiny_target_tokenizer, "tiny")


def test_an_aim_is_where_the_camera_shows_what_was_reached(episodes: list[Episode]) -> None:
    found = aims(episodes)
    assert len(found) > 20
    owners = {id(step): (e, n) for e in episodes for n, step in enumerate(e.steps)}
    several = 0
    for aim in found:
        episode, number = owners[id(aim.step)]
        goal = answers(episode, number)["object"]
        row, column = aim.cell
        place = (AGENT_CELL[1] - row, column - AGENT_CELL[0])
        assert (goal, *place) in in_view(aim.step)
        assert aim.texts[0] == aim.step.text
        _, past = aim.step.text.split(". past: ")
        for text in aim.texts[1:]:
            mission, said = text.split(". past: ")
            assert said == past
            assert goal not in mission
            several += 1
    assert several > 20


def test_slots_learn_to_look_at_it_whatever_the_instruction_says(
    policy: TokenActionSource, episodes: list[Episode], target: Target
) -> None:
    torch.manual_seed(0)
    bridge = build(policy, target, plain=False)
    link = bridge.config.links[1]
    other = {k: v.clone() for k, v in bridge.state_dict().items() if ".resampler." not in k}
    again = episodes * 4  # so that what is kept to measure on was learned from
    before, after = (
        teach(bridge, link, policy, again, steps=steps, batch_size=16, seed=0) for steps in (1, 40)
    )
    for name in ("true", "false"):
        assert before[name] < 0.3
        assert after[name] > 0.5
    state = bridge.state_dict()
    assert all(torch.equal(state[key], value) for key, value in other.items())


def test_a_saved_bridges_fusers_are_taken_where_links_are_alike(
    policy: TokenActionSource, target: Target, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    saved = build(policy, target, plain=True)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(2)
    bridge = build(policy, target, plain=False)
    own = bridge.fusers["p_slots_by_action"].resampler.queries.clone()  # type: ignore[union-attr, operator]
    assert take(bridge, None) == set()
    assert take(bridge, tmp_path) == {"p_slots"}
    for key, value in saved.fusers["p_slots"].state_dict().items():
        assert torch.equal(bridge.fusers["p_slots"].state_dict()[key], value)
    assert torch.equal(bridge.fusers["p_slots_by_action"].resampler.queries, own)  # type: ignore[union-attr]


@torch.no_grad()
def test_slots_that_look_at_a_thing_should_hold_what_naming_it_leaves(
    policy: TokenActionSource, target: Target, episodes: list[Episode]
) -> None:
    torch.manual_seed(0)
    fuser = FuserConfig(source=policy.shape, target=target.shape, hidden_size=24, rank=12)
    text = LinkConfig(source="p", geometry="slots", fuser=fuser, rows=1, cols=40, kinds=("text",))
    looking = replace(text, cols=2, kinds=(), pooling="resampler", asking=("action",))
    config = BridgeConfig(links=(text, looking), slot_token="a")
    bridge = Bridge(target, {"p": policy}, config).eval()
    for weight in bridge.parameters():
        weight.normal_(std=0.3)
    aim = next(aim for aim in aims(episodes) if len(in_view(aim.step)) > 2)
    things = ToldThings(bridge, policy, [aim.step, aim.step])
    cache = policy.prefill([look_again(policy, Camera(), aim.step)])
    at = (cache.patches[0, :, 1:] == torch.tensor(aim.cell)).all(1).nonzero().flatten()
    alignment = Alignment(
        source_index=at.expand(1, 2, -1),
        weights=torch.ones(1, 2, 1),
        target_index=torch.arange(2)[None],
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    found = things.wanted(cache, [aim.step], alignment)[0]
    goal = next(
        name
        for name, forward, right in in_view(aim.step)
        if (AGENT_CELL[1] - forward, AGENT_CELL[0] + right) == aim.cell
    )
    past = aim.step.text[aim.step.text.index(". past") :]
    expected = []
    for verb in ("go to", "pick up"):
        told = look_again(policy, Camera(), aim.step, f"{verb} the {goal}{past}")
        cache = policy.prefill([told])
        perception = bridge.fuse_slots({"p": cache})
        length = perception.input_ids.shape[1]
        layers, _ = read_layers(perception.past_key_values)
        rope = target.rope(length)
        states = last_states(layers, torch.arange(length)[None], rope, 42)[:40]
        order = align_slots(text, bridge.fusers["p_slots_text"], cache, torch.arange(40)[None])  # type: ignore[arg-type]
        words = [(cache.spans[0, i, 0] >= 0) for i in range(cache.seq_len)]
        assert sum(map(int, words)) <= 40  # a slot each, so that any slot of a word is the word's
        here = []
        for word in goal.split():
            start = told.text.index(word)
            (position,) = (cache.spans[0, :, 0] == start).nonzero().flatten().tolist()
            (slots,) = ((order.source_index == position) & (order.weights > 0.99)).any(2)
            here.append(states[slots.nonzero().flatten()[0]])
        expected.append(torch.stack(here))
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-4)

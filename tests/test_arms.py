"""What arms hand to the target, and what they read only once."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mm_c2c import Bridge, LinkConfig, SourceInput, Target
from mm_c2c.errors import ConfigError, MismatchError
from mm_c2c.evaluation.arms import Asked, Setting, build_arm, chat_inputs
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.sources.text import encode_chats


@pytest.fixture
def asked(pictures: list[Image.Image]) -> list[Asked]:
    return [
        Asked(SourceInput(text="go .", images=(picture,)), question)
        for picture, question in zip(pictures, ("what is left", "where is the cat"), strict=False)
    ]


def setting_of(bridge: Bridge) -> Setting:
    return Setting(bridge=bridge, source_name=SOURCE_NAME, request="Say.")


def relinked(bridge: Bridge, *geometries: str) -> Bridge:
    """The same models with other links, whose fusers write something."""
    (link,) = bridge.config.links
    links = tuple(replace(link, geometry=geometry) for geometry in geometries)
    other = Bridge(bridge.target, bridge.sources, replace(bridge.config, links=links)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.fusers.parameters():
            weight.normal_()
    return other


@pytest.mark.parametrize("geometries", [("aligned",), ("slots", "aligned")], ids=str)
def test_the_fused_arm_hands_over_words_that_both_have_read(
    bridge: Bridge, asked: list[Asked], geometries: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = relinked(bridge, *geometries)
    given: list[dict[str, Tensor]] = []
    generate = bridge.target.generate

    def note(inputs: Any, **kwargs: Any) -> Tensor:
        given.append({"ids": inputs["input_ids"], "keys": inputs["past_key_values"].layers[0].keys})
        return generate(inputs, **kwargs)

    monkeypatch.setattr(bridge.target, "generate", note)
    arm: Any = build_arm("fused", setting_of(bridge))
    arm.answer(asked)
    source = bridge.sources[SOURCE_NAME]
    questions = [f"go .\n{row.question}" for row in asked]
    seen = bridge.perceive([row.look for row in asked]) if "slots" in geometries else None
    heard = source.prefill([row.look_for(row.question) for row in asked])
    expected = bridge.fuse(seen, questions, {SOURCE_NAME: heard})
    assert given[0]["ids"].equal(expected["input_ids"])
    torch.testing.assert_close(given[0]["keys"], expected["past_key_values"].layers[0].keys)
    build_arm("zeroed", setting_of(bridge)).answer(asked)
    assert not given[1]["keys"].equal(given[0]["keys"])


def test_a_bridge_of_several_sources_is_not_judged_by_one(bridge: Bridge) -> None:
    (link,) = bridge.config.links
    sources = {**bridge.sources, "second": bridge.sources[SOURCE_NAME]}
    links = (link, LinkConfig(source="second", geometry="slots", fuser=link.fuser))
    both = Bridge(bridge.target, sources, replace(bridge.config, links=links))
    with pytest.raises(ConfigError, match=r"hands over what one source saw, 'stickers'.* second"):
        build_arm("fused", setting_of(both))


@pytest.mark.parametrize("name", ["blind", "caption_relay", "fused"])
def test_what_stands_before_every_prompt_is_read_once(
    bridge: Bridge, asked: list[Asked], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(bridge.config, system="look left . look left . look left .")
    bridge = Bridge(bridge.target, bridge.sources, config).eval()
    arm = build_arm(name, setting_of(bridge))
    read: list[int] = []
    lengths: list[int] = []
    forward, generate = bridge.target.model.forward, bridge.target.generate

    @functools.wraps(forward)
    def count(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(input_ids.shape[1])
        return forward(input_ids, *args, **kwargs)

    def note(inputs: Any, **kwargs: Any) -> Tensor:
        lengths.append(inputs["input_ids"].shape[1])
        return generate(inputs, **kwargs)

    monkeypatch.setattr(bridge.target.model, "forward", count)
    monkeypatch.setattr(bridge.target, "generate", note)
    before = len(bridge.prompt.before)
    arm.answer(asked[:1])
    assert read[0] >= before > 10
    read.clear()
    arm.answer(asked[1:])
    assert read[0] <= lengths[1] - before


def test_the_target_is_asked_in_its_chat_template(bridge: Bridge) -> None:
    """Word for word, whether what stands before the prompts was read already or not."""
    config = replace(bridge.config, system="look left .")
    bridge = Bridge(bridge.target, bridge.sources, config)
    prompts = ["what is left", "where is the cat or the dog"]
    for some in (prompts[:1], prompts[1:], prompts):
        inputs = chat_inputs(bridge, some)
        done = inputs["past_key_values"].get_seq_length()
        assert done == (len(bridge.prompt.before) if len(some) == 1 else 0)
        encoded, _ = encode_chats(bridge.target.tokenizer, some, bridge.device, config.system)
        assert inputs["input_ids"].equal(encoded["input_ids"])
        found = bridge.target.next_logits(inputs)
        expected = bridge.target.model(**encoded, **bridge.target.spared).logits[:, -1]
        torch.testing.assert_close(found, expected)


def test_a_bridge_stands_before_another_target_of_its_geometry(
    bridge: Bridge, asked: list[Asked], tiny_text_source: Any
) -> None:
    bridge = relinked(bridge, "slots")
    looks = [row.look for row in asked]
    questions = [row.question for row in asked]
    before = bridge.fuse(bridge.perceive(looks), questions)
    other = type(bridge.target.model)(bridge.target.model.config).eval()
    moved = bridge.onto(Target(other, bridge.target.tokenizer, "other"))
    after = moved.fuse(moved.perceive(looks), questions)
    assert not torch.equal(*(f["past_key_values"].layers[0].values for f in (before, after)))
    again = bridge.fuse(bridge.perceive(looks), questions)
    assert torch.equal(*(f["past_key_values"].layers[0].values for f in (before, again)))
    assert moved.fusers is bridge.fusers
    with pytest.raises(MismatchError, match="the target"):
        bridge.onto(Target(tiny_text_source, bridge.target.tokenizer, "other"))

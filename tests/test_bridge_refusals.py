"""What a bridge cannot be asked, and what it cannot be built from."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from bridge_rigs import (
    EYES,
    QUESTIONS,
    SLOT,
    Rig,
)
from PIL import Image
from tiny_vlm import TinyVLM

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import CacheOrigin, with_layers
from mm_c2c.errors import (
    ConfigError,
    InputError,
    MismatchError,
    ShapeError,
)
from mm_c2c.sources import SourceInput
from mm_c2c.sources.vlm import VLMSource


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(rig: Rig, question: str) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        rig.bridge([EYES]).fuse(None, ["fine ?", question])


def test_no_question_at_all_is_refused(rig: Rig) -> None:
    with pytest.raises(InputError, match="at least one question"):
        rig.bridge([EYES]).fuse(None, [])


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (QUESTIONS[0], "expected a list of questions, got 'is it red"),
        ((q for q in QUESTIONS), r"expected a list of questions, got .*\(generator\)"),
        ([[QUESTIONS[0]]], r"a question must be a text, got \['is it red"),
        ([3], "a question must be a text, got 3"),
    ],
)
def test_what_is_no_list_of_questions_is_refused(rig: Rig, questions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rig.bridge([EYES]).fuse(None, questions)


@pytest.mark.parametrize("wrong", ["cache", "picture"])
def test_what_was_not_perceived_is_refused(rig: Rig, wrong: str) -> None:
    bridge = rig.bridge([EYES])
    perception: Any = bridge.perceive(rig.pictures)
    perception = {"cache": perception.past_key_values, "picture": rig.pictures[0]}[wrong]
    with pytest.raises(InputError, match=r"expected what Bridge\.perceive returns, or None, got a"):
        bridge.fuse(perception, QUESTIONS)


def test_what_was_perceived_for_another_target_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    fewer = with_layers(perception.past_key_values, {})
    del fewer.layers[-1:]
    with pytest.raises(MismatchError, match=r"perception is of another target: expected .*got"):
        bridge.fuse(perception._replace(past_key_values=fewer), QUESTIONS)


def test_caches_without_their_sources_names_are_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    cache: Any = rig.sources["eyes"].prefill([SourceInput(images=(rig.pictures[0],))])
    for give in (bridge.fuse_slots, partial(bridge.fuse, None, QUESTIONS)):
        with pytest.raises(InputError, match=r"expected caches by the names .*\(.*eyes"):
            give(cache)


def test_a_text_that_is_none_is_refused(rig: Rig) -> None:
    text: Any = None
    with pytest.raises(InputError, match="text must be a text, got None"):
        rig.bridge([EYES]).perceive(rig.pictures, text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": 3}, "text must be a text, got 3"),
        ({"images": Image.new("RGB", (4, 4))}, r"write images=\(picture,\)"),
        ({"images": ("a.png",)}, "images must hold PIL pictures, got a str; open files by"),
        ({"images": (np.zeros((4, 4, 3)),)}, "images must hold PIL pictures, got a ndarray"),
    ],
)
def test_an_input_of_the_wrong_kind_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SourceInput(**given)


def test_rows_and_questions_must_agree_in_number(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    with pytest.raises(ShapeError, match="2 perceived rows cannot answer 3 questions"):
        bridge.fuse(perception, ["a ?", "b ?", "c ?"])


def test_sources_must_agree_in_number_of_rows(rig: Rig) -> None:
    bridge = rig.bridge([EYES, ("second", "slots")])
    inputs = [SourceInput(images=(p,)) for p in rig.pictures]
    caches = {
        "eyes": rig.sources["eyes"].prefill(inputs),
        "second": rig.sources["second"].prefill(inputs[:1]),
    }
    with pytest.raises(ShapeError, match=r"differ in batch size: \[1, 2\]"):
        bridge.fuse_slots(caches)


@pytest.mark.parametrize(("images", "found"), [(1, 2), (2, 3)])
def test_more_pictures_than_the_slots_hold_are_refused(rig: Rig, images: int, found: int) -> None:
    bridge = rig.bridge([EYES], images=images)
    shown = [tuple(rig.pictures * 2)[:count] for count in (images, found)]
    cache = rig.sources["eyes"].prefill([SourceInput(images=pictures) for pictures in shown])
    message = (
        f"row 1 of source 'eyes' has {found} pictures, its slots hold {images}; show it no more, "
        f"or build the link with images={found}"
    )
    with pytest.raises(ShapeError, match=message):
        bridge.fuse_slots({"eyes": cache})


def test_slots_for_pictures_of_a_source_without_pictures_are_refused(rig: Rig) -> None:
    with pytest.raises(ConfigError, match=r"source 'reader' reads words only .* 'aligned', or kin"):
        rig.bridge([("reader", "slots")])
    link = replace(rig.link("reader", "slots"), kinds=("text",), rows=1)
    config = BridgeConfig(links=(link,), slot_token=SLOT)
    cache = rig.sources["reader"].prefill([SourceInput(text="words only")])
    Bridge(rig.target, rig.sources, config).fuse_slots({"reader": cache})


def test_a_cache_of_another_question_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([("reader", "aligned")])
    caches = rig.caches(bridge, ["something else ?", QUESTIONS[1]])
    with pytest.raises(InputError, match=r"'reader' read 'something else \?', not 'is it red \?'"):
        bridge.fuse(None, QUESTIONS, caches)


def test_a_cache_of_fewer_questions_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([("reader", "aligned")])
    caches = rig.caches(bridge, QUESTIONS[:1], [0])
    with pytest.raises(ShapeError, match="source 'reader' has 1 rows for 2 questions"):
        bridge.fuse(None, QUESTIONS, caches)


def test_a_cache_under_an_unknown_name_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    cache = rig.sources["eyes"].prefill([SourceInput(images=(rig.pictures[0],))])
    with pytest.raises(ConfigError, match=r"no source named \['eye'\]; known: eyes"):
        bridge.fuse_slots({"eye": cache})
    with pytest.raises(ConfigError, match=r"no source named \['eye'\]"):
        bridge.fuse(None, QUESTIONS, {"eye": cache})


def test_a_cache_of_another_geometry_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    other = rig.sources["second"].prefill([SourceInput(images=(rig.pictures[0],))])
    other = replace(other, origin=rig.sources["eyes"].origin)
    with pytest.raises(MismatchError, match="the cache of source 'eyes': the fuser was made for"):
        bridge.fuse_slots({"eyes": other})


def test_a_cache_that_another_model_wrote_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES, ("reader", "aligned")])
    looks = [SourceInput(images=(picture,)) for picture in rig.pictures]
    alien = CacheOrigin("someone/other", "r9", "other")
    eyes = replace(rig.sources["eyes"].prefill(looks), origin=alien)
    with pytest.raises(
        MismatchError, match=r"cache of source 'eyes': .*got 'someone/other' at 'r9"
    ):
        bridge.fuse_slots({"eyes": eyes})
    words = {"reader": replace(rig.caches(bridge)["reader"], origin=alien)}
    with pytest.raises(MismatchError, match=r"the cache of source 'reader': .* 'tiny/text'"):
        bridge.fuse(None, QUESTIONS, words)
    with pytest.raises(MismatchError, match=r"the cache of source 'reader': .* 'tiny/text'"):
        bridge.fuse_words(bridge.read_questions(QUESTIONS), words)


def test_slots_kept_of_an_unknown_link_are_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES, ("reader", "aligned")])
    for name in ("eyes_slot", "reader_aligned"):
        keep = {name: torch.zeros(2, 6, dtype=torch.bool)}
        with pytest.raises(ConfigError, match=rf"no link .* named \['{name}'\]; known: eyes_slots"):
            bridge.fuse_slots({}, keep)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one picture or SourceInput, got an empty list"),
        ("photo.png", "got a str; open a file by mm_c2c.images.load_image"),
        (None, "got a NoneType; open a file by mm_c2c.images.load_image"),
        (["photo.png"], "row 0: expected a PIL picture or a SourceInput, got a str"),
        ([np.zeros((4, 4, 3), np.uint8)], "got a ndarray; .*array by PIL.Image.fromarray"),
    ],
)
def test_only_pictures_are_perceived(rig: Rig, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rig.bridge([EYES]).perceive(given)


def test_a_bridge_without_slots_perceives_nothing(rig: Rig) -> None:
    message = "has slots for what is perceived; ask by fuse(None, questions, caches)"
    with pytest.raises(InputError, match=re.escape(message)):
        rig.bridge([("eyes", "aligned")]).perceive(rig.pictures, "is it red ?")


def test_settings_that_cannot_be_built_from_are_refused(rig: Rig) -> None:
    link = rig.link(*EYES)
    with pytest.raises(ConfigError, match=r"without a dot, got 'qwen2\.5': .* say 'qwen2_5'"):
        replace(link, source="qwen2.5")
    with pytest.raises(ConfigError, match="geometry must be one of slots, aligned, got 'slot'"):
        replace(link, geometry="slot")
    with pytest.raises(ConfigError, match="pooling must be one of window, resampler, got 'mean'"):
        replace(link, pooling="mean")
    for name in ("rows", "cols", "images"):
        with pytest.raises(ConfigError, match=f"^{name} must be at least 1, got 0"):
            replace(link, **{name: 0})
    with pytest.raises(ConfigError, match="'aligned' has none, got 2; leave images at 1"):
        replace(link, geometry="aligned", images=2)
    for kinds in (("states",), ("pad",), ("state", "state")):
        with pytest.raises(ConfigError, match=f"some of template, text, .*, got {kinds[0]}"):
            replace(link, kinds=kinds, rows=1)
    line = replace(link, kinds=("state", "action"), rows=1)
    assert (line.name, line.num_slots) == ("eyes_slots_state_action", 3)
    for change in ({"rows": 2}, {"images": 2}, {"geometry": "aligned"}):
        with pytest.raises(ConfigError, match="state and action stand in one line: expected geom"):
            replace(line, **change)
    with pytest.raises(ConfigError, match="'aligned' has none; leave pooling at 'window'"):
        replace(link, geometry="aligned", pooling="resampler")
    asked = replace(link, pooling="resampler", asking=("action",))
    assert asked.name == "eyes_slots_by_action"
    with pytest.raises(ConfigError, match=r"asking must be some of template, .*, got actions"):
        replace(asked, asking=("actions",))
    with pytest.raises(ConfigError, match="got pooling 'window'; set pooling to 'resampler'"):
        replace(asked, pooling="window")
    for links in ((), (link, link)):
        with pytest.raises(ConfigError, match="expected one link or more, no two alike"):
            BridgeConfig(links=links)
    config = BridgeConfig(links=(link,), slot_token=SLOT)
    with pytest.raises(ConfigError, match=r"names source 'eyes'; sources given: \['reader'\]"):
        Bridge(rig.target, {"reader": rig.sources["reader"]}, config)
    with pytest.raises(ConfigError, match=r"slot_token ' xylophone' is [0-9]+ tokens"):
        Bridge(rig.target, rig.sources, replace(config, slot_token=" xylophone"))
    with pytest.raises(MismatchError, match="source 'eyes': the fuser was made for"):
        Bridge(rig.target, {"eyes": rig.sources["second"]}, config)


def test_a_cache_that_no_link_would_read_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES, ("reader", "aligned")])
    eyes = rig.sources["eyes"].prefill([SourceInput(images=(rig.pictures[0],))])
    words = rig.sources["reader"].prefill([SourceInput(text=QUESTIONS[0])])
    with pytest.raises(ConfigError, match=r"'eyes' has no aligned link: .* to fuse_slots"):
        bridge.generate(None, QUESTIONS[:1], {"eyes": eyes})
    with pytest.raises(ConfigError, match=r"'reader' has no slots link: .* in fuse"):
        bridge.fuse_slots({"reader": words})


@pytest.mark.parametrize("mark", ["<image>", "what <image> is it ?"])
def test_a_mark_of_a_picture_in_a_text_is_refused(
    tiny_llava: TinyVLM, pictures: list[Image.Image], mark: str
) -> None:
    source = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny-llava")
    shown = SourceInput(text=mark, images=tuple(pictures[:1]))
    for read in (source.prefill, source.generate):
        with pytest.raises(InputError, match=r"row 0: .* takes <image> in a text for a"):
            read([shown])

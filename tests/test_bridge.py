"""The bridge: closed it is the target alone, open it is a plain loop, and files only fit their models."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_all, patch_coordinates
from mm_c2c.bridge import Bridge, BridgeConfig, FusedInputs
from mm_c2c.cache import LayerKV, PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import (
    AlignmentError,
    ConfigError,
    InputError,
    MismatchError,
    ShapeError,
    UnsupportedError,
)
from mm_c2c.fuser import FuserConfig
from mm_c2c.link import LinkConfig
from mm_c2c.rope import RopeSpec, derotate, rotate
from mm_c2c.sources import SourceInput
from mm_c2c.sources.text import TextSource
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.sources.vlm_families import PaliGemmaSource
from mm_c2c.target import Target

QUESTIONS = ("is it red ?", "Which sticker is above the apple ? answer with one word :")
EYES = ("eyes", "slots")
ATTENTIVE_EYES = (*EYES, "resampler")
GEOMETRIES: dict[str, list[tuple[str, ...]]] = {
    "slots": [EYES],
    "resampled slots": [ATTENTIVE_EYES],
    "aligned": [("eyes", "aligned")],
    "both": [EYES, ("reader", "aligned")],
}
SLOT = "a"  # one token in any byte-level vocabulary
EACH_GEOMETRY = pytest.mark.parametrize("geometry", list(GEOMETRIES))
EACH_POOLING = pytest.mark.parametrize(
    "eyes_link", [EYES, ATTENTIVE_EYES], ids=["window", "resampler"]
)


class Rig:
    """A target, its sources and the bridges between them, over one pair of pictures."""

    def __init__(self, target: Target, sources: dict[str, Any], pictures: list[Image.Image]):
        self.target = target
        self.sources = sources
        self.pictures = pictures

    def link(self, source: str, geometry: str, pooling: str = "window", **fuser: Any) -> LinkConfig:
        shapes = {"source": self.sources[source].shape, "target": self.target.shape}
        return LinkConfig(
            source=source,
            geometry=geometry,
            fuser=FuserConfig(**{**shapes, "hidden_size": 16, "rank": 8, **fuser}),
            rows=2,
            cols=3,
            pooling=pooling,
        )

    def bridge(
        self,
        links: Sequence[tuple[str, ...]],
        *,
        fresh: bool = False,
        images: int = 1,
        **fuser: Any,
    ) -> Bridge:
        """A bridge with random weights; the same links get the same weights."""
        config = BridgeConfig(
            links=tuple(replace(self.link(*link, **fuser), images=images) for link in links),
            slot_token=SLOT,
        )
        bridge = Bridge(self.target, self.sources, config)
        if not fresh:
            for module in bridge.fusers.values():
                generator = torch.Generator().manual_seed(3)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return bridge.eval()

    def caches(
        self, bridge: Bridge, questions: Sequence[str] = QUESTIONS, rows: Sequence[int] = (0, 1)
    ) -> dict[str, SourceCache]:
        """The sources' caches of the same questions (and pictures) for the aligned links."""
        named = {link.source for link in bridge.config.links if link.geometry == "aligned"}
        inputs = [
            SourceInput(text=question, images=(self.pictures[row],))
            for question, row in zip(questions, rows, strict=True)
        ]
        texts = [SourceInput(text=question) for question in questions]
        return {
            name: self.sources[name].prefill(texts if name == "reader" else inputs)
            for name in named
        }

    @torch.no_grad()
    def fuse(
        self, bridge: Bridge, questions: Sequence[str] = QUESTIONS, rows: Sequence[int] = (0, 1)
    ) -> FusedInputs:
        """All that a bridge has to say about the pictures of some rows."""
        perception = None
        if any(link.num_slots for link in bridge.config.links):
            perception = bridge.perceive([self.pictures[row] for row in rows])
        return bridge.fuse(perception, questions, self.caches(bridge, questions, rows))


class LazySources(dict[str, Any]):
    """Sources that are built when first asked for: a test pays for those it uses."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self.request = request

    def __missing__(self, name: str) -> Any:
        get = self.request.getfixturevalue
        if name == "eyes":
            vlm = get("tiny_llava")
            self[name] = VLMSource(vlm.model, vlm.processor, "tiny/llava", "e1")
        elif name == "second":
            vlm = get("tiny_paligemma")
            self[name] = PaliGemmaSource(vlm.model, vlm.processor, "tiny/pali")
        else:
            tokenizer = get("tiny_text_source_tokenizer")
            self[name] = TextSource(get("tiny_text_source"), tokenizer, "tiny/text")
        return self[name]


@pytest.fixture
def rig(
    request: pytest.FixtureRequest,
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pictures: list[Image.Image],
) -> Rig:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny/target", "t1")
    return Rig(target, LazySources(request), pictures)


def close(bridge: Bridge) -> Bridge:
    for fuser in bridge.fusers.values():
        fuser.close()
    return bridge


def repeated(cache: Cache, times: int) -> DynamicCache:
    """A cache of its own, each row `times` times, made without the library."""
    new = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            torch.stack([x[row] for row in range(x.shape[0]) for _ in range(times)])
            for x in (layer.keys, layer.values)
        )
        new.update(keys, values, index)
    return new


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def read_on(model: Any, fused: FusedInputs) -> Tensor:
    """Logits of the positions that the cache does not cover; the cache is not grown."""
    cache = repeated(fused["past_key_values"], 1)
    done = cache.get_seq_length()
    return model(
        fused["input_ids"][:, done:],
        attention_mask=fused["attention_mask"],
        position_ids=positions(fused["attention_mask"])[:, done:],
        past_key_values=cache,
    ).logits


@torch.no_grad()
def target_alone(model: Any, fused: FusedInputs, prefix_len: int) -> FusedInputs:
    """The same inputs with the target's own cache, prefilled in the same pieces.

    Pieces of another length would round differently, and bit for bit could not be asked.
    """
    ids, mask = fused["input_ids"], fused["attention_mask"]
    first = DynamicCache()
    model(ids[:1, :prefix_len], past_key_values=first)
    cache = repeated(first, len(ids))
    done = fused["past_key_values"].get_seq_length()
    if done > prefix_len:
        model(
            ids[:, prefix_len:done],
            attention_mask=mask[:, :done],
            position_ids=positions(mask)[:, prefix_len:done],
            past_key_values=cache,
        )
    return FusedInputs(input_ids=ids, attention_mask=mask, past_key_values=cache)


def prefix_len(bridge: Bridge, fused: FusedInputs) -> int:
    question_len = bridge.prompt.read(QUESTIONS).input_ids.shape[1]
    return fused["input_ids"].shape[1] - question_len


def assert_same_cache(got: Cache, expected: Cache, **tolerance: float) -> None:
    assert len(got.layers) == len(expected.layers)
    for one, other in zip(got.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **tolerance)
        torch.testing.assert_close(one.values, other.values, **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# --- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["fresh", "closed"])
@pytest.mark.parametrize("training", [True, False])
@EACH_GEOMETRY
def test_a_bridge_that_says_nothing_leaves_the_target_untouched(
    rig: Rig, geometry: str, training: bool, state: str
) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry], fresh=state == "fresh").train(training)
    if state == "closed":
        close(bridge)
    fused = rig.fuse(bridge)
    own = target_alone(rig.target.model, fused, prefix_len(bridge, fused))
    assert_same_cache(fused["past_key_values"], own["past_key_values"], **EXACT)
    torch.testing.assert_close(
        read_on(rig.target.model, fused), read_on(rig.target.model, own), **EXACT
    )


@pytest.mark.parametrize("gate", ["sigmoid", "straight_through"])
@EACH_GEOMETRY
def test_a_closed_bridge_answers_what_the_target_answers_from_the_bare_tokens(
    rig: Rig, geometry: str, gate: str
) -> None:
    bridge = close(rig.bridge(GEOMETRIES[geometry], gate=gate))
    fused = rig.fuse(bridge)
    perception = None if geometry == "aligned" else bridge.perceive(rig.pictures)
    got = bridge.generate(perception, QUESTIONS, rig.caches(bridge), max_new_tokens=6)
    ids, mask = fused["input_ids"], fused["attention_mask"]
    with torch.no_grad():
        plain = rig.target.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    logits = read_on(rig.target.model, fused)
    torch.testing.assert_close(logits[:, -1], plain[:, -1], **CLOSE)
    out = rig.target.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6)
    expected = rig.target.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert got == expected
    assert any(got)


@EACH_GEOMETRY
def test_an_open_bridge_is_heard(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    opened = read_on(rig.target.model, rig.fuse(bridge))
    closed = read_on(rig.target.model, rig.fuse(close(bridge)))
    assert ((opened - closed)[:, -1].abs().amax(1) > 0.01).all()


def test_the_prompt_is_the_chat_template_around_slots_and_question(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    fused = rig.fuse(bridge)
    tokenizer = rig.target.tokenizer
    for row, question in enumerate(QUESTIONS):
        real = fused["input_ids"][row][fused["attention_mask"][row] == 1]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": SLOT * 6 + "\n" + question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert tokenizer.decode(real) == expected


# --- fast path and slow path ------------------------------------------------------------------


def turn(vector: Tensor, position: int, spec: RopeSpec | None, sign: int) -> Tensor:
    """Rotate one head's vector pair by pair."""
    if spec is None:
        return vector
    out, half = vector.clone(), len(spec.inv_freq)
    for pair, frequency in enumerate(spec.inv_freq):
        angle = torch.tensor(sign * position * frequency)
        first, second = vector[pair], vector[pair + half]
        out[pair] = first * angle.cos() - second * angle.sin()
        out[pair + half] = second * angle.cos() + first * angle.sin()
    return out


def slow_write(
    bridge: Bridge,
    link: LinkConfig,
    source: SourceCache,
    alignment: Alignment,
    cache: Cache,
    target_positions: Tensor,
) -> list[LayerKV]:
    """`Bridge._write`, one row, one target position and one head at a time."""
    raw, shapes = link.fuser.raw_keys, link.fuser
    own_rope = [None] * shapes.target.num_layers if raw else bridge.target.rope(64)
    source_rope = [None] * shapes.source.num_layers if raw else source.rope
    new = [LayerKV(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for row in range(len(alignment.mask)):
        for slot in range(alignment.mask.shape[1]):
            if not alignment.mask[row, slot]:
                continue
            place = int(alignment.target_index[row, slot])
            here = int(target_positions[row, place])
            heard = torch.zeros(shapes.source.num_layers, 1, 1, 2, shapes.source.width)
            for index, weight in zip(
                alignment.source_index[row, slot].tolist(),
                alignment.weights[row, slot].tolist(),
                strict=True,
            ):
                there = int(source.position_ids[row, index])
                for layer, (keys, values) in enumerate(source.layers):
                    bare = [turn(k, there, source_rope[layer], -1) for k in keys[row, :, index]]
                    heard[layer, 0, 0, 0] += weight * torch.cat(bare)
                    heard[layer, 0, 0, 1] += weight * values[row, :, index].flatten()
            own = torch.zeros(shapes.target.num_layers, 1, 1, 2, shapes.target.width)
            for layer, kv in enumerate(cache.layers):
                bare = [turn(k, here, own_rope[layer], -1) for k in kv.keys[row, :, place]]
                own[layer, 0, 0, 0] = torch.cat(bare)
                own[layer, 0, 0, 1] = kv.values[row, :, place].flatten()
            difference = bridge.fusers[link.name](heard, own)[:, 0, 0]
            for layer, (keys, values) in enumerate(new):
                for head in range(shapes.target.num_key_value_heads):
                    begin = head * shapes.target.head_dim
                    part = difference[layer, :, begin : begin + shapes.target.head_dim]
                    keys[row, head, place] += turn(part[0], here, own_rope[layer], 1)
                    values[row, head, place] += part[1]
    return new


@pytest.mark.parametrize("preset", ["small", "c2c"])
@pytest.mark.parametrize("raw_keys", [True, False])
@pytest.mark.parametrize(
    "links",
    [
        [EYES],
        [ATTENTIVE_EYES],
        [("second", "slots"), ("eyes", "aligned")],
        [("reader", "aligned")],
    ],
)
def test_writing_equals_a_plain_loop_over_rows_layers_slots_and_heads(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    links: list[tuple[str, ...]],
    raw_keys: bool,
    preset: str,
) -> None:
    bridge = rig.bridge(links, raw_keys=raw_keys, preset=preset, layers="proportional")
    fast, calls = bridge._write, []

    def spy(*args: Any) -> Cache:
        calls.append((args, fast(*args)))
        return calls[-1][1]

    monkeypatch.setattr(bridge, "_write", spy)
    rig.fuse(bridge)
    assert [args[0].name for args, _ in calls] == [link.name for link in bridge.config.links]
    for args, got in calls:
        with torch.no_grad():
            expected = slow_write(bridge, *args)
        for layer, own, (keys, values) in zip(got.layers, args[3].layers, expected, strict=True):
            assert (keys - own.keys).abs().max() > 0.01
            torch.testing.assert_close(layer.keys, keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.values, values, rtol=1e-4, atol=1e-5)


def test_slots_average_the_windows_of_the_grid(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    cache = rig.sources["eyes"].prefill([SourceInput(images=(p,)) for p in rig.pictures])
    grid = PatchGrid(4, 4)
    is_patch = cache.patches[..., 0] >= 0
    pooled = []
    for keys, values in cache.layers:
        bare = derotate(keys, cache.position_ids, cache.rope[0])
        windows = []
        for states in (bare, values):
            rows = [states[row][:, is_patch[row]] for row in range(2)]
            image = torch.stack(rows).transpose(2, 3).flatten(1, 2).unflatten(2, grid[:2])
            windows.append(torch.nn.functional.adaptive_avg_pool2d(image, (2, 3)))
        pooled.append(torch.stack([w.flatten(2).transpose(1, 2) for w in windows], dim=2))
    seen: list[Tensor] = []
    handle = bridge.fusers["eyes_slots"].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    bridge.fuse_slots({"eyes": cache})
    handle.remove()
    torch.testing.assert_close(seen[0], torch.stack(pooled), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("raw_keys", [True, False])
def test_a_resampler_reads_keys_and_values_of_every_layer(rig: Rig, raw_keys: bool) -> None:
    bridge = rig.bridge([ATTENTIVE_EYES], raw_keys=raw_keys)
    cache = rig.sources["eyes"].prefill([SourceInput(images=(p,)) for p in rig.pictures])
    states = torch.zeros(2, cache.seq_len, 4, 2, 4, 6)
    for layer, (keys, values) in enumerate(cache.layers):
        bare = keys if raw_keys else derotate(keys, cache.position_ids, cache.rope[layer])
        states[:, :, layer, 0] = bare.transpose(1, 2)
        states[:, :, layer, 1] = values.transpose(1, 2)
    resampler = bridge.fusers["eyes_slots"].resampler
    slots = torch.arange(6).expand(2, -1)
    expected = resampler(states.flatten(2), patch_coordinates(cache), align_all(cache, 6, slots))
    seen: list[Tensor] = []
    handle = bridge.fusers["eyes_slots"].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    bridge.fuse_slots({"eyes": cache})
    handle.remove()
    heard = expected.gather(states.flatten(2)).unflatten(2, (4, 2, -1)).permute(2, 0, 1, 3, 4)
    torch.testing.assert_close(seen[0], heard, rtol=1e-4, atol=1e-5)
    assert expected.weights.amax(2).min() > 1.05 / 16  # no slot merely averages


def test_target_layers_that_are_not_fed_stay_as_they_are(rig: Rig) -> None:
    bridge = rig.bridge([EYES], layers="explicit", pairs=((1, 3),))
    fused = rig.fuse(bridge)
    own = target_alone(rig.target.model, fused, prefix_len(bridge, fused))["past_key_values"]
    for index, (layer, alone) in enumerate(
        zip(fused["past_key_values"].layers, own.layers, strict=True)
    ):
        same = torch.equal(layer.keys, alone.keys) and torch.equal(layer.values, alone.values)
        assert same == (index != 1)


# --- positions --------------------------------------------------------------------------------


def moved(cache: SourceCache, by: int) -> SourceCache:
    """The same understanding, read at later positions."""
    later = cache.position_ids + by
    layers = tuple(
        LayerKV(rotate(derotate(kv.keys, cache.position_ids, spec), later, spec), kv.values)
        for kv, spec in zip(cache.layers, cache.rope, strict=True)
    )
    return replace(cache, layers=layers, position_ids=later)


@EACH_POOLING
@pytest.mark.parametrize("raw_keys", [True, False])
def test_only_raw_keys_depend_on_where_the_image_stood(
    rig: Rig, raw_keys: bool, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link], raw_keys=raw_keys)
    cache = rig.sources["eyes"].prefill([SourceInput(images=(p,)) for p in rig.pictures])
    with torch.no_grad():
        here = bridge.fuse_slots({"eyes": cache}).past_key_values
        there = bridge.fuse_slots({"eyes": moved(cache, 7)}).past_key_values
    if raw_keys:
        assert (here.layers[1].values - there.layers[1].values).abs().max() > 1e-3
    else:
        assert_same_cache(here, there, **CLOSE)


@EACH_GEOMETRY
def test_decoding_step_by_step_equals_one_forward_over_the_fused_cache(
    rig: Rig, geometry: str
) -> None:
    fused = rig.fuse(rig.bridge(GEOMETRIES[geometry]))
    more = torch.randint(5, 100, (2, 4), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([fused["input_ids"], more], dim=1)
    mask = torch.cat([fused["attention_mask"], torch.ones_like(more)], dim=1)
    longer = FusedInputs(
        input_ids=ids, attention_mask=mask, past_key_values=fused["past_key_values"]
    )
    at_once = read_on(rig.target.model, longer)
    cache = repeated(fused["past_key_values"], 1)
    steps = []
    with torch.no_grad():
        for end in range(cache.get_seq_length() + 1, ids.shape[1] + 1):
            out = rig.target.model(
                ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                position_ids=positions(mask)[:, end - 1 : end],
                past_key_values=cache,
            )
            steps.append(out.logits)
    real = mask[:, -at_once.shape[1] :] == 1
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], at_once[real], **CLOSE)


@EACH_GEOMETRY
def test_a_padded_row_gives_what_the_row_alone_gives(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    both = rig.fuse(bridge)
    assert (both["attention_mask"] == 0).any()
    logits = read_on(rig.target.model, both)
    for row, question in enumerate(QUESTIONS):
        alone = rig.fuse(bridge, [question], [row])
        assert (alone["attention_mask"] == 1).all()
        expected = read_on(rig.target.model, alone)[0, -1]
        torch.testing.assert_close(logits[row, -1], expected, **CLOSE)


@EACH_GEOMETRY
def test_the_order_of_the_batch_does_not_matter(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    forward = read_on(rig.target.model, rig.fuse(bridge))
    backward = read_on(rig.target.model, rig.fuse(bridge, QUESTIONS[::-1], [1, 0]))
    torch.testing.assert_close(backward.flip(0)[:, -1], forward[:, -1], **CLOSE)


def test_another_pictures_cache_changes_the_answer(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    cache = rig.sources["eyes"].prefill([SourceInput(images=(p,)) for p in rig.pictures])
    own, shuffled = (
        read_on(rig.target.model, bridge.fuse(bridge.fuse_slots({"eyes": c}), QUESTIONS))
        for c in (cache, cache.select(torch.tensor([1, 0])))
    )
    assert ((own - shuffled)[:, -1].abs().amax(1) > 1e-4).all()


# --- perceive once, ask often; several sources ------------------------------------------------


def test_one_look_serves_many_questions(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    calls: list[int] = []
    for module in (rig.sources["eyes"].model, rig.sources["eyes"].model.get_decoder()):
        module.register_forward_hook(lambda *_: calls.append(1))
    perception = bridge.perceive(rig.pictures[0])
    assert calls
    before = repeated(perception.past_key_values, 1)
    calls.clear()
    together = bridge.generate(perception, QUESTIONS, max_new_tokens=5)
    apart = [bridge.generate(perception, [q], max_new_tokens=5)[0] for q in QUESTIONS]
    assert not calls  # the source was not asked again
    assert together == apart
    assert_same_cache(perception.past_key_values, before, **EXACT)


def test_a_question_does_not_spoil_the_cache_for_the_next(rig: Rig) -> None:
    bridge = rig.bridge([EYES, ("reader", "aligned")])
    perception = bridge.perceive(rig.pictures)
    first = bridge.generate(perception, QUESTIONS, rig.caches(bridge), max_new_tokens=5)
    bridge.generate(perception, ["something else ?"] * 2, max_new_tokens=5, num_beams=2)
    assert bridge.generate(perception, QUESTIONS, rig.caches(bridge), max_new_tokens=5) == first


def test_two_sources_stand_side_by_side_and_a_missing_one_is_left_out(rig: Rig) -> None:
    links = [EYES, ("second", "slots")]
    bridge = rig.bridge(links)
    inputs = [SourceInput(images=(p,)) for p in rig.pictures]
    caches = {name: rig.sources[name].prefill(inputs) for name, _ in links}
    both = bridge.fuse_slots(caches)
    for name, geometry in links:
        alone = bridge.fuse_slots({name: caches[name]})
        assert alone.input_ids.shape[1] == both.input_ids.shape[1] - 6
        single = rig.bridge([(name, geometry)]).fuse_slots({name: caches[name]})
        torch.testing.assert_close(alone.input_ids, single.input_ids)
        assert_same_cache(alone.past_key_values, single.past_key_values, **CLOSE)
    closed = close(rig.bridge(links)).fuse_slots(caches)
    changed = (
        both.past_key_values.layers[2].values - closed.past_key_values.layers[2].values
    ).abs()
    assert (changed.amax((0, 1, 3))[-12:] > 0).all()
    assert (changed.amax((0, 1, 3))[:-12] == 0).all()


@pytest.mark.parametrize("name", ["eyes", "second", "reader"])
def test_aligned_links_change_the_words_and_nothing_before_them(rig: Rig, name: str) -> None:
    bridge = rig.bridge([(name, "aligned")])
    fused = rig.fuse(bridge)
    own = target_alone(rig.target.model, fused, prefix_len(bridge, fused))["past_key_values"]
    assert fused["past_key_values"].get_seq_length() == fused["input_ids"].shape[1] - 1
    for row, question in enumerate(QUESTIONS):
        change = fused["past_key_values"].layers[1].values[row] - own.layers[1].values[row]
        places = (change.abs().amax((0, 2)) > 0).nonzero().flatten().tolist()
        words = rig.target.tokenizer.decode(fused["input_ids"][row, places[:-1]])
        assert words.strip() == question
        assert places[-1] == own.get_seq_length() - 1  # where the answer starts


def test_slots_and_words_add_up(rig: Rig) -> None:
    bridge = rig.bridge(GEOMETRIES["both"])
    perception = bridge.perceive(rig.pictures)
    with_words = read_on(rig.target.model, bridge.fuse(perception, QUESTIONS, rig.caches(bridge)))[
        :, -1
    ]
    slots_only = read_on(rig.target.model, bridge.fuse(perception, QUESTIONS))[:, -1]
    words_only = read_on(rig.target.model, bridge.fuse(None, QUESTIONS, rig.caches(bridge)))[:, -1]
    single = rig.bridge([EYES])
    torch.testing.assert_close(slots_only, read_on(rig.target.model, rig.fuse(single))[:, -1])
    for one, other in [(with_words, slots_only), (with_words, words_only)]:
        assert ((one - other).abs().amax(1) > 1e-3).all()


# --- decoding is the target's own -------------------------------------------------------------


class Recorder(BaseStreamer):
    """Keeps every token that a generation hands out."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "short": {"do_sample": False, "max_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sequences": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "stopping": {
        "stopping_criteria": StoppingCriteriaList(
            [lambda ids, _scores: torch.full((len(ids),), bool((ids[:, -3:] >= 0).all()))]
        )
    },
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


def decode_plainly(rig: Rig, fused: FusedInputs, rows: int, **kwargs: Any) -> list[str]:
    out = rig.target.model.generate(
        input_ids=fused["input_ids"],
        attention_mask=fused["attention_mask"],
        past_key_values=repeated(fused["past_key_values"], rows),
        **kwargs,
    )
    new = out[:, fused["input_ids"].shape[1] :]
    return rig.target.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("mode", list(DECODING))
@EACH_GEOMETRY
def test_every_way_of_decoding_is_that_of_transformers(rig: Rig, geometry: str, mode: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    kwargs = {"max_new_tokens": 6, **DECODING[mode]}
    rows = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    perception = None if geometry == "aligned" else bridge.perceive(rig.pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = bridge.generate(perception, QUESTIONS, rig.caches(bridge), **kwargs)
        torch.manual_seed(0)
        expected = decode_plainly(rig, rig.fuse(bridge), rows, **kwargs)
    assert got == expected
    assert len(got) == 2 * kwargs.get("num_return_sequences", 1)
    assert any(got)


def test_decoding_asks_for_no_logits_but_the_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    asked = []
    forward = rig.target.model.forward

    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["logits_to_keep"])
        return forward(*args, **kwargs)

    fused = bridge.fuse(perception, QUESTIONS)
    monkeypatch.setattr(rig.target.model, "forward", spy)
    bridge.target.generate(fused, max_new_tokens=3)
    # A number would be a slice, over which torch's CPU product copies the whole vocabulary.
    assert asked
    assert all(torch.equal(index, torch.tensor([-1])) for index in asked)
    asked.clear()
    bridge.target.generate(fused, max_new_tokens=2, num_beams=2)
    assert set(asked) == {1}


def test_beams_of_a_closed_bridge_are_the_targets_own(rig: Rig) -> None:
    bridge = close(rig.bridge([EYES]))
    fused = rig.fuse(bridge)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    got = bridge.generate(bridge.perceive(rig.pictures), QUESTIONS, **kwargs)
    ids = fused["input_ids"]
    out = rig.target.model.generate(input_ids=ids, attention_mask=fused["attention_mask"], **kwargs)
    assert got == rig.target.tokenizer.batch_decode(
        out[:, ids.shape[1] :], skip_special_tokens=True
    )


def test_a_generation_config_counts_like_its_settings(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    config = GenerationConfig(pad_token_id=2, eos_token_id=2, **settings)
    by_config = bridge.generate(perception, QUESTIONS, generation_config=config)
    assert by_config == bridge.generate(perception, QUESTIONS, **settings)
    rig.target.model.generation_config.num_beams = 3
    rig.target.model.generation_config.num_return_sequences = 2
    assert bridge.generate(perception, QUESTIONS, max_new_tokens=5) == by_config
    silent = GenerationConfig(pad_token_id=2, eos_token_id=2, max_new_tokens=5)
    assert bridge.generate(perception, QUESTIONS, generation_config=silent) == by_config


def test_a_streamer_gets_every_token(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    recorder = Recorder()
    perception = bridge.perceive(rig.pictures[0])
    got = bridge.generate(perception, QUESTIONS[:1], streamer=recorder, max_new_tokens=5)
    prompt = rig.fuse(bridge, QUESTIONS[:1], [0])["input_ids"].flatten().tolist()
    assert recorder.tokens[: len(prompt)] == prompt
    assert recorder.tokens[-1] == -1
    new = recorder.tokens[len(prompt) : -1]
    assert got == [rig.target.tokenizer.decode(new, skip_special_tokens=True)]


@EACH_GEOMETRY
def test_streaming_says_the_same_as_generating(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    perception = None if geometry == "aligned" else bridge.perceive(rig.pictures[0])
    caches = rig.caches(bridge, QUESTIONS[1:], [0])
    pieces = list(bridge.stream(perception, QUESTIONS[1], caches, max_new_tokens=12))
    assert (
        "".join(pieces) == bridge.generate(perception, QUESTIONS[1:], caches, max_new_tokens=12)[0]
    )
    assert "".join(pieces)


def test_an_error_while_streaming_reaches_the_caller(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures[0])
    with pytest.raises(ValueError, match="beam search"):
        list(bridge.stream(perception, QUESTIONS[0], num_beams=2, max_new_tokens=3))


@pytest.mark.parametrize("how", ["keyword", "generation_config"])
def test_assisted_decoding_is_refused(rig: Rig, how: str) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    refused: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    kwargs = refused if how == "keyword" else {"generation_config": GenerationConfig(**refused)}
    with pytest.raises(UnsupportedError, match="prompt_lookup_num_tokens: assisted decoding"):
        bridge.generate(perception, QUESTIONS, **kwargs)
    with pytest.raises(UnsupportedError, match="assistant_model: assisted decoding"):
        bridge.generate(perception, QUESTIONS, assistant_model=rig.target.model)


@pytest.mark.parametrize("how", ["keyword", "generation_config", "model"])
def test_a_dict_instead_of_texts_is_refused(rig: Rig, how: str) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    kwargs: dict[str, Any] = {"return_dict_in_generate": True}
    if how == "generation_config":
        kwargs = {"generation_config": GenerationConfig(**kwargs)}
    elif how == "model":
        rig.target.model.generation_config.update(**kwargs)
        kwargs = {}
    message = r"answers with texts only; .* bridge\.target\.model\.generate\(\*\*bridge\.fuse"
    with pytest.raises(UnsupportedError, match=message):
        bridge.generate(perception, QUESTIONS, max_new_tokens=3, **kwargs)
    rig.target.model.generation_config.return_dict_in_generate = None
    with torch.no_grad():  # what the message advises
        out = bridge.target.model.generate(
            **bridge.fuse(perception, QUESTIONS),
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
    new = rig.target.tokenizer.batch_decode(out.sequences[:, -3:], skip_special_tokens=True)
    assert new == bridge.generate(perception, QUESTIONS, max_new_tokens=3)
    assert len(out.scores) == 3


# --- what cannot be asked ---------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(rig: Rig, question: str) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        rig.bridge([EYES]).fuse(None, ["fine ?", question])


def test_no_question_at_all_is_refused(rig: Rig) -> None:
    with pytest.raises(InputError, match="at least one question"):
        rig.bridge([EYES]).fuse(None, [])


def test_a_question_that_is_not_in_a_list_is_refused(rig: Rig) -> None:
    with pytest.raises(InputError, match="expected a list of questions, got the text 'is it red"):
        rig.bridge([EYES]).fuse(None, QUESTIONS[0])


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


def test_queries_without_a_grid_are_one_picture(rig: Rig) -> None:
    cache = two_pictures(rig)
    cache = replace(cache, patches=torch.full_like(cache.patches, -1), grids=((), ()))
    one = fuser_inputs(rig.bridge([ATTENTIVE_EYES]), cache)
    two = fuser_inputs(rig.bridge([ATTENTIVE_EYES], images=2), cache)
    torch.testing.assert_close(two[:, :, :6], one)
    assert (two[:, :, 6:] == 0).all()
    with pytest.raises(AlignmentError, match="queries that lie nowhere: use pooling='resampler'"):
        rig.bridge([EYES], images=2).fuse_slots({"eyes": cache})


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
    with pytest.raises(MismatchError, match="the cache of source 'eyes': the fuser was made for"):
        bridge.fuse_slots({"eyes": other})


def test_settings_that_cannot_be_built_from_are_refused(rig: Rig) -> None:
    link = rig.link(*EYES)
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


# --- training ---------------------------------------------------------------------------------


@EACH_POOLING
def test_training_moves_fuser_weights_only(rig: Rig, eyes_link: tuple[str, ...]) -> None:
    bridge = rig.bridge([eyes_link, ("reader", "aligned")]).train()
    resampled = [name for name, _ in bridge.named_parameters() if ".resampler." in name]
    assert bool(resampled) == (eyes_link == ATTENTIVE_EYES)
    frozen = {"target": rig.target.model, **{k: s.model for k, s in rig.sources.items()}}
    before = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in frozen.items()
    }
    fusers = {key: value.clone() for key, value in bridge.state_dict().items()}
    assert all(key.startswith("fusers.") for key in fusers)
    assert {id(p) for p in bridge.parameters()} == {id(p) for p in bridge.fusers.parameters()}
    assert not any(model.training for model in frozen.values())

    optimiser = torch.optim.SGD(bridge.parameters(), lr=0.1)
    eyes = rig.sources["eyes"].prefill([SourceInput(images=(p,)) for p in rig.pictures])
    fused = bridge.fuse(bridge.fuse_slots({"eyes": eyes}), QUESTIONS, rig.caches(bridge))
    done = fused["past_key_values"].get_seq_length()
    logits = rig.target.model(
        fused["input_ids"][:, done:],
        attention_mask=fused["attention_mask"],
        position_ids=positions(fused["attention_mask"])[:, done:],
        past_key_values=fused["past_key_values"],
    ).logits
    logits[:, -1].log_softmax(-1)[:, 7].sum().neg().backward()
    optimiser.step()

    for name, model in frozen.items():
        assert all(p.grad is None for p in model.parameters()), name
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name][key], **EXACT)
    for name, parameter in bridge.named_parameters():
        assert parameter.grad is not None, name
        assert not torch.equal(parameter, fusers[name]), name


@pytest.mark.parametrize("role", ["target", "eyes", "second", "reader"])
def test_a_model_that_is_read_is_frozen(rig: Rig, role: str) -> None:
    wrapper = rig.target if role == "target" else rig.sources[role]
    model, origin = wrapper.model, wrapper.origin
    model.train().requires_grad_(True)
    tool = wrapper.processor if hasattr(wrapper, "processor") else wrapper.tokenizer
    type(wrapper)(model, tool, origin.model, origin.revision)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- several pictures of a row ----------------------------------------------------------------


def two_pictures(rig: Rig) -> SourceCache:
    """Two rows of two pictures, in either order; the shorter words are padded."""
    shown = (rig.pictures, rig.pictures[::-1])
    return rig.sources["eyes"].prefill(
        [
            SourceInput(text=text, images=tuple(pictures))
            for text, pictures in zip(QUESTIONS, shown, strict=True)
        ]
    )


def fuser_inputs(bridge: Bridge, cache: SourceCache) -> Tensor:
    """`(layers, batch, slots, 2, width)`: what the slots take of a cache."""
    seen: list[Tensor] = []
    handle = bridge.fusers["eyes_slots"].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    bridge.fuse_slots({"eyes": cache})
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("training", [True, False])
@EACH_POOLING
def test_a_closed_bridge_of_several_pictures_leaves_the_target_untouched(
    rig: Rig, eyes_link: tuple[str, ...], training: bool
) -> None:
    bridge = rig.bridge([eyes_link], images=2).train(training)
    caches = {"eyes": two_pictures(rig)}
    opened = bridge.fuse(bridge.fuse_slots(caches), QUESTIONS)
    closed = close(bridge).fuse(bridge.fuse_slots(caches), QUESTIONS)
    assert ((closed["input_ids"] == bridge.prompt.slot_id).sum(1) >= 12).all()
    own = target_alone(rig.target.model, closed, prefix_len(bridge, closed))
    assert_same_cache(closed["past_key_values"], own["past_key_values"], **EXACT)
    logits = read_on(rig.target.model, closed)
    torch.testing.assert_close(logits, read_on(rig.target.model, own), **EXACT)
    assert ((read_on(rig.target.model, opened) - logits)[:, -1].abs().amax(1) > 0.01).all()


@torch.no_grad()
def test_a_bridge_perceives_pictures_and_whole_inputs_alike(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    first, second = rig.pictures
    expected = bridge.perceive(rig.pictures, QUESTIONS[0]).past_key_values
    whole = [SourceInput(text=QUESTIONS[0], images=(picture,)) for picture in rig.pictures]
    assert_same_cache(bridge.perceive(whole).past_key_values, expected, **EXACT)
    blind = bridge.perceive([first, SourceInput(images=(second,))])
    assert_same_cache(blind.past_key_values, bridge.perceive(rig.pictures).past_key_values, **EXACT)
    assert bridge.perceive(whole[0]).batch_size == 1
    with pytest.raises(InputError, match=r"row 1 is a SourceInput, .* put 'look' there"):
        bridge.perceive([first, whole[1]], "look")


@EACH_POOLING
def test_each_picture_fills_its_own_slots_in_order(rig: Rig, eyes_link: tuple[str, ...]) -> None:
    cache = two_pictures(rig)
    both = fuser_inputs(rig.bridge([eyes_link], images=2), cache)
    assert both.shape[2] == 12
    for image in range(2):
        elsewhere = (cache.patches[..., :1] != image).expand_as(cache.patches)
        alone = cache.patches.masked_fill(elsewhere, -1)
        alone[..., 0].clamp_(max=0)
        grids = tuple((grids[image]._replace(image=0),) for grids in cache.grids)
        expected = fuser_inputs(rig.bridge([eyes_link]), replace(cache, patches=alone, grids=grids))
        torch.testing.assert_close(both[:, :, 6 * image : 6 * image + 6], expected)
    assert not torch.allclose(both[:, :, :6], both[:, :, 6:])


@EACH_POOLING
def test_rows_of_several_pictures_do_not_feel_each_other(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge, cache = rig.bridge([eyes_link], images=2), two_pictures(rig)
    assert (cache.kinds == 0).any()  # padding
    both = read_on(rig.target.model, bridge.fuse(bridge.fuse_slots({"eyes": cache}), QUESTIONS))
    for rows in ([1, 0], [0], [1]):
        some = bridge.fuse_slots({"eyes": cache.select(torch.tensor(rows))})
        asked = bridge.fuse(some, [QUESTIONS[row] for row in rows])
        found = read_on(rig.target.model, asked)[:, -1]
        torch.testing.assert_close(found, both[rows, -1], **CLOSE)


def unlike_pictures(rig: Rig) -> SourceCache:
    """Rows of two pictures, one and none, in words of unlike length."""
    shown = (rig.pictures, rig.pictures[1:], rig.pictures[:1])
    cache = rig.sources["eyes"].prefill(
        [
            SourceInput(text=text, images=tuple(pictures))
            for text, pictures in zip(("look", *QUESTIONS), shown, strict=True)
        ]
    )
    kinds, patches = cache.kinds.clone(), cache.patches.clone()
    kinds[2][kinds[2] == PositionKind.IMAGE] = PositionKind.TEMPLATE
    patches[2] = -1
    return replace(cache, kinds=kinds, patches=patches, grids=(*cache.grids[:2], ()))


@pytest.mark.parametrize("training", [True, False])
@EACH_POOLING
def test_slots_of_missing_pictures_stay_the_targets_own(
    rig: Rig, eyes_link: tuple[str, ...], training: bool
) -> None:
    """What is there is fused as by a bridge with slots for so many pictures."""
    bridge, cache = rig.bridge([eyes_link], images=3).train(training), unlike_pictures(rig)
    seen = bridge.fuse_slots({"eyes": cache})
    before = seen.input_ids.shape[1] - 18
    with torch.no_grad():
        own = rig.target.model(seen.input_ids[:1]).past_key_values
    for row, count in enumerate((2, 1, 0)):
        end = before + 6 * count
        for got, alone in zip(seen.past_key_values.layers, own.layers, strict=True):
            torch.testing.assert_close(got.keys[row, :, end:], alone.keys[0, :, end:], **EXACT)
            torch.testing.assert_close(got.values[row, :, end:], alone.values[0, :, end:], **EXACT)
        if count:
            fitting = rig.bridge([eyes_link], images=count).train(training)
            one = fitting.fuse_slots({"eyes": cache.select(torch.tensor([row]))})
            for got, expected, alone in zip(
                seen.past_key_values.layers, one.past_key_values.layers, own.layers, strict=True
            ):
                torch.testing.assert_close(got.keys[row, :, :end], expected.keys[0], **CLOSE)
                torch.testing.assert_close(got.values[row, :, :end], expected.values[0], **CLOSE)
                change = (got.values[row] - alone.values[0])[:, before:end].abs()
                assert change.amax((0, 2)).min() > 1e-3


@EACH_POOLING
def test_rows_of_unlike_numbers_of_pictures_do_not_feel_each_other(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge, cache = rig.bridge([eyes_link], images=2), unlike_pictures(rig)
    questions = (*QUESTIONS, "what is it ?")
    all_rows = read_on(rig.target.model, bridge.fuse(bridge.fuse_slots({"eyes": cache}), questions))
    for rows in ([2, 0, 1], [0], [1], [2]):
        some = bridge.fuse_slots({"eyes": cache.select(torch.tensor(rows))})
        asked = bridge.fuse(some, [questions[row] for row in rows])
        found = read_on(rig.target.model, asked)[:, -1]
        torch.testing.assert_close(found, all_rows[rows, -1], **CLOSE)


@torch.no_grad()
@EACH_POOLING
def test_pictures_of_unlike_number_are_perceived_and_asked_about(
    rig: Rig, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link], images=2)
    looks = [SourceInput(images=tuple(rig.pictures)), SourceInput(images=(rig.pictures[1],))]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    seen = bridge.perceive(looks)
    answers = bridge.generate(seen, QUESTIONS, **options)
    for row, look in enumerate(looks):
        alone = bridge.perceive(look)
        for got, expected in zip(
            seen.past_key_values.layers, alone.past_key_values.layers, strict=True
        ):
            torch.testing.assert_close(got.keys[row], expected.keys[0], **CLOSE)
            torch.testing.assert_close(got.values[row], expected.values[0], **CLOSE)
        assert bridge.generate(alone, [QUESTIONS[row]], **options) == [answers[row]]


@EACH_POOLING
@pytest.mark.parametrize("rows", [[0, 1, 2], [2]])
def test_a_missing_picture_gives_the_fuser_nothing_to_learn(
    rig: Rig, eyes_link: tuple[str, ...], rows: list[int]
) -> None:
    """Gradients of a batch are the sum of each row's; those of a row without picture are zero."""
    bridge, cache = rig.bridge([eyes_link], images=2).train(), unlike_pictures(rig)

    def gradients(chosen: list[int]) -> dict[str, Tensor]:
        bridge.zero_grad()
        seen = bridge.fuse_slots({"eyes": cache.select(torch.tensor(chosen))})
        sum(
            (layer.keys + layer.values).square().sum() for layer in seen.past_key_values.layers
        ).backward()
        return {name: weight.grad.clone() for name, weight in bridge.named_parameters()}

    together = gradients(rows)
    alone = [gradients([row]) for row in rows]
    for name, found in together.items():
        assert found.isfinite().all(), name
        expected = sum(part[name] for part in alone)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert rows != [2] or not found.any(), name


@EACH_POOLING
def test_a_saved_bridge_holds_as_many_pictures_as_before(
    rig: Rig, tmp_path: Path, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link], images=2)
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert loaded.config == bridge.config
    assert loaded.config.links[0].images == 2
    caches = {"eyes": two_pictures(rig)}
    seen = [b.fuse_slots(caches).past_key_values for b in (bridge, loaded)]
    assert_same_cache(*seen, **EXACT)
    # What is learned serves any number of pictures.
    one = rig.bridge([eyes_link])
    assert [p.shape for p in one.parameters()] == [p.shape for p in bridge.parameters()]


# --- files ------------------------------------------------------------------------------------


@EACH_POOLING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_bridge_comes_back_bit_for_bit(
    rig: Rig, tmp_path: Path, dtype: torch.dtype, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link, ("reader", "aligned")])
    bridge.save_pretrained(tmp_path / "new" / "saved", dtype)
    loaded = Bridge.from_pretrained(tmp_path / "new" / "saved", rig.target, rig.sources)
    assert loaded.config == bridge.config
    assert not loaded.training
    stored = load_file(tmp_path / "new" / "saved" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    for key, value in bridge.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value.to(dtype).float(), **EXACT)
    if dtype == torch.float32:
        answers = [
            b.generate(b.perceive(rig.pictures), QUESTIONS, rig.caches(b), max_new_tokens=6)
            for b in (bridge, loaded)
        ]
        assert answers[0] == answers[1]
        caches = [rig.fuse(b)["past_key_values"] for b in (bridge, loaded)]
        assert_same_cache(*caches, **EXACT)
    loaded.save_pretrained(tmp_path / "again", dtype)
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        torch.testing.assert_close(value, stored[key], **EXACT)


def test_nothing_but_fusers_and_references_is_saved(rig: Rig, tmp_path: Path) -> None:
    rig.bridge([EYES]).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(key.startswith("eyes_slots.") for key in load_file(tmp_path / "model.safetensors"))
    header = json.loads((tmp_path / "config.json").read_text())
    assert header["target"] == {"model": "tiny/target", "revision": "t1", "model_type": "llama"}
    assert header["sources"]["eyes"]["revision"] == "e1"


def test_a_bridge_with_explicit_layers_comes_back_bit_for_bit(rig: Rig, tmp_path: Path) -> None:
    bridge = rig.bridge([EYES], layers="explicit", pairs=((2, 0), (1, 3)))
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert loaded.config == bridge.config  # tuples again, not JSON's lists
    caches = [rig.fuse(b)["past_key_values"] for b in (bridge, loaded)]
    assert_same_cache(*caches, **EXACT)


def test_a_bridge_saved_before_there_were_later_settings_still_loads(rig: Rig, saved: Path) -> None:
    header = json.loads((saved / "config.json").read_text())
    link = header["bridge"]["links"][0]
    del link["pooling"], link["images"], link["kinds"], link["fuser"]["pairs"]
    (saved / "config.json").write_text(json.dumps(header))
    assert not any("resampler" in key for key in load_file(saved / "model.safetensors"))
    assert load(rig, saved).config == rig.bridge([EYES]).config


def test_a_resampler_is_saved_under_its_link_and_missed_when_it_is_not_there(
    rig: Rig, saved: Path, tmp_path: Path
) -> None:
    window = set(load_file(saved / "model.safetensors"))
    rig.bridge([ATTENTIVE_EYES]).save_pretrained(tmp_path / "attentive")
    more = set(load_file(tmp_path / "attentive" / "model.safetensors")) - window
    assert more
    assert all(key.startswith("eyes_slots.resampler.") for key in more)
    edit_header(saved, "bridge", "links", "0", "pooling", value="resampler")
    with pytest.raises(MismatchError, match=r"missing weights \['eyes_slots\.resampler\."):
        load(rig, saved)
    edit_header(tmp_path / "attentive", "bridge", "links", "0", "pooling", value="window")
    with pytest.raises(MismatchError, match=r"unknown ones \['eyes_slots\.resampler\."):
        load(rig, tmp_path / "attentive")


def test_a_closed_bridge_stays_closed_on_disk(rig: Rig, tmp_path: Path) -> None:
    close(rig.bridge([EYES])).save_pretrained(tmp_path, torch.float16)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert (loaded.fusers["eyes_slots"].gates() == 0).all()


@pytest.fixture
def saved(rig: Rig, tmp_path: Path) -> Path:
    rig.bridge([EYES]).save_pretrained(tmp_path)
    return tmp_path


def edit_header(folder: Path, *keys: str, value: Any) -> None:
    header = json.loads((folder / "config.json").read_text())
    place = header
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(header))


def load(rig: Rig, folder: Path) -> Bridge:
    return Bridge.from_pretrained(folder, rig.target, rig.sources)


def test_a_folder_without_a_bridge_is_refused(rig: Rig, saved: Path) -> None:
    with pytest.raises(MismatchError, match=r"is not a saved bridge: config\.json is missing"):
        load(rig, saved / "elsewhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"model\.safetensors is missing or unreadable"):
        load(rig, saved)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_cut_off_weights_are_refused(rig: Rig, saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MismatchError, match=r"model\.safetensors is damaged or cut off"):
        load(rig, saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is damaged"),
        ("[]", "not a saved bridge of format 1"),
        ('{"format": 2}', "not a saved bridge of format 1"),
        ('{"format": 1}', r"config\.json lacks bridge, target, sources"),
    ],
)
def test_a_damaged_header_is_refused(rig: Rig, saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(MismatchError, match=message):
        load(rig, saved)


def test_another_target_is_refused(rig: Rig, saved: Path) -> None:
    model, tokenizer = rig.target.model, rig.target.tokenizer
    for name, revision in (("tiny/other", "t1"), ("tiny/target", "t2"), ("tiny/target", None)):
        rig.target = Target(model, tokenizer, name, revision)
        with pytest.raises(
            MismatchError,
            match=f"target: .* trained with 'tiny/target' at revision 't1' .*got '{name}' at "
            f"{revision!r}",
        ):
            load(rig, saved)


def test_another_source_is_refused(rig: Rig, saved: Path) -> None:
    eyes = rig.sources["eyes"]
    rig.sources["eyes"] = VLMSource(eyes.model, eyes.processor, "tiny/llava", "e2")
    with pytest.raises(MismatchError, match=r"source 'eyes': .* at revision 'e1' .* at 'e2'"):
        load(rig, saved)
    del rig.sources["eyes"]
    with pytest.raises(MismatchError, match=r"needs a source named 'eyes' \(tiny/llava\)"):
        load(rig, saved)


def test_models_of_the_same_name_but_another_geometry_are_refused(rig: Rig, saved: Path) -> None:
    second = rig.sources["second"]
    second.origin = rig.sources["eyes"].origin
    rig.sources["eyes"] = second
    with pytest.raises(MismatchError, match="source 'eyes': the fuser was made for CacheShape"):
        load(rig, saved)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("bridge", "colour"), "unknown key 'colour'"),
        (("bridge", "links", "0", "row"), r"unknown key '.*row'; did you mean 'rows'"),
        (("bridge", "links", "0", "fuser", "ranks"), r"unknown key '.*fuser\.ranks'"),
    ],
)
def test_unknown_settings_are_refused(
    rig: Rig, saved: Path, keys: tuple[str, ...], message: str
) -> None:
    edit_header(saved, *keys, value=1)
    with pytest.raises(ConfigError, match=message):
        load(rig, saved)


def test_an_unknown_word_about_a_model_is_refused(rig: Rig, saved: Path) -> None:
    edit_header(saved, "target", "colour", value="red")
    with pytest.raises(MismatchError, match="target: expected model, revision, model_type"):
        load(rig, saved)


def test_weights_of_another_fuser_are_refused(rig: Rig, saved: Path) -> None:
    edit_header(saved, "bridge", "links", "0", "fuser", "rank", value=9)
    with pytest.raises(MismatchError, match=r"eyes_slots\..* is \(.*\), expected \("):
        load(rig, saved)
    edit_header(saved, "bridge", "links", "0", "fuser", "layers", value="terminal")
    edit_header(saved, "bridge", "links", "0", "fuser", "preset", value="c2c")
    with pytest.raises(MismatchError, match=r"missing weights \['eyes_slots\..*unknown ones"):
        load(rig, saved)

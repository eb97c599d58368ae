"""The bridge: closed it is the target alone, open it is a plain loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bridge_rigs import (
    ATTENTIVE_EYES,
    CLOSE,
    EACH_GEOMETRY,
    EACH_POOLING,
    EXACT,
    EYES,
    GEOMETRIES,
    QUESTIONS,
    SLOT,
    Rig,
    assert_same_cache,
    close,
    positions,
    prefix_len,
    read_on,
    repeated,
    target_alone,
)
from torch import Tensor
from transformers import Cache

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_all, patch_coordinates
from mm_c2c.bridge import Bridge
from mm_c2c.cache import LayerKV, PatchGrid, SourceCache
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs
from mm_c2c.rope import RopeSpec, derotate, rotate
from mm_c2c.sources import SourceInput

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


def test_a_target_of_another_dtype_reads_the_prompt_anew(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    bridge.perceive(rig.pictures)
    rig.target.model.to(torch.float64)
    again = bridge.perceive(rig.pictures).past_key_values
    assert again.layers[0].keys.dtype == torch.float64
    fresh = rig.bridge([EYES]).perceive(rig.pictures).past_key_values
    assert_same_cache(again, fresh, **EXACT)


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

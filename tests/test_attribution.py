"""What an answer drew on: maps over the picture agree with what was written and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mm_c2c import Bridge
from mm_c2c.align.patches import align_pooled, finest_patches
from mm_c2c.cache import PatchGrid, fork, read_layers
from mm_c2c.errors import ConfigError, InputError, ShapeError
from mm_c2c.evaluation.attribution import (
    answer_attention,
    attention_outputs,
    attribute,
    overlay,
    slot_writing,
    slots_link,
    to_patches,
)
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.sources.base import SourceInput

QUESTION, ANSWER = "is it red ?", "the red one"


@pytest.fixture
def trained(bridge: Bridge) -> Bridge:
    """A bridge whose fuser does something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bridge.fusers.parameters():
            parameter.normal_(std=0.5)
    return bridge


@torch.no_grad()
def test_what_is_written_is_what_the_cache_gains(
    trained: Bridge, pictures: list[Image.Image]
) -> None:
    link = slots_link(trained, SOURCE_NAME)
    cache = trained.sources[SOURCE_NAME].prefill([SourceInput(images=(p,)) for p in pictures])
    written = slot_writing(trained, link, cache)
    fused = read_layers(trained.fuse_slots({SOURCE_NAME: cache}).past_key_values)[0]
    strengths = trained.fusers[link.name].gates()
    assert (written.weights.amax((1, 2, 4)) <= strengths).all()
    trained.fusers[link.name].close()
    own = read_layers(trained.fuse_slots({SOURCE_NAME: cache}).past_key_values)[0]
    for layer, (after, before) in enumerate(zip(fused, own, strict=True)):
        for index in range(2):
            gained = (after[index] - before[index])[:, :, -link.num_slots :]
            # Rotation keeps lengths.
            norms = gained.transpose(1, 2).flatten(2).norm(dim=-1)
            torch.testing.assert_close(written.norms[layer, ..., index], norms)
    closed = slot_writing(trained, link, cache)
    assert not closed.weights.any()
    assert not closed.norms.any()


@torch.no_grad()
def test_attention_is_that_of_one_plain_forward(
    trained: Bridge, pictures: list[Image.Image]
) -> None:
    model, tokenizer = trained.target.model, trained.target.tokenizer
    before = model.config._attn_implementation
    assert before != "eager"
    perception = trained.perceive(pictures[0])
    length = perception.past_key_values.get_seq_length()
    attention = answer_attention(trained, perception, QUESTION, ANSWER)
    assert model.config._attn_implementation == before
    assert perception.past_key_values.get_seq_length() == length
    tokens = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 1
    fused = trained.fuse(perception, [QUESTION])
    prompt = fused["input_ids"].shape[1]
    ids = torch.cat([fused["input_ids"], torch.tensor([tokens])], dim=1)
    model.set_attn_implementation("eager")
    whole = model(
        ids[:, length:],
        past_key_values=fork(perception.past_key_values),
        position_ids=torch.arange(length, ids.shape[1])[None],
        output_attentions=True,
    )
    model.set_attn_implementation(before)
    choosing = slice(prompt - 1 - length, ids.shape[1] - 1 - length)
    expected = torch.cat(whole.attentions)[:, :, choosing, :length]
    torch.testing.assert_close(attention, expected)


@torch.no_grad()
def test_attention_outputs_are_what_the_output_projection_reads(trained: Bridge) -> None:
    model, read = trained.target.model, []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for layer in model.model.layers
    ]
    outputs = attention_outputs(trained, trained.fuse(None, [QUESTION]), 3)
    for hook in hooks:
        hook.remove()
    # The first layers of `read` come from the prefix, which is read once.
    expected = torch.stack([states[0, -3:] for states in read[-len(outputs) :]])
    torch.testing.assert_close(outputs, expected)


def test_slots_are_shared_out_among_their_patches(
    trained: Bridge, pictures: list[Image.Image]
) -> None:
    cache = trained.sources[SOURCE_NAME].prefill([SourceInput(images=(pictures[0],))])
    rows, cols = finest_patches(cache, 0).shape
    assert (rows, cols) == (4, 4)
    alignment = align_pooled(cache, PatchGrid(2, 1), torch.arange(2)[None])
    found = to_patches(cache, alignment, torch.tensor([[8.0, 0.0], [0.0, 16.0]]))
    expected = torch.zeros(2, 4, 4)
    expected[0, :2], expected[1, 2:] = 1, 2
    torch.testing.assert_close(found, expected)


def test_an_answer_gets_maps_over_the_patch_grid(
    trained: Bridge, pictures: list[Image.Image]
) -> None:
    seen = attribute(trained, pictures[0], QUESTION, ANSWER, SOURCE_NAME)
    assert seen.weights.shape == seen.norms.shape == (2, 4, 4)
    assert seen.attention.shape == (4, 4)
    link = slots_link(trained, SOURCE_NAME)
    attention = answer_attention(trained, trained.perceive(pictures[0]), QUESTION, ANSWER)
    expected = attention[..., -link.num_slots :].sum(-1).mean()
    torch.testing.assert_close(seen.attention.sum(), expected)
    cache = trained.sources[SOURCE_NAME].prefill([SourceInput(images=(pictures[0],))])
    # Two by two slots: each is one quarter of the picture.
    norms = slot_writing(trained, link, cache).norms.mean((0, 1)).view(2, 2, 2)
    torch.testing.assert_close(seen.norms[:, ::2, ::2], norms.permute(2, 0, 1))
    assert seen.weights.min() > 0
    assert seen.weights.max() < 1
    with pytest.raises(InputError, match="answer is empty"):
        attribute(trained, pictures[0], QUESTION, " ", SOURCE_NAME)
    with pytest.raises(ConfigError, match="must have one link, with slots"):
        attribute(trained, pictures[0], QUESTION, ANSWER, "other")


def test_an_overlay_runs_from_violet_to_yellow() -> None:
    picture = Image.new("RGBA", (40, 20), (255, 255, 255, 255))
    laid = overlay(picture, torch.tensor([[0.0, 5.0]]))
    assert (laid.mode, laid.size) == ("RGB", (40, 20))
    left, right = laid.getpixel((0, 10)), laid.getpixel((39, 10))
    assert left[2] > left[1]
    assert right[0] > right[1] > right[2]
    light = np.asarray(laid.convert("L"), dtype=int)[10]
    assert (np.diff(light) >= 0).all()
    # One outlier does not darken the rest.
    heat = torch.linspace(0, 1, 100).view(10, 10)
    heat[9, 9] = 1000
    bright = overlay(picture, heat).getpixel((0, 19))
    assert bright[1] > bright[2]
    even = np.asarray(overlay(picture, [[3.0]]))
    assert (even == even[0, 0]).all()
    with pytest.raises(ShapeError, match=r"map of \(rows, cols\)"):
        overlay(picture, [1.0, 2.0])
    with pytest.raises(InputError, match="finite"):
        overlay(picture, [[float("nan")]])

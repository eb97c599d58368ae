"""SmolVLA as a source: LeRobot's own classes where they are installed, and a stand-in elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from policies import WORDS, assert_reading_changes_nothing
from smolvla import ACTION_DIM, CHUNK, Smol, build_lerobot_smol, build_smol, pair_mask
from torch import Tensor
from transformers import DynamicCache

from mm_c2c.cache import CacheShape, PatchGrid, PositionKind
from mm_c2c.errors import InputError, ShapeError, UnsupportedError
from mm_c2c.rope import derotate
from mm_c2c.sources import Source, SourceInput
from mm_c2c.sources.smolvla import SmolVLASource


def crop_to(self: DynamicCache, length: int) -> None:
    """What LeRobot 0.6.1 still asks for: to say how many positions stay, not how many go."""
    for layer in self.layers:
        layer.crop(min(length - layer.get_seq_length(), 0))


@pytest.fixture(params=["stand-in", "lerobot"])
def build(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Smol]:
    """What makes a policy: the stand-in beside a module of LeRobot's name, or LeRobot itself."""
    if request.param == "lerobot":
        pytest.importorskip(
            "lerobot", reason="make test-lerobot runs these on LeRobot's own classes"
        )
        monkeypatch.setattr(DynamicCache, "crop", crop_to)
        return functools.partial(build_lerobot_smol, tmp_path)
    for name in ("lerobot", "lerobot.policies", "lerobot.policies.smolvla"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("lerobot.policies.smolvla.modeling_smolvla")
    module.make_att_2d_masks = pair_mask
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return build_smol


@pytest.fixture
def smol_inputs(pictures: list[Image.Image]) -> list[SourceInput]:
    """One camera of two, so that the other stays empty; instructions of unlike length."""
    states = torch.tensor([[0.5, -0.5, 1.0], [0.0, 2.0, -1.0]])
    same_size = [pictures[0], pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return [
        SourceInput(text=text, images=(picture,), state=state)
        for text, picture, state in zip(WORDS, same_size, states, strict=True)
    ]


@pytest.mark.parametrize(("special", "prefix_length"), [(False, -1), (True, 60)])
def test_smolvla_marks_cameras_words_state_and_actions(
    build: Callable[..., Smol], smol_inputs: list[SourceInput], special: bool, prefix_length: int
) -> None:
    smol = build(special=special, prefix_length=prefix_length)
    source: Source = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    cache = source.prefill(smol_inputs)
    assert (
        cache.shape == source.shape == CacheShape(num_layers=2, num_key_value_heads=2, head_dim=6)
    )
    assert cache.layer_indices == (0, 2)  # where the expert attends to itself
    assert cache.grids == ((PatchGrid(2, 2),),) * 2
    assert cache.texts == WORDS
    assert cache.origin == source.origin == ("tiny/smolvla", None, "smolvla")
    around = [PositionKind.TEMPLATE] * special
    for row in range(2):
        kinds = cache.kinds[row]
        real = kinds[kinds != PositionKind.PAD].tolist()
        words = real.count(PositionKind.TEXT)
        assert words > 3
        assert real[: 4 + 3 * special] == [*around * 2, *[PositionKind.IMAGE] * 4, *around]
        # The empty camera has its marks, but shows nothing.
        assert real[4 + 3 * special : 4 + 6 * special] == around * 3
        tail = real[4 + 6 * special + words :]
        line_end = [PositionKind.TEMPLATE] if tail[0] == PositionKind.TEMPLATE else []
        assert tail == [*line_end, PositionKind.STATE, *[PositionKind.ACTION] * CHUNK]
        pieces = [WORDS[row][start:end] for start, end in cache.spans[row].tolist() if end > 0]
        assert WORDS[row].replace(" ", "").startswith("".join(pieces).replace(" ", ""))
        expected = [[0, r, c] for r in range(2) for c in range(2)]
        assert cache.patches[row][kinds == PositionKind.IMAGE].tolist() == expected


def test_smolvla_holds_what_the_policy_itself_computes(
    build: Callable[..., Smol], smol_inputs: list[SourceInput]
) -> None:
    """Against the policy's own cache after its first denoising step, before it crops it."""
    smol = build()
    source = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    steps: list[list[Tensor]] = []
    towers = smol.policy.model.vlm_with_expert
    forward = towers.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        steps.append([kv.keys.clone() for kv in out[1].layers])
        return out

    towers.forward = record  # LeRobot calls it past the module's hooks
    source.act(smol_inputs)
    towers.forward = forward
    cache = source.prefill(smol_inputs)
    for index, (keys, _) in zip(cache.layer_indices, cache.layers, strict=True):
        torch.testing.assert_close(keys, steps[1][index], rtol=0, atol=0)


def test_smolvla_without_its_actions_is_read_in_every_layer(
    build: Callable[..., Smol], smol_inputs: list[SourceInput]
) -> None:
    smol = build()
    whole = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    prefix = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla", read_actions=False)
    cache, longer = prefix.prefill(smol_inputs), whole.prefill(smol_inputs)
    assert cache.shape == prefix.shape == dataclasses.replace(whole.shape, num_layers=4)
    assert cache.layer_indices == (0, 1, 2, 3)
    assert cache.seq_len == longer.seq_len - CHUNK
    torch.testing.assert_close(
        longer.layers[1].keys[:, :, :-CHUNK], cache.layers[2].keys, rtol=0, atol=0
    )
    assert not (cache.kinds == PositionKind.ACTION).any()


def test_derotated_keys_of_smolvla_are_those_projected_without_rope(
    build: Callable[..., Smol],
    smol_inputs: list[SourceInput],
) -> None:
    smol = build()
    projected: list[Tensor] = []
    towers = smol.policy.model.vlm_with_expert
    for part in (towers.vlm.model.text_model, towers.lm_expert):
        part.layers[0].self_attn.k_proj.register_forward_hook(
            lambda _module, _args, out: projected.append(out)
        )
    cache = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla").prefill(smol_inputs)
    bare = torch.cat(projected, dim=1).unflatten(-1, (2, 6)).transpose(1, 2)
    derotated = derotate(cache.layers[0].keys, cache.position_ids, cache.rope[0])
    torch.testing.assert_close(derotated, bare, rtol=1e-4, atol=1e-5)


def test_a_padded_row_of_smolvla_gives_what_the_row_alone_gives(
    build: Callable[..., Smol],
    smol_inputs: list[SourceInput],
) -> None:
    smol = build()
    source = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    both = source.prefill(smol_inputs)
    for row, item in enumerate(smol_inputs):
        alone = source.prefill([item])
        real = [cache.kinds[i] != PositionKind.PAD for cache, i in ((both, row), (alone, 0))]
        for got, expected in zip(both.layers, alone.layers, strict=True):
            torch.testing.assert_close(got.keys[row][:, real[0]], expected.keys[0][:, real[1]])
        for field in ("position_ids", "kinds", "patches", "spans"):
            torch.testing.assert_close(
                getattr(both, field)[row][real[0]], getattr(alone, field)[0][real[1]], msg=field
            )


@pytest.mark.parametrize("read_actions", [True, False])
def test_reading_smolvla_leaves_its_actions_as_they_are(
    build: Callable[..., Smol], smol_inputs: list[SourceInput], read_actions: bool
) -> None:
    smol = build()
    source = SmolVLASource(
        smol.policy, smol.preprocessor, "tiny/smolvla", read_actions=read_actions
    )
    batch = source._preprocess(smol_inputs)
    assert_reading_changes_nothing(
        smol.policy,
        lambda: smol.policy.predict_action_chunk(batch),
        lambda: source.prefill(smol_inputs),
    )
    assert not smol.policy._queues["action"]
    acted = source.act(smol_inputs)
    assert acted.shape == (2, CHUNK, 5)
    torch.testing.assert_close(source.act(smol_inputs), acted, rtol=0, atol=0)


def test_smolvla_sees_the_state_and_starts_from_the_noise_it_is_given(
    build: Callable[..., Smol],
    smol_inputs: list[SourceInput],
) -> None:
    smol = build()
    source = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    before = source.prefill(smol_inputs[:1])
    item = smol_inputs[0]
    parts = {"text": item.text, "images": item.images}
    noise = torch.zeros(CHUNK, ACTION_DIM)
    for change, first in (
        ({"state": torch.zeros(3)}, PositionKind.STATE),
        ({"state": item.state, "noise": noise}, PositionKind.ACTION),
    ):
        after = source.prefill([SourceInput(**parts, **change)])
        moved = (after.layers[1].keys - before.layers[1].keys).abs().amax((1, 3)) > 0
        real = before.kinds != PositionKind.PAD
        assert moved[real].equal(before.kinds[real] >= first)


def test_smolvla_refuses_what_it_cannot_read(
    build: Callable[..., Smol], smol_inputs: list[SourceInput], pictures: list[Image.Image]
) -> None:
    smol = build()
    source = SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")
    state = torch.zeros(3)
    for images in ((), (pictures[0],) * 3):
        with pytest.raises(InputError, match=r"one for each of its cameras \(observation.images"):
            source.prefill([SourceInput(text="a", images=images, state=state)])
    other_size = SourceInput(text="a", images=(pictures[1],), state=state)
    with pytest.raises(InputError, match="the same pictures in every row"):
        source.prefill([smol_inputs[0], other_size])
    with pytest.raises(InputError, match=r"row 0: expected a state of \(3,\)"):
        source.prefill([SourceInput(text="a", images=(pictures[0],))])
    with pytest.raises(UnsupportedError, match="answers with actions, not words; call `act`"):
        source.generate(smol_inputs)
    smol.policy.model.prefix_length = 0
    smol.policy.model.add_image_special_tokens = True
    embed_prefix = smol.policy.model.embed_prefix
    smol.policy.model.embed_prefix = lambda *args, **kwargs: [
        part[:, :-1] for part in embed_prefix(*args, **kwargs)
    ]
    with pytest.raises(ShapeError, match=r"expected a prefix of \d+ positions"):
        source.prefill(smol_inputs)


def test_smolvla_without_lerobot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot.policies.smolvla.modeling_smolvla", None)
    smol = build_smol()
    with pytest.raises(UnsupportedError, match=r"pip install 'lerobot\[smolvla\]'"):
        SmolVLASource(smol.policy, smol.preprocessor, "tiny/smolvla")

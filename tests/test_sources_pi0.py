"""pi0 as a source: what stands in its cache, and that it acts as if nobody read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policies import ACTION_DIM, CHUNK, WORDS, assert_reading_changes_nothing

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target, load_cache, save_cache
from mm_c2c.cache import CacheShape, PatchGrid, PositionKind, zeroed
from mm_c2c.errors import ConfigError, InputError, UnsupportedError
from mm_c2c.rope import derotate
from mm_c2c.sources import Source, SourceInput
from mm_c2c.sources.action import PI0Source


def test_pi0_marks_cameras_words_state_and_actions(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    source: Source = pi0
    cache = source.prefill(observations)
    assert (
        cache.shape == source.shape == CacheShape(num_layers=3, num_key_value_heads=1, head_dim=10)
    )
    assert cache.layer_indices == (0, 1, 2)
    assert cache.grids == ((PatchGrid(3, 3, 0), PatchGrid(3, 3, 1)), (PatchGrid(3, 3, 0),))
    assert cache.texts == WORDS
    assert cache.origin == source.origin == ("tiny/pi0", None, "pi0")
    for row, cameras in enumerate((2, 1)):
        kinds = cache.kinds[row]
        real = kinds[kinds != PositionKind.PAD].tolist()
        words = real.count(PositionKind.TEXT)
        assert words > 3
        assert real == [
            *[PositionKind.IMAGE] * 9 * cameras,
            PositionKind.TEMPLATE,
            *[PositionKind.TEXT] * words,
            PositionKind.TEMPLATE,
            PositionKind.STATE,
            *[PositionKind.ACTION] * CHUNK,
        ]
        spelled = "".join(
            WORDS[row][start:end] for start, end in cache.spans[row].tolist() if end > 0
        )
        assert spelled.replace(" ", "") == WORDS[row].replace(" ", "")
        expected = [[cam, r, c] for cam in range(cameras) for r in range(3) for c in range(3)]
        assert cache.patches[row][kinds == PositionKind.IMAGE].tolist() == expected
        assert (cache.patches[row][kinds != PositionKind.IMAGE] == -1).all()


def test_pi0_holds_what_the_policy_itself_computes(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    """Against the steps of `sample_actions`: prefix by the VLM alone, then the expert after it."""
    cache = pi0.prefill(observations[:1])
    encoded = pi0._encode(observations[:1])
    model, mask = pi0.model.model, encoded["attention_mask"]
    embeds = model.embed_prefix(
        encoded["input_ids"], encoded["pixel_values"], encoded["pixel_attention_mask"]
    )
    plain = model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
        use_cache=True,
    ).past_key_values
    pi0.model(
        state=encoded["state"],
        noise=pi0._noise(observations[:1]),
        timestep=torch.ones(1),
        attention_mask=mask,
        past_key_values=plain,
    )
    for got, expected in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(got.keys, expected.keys, rtol=0, atol=0)
        torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0)


def test_a_padded_row_of_pi0_gives_what_the_row_alone_gives(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    both = pi0.prefill(observations)
    assert (both.kinds == PositionKind.PAD).any()
    for row, item in enumerate(observations):
        alone = pi0.prefill([item])
        real = both.kinds[row] != PositionKind.PAD
        for got, expected in zip(both.layers, alone.layers, strict=True):
            torch.testing.assert_close(got.keys[row][:, real], expected.keys[0])
            torch.testing.assert_close(got.values[row][:, real], expected.values[0])
        for field in ("position_ids", "kinds", "patches", "spans"):
            torch.testing.assert_close(
                getattr(both, field)[row][real], getattr(alone, field)[0], msg=field
            )


def test_derotated_keys_of_pi0_are_those_projected_without_rope(
    pi0: PI0Source, observations: list[SourceInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's keys depend on the rotation only by themselves."""
    projected = []
    for part in (pi0.model.model.vlm.language_model, pi0.model.model.dit):
        part.layers[0].self_attn.k_proj.register_forward_hook(
            lambda _module, _args, out: projected.append(out)
        )
    cache = pi0.prefill(observations)
    # The model first; what follows is the measuring of its rotation.
    bare = torch.cat(projected[:2], dim=1).unflatten(-1, (1, 10)).transpose(1, 2)
    real = (cache.kinds != PositionKind.PAD)[:, None, :, None]
    derotated = derotate(cache.layers[0].keys, cache.position_ids, cache.rope[0])
    torch.testing.assert_close(derotated * real, bare * real, rtol=1e-4, atol=1e-5)


def test_reading_pi0_leaves_its_actions_as_they_are(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    encoded = pi0._encode(observations)
    del encoded["offset_mapping"]
    assert_reading_changes_nothing(
        pi0.model,
        lambda: pi0.model.sample_actions(**encoded),  # from noise of the global stream
        lambda: pi0.prefill(observations),
    )


def test_pi0_reads_and_acts_from_noise_that_is_fixed(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    actions = pi0.act(observations)
    assert actions.shape == (2, CHUNK, ACTION_DIM)
    torch.testing.assert_close(pi0.act(observations), actions, rtol=0, atol=0)
    first, second = pi0.prefill(observations), pi0.prefill(observations)
    torch.testing.assert_close(second.layers[2].keys, first.layers[2].keys, rtol=0, atol=0)

    noise = torch.randn(CHUNK, ACTION_DIM, generator=torch.Generator().manual_seed(0))
    given = [
        SourceInput(text=i.text, images=i.images, state=i.state, noise=noise) for i in observations
    ]
    torch.testing.assert_close(pi0.act(given), actions, rtol=0, atol=0)
    other = PI0Source(pi0.model, pi0.processor, "tiny/pi0", seed=1)
    assert not torch.equal(other.act(observations), actions)
    change = (other.prefill(observations).layers[2].keys - first.layers[2].keys).abs().amax((1, 3))
    assert (change > 0).equal(first.kinds == PositionKind.ACTION)


def test_pi0_sees_the_state_at_its_position_and_in_the_actions(
    pi0: PI0Source, observations: list[SourceInput]
) -> None:
    before = pi0.prefill(observations[:1])
    item = observations[0]
    moved = SourceInput(text=item.text, images=item.images, state=torch.zeros(3))
    change = (pi0.prefill([moved]).layers[2].keys - before.layers[2].keys).abs().amax((1, 3))
    assert (change > 0).equal(before.kinds >= PositionKind.STATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ()}, "row 0: tiny/pi0 needs a picture, got none"),
        ({"state": None}, r"row 0: expected a state of \(3,\).*got None"),
        ({"state": torch.zeros(1, 3)}, r"row 0: expected a state of \(3,\).*got \(1, 3\)"),
        ({"noise": torch.zeros(3, 8)}, r"row 0: expected noise of \(4, 8\), got \(3, 8\)"),
    ],
)
def test_pi0_refuses_what_it_cannot_read(
    pi0: PI0Source, observations: list[SourceInput], change: dict[str, Any], message: str
) -> None:
    item = observations[0]
    parts = {"text": item.text, "images": item.images, "state": item.state, **change}
    with pytest.raises(InputError, match=message):
        pi0.prefill([SourceInput(**parts)])


@pytest.mark.parametrize(
    ("key", "value"), [("head_dim", 12), ("rope_parameters", {"rope_type": "default"})]
)
def test_pi0_refuses_an_expert_that_cannot_share_the_prefix_cache(
    pi0: PI0Source, key: str, value: Any
) -> None:
    setattr(pi0.model.config.dit_config, key, value)
    with pytest.raises(UnsupportedError, match=f"{key} is .* in the prefix and .* must agree"):
        PI0Source(pi0.model, pi0.processor, "tiny/pi0")


def test_what_pi0_saw_travels_as_a_file_and_reaches_the_target(
    pi0: PI0Source,
    observations: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """A row with one camera, for a row's slots hold one picture."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=pi0.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="robot", geometry="slots", rows=2, cols=2, fuser=fuser)
    bridge = Bridge(target, {"robot": pi0}, BridgeConfig(links=(link,), slot_token="a")).eval()
    cache = pi0.prefill(observations[1:])
    save_cache(cache, tmp_path / "seen.safetensors")
    loaded = load_cache(tmp_path / "seen.safetensors")
    torch.testing.assert_close(loaded.kinds, cache.kinds)
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.add_(0.1)
    seen = bridge.fuse_slots({"robot": loaded})
    blank = bridge.fuse_slots({"robot": zeroed(cache)})
    change = seen.past_key_values.layers[0].keys - blank.past_key_values.layers[0].keys
    assert (change[:, :, -4:].abs().amax((1, 3)) > 0).all()
    assert len(bridge.generate(seen, ["what is it ?"], max_new_tokens=3, do_sample=False)) == 1


def test_pi0_refuses_a_processor_without_statistics(pi0: PI0Source) -> None:
    pi0.processor.state_mean = None
    with pytest.raises(ConfigError, match="no statistics of the robot's state"):
        PI0Source(pi0.model, pi0.processor, "tiny/pi0")


def test_pi0_has_no_words(pi0: PI0Source, observations: list[SourceInput]) -> None:
    with pytest.raises(UnsupportedError, match="answers with actions, not words; call `act`"):
        pi0.generate(observations)

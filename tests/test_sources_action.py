"""Action sources: what stands in their caches, and policies that act as if nobody read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from tiny_vlm import build_frozen, train_tokenizer, vision_config
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PI0Config,
    PI0ForConditionalGeneration,
    PreTrainedModel,
    SiglipImageProcessorPil,
)
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.pi0.processing_pi0 import PI0Processor

from mm_c2c import (
    Bridge,
    BridgeConfig,
    FuserConfig,
    LinkConfig,
    Target,
    load_cache,
    save_cache,
)
from mm_c2c.cache import CacheShape, PatchGrid, PositionKind, zeroed
from mm_c2c.errors import AlignmentError, ConfigError, InputError, UnsupportedError
from mm_c2c.link import align_slots
from mm_c2c.rope import derotate
from mm_c2c.sources import Source, SourceInput, action, load_source, source_class
from mm_c2c.sources.action import (
    ActionBins,
    PI0Source,
    TokenActionSource,
    backbone_source,
)
from mm_c2c.sources.base import full_cache
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.sources.vlm_families import PaliGemmaSource

WORDS = ("pick the cat", "put the red square left of a blue circle")
CHUNK = 4
ACTION_DIM = 8


def weights_of(policy: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of weights and buffers, also of those that no checkpoint holds."""
    held = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def attributes_of(policy: torch.nn.Module) -> list[tuple[str, bool, list[str]]]:
    """What each module is called, its mode, and the names of all that it holds."""
    return [(name, m.training, sorted(vars(m))) for name, m in policy.named_modules()]


def assert_reading_changes_nothing(
    policy: torch.nn.Module, act: Callable[[], Tensor], read: Callable[[], Any]
) -> None:
    """Act, read, act again from the same seed: same actions, same random stream, same policy."""
    torch.manual_seed(7)
    before, stream = act(), torch.rand(3)
    weights, attributes = weights_of(policy), attributes_of(policy)
    torch.manual_seed(7)
    cache = read()
    after = act()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(3), stream, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(policy), weights, rtol=0, atol=0)
    assert attributes_of(policy) == attributes
    assert not any(kv.keys.requires_grad or kv.values.requires_grad for kv in cache.layers)
    assert all(weight.grad is None for weight in policy.parameters())


# --- pi0 --------------------------------------------------------------------------------------


@pytest.fixture
def pi0() -> PI0Source:
    """pi0: cameras of 3 x 3 patches; 3 layers, 1 KV head of 10; 4 actions of width 8."""
    tokenizer = train_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"],
        merges=30,
        chat_template=None,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    image_processor = SiglipImageProcessorPil(size={"height": 21, "width": 21})
    image_processor.image_seq_length = 9
    processor = PI0Processor(
        image_processor,
        tokenizer,
        state_mean=[0.1, 0.2, 0.3],
        state_std=[2.0, 1.0, 0.5],
        max_state_dim=6,
        chunk_size=CHUNK,
    )
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 512,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "vision_config": {
                **vision_config("siglip_vision_model", image_size=21),
                "vision_use_head": False,
            },
            "text_config": {
                **gemma,
                "vocab_size": len(tokenizer),
                "hidden_size": 20,
                "intermediate_size": 32,
            },
            "image_token_id": processor.image_token_id,
            "projection_dim": 20,
        },
        dit_config={**gemma, "hidden_size": 16, "intermediate_size": 24},
        chunk_size=CHUNK,
        max_state_dim=6,
        max_action_dim=ACTION_DIM,
        num_inference_steps=3,
    )
    model = build_frozen(lambda: PI0ForConditionalGeneration(config), seed=5)
    build = source_class("pi0", has_vision=True)
    assert build is PI0Source
    return build(model, processor, "tiny/pi0")


@pytest.fixture
def observations(pictures: list[Image.Image]) -> list[SourceInput]:
    """Two cameras and a short instruction; one camera and a long one."""
    states = torch.tensor([[0.5, -0.5, 1.0], [0.0, 2.0, -1.0]])
    return [
        SourceInput(text=WORDS[0], images=tuple(pictures), state=states[0]),
        SourceInput(text=f" {WORDS[1]}\n", images=(pictures[0],), state=states[1]),
    ]


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


def test_pi0_refuses_a_processor_without_statistics(pi0: PI0Source) -> None:
    pi0.processor.state_mean = None
    with pytest.raises(ConfigError, match="no statistics of the robot's state"):
        PI0Source(pi0.model, pi0.processor, "tiny/pi0")


def test_pi0_has_no_words(pi0: PI0Source, observations: list[SourceInput]) -> None:
    with pytest.raises(UnsupportedError, match="answers with actions, not words; call `act`"):
        pi0.generate(observations)


# --- action tokens in the cache (OpenVLA's form) ----------------------------------------------


@pytest.fixture
def bins() -> ActionBins:
    return ActionBins(
        vocab_size=300, low=(-0.5, 0.0, 0.0), high=(0.5, 2.0, 1.0), scaled=(True, True, False)
    )


@pytest.fixture
def token_policy(tiny_llava: Any, bins: ActionBins) -> TokenActionSource:
    return TokenActionSource(tiny_llava.model, tiny_llava.processor, bins, "tiny/openvla")


@pytest.fixture
def instructions(pictures: list[Image.Image]) -> list[SourceInput]:
    return [
        SourceInput(text=text, images=(picture,))
        for text, picture in zip(WORDS, pictures, strict=True)
    ]


def test_action_tokens_stand_for_steps_from_high_to_low(bins: ActionBins) -> None:
    """By the steps of OpenVLA's own code, in numpy and for one row."""
    tokens = np.array([[299, 172, 44], [45, 298, 46], [7, 299, 171]])  # 7 is no action token
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2.0
    normalised = centres[np.clip(300 - tokens - 1, 0, 254)]
    low, high = np.array(bins.low), np.array(bins.high)
    expected = np.where(
        np.array(bins.scaled), 0.5 * (normalised + 1) * (high - low) + low, normalised
    )
    decoded = bins.decode(torch.from_numpy(tokens))
    torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert decoded[0, 0] == pytest.approx(-0.5 + 1 / 510)  # the centre of the lowest step
    assert decoded[0, 2] == pytest.approx(1 - 1 / 255)  # not scaled
    assert ActionBins(vocab_size=300, low=(0.0,), high=(4.0,)).decode(torch.tensor([172])) > 1.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": (1.0,)}, "one number for each dimension of an action, got 3 and 1"),
        ({"scaled": (True,)}, "scaled has 1 entries, low has 3"),
        ({"num_bins": 301}, r"num_bins must be in \[2, vocab_size=300\], got 301"),
    ],
)
def test_bins_that_cannot_be_built_are_refused(
    bins: ActionBins, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(bins, **change)


def test_a_token_policy_is_read_with_its_action_tokens(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    """Against one plain forward over prompt and action tokens."""
    source: Source = token_policy
    for item in instructions:
        cache = source.prefill([item])
        prompt = VLMSource.prefill(token_policy, [item])
        assert cache.shape == source.shape == prompt.shape
        assert cache.seq_len == prompt.seq_len + 3
        assert cache.kinds[0, -3:].tolist() == [PositionKind.ACTION] * 3
        torch.testing.assert_close(cache.kinds[:, :-3], prompt.kinds)
        assert (cache.spans[0, -3:] == -1).all()
        assert (cache.patches[0, -3:] == -1).all()
        torch.testing.assert_close(cache.position_ids[0], torch.arange(cache.seq_len))

        acted = token_policy.act([item])
        text = f"USER: <image>\n{item.text}\nASSISTANT:"
        encoded = token_policy.processor(images=[item.images[0]], text=[text], return_tensors="pt")
        ids = torch.cat([encoded["input_ids"], acted.tokens], dim=1)
        plain = token_policy.model(ids, pixel_values=encoded["pixel_values"], use_cache=True)
        for got, expected in zip(cache.layers, plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(got.keys, expected.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.values, expected.values, rtol=1e-5, atol=1e-5)
        # The tokens are those that the forward itself finds likeliest.
        torch.testing.assert_close(plain.logits[:, -4:-1].argmax(-1), acted.tokens)
        torch.testing.assert_close(token_policy.bins.decode(acted.tokens), acted.actions)


@torch.no_grad()
def test_action_tokens_are_pooled_to_slots(
    token_policy: TokenActionSource,
    instructions: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
) -> None:
    """Three tokens into two slots share the second one."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=token_policy.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(
        source="robot", geometry="slots", kinds=("action",), rows=1, cols=2, fuser=fuser
    )
    bridge = Bridge(target, {"robot": token_policy}, BridgeConfig(links=(link,), slot_token="a"))
    taken: list[Tensor] = []
    bridge.fusers["robot_slots_action"].register_forward_pre_hook(
        lambda _module, args: taken.append(args[0])
    )
    cache = token_policy.prefill(instructions)
    bridge.fuse_slots({"robot": cache})
    for layer, (_, values) in enumerate(cache.layers):
        first, second, third = values.transpose(1, 2).flatten(2)[:, -3:].unbind(1)
        expected = torch.stack([(first + second) / 2, (second + third) / 2], dim=1)
        torch.testing.assert_close(taken[0][layer, :, :, 1], expected)
    with pytest.raises(AlignmentError, match="row 0 of tiny/openvla has no position of kind ACTI"):
        bridge.fuse_slots({"robot": VLMSource.prefill(token_policy, instructions)})


def test_a_padded_row_of_a_token_policy_gives_what_the_row_alone_gives(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    both = token_policy.prefill(instructions)
    assert (both.kinds == PositionKind.PAD).any()
    for row, item in enumerate(instructions):
        alone = token_policy.prefill([item])
        real = both.kinds[row] != PositionKind.PAD
        for got, expected in zip(both.layers, alone.layers, strict=True):
            torch.testing.assert_close(got.keys[row][:, real], expected.keys[0])
        torch.testing.assert_close(both.position_ids[row, real], alone.position_ids[0])


def test_tokens_that_are_given_are_read_without_acting_again(
    token_policy: TokenActionSource,
    instructions: list[SourceInput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acted = token_policy.act(instructions)
    expected = token_policy.prefill(instructions)
    monkeypatch.delattr(TokenActionSource, "act")
    got = token_policy.prefill(instructions, acted.tokens)
    torch.testing.assert_close(got.layers[3].keys, expected.layers[3].keys, rtol=0, atol=0)
    other = token_policy.prefill(instructions, acted.tokens.flip(1))
    assert not torch.equal(other.layers[3].keys, expected.layers[3].keys)


def test_an_input_may_bring_its_own_action_tokens(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    """Given rows are read as they are, the policy acts in the others."""
    acted = token_policy.act(instructions).tokens
    told = torch.stack([acted[0].flip(0), acted[1]])
    mixed = [dataclasses.replace(instructions[0], action_tokens=told[0]), instructions[1]]
    got, expected = token_policy.prefill(mixed), token_policy.prefill(instructions, told)
    torch.testing.assert_close(got.layers[3].keys, expected.layers[3].keys, rtol=0, atol=0)
    short = dataclasses.replace(instructions[1], action_tokens=told[1][:2])
    with pytest.raises(InputError, match=r"row 1: expected 3 action tokens, got \(2,\)"):
        token_policy.prefill([instructions[0], short])


def save_policy(folder: Path, vlm: Any, **settings: Any) -> None:
    """A tiny model whose config says what its action tokens mean."""
    vlm.model.config.update(settings)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


STATS = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "mask": [True, False]}


def test_a_policy_is_known_by_its_config(
    tiny_llava: Any, instructions: list[SourceInput], tmp_path: Path
) -> None:
    vocab_size = tiny_llava.model.config.text_config.vocab_size
    settings = {"n_action_bins": 16, "norm_stats": {"bridge": {"action": STATS}}}
    save_policy(tmp_path, tiny_llava, **settings, pad_to_multiple_of=3)
    source = load_source(str(tmp_path))
    assert type(source) is TokenActionSource
    assert source.bins == ActionBins(
        vocab_size=vocab_size - 3,
        low=(-1.0, 0.0),
        high=(1.0, 4.0),
        scaled=(True, False),
        num_bins=16,
    )
    assert source.act(instructions).actions.shape == (2, 2)


def test_a_policy_of_another_family_is_read_as_that_family(
    tiny_paligemma: Any, instructions: list[SourceInput], tmp_path: Path
) -> None:
    stats = {"a": {"action": {"q01": [0], "q99": [1]}}}
    save_policy(tmp_path, tiny_paligemma, n_action_bins=4, norm_stats=stats)
    source = load_source(str(tmp_path))
    assert isinstance(source, TokenActionSource)
    assert isinstance(source, PaliGemmaSource)
    assert source.prefill(instructions).kinds[0, -1] == PositionKind.ACTION
    with pytest.raises(UnsupportedError, match="TextSource has no prompt"):
        action.policy_class(source_class("qwen3", has_vision=False))
    tiny = FAMILIES["blip-2_t5"].build()
    kind = action.policy_class(source_class("blip-2", has_vision=True))
    bins = ActionBins(vocab_size=40, low=(-1.0,), high=(1.0,), num_bins=32)
    with pytest.raises(UnsupportedError, match=r"tiny/t5: .* encoder and decoder \(blip-2\)"):
        kind(tiny.model, tiny.processor, bins, "tiny/t5")


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (None, "needs norm_stats in its config.*got None"),
        ({"a": {"action": STATS}, "b": {"action": STATS}}, "data sets a, b, .* of None"),
        ({"a": {"action": {"q01": [0.0]}}}, "norm_stats of a: .* KeyError"),
        ({"a": {"action": {**STATS, "mask": [True]}}}, "scaled has 1 entries, low has 2"),
    ],
)
def test_a_config_that_does_not_say_what_actions_mean_is_refused(
    tiny_llava: Any, stats: Any, message: str
) -> None:
    config = tiny_llava.model.config
    config.update({"n_action_bins": 8, "norm_stats": stats})
    with pytest.raises(ConfigError, match=message):
        ActionBins.from_config(config)


def test_of_several_data_sets_one_is_named(tiny_llava: Any) -> None:
    other = {**STATS, "q99": [3.0, 3.0]}
    stats = {"a": {"action": STATS}, "b": {"action": other}}
    tiny_llava.model.config.update({"n_action_bins": 8, "norm_stats": stats})
    assert ActionBins.from_config(tiny_llava.model.config, "b").high == (3.0, 3.0)


def test_another_family_may_write_action_tokens(
    tiny_paligemma: Any, bins: ActionBins, instructions: list[SourceInput]
) -> None:
    """PaliGemma, whose prompt attends both ways and its answer does not."""

    class Policy(TokenActionSource, PaliGemmaSource):
        pass

    policy = Policy(tiny_paligemma.model, tiny_paligemma.processor, bins, "tiny/fast")
    cache = policy.prefill(instructions[:1])
    tokens = policy.act(instructions[:1]).tokens
    encoded = policy._encode(instructions[:1], [policy.render(instructions[0])])
    kinds = torch.cat([encoded["token_type_ids"], torch.ones_like(tokens)], dim=1)
    plain = policy.model(
        torch.cat([encoded["input_ids"], tokens], dim=1),
        pixel_values=encoded["pixel_values"],
        token_type_ids=kinds,
        use_cache=True,
    ).past_key_values
    for got, expected in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(got.keys, expected.keys, rtol=1e-5, atol=1e-5)


def test_reading_a_token_policy_leaves_its_actions_as_they_are(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    encoded = token_policy._encode(instructions, [token_policy.render(i) for i in instructions])
    encoded = token_policy._known(encoded)
    for sample in (False, True):
        assert_reading_changes_nothing(
            token_policy.model,
            lambda sample=sample: token_policy.model.generate(
                **encoded, max_new_tokens=3, do_sample=sample
            ),
            lambda: token_policy.prefill(instructions),
        )


def test_a_token_policy_that_ends_early_is_no_policy(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    tokens = token_policy.act(instructions).tokens
    only = set(tokens[0].tolist()) - set(tokens[1].tolist())
    token_policy.model.generation_config.eos_token_id = min(only)
    for batch in (instructions[:1], instructions):  # in the second, the other row goes on
        with pytest.raises(UnsupportedError, match="ended before the 3 tokens of an action"):
            token_policy.act(batch)


def test_a_policy_whose_prompt_is_not_all_in_keys_and_values_is_refused(
    token_policy: TokenActionSource,
    instructions: list[SourceInput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_a_linear_layer(model: PreTrainedModel) -> DynamicCache:
        cache = full_cache(model)
        cache.layers.append(LinearAttentionLayer())
        return cache

    monkeypatch.setattr(action, "full_cache", with_a_linear_layer)
    with pytest.raises(
        UnsupportedError, match="linear attention carries the prompt outside of K and V"
    ):
        token_policy.prefill(instructions)


# --- a backbone whose hidden states feed the head (GR00T's form) ------------------------------


class HeadOverHiddenStates(nn.Module):
    """GR00T's form: a head that starts from noise and looks at the backbone's last layer."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"model": backbone})
        self.head = nn.Linear(24, CHUNK * ACTION_DIM)

    @torch.no_grad()
    def act(self, **inputs: Tensor) -> Tensor:
        out = self.backbone["model"](**inputs, output_hidden_states=True, use_cache=False)
        actions = self.head(out.hidden_states[-1].mean(1))
        return (actions + torch.randn_like(actions)).unflatten(1, (CHUNK, ACTION_DIM))


def test_a_policy_without_a_cache_is_read_through_its_backbone(
    tiny_llava: Any, instructions: list[SourceInput]
) -> None:
    policy = HeadOverHiddenStates(tiny_llava.model)
    source = backbone_source(policy, tiny_llava.processor, "tiny/groot")
    assert isinstance(source, VLMSource)
    assert source.origin == ("tiny/groot", None, "llava")
    expected = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny").prefill(instructions)
    got = source.prefill(instructions)
    torch.testing.assert_close(got.layers[3].values, expected.layers[3].values, rtol=0, atol=0)

    encoded = source._known(source._encode(instructions, [source.render(i) for i in instructions]))
    assert_reading_changes_nothing(
        policy, lambda: policy.act(**encoded), lambda: source.prefill(instructions)
    )


def test_layers_that_a_policy_has_cut_off_are_not_missed(
    tiny_llava: Any, instructions: list[SourceInput]
) -> None:
    whole = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny").prefill(instructions)
    policy = HeadOverHiddenStates(tiny_llava.model)
    policy.backbone["model"].model.language_model.layers.pop(-1)
    source = backbone_source(policy, tiny_llava.processor, "tiny/groot")
    cache = source.prefill(instructions)
    assert cache.layer_indices == (0, 1, 2)
    assert source.shape == cache.shape
    torch.testing.assert_close(cache.layers[2].keys, whole.layers[2].keys, rtol=0, atol=0)


def test_a_policy_with_neither_cache_nor_backbone_is_refused(tiny_llava: Any) -> None:
    policy = nn.Sequential(nn.Conv2d(3, 4, 3), tiny_llava.model.model.vision_tower)
    with pytest.raises(UnsupportedError, match="Sequential has neither a cache of its own nor"):
        backbone_source(policy, tiny_llava.processor, "tiny/act")

"""Policies that write action tokens, and such as keep no cache: read, and acting as if nobody did."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from policies import ACTION_DIM, CHUNK, WORDS, assert_reading_changes_nothing
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import PositionKind
from mm_c2c.errors import AlignmentError, ConfigError, InputError, UnsupportedError
from mm_c2c.sources import Source, SourceInput, action, load_source, source_class
from mm_c2c.sources.action import (
    ActionBins,
    TokenActionSource,
    backbone_source,
    policy_class,
)
from mm_c2c.sources.base import full_cache
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.sources.vlm_families import PaliGemmaSource, QwenVLSource

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


def told(inputs: list[SourceInput], tokens: Tensor) -> list[SourceInput]:
    """The same with what the policy did there."""
    rows = zip(inputs, tokens, strict=True)
    return [dataclasses.replace(item, action_tokens=row) for item, row in rows]


def test_tokens_that_are_given_are_read_without_acting_again(
    token_policy: TokenActionSource,
    instructions: list[SourceInput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acted = token_policy.act(instructions)
    expected = token_policy.prefill(instructions)
    monkeypatch.delattr(TokenActionSource, "act")
    got = token_policy.prefill(told(instructions, acted.tokens))
    torch.testing.assert_close(got.layers[3].keys, expected.layers[3].keys, rtol=0, atol=0)
    other = token_policy.prefill(told(instructions, acted.tokens.flip(1)))
    assert not torch.equal(other.layers[3].keys, expected.layers[3].keys)


def test_an_input_may_bring_its_own_action_tokens(
    token_policy: TokenActionSource, instructions: list[SourceInput]
) -> None:
    """Given rows are read as they are, the policy acts in the others."""
    acted = token_policy.act(instructions).tokens
    given = told(instructions, torch.stack([acted[0].flip(0), acted[1]]))
    got = token_policy.prefill([given[0], instructions[1]])
    expected = token_policy.prefill(given)
    torch.testing.assert_close(got.layers[3].keys, expected.layers[3].keys, rtol=0, atol=0)
    short = dataclasses.replace(instructions[1], action_tokens=acted[1][:2])
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


@pytest.mark.parametrize(
    "name", ["blip-2", "blip-2_t5", "kosmos-2", "gemma4", "mllama", "florence2"]
)
def test_a_family_that_cannot_read_on_behind_its_prompt_has_no_action_tokens(name: str) -> None:
    tiny = FAMILIES[name].build()
    model_type = tiny.model.config.model_type
    kind = action.policy_class(source_class(model_type, has_vision=True))
    bins = ActionBins(vocab_size=40, low=(-1.0,), high=(1.0,), num_bins=32)
    with pytest.raises(UnsupportedError, match=f"tiny: .* of type {model_type} cannot read on"):
        kind(tiny.model, tiny.processor, bins, "tiny")


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


@torch.no_grad()
def test_acting_leaves_the_offsets_of_a_prompt_that_someone_is_amid(
    bins: ActionBins, instructions: list[SourceInput]
) -> None:
    vlm = FAMILIES["qwen2_vl"].build()
    policy = policy_class(QwenVLSource)(vlm.model, vlm.processor, bins, "tiny/qwen-policy")
    base: Any = vlm.model.base_model
    base.rope_deltas = before = torch.tensor([[-28]])
    policy.act(instructions[:1])
    assert base.rope_deltas is before
    policy.entropy(instructions[:1])
    assert base.rope_deltas is before

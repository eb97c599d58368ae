import cmath
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)

from mm_c2c.errors import ConfigError, ShapeError, UnsupportedError
from mm_c2c.rope import RopeSpec, derotate, rotate
from mm_c2c.rope_probe import rope_specs

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SEQ_LEN = 12
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 1, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(rope_type: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model, and what `rope_specs` should say of each of its layers."""

    family: str = "Llama"
    config: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    rotating: tuple[bool, ...] = (True, True, True)
    rotary_dim: int = 16
    scaling: float = 1.0
    interleaved: bool = False
    section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    # A shift by 5 keeps the frequencies.
    is_static: bool = True

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        text, config_class = TEXT | self.config, getattr(transformers, f"{self.family}Config")
        if self.vision is None:
            return AutoModelForCausalLM.from_config(config_class(**text)).eval()
        config = config_class(text_config=text, vision_config=VISION | self.vision)
        return AutoModelForImageTextToText.from_config(config).eval()


LONGROPE = {
    "short_factor": [1.1 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "patch_size": 7}
CASES = {
    "default": Case(config=rope()),
    "linear": Case(config=rope("linear", factor=4.0)),
    "dynamic within its length": Case(config=rope("dynamic", factor=2.0)),
    "dynamic beyond its length": Case(
        config=rope("dynamic", factor=2.0) | {"max_position_embeddings": 8}, is_static=False
    ),
    "llama3": Case(
        config=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "yarn": Case(
        config=rope("yarn", factor=4.0, original_max_position_embeddings=16),
        scaling=0.1 * math.log(4) + 1,
    ),
    "longrope, short": Case(
        family="Phi3",
        config=rope("longrope", **LONGROPE) | {"original_max_position_embeddings": 32},
        scaling=math.sqrt(1 + math.log(2) / math.log(32)),
    ),
    "longrope, long": Case(
        family="Phi3",
        config=rope("longrope", **LONGROPE) | {"original_max_position_embeddings": 8},
        scaling=math.sqrt(1 + math.log(8) / math.log(8)),
    ),
    "a scaling of its own (PhiMoE)": Case(
        family="Phimoe",
        config=rope(
            "longrope",
            original_max_position_embeddings=32,
            short_mscale=1.25,
            long_mscale=1.5,
            **LONGROPE,
        )
        | {"num_local_experts": 2},
        scaling=1.25,
    ),
    "partial (Phi)": Case(family="Phi", config=rope(partial_rotary_factor=0.5), rotary_dim=8),
    "partial (StableLM)": Case(
        family="StableLm", config=rope(partial_rotary_factor=0.25), rotary_dim=4
    ),
    "partial, fused projection (GPT-NeoX)": Case(
        family="GPTNeoX", config=rope(partial_rotary_factor=0.25), rotary_dim=4
    ),
    "key norm (Qwen3)": Case(family="Qwen3", config=rope() | {"head_dim": 16}),
    "sinks and yarn (gpt-oss)": Case(
        family="GptOss",
        config=rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32}
        | {"layer_types": SLIDING},
        scaling=0.1 * math.log(4) + 1,
    ),
    "interleaved (Cohere)": Case(family="Cohere", config=rope(), interleaved=True),
    "interleaved, partial (GLM)": Case(
        family="Glm",
        config=rope(partial_rotary_factor=0.5) | {"head_dim": 16},
        rotary_dim=8,
        interleaved=True,
    ),
    "NoPE layers (SmolLM3)": Case(
        family="SmolLM3",
        config=rope() | {"no_rope_layers": [1, 0, 1]},
        rotating=(True, False, True),
    ),
    "NoPE layers, interleaved (Cohere 2)": Case(
        family="Cohere2",
        config=rope() | {"layer_types": SLIDING, "sliding_window": 32},
        rotating=(True, False, True),
        interleaved=True,
    ),
    "local and global (Gemma 3)": Case(
        family="Gemma3",
        config={
            "head_dim": 16,
            "sliding_window": 32,
            "layer_types": SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        vision={"hidden_size": 24, "num_hidden_layers": 1, "image_size": 28, "patch_size": 7},
    ),
    "blocks (Qwen2-VL)": Case(
        family="Qwen2VL",
        config=rope(mrope_section=[3, 3, 2]),
        vision={"embed_dim": 32, "hidden_size": 64, "patch_size": 7},
        section=(3, 3, 2),
    ),
    "blocks (Qwen2.5-VL)": Case(
        family="Qwen2_5_VL",
        config=rope(mrope_section=[2, 3, 3]),
        vision=QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 28},
        section=(2, 3, 3),
    ),
    "blocks, linear scaling": Case(
        family="Qwen2_5_VL",
        config=rope("linear", factor=2.0, mrope_section=[2, 3, 3]),
        vision=QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 28},
        section=(2, 3, 3),
    ),
    "alternating rows (Qwen3-VL)": Case(
        family="Qwen3VL",
        config=rope(mrope_section=[4, 2, 2], mrope_interleaved=True) | {"head_dim": 16},
        vision=QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        section=(4, 2, 2),
        mrope_interleaved=True,
    ),
    "blocks, partial, interleaved (GLM-4V)": Case(
        family="Glm4v",
        config=rope(mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
        vision=QWEN_VISION,
        rotary_dim=8,
        interleaved=True,
        section=(1, 1, 2),
    ),
}


class Prefill(NamedTuple):
    """Per layer: keys in the cache, and keys from the same hidden states with cos 1 and sin 0."""

    cached: list[Tensor]
    bare: list[Tensor]


class Prompt(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @property
    def end(self) -> int:
        return int(self.position_ids.max()) + 1

    def shifted(self, by: int) -> "Prompt":
        return self._replace(position_ids=self.position_ids + by)


def prompt(*, mrope: bool = False) -> Prompt:
    """Two rows of which the second is padded on the left, and for M-RoPE holds a 2 x 2 image."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, 64, (2, SEQ_LEN))
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    if mrope:
        position_ids = position_ids.repeat(3, 1, 1)
        position_ids[:, 1, 6:10] = torch.tensor([[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]])
        position_ids[:, 1, 10:] = torch.tensor([4, 5])
    return Prompt(input_ids, mask, position_ids)


@contextmanager
def recorded_calls(modules: list[nn.Module]) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    calls: list[tuple[tuple[Any, ...], Any]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for module in modules
    ]
    yield calls
    for handle in handles:
        handle.remove()


@torch.no_grad()
def prefill(model: PreTrainedModel, inputs: Prompt) -> Prefill:
    decoder = model.get_decoder()
    attentions = [getattr(layer, "self_attn", None) or layer.attention for layer in decoder.layers]
    with recorded_calls(attentions) as calls:
        cached = decoder(**inputs._asdict(), use_cache=True).past_key_values
    bare = DynamicCache()
    for attention, (args, kwargs) in zip(attentions, calls, strict=True):
        cos, sin = kwargs["position_embeddings"]
        without = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        cache_name = next(name for name in ("past_key_values", "layer_past") if name in kwargs)
        attention(*args, **kwargs | without | {cache_name: bare})
    return Prefill([layer.keys for layer in cached.layers], [layer.keys for layer in bare.layers])


def assert_derotation_is_exact(model: PreTrainedModel, inputs: Prompt) -> None:
    found = prefill(model, inputs)
    specs = rope_specs(model, inputs.end)
    for cached, bare, spec in zip(found.cached, found.bare, specs, strict=True):
        torch.testing.assert_close(derotate(cached, inputs.position_ids, spec), bare, **CLOSE)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case) -> PreTrainedModel:
    return case.build()


@pytest.fixture
def inputs(case: Case) -> Prompt:
    return prompt(mrope=case.section is not None)


def test_specs_say_what_the_family_does(case, model, inputs):
    specs = rope_specs(model, inputs.end)
    assert tuple(spec is not None for spec in specs) == case.rotating
    for spec in filter(None, specs):
        assert spec.rotary_dim == case.rotary_dim
        assert spec.attention_scaling == pytest.approx(case.scaling)
        assert spec.interleaved == case.interleaved
        assert spec.mrope_section == case.section
        assert spec.mrope_interleaved == case.mrope_interleaved


def test_derotated_keys_are_those_projected_without_rope(case, model, inputs):
    found = prefill(model, inputs)
    specs = rope_specs(model, inputs.end)
    for cached, bare, spec in zip(found.cached, found.bare, specs, strict=True):
        torch.testing.assert_close(derotate(cached, inputs.position_ids, spec), bare, **CLOSE)
        if spec is not None:
            assert (cached - bare).abs().max() > 1e-2, "the model did not rotate; nothing is shown"


def test_rotating_again_gives_the_cache_back(case, model, inputs):
    cached = prefill(model, inputs).cached
    for keys, spec in zip(cached, rope_specs(model, inputs.end), strict=True):
        bare = derotate(keys, inputs.position_ids, spec)
        torch.testing.assert_close(rotate(bare, inputs.position_ids, spec), keys, **CLOSE)


def test_keys_moved_are_those_of_a_prefill_further_on(case, model, inputs):
    if not case.is_static:
        pytest.skip(
            "its frequencies follow the length; the next test moves its first layer instead"
        )
    here, there = inputs, inputs.shifted(5)
    cached = prefill(model, here).cached
    expected = prefill(model, there).cached
    specs = rope_specs(model, there.end)
    assert specs == rope_specs(model, here.end)
    for keys, moved, spec in zip(cached, expected, specs, strict=True):
        bare = derotate(keys, here.position_ids, spec)
        torch.testing.assert_close(rotate(bare, there.position_ids, spec), moved, **CLOSE)


def test_first_layer_keys_move_from_one_set_of_frequencies_to_another():
    for name in ("dynamic beyond its length", "longrope, long"):
        model, here = CASES[name].build(), prompt()
        there = here.shifted(-6)
        there = there._replace(position_ids=there.position_ids.clamp(min=0))
        cached, spec = prefill(model, here).cached[0], rope_specs(model, here.end)[0]
        moved, moved_spec = prefill(model, there).cached[0], rope_specs(model, there.end)[0]
        assert spec != moved_spec
        bare = derotate(cached, here.position_ids, spec)
        torch.testing.assert_close(rotate(bare, there.position_ids, moved_spec), moved, **CLOSE)


def test_a_padded_row_derotates_to_what_the_row_alone_gives():
    model, both = CASES["yarn"].build(), prompt()
    alone = Prompt(*(tensor[1:, 4:] for tensor in both))
    together, single = prefill(model, both).cached, prefill(model, alone).cached
    for padded, keys, spec in zip(together, single, rope_specs(model, both.end), strict=True):
        bare = derotate(padded, both.position_ids, spec)[1:, :, 4:]
        torch.testing.assert_close(bare, derotate(keys, alone.position_ids, spec), **CLOSE)


def test_gemma3_layers_follow_their_own_frequencies():
    local, far, again = rope_specs(CASES["local and global (Gemma 3)"].build(), SEQ_LEN)
    assert local == again
    assert local.inv_freq[1] == pytest.approx(100 ** (-1 / 8))
    assert far.inv_freq[1] == pytest.approx(1e6 ** (-1 / 8) / 8)


def test_longrope_switches_where_the_prefill_outgrows_the_original_length():
    model = CASES["longrope, short"].build()
    short, long = rope_specs(model, 32)[0], rope_specs(model, 33)[0]
    assert short.inv_freq[0] == pytest.approx(1 / 1.1)
    assert long.inv_freq[0] == pytest.approx(1 / 2)


def test_dynamic_frequencies_are_those_left_by_an_earlier_longer_prefill():
    model, inputs = CASES["dynamic beyond its length"].build(), prompt()
    fresh = rope_specs(model, inputs.end)
    prefill(model, inputs.shifted(40))
    assert_derotation_is_exact(model, inputs)
    assert rope_specs(model, inputs.end) != fresh


@pytest.mark.parametrize("name", ["dynamic beyond its length", "longrope, short", "default"])
@pytest.mark.parametrize("seq_len", [1, 7, 50])
def test_reading_the_specs_leaves_the_model_as_it_was(name, seq_len):
    model = CASES[name].build().train()
    prefill(model, prompt())
    rotary = model.model.rotary_emb
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(rotary).items()}
    buffers = {k: (v, v.clone()) for k, v in model.named_buffers()}
    rope_specs(model, seq_len)
    assert model.training
    assert model.get_decoder().training
    after = vars(rotary)
    assert before.keys() == after.keys()
    for key in ("attention_scaling", "max_seq_len_cached", "long_inv_freq"):
        if key in before:
            torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    for key, buffer in model.named_buffers():
        was, value = buffers[key]
        assert buffer is was
        torch.testing.assert_close(buffer, value, rtol=0, atol=0)


def test_a_model_cast_to_bfloat16_has_the_rounded_frequencies_it_uses():
    model, inputs = CASES["default"].build().to(torch.bfloat16), prompt()
    spec = rope_specs(model, inputs.end)[0]
    assert spec.inv_freq == tuple(model.model.rotary_emb.inv_freq.tolist())
    found = prefill(model, inputs)
    bare = derotate(found.cached[0], inputs.position_ids, spec)
    assert bare.dtype == torch.bfloat16
    # Keys, cos and sin are rounded to 8 bits by the model, the result by us.
    torch.testing.assert_close(bare, found.bare[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["OPT", "GPT2", "Bloom"])
def test_models_without_rope_rotate_no_layer(family):
    assert rope_specs(Case(family=family).build(), SEQ_LEN) == (None, None, None)


def test_layers_without_keys_have_no_spec():
    model = Case(
        family="MiniMax",
        config=rope()
        | {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        }
        | {"num_local_experts": 2},
    ).build()
    first, second, third = rope_specs(model, SEQ_LEN)
    assert first is None
    assert second.rotary_dim == 16
    assert third is None


def test_layers_may_differ_in_head_dim():
    config = {"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 2}
    shared = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size": 64}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    model = Case(family="Gemma4Text", config=config | shared | layers).build()
    # The full layers turn a quarter of their channels: their other frequencies are zero.
    assert [spec.rotary_dim for spec in rope_specs(model, SEQ_LEN)] == [8, 16, 8, 16]
    assert_derotation_is_exact(model, prompt())


def test_position_rows_may_differ_by_layer_type():
    parameters = {
        "sliding_attention": rope(mrope_section=[4, 2, 2])["rope_parameters"],
        "full_attention": rope(mrope_section=[2, 3, 3])["rope_parameters"],
    }
    config = transformers.CohereCompassTextConfig(
        **TEXT, head_dim=16, layer_types=SLIDING, sliding_window=32, rope_parameters=parameters
    )
    model = AutoModel.from_config(config).eval()
    sections = [spec.mrope_section for spec in rope_specs(model, SEQ_LEN)]
    assert sections == [(4, 2, 2), (2, 3, 3), (4, 2, 2)]
    assert_derotation_is_exact(model, prompt(mrope=True))


def test_tokens_embedded_as_zero_do_not_hide_the_layout():
    model = CASES["default"].build()
    expected = rope_specs(model, SEQ_LEN)
    nn.init.zeros_(model.model.embed_tokens.weight[:40])
    assert rope_specs(model, SEQ_LEN) == expected


def test_sections_that_do_not_fit_the_pairs_are_refused():
    case = CASES["alternating rows (Qwen3-VL)"]
    long = replace(case, config=case.config | rope(mrope_section=[24, 20, 20]))
    with pytest.raises(UnsupportedError, match="qwen3_vl_text layer 0: no known RoPE layout"):
        rope_specs(long.build(), SEQ_LEN)


def test_a_layout_that_no_reading_reproduces_is_refused():
    gptj = Case(family="GPTJ", config={"n_layer": 2, "n_head": 4, "rotary_dim": 8}).build()
    with pytest.raises(UnsupportedError, match=r"gptj layer 0: no known RoPE layout .* off by"):
        rope_specs(gptj, SEQ_LEN)
    # HunYuan norms keys after it has rotated them, each channel by its own weight.
    hunyuan = Case(family="HunYuanDenseV1", config=rope() | {"head_dim": 16}).build()
    nn.init.normal_(hunyuan.model.layers[1].self_attn.key_layernorm.weight)
    with pytest.raises(UnsupportedError, match="hunyuan_v1_dense layer 1: no known RoPE layout"):
        rope_specs(hunyuan, SEQ_LEN)


def test_keys_of_zero_cannot_be_read():
    model = CASES["default"].build()
    nn.init.zeros_(model.model.layers[2].self_attn.k_proj.weight)
    with pytest.raises(UnsupportedError, match="llama layer 2: no known RoPE layout"):
        rope_specs(model, SEQ_LEN)


def test_a_latent_cache_is_refused():
    heads = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    dims = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    model = Case(family="DeepseekV3", config=heads | experts | dims).build()
    with pytest.raises(UnsupportedError, match="deepseek_v3 layer 0: its values depend on the"):
        rope_specs(model, SEQ_LEN)


def test_an_encoder_decoder_is_refused():
    heads = {"decoder_num_attention_heads": 4, "encoder_num_attention_heads": 4}
    layers = {"decoder_num_hidden_layers": 1, "encoder_num_hidden_layers": 1}
    config = transformers.MoonshineConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, **heads, **layers
    )
    model = transformers.MoonshineForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match="moonshine: an encoder-decoder's RoPE"):
        rope_specs(model, SEQ_LEN)


def test_an_empty_prefill_is_refused():
    with pytest.raises(ConfigError, match="seq_len must be at least 1, got 0"):
        rope_specs(CASES["default"].build(), 0)


class Keys(NamedTuple):
    keys: Tensor
    position_ids: Tensor
    spec: RopeSpec


@st.composite
def specs(draw: st.DrawFn) -> RopeSpec:
    pairs = draw(st.integers(1, 6))
    cuts = sorted(draw(st.tuples(st.integers(0, pairs), st.integers(0, pairs))))
    section = (cuts[0], cuts[1] - cuts[0], pairs - cuts[1])
    is_mrope = draw(st.booleans())
    return RopeSpec(
        inv_freq=tuple(draw(st.floats(0, 1, width=32)) for _ in range(pairs)),
        attention_scaling=draw(st.floats(0.5, 2)),
        mrope_section=section if is_mrope else None,
        mrope_interleaved=is_mrope and draw(st.booleans()),
        interleaved=draw(st.booleans()),
    )


@st.composite
def keyed(draw: st.DrawFn) -> Keys:
    spec = draw(specs())
    batch, heads, seq_len = (draw(st.integers(1, 3)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    head_dim = spec.rotary_dim + draw(st.integers(0, 3))
    keys = torch.randn(batch, heads, seq_len, head_dim, generator=generator)
    has_rows = spec.mrope_section is not None and draw(st.booleans())
    size = (3, batch, seq_len) if has_rows else (batch, seq_len)
    return Keys(keys, torch.randint(0, 50, size, generator=generator), spec)


def reference(keys: Tensor, position_ids: Tensor, spec: RopeSpec) -> Tensor:
    """Rotation as the papers write it: complex numbers, one pair at a time."""
    pairs = len(spec.inv_freq)
    rows = [0] * pairs
    if spec.mrope_interleaved:
        for row in (1, 2):
            for pair in range(row, min(pairs, 3 * spec.mrope_section[row]), 3):
                rows[pair] = row
    elif spec.mrope_section is not None:
        temporal, by_row, by_column = spec.mrope_section
        rows = [0] * temporal + [1] * by_row + [2] * by_column
    turned = keys.clone()
    for batch, head, place in torch.cartesian_prod(*map(torch.arange, keys.shape[:3])).view(-1, 3):
        vector = keys[batch, head, place]
        for pair, freq in enumerate(spec.inv_freq):
            a, b = (2 * pair, 2 * pair + 1) if spec.interleaved else (pair, pair + pairs)
            ids = position_ids if position_ids.ndim == 2 else position_ids[rows[pair]]
            turn = cmath.rect(spec.attention_scaling, float(ids[batch, place]) * freq)
            z = complex(vector[a], vector[b]) * turn
            turned[batch, head, place, a], turned[batch, head, place, b] = z.real, z.imag
    return turned


@settings(max_examples=40, deadline=None)
@given(keyed())
def test_rotation_is_multiplication_of_complex_numbers(example):
    torch.testing.assert_close(rotate(*example), reference(*example), **CLOSE)


@settings(max_examples=60, deadline=None)
@given(keyed())
def test_derotate_and_rotate_undo_each_other(example):
    keys, position_ids, spec = example
    torch.testing.assert_close(derotate(rotate(*example), position_ids, spec), keys, **CLOSE)
    torch.testing.assert_close(rotate(derotate(*example), position_ids, spec), keys, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(keyed())
def test_scaling_stretches_what_turns_and_leaves_the_rest(example):
    keys, _, spec = example
    rotated = rotate(*example)
    turned, still = rotated.split([spec.rotary_dim, keys.shape[-1] - spec.rotary_dim], dim=-1)
    length = keys[..., : spec.rotary_dim].norm(dim=-1) * spec.attention_scaling
    torch.testing.assert_close(turned.norm(dim=-1), length, **CLOSE)
    torch.testing.assert_close(still, keys[..., spec.rotary_dim :], rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(keyed(), st.integers(0, 50))
def test_scores_depend_on_distance_alone(example, shift):
    keys, position_ids, spec = example
    queries = keys.flip(1)

    def scores(offset: int) -> Tensor:
        turned = rotate(keys, position_ids + offset, spec)
        return rotate(queries, position_ids + offset + 3, spec) @ turned.mT

    torch.testing.assert_close(scores(0), scores(shift), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(specs())
def test_a_spec_comes_back_equal_from_json(spec):
    sent = RopeSpec(**json.loads(json.dumps(asdict(spec))))
    assert sent == spec
    assert hash(sent) == hash(spec)


SPEC = RopeSpec(inv_freq=(1.0, 0.1))
MROPE = RopeSpec(inv_freq=(1.0, 0.1, 0.01), mrope_section=(1, 1, 1), attention_scaling=1.5)


def test_without_a_spec_keys_are_returned_as_they_are():
    keys, position_ids = torch.randn(2, 3, 4, 5), torch.arange(4).repeat(2, 1)
    assert rotate(keys, position_ids, None) is keys
    assert derotate(keys, position_ids, None) is keys


def test_one_row_of_positions_stands_for_three_equal_ones():
    keys, position_ids = torch.randn(2, 3, 4, 6), torch.randint(0, 20, (2, 4))
    expected = rotate(keys, position_ids.repeat(3, 1, 1), MROPE)
    torch.testing.assert_close(rotate(keys, position_ids, MROPE), expected, rtol=0, atol=0)


@pytest.mark.parametrize("turn", [rotate, derotate])
def test_gradients_are_those_of_finite_differences(turn):
    keys = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    position_ids = torch.randint(0, 20, (3, 2, 3))
    assert torch.autograd.gradcheck(lambda x: turn(x, position_ids, MROPE), (keys,))


def test_gradients_flow_after_a_first_use_in_inference_mode():
    spec = RopeSpec(inv_freq=(0.123, 0.0456))
    keys, position_ids = torch.randn(1, 1, 3, 4), torch.arange(3)[None]
    with torch.inference_mode():
        rotate(keys, position_ids, spec)
    keys.requires_grad_()
    rotate(keys, position_ids, spec).sum().backward()
    assert keys.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_keep_their_dtype_and_angles_their_precision(dtype):
    keys = torch.randn(2, 3, 4, 6).to(dtype)
    position_ids = torch.randint(5000, 9000, (2, 4))
    rotated = rotate(keys, position_ids, MROPE)
    assert rotated.dtype == dtype
    # Angles in half precision would be wrong by whole turns at such positions.
    expected = rotate(keys.float(), position_ids, MROPE).to(dtype)
    torch.testing.assert_close(rotated, expected)


def test_nothing_is_read_back_from_the_device():
    # A tensor on the meta device has no data: whatever needs a value of it on the host raises.
    keys = torch.empty(2, 3, 4, 6, device="meta")
    position_ids = torch.empty(3, 2, 4, dtype=torch.long, device="meta")
    assert derotate(keys, position_ids, MROPE).shape == keys.shape


@pytest.mark.parametrize(
    ("keys", "position_ids", "spec", "message"),
    [
        ((2, 3, 4), (2, 4), SPEC, r"head_dim >= 4\), got \(2, 3, 4\)"),
        ((2, 3, 4, 2), (2, 4), SPEC, r"head_dim >= 4\), got \(2, 3, 4, 2\)"),
        ((2, 3, 4, 6), (3, 2, 4), SPEC, r"position_ids of \(2, 4\) for .* got \(3, 2, 4\)"),
        ((2, 3, 4, 6), (2, 5), SPEC, r"position_ids of \(2, 4\) for .* got \(2, 5\)"),
        ((2, 3, 4, 6), (1, 4), SPEC, r"position_ids of \(2, 4\) for .* got \(1, 4\)"),
        ((2, 3, 4, 6), (4, 2, 4), MROPE, r"\(2, 4\) or \(3, 2, 4\) for .* got \(4, 2, 4\)"),
    ],
)
@pytest.mark.parametrize("turn", [rotate, derotate])
def test_shapes_that_do_not_fit_are_named(turn, keys, position_ids, spec, message):
    with pytest.raises(ShapeError, match=message):
        turn(torch.zeros(keys), torch.zeros(position_ids, dtype=torch.long), spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inv_freq": ()}, "inv_freq must be finite and not empty"),
        ({"inv_freq": (1.0, math.nan)}, "inv_freq must be finite"),
        ({"attention_scaling": 0.0}, "attention_scaling must be positive, got 0.0"),
        ({"attention_scaling": math.inf}, "attention_scaling must be positive, got inf"),
        ({"mrope_interleaved": True}, "mrope_interleaved needs an mrope_section"),
        ({"mrope_section": (1, 1)}, r"three counts that sum to 2 pairs, got \(1, 1\)"),
        ({"mrope_section": (1, 1, 1)}, r"three counts that sum to 2 pairs, got \(1, 1, 1\)"),
        ({"mrope_section": (3, -1, 0)}, r"three counts that sum to 2 pairs, got \(3, -1, 0\)"),
    ],
)
def test_specs_that_describe_no_rotation_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RopeSpec(**{"inv_freq": (1.0, 0.1), **settings})

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from rope_cases import CASES, SLIDING, TEXT, Case, rope
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from mm_c2c.errors import ConfigError, UnsupportedError
from mm_c2c.rope import derotate, rotate
from mm_c2c.rope_probe import rope_specs

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SEQ_LEN = 12


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

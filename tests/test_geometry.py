"""The published geometries: every named model is built on the meta device, every pair is fused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from PIL import Image
from transformers import (
    AutoModel,
    DynamicCache,
    Lfm2VlConfig,
    LlamaForCausalLM,
    Mistral3Config,
    PreTrainedTokenizerFast,
)

from mm_c2c.align import Alignment
from mm_c2c.align.patches import align_pooled
from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import (
    CacheOrigin,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    empty_spans,
    read_layers,
)
from mm_c2c.cli import main
from mm_c2c.errors import InputError
from mm_c2c.fuser import CacheFuser, FuserConfig
from mm_c2c.geometry import Geometry, find, pair_costs, table, training_memory
from mm_c2c.inspection import describe_pair
from mm_c2c.link import LinkConfig
from mm_c2c.rope import RopeSpec
from mm_c2c.sources import source_class
from mm_c2c.sources.base import SourceInput

NAMES = list(table())
# Gemma 3 answers without pictures too.
TARGETS = [name for name in NAMES if "picture" not in table()[name] or "gemma-3" in name]


def unlike(names: list[str]) -> list[str]:
    """The first model of each cache geometry: what follows would only be done again."""
    return list({find(name).layout.shape: name for name in reversed(names)}.values())[::-1]


# Of the whole text model, as the Hub counts its weights.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "gemma-3-1b": 999_885_952,
    "SmolLM2-135M": 134_515_008,
}
PLACES = 20
GRID = PatchGrid(4, 4)
SLOTS = PatchGrid(2, 2)


@cache
def geometry(name: str) -> Geometry:
    return find(name)


# Of an encoder-decoder see tests/test_dry_run.py.
@pytest.mark.parametrize("name", [name for name in NAMES if "whisper" not in name])
def test_a_named_models_decoder_writes_the_cache_that_the_table_announces(name: str) -> None:
    found = geometry(name)
    with torch.device("meta"), torch.no_grad():
        decoder = AutoModel.from_config(found.text).eval()
        cache = DynamicCache(config=found.text)
        embeds = torch.zeros(1, 1, found.text.hidden_size, dtype=decoder.dtype)
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    layers, indices = read_layers(cache)
    layout = found.layout
    assert indices == layout.layer_indices == tuple(range(found.text.num_hidden_layers))
    for keys, values in layers:
        assert keys.shape == values.shape
        assert keys.shape[1::2] == (layout.shape.num_key_value_heads, layout.shape.head_dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_model_has_as_many_weights_as_published(name: str) -> None:
    assert geometry(name).num_parameters == PUBLISHED[name]


def test_every_number_in_the_table_says_where_it_came_from() -> None:
    for entry in table().values():
        marks = ("derived", "default", "code", "unconfirmed")
        marked = [key for mark in marks for key in entry.get(mark, [])]
        assert len(set(marked)) == len(marked)
        assert set(marked) <= {*entry["text"], "picture", "all"}
        text = entry["text"]
        if "head_dim" in entry.get("derived", []):
            assert text["head_dim"] * text["num_attention_heads"] == text["hidden_size"]


class MetaModel:
    """Stands for a source or a target: its geometry on the meta device, no weights."""

    minds_padding = False
    model = torch.nn.Module()
    model.device = torch.device("meta")  # type: ignore[assignment]

    def check_continues(self) -> None:
        """Meta tensors hold no logits that could differ."""

    def __init__(self, found: Geometry, tokenizer: Any) -> None:
        self.shape = found.layout.shape
        self.origin = CacheOrigin(found.name, None, found.model_type)
        self.tokenizer = tokenizer
        half = self.shape.head_dim // 2
        self.spec = RopeSpec(inv_freq=tuple(1e4 ** (-i / half) for i in range(half)))

    def rope(self, seq_len: int) -> tuple[RopeSpec, ...]:
        return (self.spec,) * self.shape.num_layers

    def layers(self, places: int) -> tuple[LayerKV, ...]:
        size = (1, self.shape.num_key_value_heads, places, self.shape.head_dim)
        return (LayerKV(*torch.zeros(2, *size, device="meta")),) * self.shape.num_layers

    def target_cache(self) -> DynamicCache:
        return DynamicCache([tuple(kv) for kv in self.layers(PLACES)])

    def source_cache(self) -> SourceCache:
        cells = [[0, row, col] for row in range(GRID.rows) for col in range(GRID.cols)]
        places = len(cells)
        return SourceCache(
            layers=self.layers(places),
            layer_indices=tuple(range(self.shape.num_layers)),
            position_ids=torch.zeros(1, places, dtype=torch.long, device="meta"),
            kinds=torch.full((1, places), PositionKind.IMAGE),
            patches=torch.tensor([cells]),
            grids=((GRID,),),
            spans=empty_spans(1, places),
            texts=("",),
            rope=self.rope(places),
            origin=self.origin,
        )


@pytest.mark.parametrize("target_name", unlike(TARGETS))
def test_every_source_fuses_into_a_target_of_real_geometry(
    target_name: str, tiny_target_tokenizer: PreTrainedTokenizerFast
) -> None:
    target = MetaModel(geometry(target_name), tiny_target_tokenizer)
    own = target.target_cache()
    positions = torch.arange(PLACES, device="meta").unsqueeze(0)
    index = torch.arange(SLOTS.rows * SLOTS.cols).unsqueeze(0)
    for name in unlike(NAMES):
        source = MetaModel(geometry(name), tiny_target_tokenizer)
        fuser = FuserConfig(source=source.shape, target=target.shape)
        link = LinkConfig(source="s", geometry="slots", rows=2, cols=2, fuser=fuser)
        with torch.device("meta"):
            bridge = Bridge(target, {"s": source}, BridgeConfig(links=(link,), slot_token="a"))  # type: ignore[arg-type, dict-item]
        seen = source.source_cache()
        alignment = align_pooled(seen, SLOTS, index)
        moved = {key: getattr(alignment, key).to("meta") for key in Alignment.__annotations__}
        fused = bridge._write(link, seen, replace(alignment, **moved), own, positions)
        for before, after in zip(own.layers, fused.layers, strict=True):
            assert after.keys.shape == after.values.shape == before.keys.shape
            assert after.keys.is_meta
            assert after.keys is not before.keys


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        ("gemma-3-4b", "google/gemma-3-4b-it"),
        ("pi0", "lerobot/pi0_base"),
    ],
)
def test_a_model_is_found_by_short_names_too(name: str, known: str) -> None:
    assert find(name).name == known


def test_no_two_models_share_a_name() -> None:
    shorts = [name.rpartition("/")[2].lower() for name in NAMES]
    assert len(set(shorts)) == len(shorts)
    for name in NAMES:
        assert find(name.rpartition("/")[2]).name == name


def test_an_unknown_model_lists_the_known_ones_and_the_closest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"closest: Qwen/Qwen3-8B; known: Qwen/Qwen2\.5-0\.5B-Ins"):
        find("qwen3-9b")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model"):
        find(str(tmp_path))


def test_a_folder_is_read_like_a_name(
    tiny_target: LlamaForCausalLM, tiny_llava: Any, tmp_path: Path
) -> None:
    for name, model in (("text", tiny_target), ("vlm", tiny_llava.model)):
        model.save_pretrained(tmp_path / name)
    source, target = find(str(tmp_path / "vlm")), find(str(tmp_path / "text"))
    assert (source.model_type, source.picture_tokens, source.picture_pixels) == (
        "llava",
        16,
        "28 x 28",
    )
    assert target.num_parameters == tiny_target.num_parameters()
    costs = pair_costs(source, target)
    assert costs["source"]["cache"]["fp16_bytes_a_token"] == 2 * 2 * 4 * 4 * 6
    assert costs["source"]["cache"]["fp32_bytes_a_picture"] == 4 * 2 * 4 * 4 * 6 * 16
    assert "picture_tokens" not in costs["target"]["cache"]


def test_the_fuser_that_is_priced_is_the_one_that_is_built() -> None:
    source, target = geometry("SmolVLM-256M"), geometry("SmolLM2-135M")
    costs = pair_costs(source, target)
    shapes = {"source": source.layout.shape, "target": target.layout.shape}
    for preset, config in (("small", FuserConfig(**shapes)), ("c2c", FuserConfig.c2c(**shapes))):
        with torch.device("meta"):
            expected = sum(p.numel() for p in CacheFuser(config).parameters())
        fuser = costs["fusers"][preset]
        assert fuser["parameters"] == expected
        assert fuser["fp32_bytes"] == 2 * fuser["fp16_bytes"] == 4 * expected
        assert fuser["training_bytes"]["total"] == sum(
            size for part, size in fuser["training_bytes"].items() if part != "total"
        )


def test_training_memory_counts_what_it_says() -> None:
    source, target = geometry("SmolVLM-256M"), geometry("SmolLM2-135M")
    memory = training_memory(1000, [source], target, rows=2, positions=3)
    assert memory[:3] == (4000, 4000, 8000)
    assert memory.frozen == 2 * (source.num_parameters + 134_515_008)
    assert memory.activations == 6 * (34 * 576 * 30 + 8 * 49152)
    assert memory.total == sum(memory)


def test_a_pair_is_printed_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--pair", "SmolVLM-256M", "gemma-3-1b"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line]
    assert all(line == line.rstrip() and len(line) <= 100 for line in lines)
    column = lines[0].index("target")
    assert lines[1][column:] == "google/gemma-3-1b-it"
    assert "sliding layers       none" in printed
    assert "22, window 512" in printed
    assert "2048 x 2048: 1,088 tokens" in printed


def test_a_pair_can_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", "--pair", "SmolVLM-256M", "SmolLM2-135M"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == pair_costs(geometry("SmolVLM-256M"), geometry("SmolLM2-135M"))
    assert describe_pair(report)


@pytest.mark.parametrize(
    "argv",
    [[], ["what", "--pair", "a", "b"], ["what", "--json"]],
    ids=["nothing", "both", "json of one"],
)
def test_inspect_wants_one_thing_or_a_pair(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *argv]) == 1
    assert "inspect takes WHAT, or --pair SOURCE TARGET" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"blip-2_t5", "florence2"}))
def test_the_decoder_of_each_family_is_counted(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build().model
    model.save_pretrained(tmp_path)
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    found = find(str(tmp_path))
    assert found.num_parameters == decoder.num_parameters() + (0 if tied else head.numel())
    assert found.picture_tokens or name == "gemma4"  # whose config does not tell


@pytest.mark.parametrize(
    ("kind", "positions"),
    [(Mistral3Config, (448 // 28) ** 2), (Lfm2VlConfig, (448 // 32) ** 2)],
)
def test_models_that_merge_patches_say_so_in_different_places(
    kind: Any, positions: int, tmp_path: Path
) -> None:
    kind().save_pretrained(tmp_path)
    found = find(str(tmp_path))
    assert (found.picture_tokens, found.picture_pixels) == (positions, "448 x 448")


@pytest.mark.parametrize(
    ("name", "positions"),
    [("blip-2", 5), ("blip-2_t5", 5), ("florence2", None), ("mllama", 4 * 4 + 1)],
)
def test_models_that_look_through_queries_or_cross_attention_are_described(
    name: str, positions: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = FAMILIES[name].build()
    tiny.model.save_pretrained(tmp_path)
    read = source_class(tiny.model.config.model_type, has_vision=True)
    source = read(tiny.model, tiny.processor, name)
    cache = source.prefill([SourceInput(text="What?", images=(Image.new("RGB", (28, 28)),))])
    model = find(str(tmp_path))
    assert (model.layout.shape, model.picture_tokens) == (source.shape, positions)
    assert model.layout.layer_indices == cache.layer_indices
    assert main(["inspect", str(tmp_path)]) == 0
    heads = f"{source.shape.num_key_value_heads} KV heads of {source.shape.head_dim}"
    printed = capsys.readouterr().out
    assert f"  cache      {source.shape.num_layers} " in printed
    assert heads in printed
    assert main(["inspect", "--pair", str(tmp_path), "SmolLM2-135M"]) == 0

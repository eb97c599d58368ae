"""Write the golden tensors: what a tiny bridge of formula-made weights puts into a target.

python tests/golden/write_golden.py     # after a change that is meant to change them
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mm_c2c import (
    Bridge,
    BridgeConfig,
    CacheShape,
    FuserConfig,
    LinkConfig,
    PatchGrid,
    SourceCache,
    SourceInput,
    Target,
)
from mm_c2c.cache import CacheOrigin, LayerKV, empty_spans, read_layers
from mm_c2c.rope import RopeSpec
from mm_c2c.sources.base import count_positions

GOLDEN = Path(__file__).parent / "fused.safetensors"
SOURCE = CacheShape(num_layers=2, num_key_value_heads=3, head_dim=4)
TARGET = CacheShape(num_layers=3, num_key_value_heads=2, head_dim=8)


def wave(*shape: int, step: float, scale: float = 0.3) -> Tensor:
    """Numbers by a formula, since random streams change between releases of torch."""
    count = torch.Size(shape).numel()
    return (
        (scale * torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * step))
        .float()
        .view(shape)
    )


def fill(module: nn.Module) -> None:
    """Give every weight its own wave."""
    with torch.no_grad():
        for index, weight in enumerate(module.parameters()):
            weight.copy_(wave(*weight.shape, step=0.7 + 0.01 * index))


def build_target() -> LlamaForCausalLM:
    """A Llama of three layers."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=TARGET.num_layers,
        num_attention_heads=4,
        num_key_value_heads=TARGET.num_key_value_heads,
        head_dim=TARGET.head_dim,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    fill(model)
    return model


def build_cache() -> SourceCache:
    """A prompt of two rows: a 2 x 4 picture, then one word."""
    seq_len, grid = 9, PatchGrid(2, 4)
    cells = [(0, r, c) for r in range(grid.rows) for c in range(grid.cols)] + [(-1, -1, -1)]
    sizes = (2, SOURCE.num_key_value_heads, seq_len, SOURCE.head_dim)
    return SourceCache(
        layers=tuple(
            LayerKV(wave(*sizes, step=1.1 + i, scale=1.0), wave(*sizes, step=1.3 + i, scale=1.0))
            for i in range(SOURCE.num_layers)
        ),
        layer_indices=(0, 1),
        position_ids=torch.arange(seq_len).expand(2, -1),
        kinds=torch.tensor([[3] * 8 + [2]] * 2),
        patches=torch.tensor([cells] * 2),
        grids=((grid,),) * 2,
        spans=empty_spans(2, seq_len),
        texts=("", ""),
        rope=(RopeSpec(inv_freq=(1.0, 0.1)),) * SOURCE.num_layers,
        origin=CacheOrigin("golden", None, "golden"),
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; nothing is trained."""
    words = ["[PAD]", "[UNK]", "image", "what", "is", "here", "where", "the", "cat", "?", "look"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{{ 'look' }}"
    )
    return fast


class Writer:
    """A source that is never asked: its cache is written by a formula."""

    shape = SOURCE
    origin = CacheOrigin("golden", None, "golden")

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """The same cache, whatever is shown."""
        return build_cache()

    def generate(self, inputs: Sequence[SourceInput], **kwargs: object) -> list[str]:
        """It has nothing to say."""
        return [""] * len(inputs)


@torch.no_grad()
def fused() -> dict[str, Tensor]:
    """From a source's cache to the target's logits: the whole way through a bridge."""
    model = build_target()
    link = LinkConfig(
        source="golden",
        geometry="slots",
        rows=1,
        cols=2,
        fuser=FuserConfig(source=SOURCE, target=TARGET, hidden_size=12, rank=5),
    )
    bridge = Bridge(
        Target(model, build_tokenizer(), "golden"),
        {"golden": Writer()},
        BridgeConfig(links=(link,), slot_token="image"),
    ).eval()
    fill(bridge.fusers)
    seen = bridge.fuse_slots({"golden": build_cache()})
    layers, _ = read_layers(seen.past_key_values)
    inputs = bridge.fuse(seen, ["what is here?", "where is the cat?"])
    logits = model(
        inputs["input_ids"][:, seen.input_ids.shape[1] :],
        attention_mask=inputs["attention_mask"],
        position_ids=count_positions(inputs["attention_mask"])[:, seen.input_ids.shape[1] :],
        past_key_values=inputs["past_key_values"],
    ).logits
    return {
        "keys": torch.stack([kv.keys for kv in layers]),
        "values": torch.stack([kv.values for kv in layers]),
        "logits": logits,
    }


if __name__ == "__main__":
    save_file(fused(), GOLDEN)

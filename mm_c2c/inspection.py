"""What `mm-c2c inspect` prints: a saved bridge, a cache file, or a model's cache geometry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from mm_c2c.bridge import BridgeConfig
from mm_c2c.cache import CacheShape, PositionKind
from mm_c2c.config import from_dict
from mm_c2c.errors import InputError, MismatchError
from mm_c2c.geometry import CacheLayout, cache_layout, pair_costs
from mm_c2c.geometry import find as find_geometry
from mm_c2c.link import LinkConfig
from mm_c2c.pretrained import CONFIG_NAME, WEIGHTS_NAME, read_header
from mm_c2c.transport import load_cache


def describe(what: str) -> str:
    """Layers, heads, positions and parameters of a saved bridge, a cache or a model.

    Args:
        what: a folder that `save_pretrained` wrote, a file that `save_cache` wrote, or a model's
            folder or Hub id.
    """
    folder = Path(what)
    if folder.is_file() or folder.suffix == ".safetensors":
        return _describe_cache(folder)
    if (folder / CONFIG_NAME).is_file() and '"bridge"' in (folder / CONFIG_NAME).read_text("utf-8"):
        return _describe_bridge(folder)
    return _describe_model(what)


def pair_report(source: str, target: str) -> dict[str, Any]:
    """What fusing one model into another costs; see `mm_c2c.geometry`.

    Args:
        source: a name in the table of known models, a Hub id or a folder.
        target: likewise.
    """
    return pair_costs(find_geometry(source), find_geometry(target))


def describe_pair(report: dict[str, Any]) -> str:
    """The report of `pair_report` as two tables."""
    models = [report["source"], report["target"]]
    small, c2c = report["fusers"]["small"], report["fusers"]["c2c"]
    rows = [
        ("", "source", "target"),
        ("model", *(model["name"] for model in models)),
        ("type", *(model["model_type"] for model in models)),
        ("layers fused", *map(_held_layers, models)),
        ("sliding layers", *map(_sliding, models)),
        ("KV heads", *(f"{m['num_key_value_heads']} of {m['head_dim']}" for m in models)),
        ("attention heads", *(str(model["num_attention_heads"]) for model in models)),
        ("hidden size", *(f"{model['hidden_size']:,}" for model in models)),
        ("vocabulary", *(f"{model['vocab_size']:,}" for model in models)),
        ("parameters (text)", *(f"{model['parameters']:,}" for model in models)),
        ("cache a token, fp16", *(_size(m["cache"]["fp16_bytes_a_token"]) for m in models)),
        ("cache a token, fp32", *(_size(m["cache"]["fp32_bytes_a_token"]) for m in models)),
        ("one picture", *map(_picture, models)),
        ("cache of it, fp16", *map(_picture_size, models)),
    ]
    fusers = [
        ("fuser", "small", "c2c"),
        ("parameters", f"{small['parameters']:,}", f"{c2c['parameters']:,}"),
        *(
            (f"file, {dtype}", _size(small[f"{dtype}_bytes"]), _size(c2c[f"{dtype}_bytes"]))
            for dtype in ("fp16", "fp32")
        ),
        ("to train it, estimated", "", ""),
        *(
            (f"  {words}", _size(small["training_bytes"][key]), _size(c2c["training_bytes"][key]))
            for key, words in _TRAINING_WORDS.items()
        ),
    ]
    return "\n\n".join(_columns(part) for part in (rows, fusers))


_TRAINING_WORDS = {
    "fuser": "fuser, fp32",
    "gradients": "gradients",
    "optimizer": "Adam's two moments",
    "frozen": "frozen decoders, bf16",
    "activations": "activations, 8 x 128 positions",
    "total": "total",
}


def _held_layers(model: dict[str, Any]) -> str:
    held, total = len(model["layer_indices"]), model["num_hidden_layers"]
    return str(held) if held == total else f"{held} of {total}"


def _sliding(model: dict[str, Any]) -> str:
    count = model["sliding_layers"]
    return f"{count}, window {model['sliding_window']:,}" if count else "none"


def _picture(model: dict[str, Any]) -> str:
    tokens = model["cache"].get("picture_tokens")
    return f"{model['picture_pixels']}: {tokens:,} tokens" if tokens else "-"


def _picture_size(model: dict[str, Any]) -> str:
    size = model["cache"].get("fp16_bytes_a_picture")
    return _size(size) if size else "-"


def _size(num_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.1f} {unit}" if unit != "B" else f"{num_bytes} B"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of words under each other, each column as wide as its widest word."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{word:<{w}}" for word, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _describe_bridge(folder: Path) -> str:
    header = read_header(folder)
    weights = folder / WEIGHTS_NAME
    try:
        with safe_open(weights, "pt") as file:
            sizes = {n: torch.Size(file.get_slice(n).get_shape()).numel() for n in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MismatchError(f"{weights} is missing or damaged: {error}") from error
    lines = [f"bridge to {header['target']['model']} ({header['target']['model_type']})"]
    for link in from_dict(BridgeConfig, header["bridge"]).links:
        fuser = link.fuser
        count = sum(size for key, size in sizes.items() if key.startswith(f"{link.name}."))
        origin = header["sources"][link.source]
        lines += [
            f"  {link.name}: from {origin['model']} ({origin['model_type']})",
            f"    source  {_geometry(fuser.source)}",
            f"    target  {_geometry(fuser.target)}",
            f"    fuser   {fuser.preset}, layers {fuser.layers}, {count:,} parameters",
            f"    {_slots(link)}",
        ]
    lines.append(f"  {weights.stat().st_size:,} bytes")
    return "\n".join(lines)


def _describe_cache(path: Path) -> str:
    cache = load_cache(path)
    first = cache.layers[0].keys
    origin = cache.origin
    shapes = {(kv.keys.shape[1], kv.keys.shape[3]) for kv in cache.layers}
    heads = ", ".join(f"{count} KV heads of {dim}" for count, dim in sorted(shapes))
    counts = Counter(PositionKind(kind).name.lower() for kind in cache.kinds.flatten().tolist())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    grids = Counter(f"{grid.rows} x {grid.cols}" for row in cache.grids for grid in row)
    turned = sum(spec is not None for spec in cache.rope)
    lines = [
        f"cache of {origin.model} ({origin.model_type}), revision {origin.revision or 'unknown'}",
        f"  layers     {len(cache.layers)}{_skipping(cache.layer_indices)}, {heads}; {turned} with "
        "rotated keys",
        f"  positions  {cache.batch_size} x {cache.seq_len}: {kinds}",
        *(f"  views      {count} of {grid} patches" for grid, count in grids.items()),
        f"  {cache.num_bytes:,} bytes of K and V, {str(first.dtype).removeprefix('torch.')}",
    ]
    return "\n".join(lines)


def _skipping(indices: Sequence[int]) -> str:
    """Which layers a cache holds, where it does not hold the first ones without a gap."""
    if tuple(indices) == tuple(range(len(indices))):
        return ""
    return f" ({', '.join(map(str, indices))})"


def _geometry(shape: CacheShape) -> str:
    return f"{shape.num_layers} layers, {shape.num_key_value_heads} KV heads of {shape.head_dim}"


def _slots(link: LinkConfig) -> str:
    if link.geometry == "aligned":
        return "aligned to the words of the question"
    several = f", for each of {link.images} pictures" if link.images > 1 else ""
    drawn = f", of {' and '.join(link.kinds)}" if link.kinds else ""
    asked = f", asked by {' and '.join(link.asking)}" if link.asking else ""
    return f"slots   {link.rows} x {link.cols}{several}{drawn}{asked}"


def _describe_model(what: str) -> str:
    from mm_c2c.reference.tower import register

    register()
    try:
        config = AutoConfig.from_pretrained(what)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what!r} is neither a saved bridge nor a model that can be found: {error}"
        ) from error
    text = config.get_text_config(decoder=True)
    layout = cache_layout(config)
    shape = layout.shape
    positions = getattr(text, "max_position_embeddings", None)
    return (
        f"{what} ({config.model_type}): {_parameters(config)} parameters\n"
        f"  cache      {_layers(layout)}, {shape.num_key_value_heads} KV heads of "
        f"{shape.head_dim}\n"
        f"  positions  {f'up to {positions:,}' if positions else 'no fixed limit'}, "
        f"{4 * shape.num_layers * shape.width:,} bytes of bf16 cache each"
    )


def _layers(layout: CacheLayout) -> str:
    """How many layers hold keys and values, and which do where others do not."""
    held, total = len(layout.layer_indices), layout.num_hidden_layers
    if held == total:
        return f"{held} layers"
    which = ", ".join(map(str, layout.layer_indices))
    return f"{held} of {total} layers ({which}; nothing of the others is fused)"


def _parameters(config: PreTrainedConfig) -> str:
    """How many the model has, counted without making it."""
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
        try:
            with torch.device("meta"):
                model = auto.from_config(config)
        except (ValueError, ImportError):
            continue  # another class's model, or one that wants a package which is not here
        return f"{model.num_parameters():,}"
    return "an unknown number of"

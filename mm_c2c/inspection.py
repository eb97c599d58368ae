"""What `mm-c2c inspect` prints: a saved bridge, a cache file, or a model's cache geometry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from mm_c2c.bridge import CONFIG_NAME, WEIGHTS_NAME, read_header
from mm_c2c.cache import PositionKind
from mm_c2c.errors import InputError, MismatchError
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


def _describe_bridge(folder: Path) -> str:
    header = read_header(folder)
    weights = folder / WEIGHTS_NAME
    try:
        with safe_open(weights, "pt") as file:
            sizes = {n: torch.Size(file.get_slice(n).get_shape()).numel() for n in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MismatchError(f"{weights} is missing or damaged: {error}") from error
    lines = [f"bridge to {header['target']['model']} ({header['target']['model_type']})"]
    for link in header["bridge"]["links"]:
        fuser = link["fuser"]
        name = f"{link['source']}_{link['geometry']}"
        count = sum(size for key, size in sizes.items() if key.startswith(f"{name}."))
        origin = header["sources"][link["source"]]
        lines += [
            f"  {name}: from {origin['model']} ({origin['model_type']})",
            f"    source  {_geometry(fuser['source'])}",
            f"    target  {_geometry(fuser['target'])}",
            f"    fuser   {fuser['preset']}, layers {fuser['layers']}, {count:,} parameters",
            f"    slots   {link['rows']} x {link['cols']}"
            if link["geometry"] == "slots"
            else "    aligned to the words of the question",
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
        f"  layers     {len(cache.layers)}, {heads}; {turned} with rotated keys",
        f"  positions  {cache.batch_size} x {cache.seq_len}: {kinds}",
        *(f"  views      {count} of {grid} patches" for grid, count in grids.items()),
        f"  {cache.num_bytes:,} bytes of K and V, {str(first.dtype).removeprefix('torch.')}",
    ]
    return "\n".join(lines)


def _geometry(shape: dict[str, int]) -> str:
    return (
        f"{shape['num_layers']} layers, {shape['num_key_value_heads']} KV heads "
        f"of {shape['head_dim']}"
    )


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
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    positions = getattr(text, "max_position_embeddings", None)
    per_position = 2 * text.num_hidden_layers * kv_heads * head_dim
    return (
        f"{what} ({config.model_type}): {_parameters(config)} parameters\n"
        f"  cache      {text.num_hidden_layers} layers, {kv_heads} KV heads of {head_dim}\n"
        f"  positions  {f'up to {positions:,}' if positions else 'no fixed limit'}, "
        f"{2 * per_position:,} bytes of bf16 cache each"
    )


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

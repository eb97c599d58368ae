"""Text models of many families, as what is read and as what answers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_families import (
    FAMILIES,
    FORGETFUL,
    LONGER,
    PADDED,
    REFUSED,
    WIDE,
    build,
    byte_tokenizer,
    states,
)
from torch import Tensor

from mm_c2c.bridge import Bridge, BridgeConfig
from mm_c2c.cache import (
    CacheOrigin,
    CacheShape,
    LayerKV,
    PatchGrid,
    PositionKind,
    SourceCache,
    empty_spans,
    read_layers,
)
from mm_c2c.errors import UnsupportedError
from mm_c2c.fuser import FuserConfig
from mm_c2c.geometry import cache_layout
from mm_c2c.inspection import describe
from mm_c2c.link import LinkConfig
from mm_c2c.perception import FusedInputs
from mm_c2c.sources import SourceInput
from mm_c2c.sources.base import full_cache
from mm_c2c.sources.text import TextSource
from mm_c2c.target import Target
from mm_c2c.transport import save_cache

TOKENIZER = byte_tokenizer()
QUESTIONS = ("is it red ?", "Which sticker is above the apple ? answer :")  # longer than WINDOW
ANSWER = (70, 71, 72)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}
HYBRIDS = ("qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "granitemoehybrid")
WINDOWED = ("gemma3_text", "mistral", "gpt_oss")
EACH_GEOMETRY = pytest.mark.parametrize("geometry", ["slots", "aligned"])


class Eyes:
    """Stands for a source that looked at 2 x 2 patches: its cache is made of noise."""

    shape = CacheShape(num_layers=2, num_key_value_heads=3, head_dim=6)
    origin = CacheOrigin("tiny/eyes", None, "eyes")

    def cache(self, rows: int = 2) -> SourceCache:
        generator = torch.Generator().manual_seed(7)

        def noise() -> Tensor:
            return torch.randn(rows, 3, 4, 6, generator=generator)

        cells = torch.tensor([[0, r, c] for r in range(2) for c in range(2)])
        return SourceCache(
            layers=tuple(LayerKV(noise(), noise()) for _ in range(2)),
            layer_indices=(0, 1),
            position_ids=torch.arange(4).expand(rows, -1),
            kinds=torch.full((rows, 4), PositionKind.IMAGE),
            patches=cells.expand(rows, -1, -1),
            grids=((PatchGrid(2, 2),),) * rows,
            spans=empty_spans(rows, 4),
            texts=("",) * rows,
            rope=(None, None),
            origin=self.origin,
        )


def reader(name: str = "qwen3") -> TextSource:
    return TextSource(build(FAMILIES[name], len(TOKENIZER)), TOKENIZER, f"tiny/{name}")


class Rig:
    """A family's model as the target of both geometries."""

    def __init__(self, model: Any, source: TextSource) -> None:
        self.target = Target(model, TOKENIZER, "tiny/target")
        self.sources = {"eyes": Eyes(), "reader": source}
        self.words = source.prefill([SourceInput(text=question) for question in QUESTIONS])

    def bridge(self, geometry: str, *, is_open: bool = False) -> Bridge:
        """Closed, or open with random weights."""
        name = "eyes" if geometry == "slots" else "reader"
        fuser = FuserConfig(
            source=self.sources[name].shape, target=self.target.shape, hidden_size=12, rank=4
        )
        link = LinkConfig(source=name, geometry=geometry, rows=2, cols=3, fuser=fuser)
        bridge = Bridge(self.target, self.sources, BridgeConfig(links=(link,), slot_token="a"))
        generator = torch.Generator().manual_seed(3)
        for module in bridge.fusers.values():
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if not is_open:
                module.close()
        return bridge.eval()

    def fuse(self, bridge: Bridge, questions: Sequence[str] = QUESTIONS) -> FusedInputs:
        if bridge.config.links[0].geometry == "slots":
            return bridge.fuse(bridge.fuse_slots({"eyes": Eyes().cache()}), questions)
        return bridge.fuse(None, questions, {"reader": self.words})

    def logits(self, fused: FusedInputs, answer: Sequence[int] = ()) -> Tensor:
        """Of the last position of each row, or of the answer's."""
        ids, mask = fused["input_ids"], fused["attention_mask"]
        done = fused["past_key_values"].get_seq_length()
        said = torch.tensor(answer, dtype=torch.long).expand(len(ids), -1)
        ids, mask = torch.cat([ids, said], dim=1), torch.cat([mask, said > 0], dim=1)
        return self.target.model(
            ids[:, done:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, done:],
            past_key_values=fused["past_key_values"],
        ).logits[:, -1]


@pytest.fixture(scope="module")
def words_source() -> TextSource:
    return reader()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rig(family: str, words_source: TextSource) -> Rig:
    return Rig(build(FAMILIES[family], len(TOKENIZER)), words_source)


def make_rig(name: str, words_source: TextSource) -> Rig:
    return Rig(build(FAMILIES[name], len(TOKENIZER)), words_source)


def real_ids(fused: FusedInputs, row: int) -> Tensor:
    return fused["input_ids"][row, fused["attention_mask"][row] == 1].unsqueeze(0)


# --- as a source ------------------------------------------------------------------------------


def test_a_source_reads_the_layers_that_hold_keys_and_values(family: str, rig: Rig) -> None:
    expected = FAMILIES[family]
    source = TextSource(rig.target.model, TOKENIZER, "tiny/source")
    cache = source.prefill([SourceInput(text=question) for question in QUESTIONS])
    announced = cache_layout(source.model.config)
    assert cache.layer_indices == source.layer_indices == announced.layer_indices == expected.fused
    assert cache.shape == source.shape == announced.shape
    assert cache.shape == CacheShape(
        num_layers=len(expected.fused),
        num_key_value_heads=expected.heads,
        head_dim=expected.head_dim,
    )


@torch.no_grad()
def test_a_source_keeps_what_a_plain_forward_computes_for_each_row(rig: Rig) -> None:
    source = TextSource(rig.target.model, TOKENIZER, "tiny/source")
    cache = source.prefill([SourceInput(text=question) for question in QUESTIONS])
    for row, question in enumerate(QUESTIONS):
        turns = [{"role": "user", "content": question}]
        ids = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        real = cache.kinds[row] != PositionKind.PAD
        own = rig.target.model(ids["input_ids"], use_cache=True).past_key_values
        for found, index in zip(cache.layers, cache.layer_indices, strict=True):
            for ours, theirs in zip(
                found, (own.layers[index].keys, own.layers[index].values), strict=True
            ):
                kept = theirs.shape[2]  # the model's own cache forgets what left the window
                torch.testing.assert_close(ours[row, :, real][:, -kept:], theirs[0], **CLOSE)


# --- as a target ------------------------------------------------------------------------------


@EACH_GEOMETRY
@torch.no_grad()
def test_a_closed_bridge_gives_each_row_what_the_target_alone_gives(
    rig: Rig, geometry: str
) -> None:
    bridge = rig.bridge(geometry)
    fused = rig.fuse(bridge)
    answers = rig.target.generate(fused, max_new_tokens=6, do_sample=False, pad_token_id=2)
    answers = answers[:, fused["input_ids"].shape[1] :]
    got = rig.logits(rig.fuse(bridge))
    for row in range(2):
        ids = real_ids(fused, row)
        torch.testing.assert_close(got[row], rig.target.model(ids).logits[0, -1], **CLOSE)
        own = rig.target.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
        own = own[0, ids.shape[1] :]
        assert answers[row, : len(own)].tolist() == own.tolist()


@EACH_GEOMETRY
@torch.no_grad()
def test_a_closed_bridge_leaves_the_targets_cache_untouched(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(geometry)
    fused = rig.fuse(bridge)
    before = bridge.prompt.before + [bridge.prompt.slot_id] * (6 if geometry == "slots" else 0)
    ids, mask = fused["input_ids"], fused["attention_mask"]
    own = full_cache(rig.target.model)
    done = fused["past_key_values"].get_seq_length()
    rig.target.model(torch.tensor([before]), past_key_values=own)
    longest = int(mask.sum(1).argmax())
    if done > len(before):
        rig.target.model(ids[longest : longest + 1, len(before) : done], past_key_values=own)
    for index in rig.target.layer_indices:
        found, expected = fused["past_key_values"].layers[index], own.layers[index]
        torch.testing.assert_close(found.keys[longest], expected.keys[0], **EXACT)
        torch.testing.assert_close(found.values[longest], expected.values[0], **EXACT)


@EACH_GEOMETRY
def test_an_open_bridge_is_heard_and_trains_the_fuser_alone(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(geometry, is_open=True)
    logits = rig.logits(rig.fuse(bridge), ANSWER)
    closed = rig.logits(rig.fuse(rig.bridge(geometry)), ANSWER)
    assert ((logits - closed).abs().amax(1) > 1e-3).all()
    logits.logsumexp(1).sum().backward()
    for name, parameter in bridge.fusers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    for parameter in rig.target.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


@EACH_GEOMETRY
@torch.no_grad()
def test_a_padded_row_gives_what_the_row_alone_gives(rig: Rig, geometry: str) -> None:
    bridge = rig.bridge(geometry, is_open=True)
    both = rig.logits(rig.fuse(bridge))
    for row, question in enumerate(QUESTIONS):
        if geometry == "slots":
            seen = bridge.fuse_slots({"eyes": Eyes().cache().select(torch.tensor([row]))})
            fused = bridge.fuse(seen, [question])
        else:
            words = {"reader": rig.words.select(torch.tensor([row]))}
            fused = bridge.fuse(None, [question], words)
        torch.testing.assert_close(both[row], rig.logits(fused)[0], **CLOSE)


def test_gradients_are_those_of_finite_differences(rig: Rig) -> None:
    """A layer that writes into what autograd has kept would raise, or be wrong here."""
    bridge = rig.bridge("slots", is_open=True)
    gate = next(iter(bridge.fusers.values())).gate_logits

    def loss() -> Tensor:
        return rig.logits(rig.fuse(bridge), ANSWER).logsumexp(1).sum()

    (found,) = torch.autograd.grad(loss(), gate)
    direction = found / found.norm()
    step = 2e-2
    with torch.no_grad():
        gate += step * direction
        above = loss()
        gate -= 2 * step * direction
        below = loss()
        gate += step * direction
    torch.testing.assert_close((above - below) / (2 * step), found.norm(), rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("has_template", [True, False])
@torch.no_grad()
def test_the_answers_start_is_fused_where_the_target_has_one(
    words_source: TextSource, has_template: bool
) -> None:
    rig = make_rig("llama", words_source)
    if not has_template:
        rig.target = Target(rig.target.model, copy.deepcopy(TOKENIZER), "tiny/base")
        rig.target.tokenizer.chat_template = None
    bridge = rig.bridge("aligned", is_open=True)
    reading = bridge.read_questions(QUESTIONS)
    changed = [LayerKV(kv.keys.clone(), kv.values.clone()) for kv in rig.words.layers]
    for kv in changed:
        kv.values[:, :, -1] += 1
    fused, again = (
        bridge.fuse_words(reading, {"reader": words})["past_key_values"]
        for words in (rig.words, replace(rig.words, layers=tuple(changed)))
    )
    moved = (fused.layers[0].values - again.layers[0].values).abs().amax((1, 3)) > 1e-6
    last = torch.arange(moved.shape[1]) == moved.shape[1] - 1
    torch.testing.assert_close(moved, (last & has_template).expand_as(moved))


# --- hybrids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_a_question_leaves_a_hybrids_states_for_the_next(
    words_source: TextSource, name: str
) -> None:
    rig = make_rig(name, words_source)
    bridge = rig.bridge("slots", is_open=True)
    seen = bridge.fuse_slots({"eyes": Eyes().cache(1)})
    kept = [tensor.clone() for tensor in states(seen.past_key_values)]
    first = bridge.generate(seen, QUESTIONS[:1], max_new_tokens=4, do_sample=False)
    bridge.generate(seen, QUESTIONS[1:], max_new_tokens=4, do_sample=False)
    again = bridge.generate(seen, QUESTIONS[:1], max_new_tokens=4, do_sample=False)
    assert first == again
    for now, before in zip(states(seen.past_key_values), kept, strict=True):
        torch.testing.assert_close(now, before, **EXACT)


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_a_hybrid_answers_several_questions_about_each_row(
    words_source: TextSource, name: str
) -> None:
    rig = make_rig(name, words_source)
    bridge = rig.bridge("slots", is_open=True)
    four = bridge.fuse(bridge.fuse_slots({"eyes": Eyes().cache()}), QUESTIONS * 2)
    together = rig.logits(four)
    for row in range(4):
        seen = bridge.fuse_slots({"eyes": Eyes().cache().select(torch.tensor([row // 2]))})
        alone = rig.logits(bridge.fuse(seen, [QUESTIONS[row % 2]]))
        torch.testing.assert_close(together[row], alone[0], **CLOSE)


@pytest.mark.parametrize("name", [*HYBRIDS, *WINDOWED])
@torch.no_grad()
def test_beams_of_a_closed_bridge_are_the_targets_own(words_source: TextSource, name: str) -> None:
    rig = make_rig(name, words_source)
    bridge = rig.bridge("slots")
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    fused = rig.fuse(bridge)
    got = rig.target.generate(fused, **settings)[:, fused["input_ids"].shape[1] :]
    for row in range(2):
        ids = real_ids(fused, row)
        own = rig.target.model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        assert got[row, : len(own)].tolist() == own


# --- sliding windows --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_heard"), [("mistral", False), ("gemma3_text", True)])
@torch.no_grad()
def test_slots_beyond_every_window_are_heard_through_a_full_layer_only(
    words_source: TextSource, name: str, is_heard: bool
) -> None:
    rig = make_rig(name, words_source)
    question = ["x" * (3 * WIDE)]  # three layers see three windows far
    last = []
    for is_open in (True, False):
        bridge = rig.bridge("slots", is_open=is_open)
        last.append(rig.logits(bridge.fuse(bridge.fuse_slots({"eyes": Eyes().cache(1)}), question)))
    assert bool((last[0] - last[1]).abs().max() > 1e-4) == is_heard


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek_v2", r"tiny \(deepseek_v2\) layer 0 keeps .* a latent \(MLA\)"),
        ("deepseek_v3", r"tiny \(deepseek_v3\) layer 0 keeps .* a latent \(MLA\)"),
        ("mamba", r"tiny \(mamba\) keeps no keys and values in any layer"),
        ("mamba2", r"tiny \(mamba2\) keeps no keys and values in any layer"),
        ("gemma4_text", r"layers differ in \(heads, head_dim\): \[\(2, 8\), \(2, 16\)\]"),
    ],
)
def test_models_without_like_keys_and_values_are_refused(name: str, message: str) -> None:
    model = build(REFUSED[name], len(TOKENIZER))
    for role in (Target, TextSource):
        with pytest.raises(UnsupportedError, match=message):
            assert role(model, TOKENIZER, "tiny").shape
    with pytest.raises(UnsupportedError, match=message):
        TextSource(model, TOKENIZER, "tiny").prefill([SourceInput(text="a")])
    with pytest.raises(UnsupportedError, match=name):
        cache_layout(model.config)


def test_a_target_that_forgets_what_its_cache_holds_is_refused(words_source: TextSource) -> None:
    rig = Rig(build(FORGETFUL, len(TOKENIZER)), words_source)
    assert rig.target.layer_indices == FORGETFUL.fused
    with pytest.raises(UnsupportedError, match=r"tiny/target .* does not go on where its cache"):
        rig.bridge("slots")


def test_a_target_that_goes_on_otherwise_is_refused(
    words_source: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("llama", words_source)
    forward = rig.target.model.forward

    @functools.wraps(forward)
    def forget(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        del past_key_values
        return forward(*args, **kwargs)

    monkeypatch.setattr(rig.target.model, "forward", forget)
    with pytest.raises(UnsupportedError, match=r"tiny/target .* does not go on where its cache"):
        rig.bridge("slots")


@EACH_GEOMETRY
@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_padding_that_only_the_logits_tell_is_kept_out_of_a_prompt(
    words_source: TextSource, name: str, geometry: str
) -> None:
    rig = Rig(build(PADDED[name], len(TOKENIZER)), words_source)
    got = rig.logits(fused := rig.fuse(rig.bridge(geometry)))
    assert rig.target.minds_padding
    for row in range(2):
        own = rig.target.model(real_ids(fused, row)).logits[0, -1]
        torch.testing.assert_close(got[row], own, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_padding_is_not_minded(name: str, dtype: torch.dtype) -> None:
    model = build(FAMILIES[name], len(TOKENIZER)).to(dtype)
    target = Target(model, TOKENIZER, "tiny/target")
    target.check_continues()
    assert not target.minds_padding


@pytest.mark.parametrize("name", LONGER)
@torch.no_grad()
def test_decoding_past_the_length_where_keys_turn_otherwise_is_refused(
    words_source: TextSource, name: str
) -> None:
    rig = Rig(build(LONGER[name], len(TOKENIZER)), words_source)
    bridge = rig.bridge("slots", is_open=True)
    seen = bridge.fuse_slots({"eyes": Eyes().cache(1)})
    prompt = bridge.fuse(seen, QUESTIONS[1:])["input_ids"].shape[1]
    fits, settings = 72 - prompt, {"do_sample": False, "pad_token_id": 2}
    assert len(bridge.generate(seen, QUESTIONS[1:], max_new_tokens=fits, **settings)) == 1
    message = rf"beyond 72 tokens .* got {prompt} tokens and .* at most {fits}, or ask"
    for longer in ({"max_new_tokens": fits + 1}, {"max_length": 73}):
        with pytest.raises(UnsupportedError, match=message):
            bridge.generate(seen, QUESTIONS[1:], **longer, **settings)
    fused = bridge.fuse(seen, QUESTIONS[1:])
    answers = [[5] * count for count in (1, fits)]
    assert len(bridge.target.score(fused, [0, 0], answers)[0]) == 2
    with pytest.raises(UnsupportedError, match=rf"got {prompt} tokens and {fits + 1} new ones"):
        bridge.target.score(fused, [0], [[5] * (fits + 1)])
    long = bridge.fuse(seen, [QUESTIONS[1] + " what" * 72])
    with pytest.raises(UnsupportedError, match="beyond 72 tokens"):
        bridge.target.next_logits(long)


@torch.no_grad()
def test_layers_left_out_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mm_c2c"):
        source = reader("lfm2")
        assert source.shape.num_layers == 2
        layers, _ = read_layers(source.model(torch.tensor([[5]])).past_key_values)
    assert len(layers) == 2
    assert "2 of 4 decoder layers hold keys and values (1, 3)" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lfm2", "2 of 4 layers (1, 3; nothing of the others is fused), 2 KV heads of 8"),
        (
            "gemma3n_text",
            "2 of 4 layers (0, 1; nothing of the others is fused), 2 KV heads of 8",
        ),
        ("falcon_h1", "3 layers, 2 KV heads of 8"),
    ],
)
def test_inspect_says_which_layers_hold_keys_and_values(
    name: str, words: str, tmp_path: Path
) -> None:
    model = build(FAMILIES[name], len(TOKENIZER))
    model.save_pretrained(tmp_path)
    assert words in describe(str(tmp_path))


def test_inspect_says_which_layers_a_cache_file_holds(tmp_path: Path) -> None:
    save_cache(reader("lfm2").prefill([SourceInput(text="a")]), tmp_path / "read.safetensors")
    assert "layers     2 (1, 3), 2 KV heads of 8" in describe(str(tmp_path / "read.safetensors"))

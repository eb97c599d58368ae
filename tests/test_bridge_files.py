"""A saved bridge comes back bit for bit, and only fits its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_rigs import (
    ATTENTIVE_EYES,
    EACH_POOLING,
    EXACT,
    EYES,
    QUESTIONS,
    Rig,
    assert_same_cache,
    close,
)
from safetensors.torch import load_file

from mm_c2c.bridge import Bridge
from mm_c2c.errors import (
    ConfigError,
    MismatchError,
)
from mm_c2c.reference.average import average
from mm_c2c.sources.vlm import VLMSource
from mm_c2c.target import Target


def test_a_folder_is_the_same_with_a_slash_behind_it(rig: Rig, tmp_path: Path) -> None:
    rig.bridge([EYES]).save_pretrained(tmp_path)
    origin = rig.target.origin
    path = tmp_path / "config.json"
    header = json.loads(path.read_text())
    header["target"]["model"] = origin.model + "/"
    path.write_text(json.dumps(header))
    Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    header["target"]["model"] = origin.model + "/other"
    path.write_text(json.dumps(header))
    with pytest.raises(MismatchError, match="was trained with"):
        Bridge.from_pretrained(tmp_path, rig.target, rig.sources)


@EACH_POOLING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_bridge_comes_back_bit_for_bit(
    rig: Rig, tmp_path: Path, dtype: torch.dtype, eyes_link: tuple[str, ...]
) -> None:
    bridge = rig.bridge([eyes_link, ("reader", "aligned")])
    bridge.save_pretrained(tmp_path / "new" / "saved", dtype)
    loaded = Bridge.from_pretrained(tmp_path / "new" / "saved", rig.target, rig.sources)
    assert loaded.config == bridge.config
    assert not loaded.training
    stored = load_file(tmp_path / "new" / "saved" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    for key, value in bridge.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value.to(dtype).float(), **EXACT)
    if dtype == torch.float32:
        answers = [
            b.generate(b.perceive(rig.pictures), QUESTIONS, rig.caches(b), max_new_tokens=6)
            for b in (bridge, loaded)
        ]
        assert answers[0] == answers[1]
        caches = [rig.fuse(b)["past_key_values"] for b in (bridge, loaded)]
        assert_same_cache(*caches, **EXACT)
    loaded.save_pretrained(tmp_path / "again", dtype)
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        torch.testing.assert_close(value, stored[key], **EXACT)


def test_nothing_but_fusers_and_references_is_saved(rig: Rig, tmp_path: Path) -> None:
    rig.bridge([EYES]).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(key.startswith("eyes_slots.") for key in load_file(tmp_path / "model.safetensors"))
    header = json.loads((tmp_path / "config.json").read_text())
    assert header["target"] == {"model": "tiny/target", "revision": "t1", "model_type": "llama"}
    assert header["sources"]["eyes"]["revision"] == "e1"


@pytest.mark.parametrize("pairs", [((2, 0), (1, 3)), {2: 0, 1: 3}, [[2, 0], [1, 3]]])
def test_a_bridge_with_explicit_layers_comes_back_bit_for_bit(
    rig: Rig, tmp_path: Path, pairs: Any
) -> None:
    bridge = rig.bridge([EYES], layers="explicit", pairs=pairs)
    bridge.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert loaded.config == bridge.config  # tuples again, not JSON's lists
    caches = [rig.fuse(b)["past_key_values"] for b in (bridge, loaded)]
    assert_same_cache(*caches, **EXACT)


def test_a_bridge_saved_before_there_were_later_settings_still_loads(rig: Rig, saved: Path) -> None:
    header = json.loads((saved / "config.json").read_text())
    link = header["bridge"]["links"][0]
    del link["pooling"], link["images"], link["kinds"], link["fuser"]["pairs"]
    (saved / "config.json").write_text(json.dumps(header))
    assert not any("resampler" in key for key in load_file(saved / "model.safetensors"))
    assert load(rig, saved).config == rig.bridge([EYES]).config


def test_a_resampler_is_saved_under_its_link_and_missed_when_it_is_not_there(
    rig: Rig, saved: Path, tmp_path: Path
) -> None:
    window = set(load_file(saved / "model.safetensors"))
    rig.bridge([ATTENTIVE_EYES]).save_pretrained(tmp_path / "attentive")
    more = set(load_file(tmp_path / "attentive" / "model.safetensors")) - window
    assert more
    assert all(key.startswith("eyes_slots.resampler.") for key in more)
    edit_header(saved, "bridge", "links", "0", "pooling", value="resampler")
    with pytest.raises(MismatchError, match=r"missing weights \['eyes_slots\.resampler\."):
        load(rig, saved)
    edit_header(tmp_path / "attentive", "bridge", "links", "0", "pooling", value="window")
    with pytest.raises(MismatchError, match=r"unknown ones \['eyes_slots\.resampler\."):
        load(rig, tmp_path / "attentive")


def test_a_closed_bridge_stays_closed_on_disk(rig: Rig, tmp_path: Path) -> None:
    close(rig.bridge([EYES])).save_pretrained(tmp_path, torch.float16)
    loaded = Bridge.from_pretrained(tmp_path, rig.target, rig.sources)
    assert (loaded.fusers["eyes_slots"].gates() == 0).all()


@pytest.fixture
def saved(rig: Rig, tmp_path: Path) -> Path:
    rig.bridge([EYES]).save_pretrained(tmp_path)
    return tmp_path


def edit_header(folder: Path, *keys: str, value: Any) -> None:
    header = json.loads((folder / "config.json").read_text())
    place = header
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(header))


def load(rig: Rig, folder: Path) -> Bridge:
    return Bridge.from_pretrained(folder, rig.target, rig.sources)


def test_a_folder_without_a_bridge_is_refused(rig: Rig, saved: Path) -> None:
    with pytest.raises(MismatchError, match=r"is not a saved bridge: config\.json is missing"):
        load(rig, saved / "elsewhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"model\.safetensors is missing or unreadable"):
        load(rig, saved)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_cut_off_weights_are_refused(rig: Rig, saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MismatchError, match=r"model\.safetensors is damaged or cut off"):
        load(rig, saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is damaged"),
        ("[]", "not a saved bridge of format 1"),
        ('{"format": 2}', "not a saved bridge of format 1"),
        ('{"format": 1}', r"config\.json lacks bridge, target, sources"),
        (
            '{"format": 1, "bridge": {}, "target": null, "sources": {}}',
            "target should have .* None",
        ),
        ('{"format": 1, "bridge": {}, "target": {}, "sources": []}', r"sources should .* got \[\]"),
        (
            '{"format": 1, "bridge": {}, "target": {}, "sources": {"eyes": 3}}',
            r"sources\.eyes should have entries, got 3",
        ),
        ("\udcff", r"config\.json is damaged: .*decode"),
    ],
)
def test_a_damaged_header_is_refused(rig: Rig, saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MismatchError, match=message):
        load(rig, saved)


def test_another_target_is_refused(rig: Rig, saved: Path) -> None:
    model, tokenizer = rig.target.model, rig.target.tokenizer
    for name, revision in (("tiny/other", "t1"), ("tiny/target", "t2"), ("tiny/target", None)):
        rig.target = Target(model, tokenizer, name, revision)
        with pytest.raises(
            MismatchError,
            match=f"target: .* trained with 'tiny/target' at revision 't1' .*got '{name}' at "
            f"{revision!r}",
        ):
            load(rig, saved)


def test_another_source_is_refused(rig: Rig, saved: Path) -> None:
    eyes = rig.sources["eyes"]
    rig.sources["eyes"] = VLMSource(eyes.model, eyes.processor, "tiny/llava", "e2")
    with pytest.raises(MismatchError, match=r"source 'eyes': .* at revision 'e1' .* at 'e2'"):
        load(rig, saved)
    del rig.sources["eyes"]
    with pytest.raises(MismatchError, match=r"needs a source named 'eyes' \(tiny/llava\)"):
        load(rig, saved)


def test_models_of_the_same_name_but_another_geometry_are_refused(rig: Rig, saved: Path) -> None:
    second = rig.sources["second"]
    second.origin = rig.sources["eyes"].origin
    rig.sources["eyes"] = second
    with pytest.raises(MismatchError, match="source 'eyes': the fuser was made for CacheShape"):
        load(rig, saved)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("bridge", "colour"), "unknown key 'colour'"),
        (("bridge", "links", "0", "row"), r"unknown key '.*row'; did you mean 'rows'"),
        (("bridge", "links", "0", "fuser", "ranks"), r"unknown key '.*fuser\.ranks'"),
    ],
)
def test_unknown_settings_are_refused(
    rig: Rig, saved: Path, keys: tuple[str, ...], message: str
) -> None:
    edit_header(saved, *keys, value=1)
    with pytest.raises(ConfigError, match=message):
        load(rig, saved)


def test_an_unknown_word_about_a_model_is_refused(rig: Rig, saved: Path) -> None:
    edit_header(saved, "target", "colour", value="red")
    with pytest.raises(MismatchError, match="target: expected model, revision, model_type"):
        load(rig, saved)


def test_weights_of_another_fuser_are_refused(rig: Rig, saved: Path) -> None:
    edit_header(saved, "bridge", "links", "0", "fuser", "rank", value=9)
    with pytest.raises(MismatchError, match=r"eyes_slots\..* is \(.*\), expected \("):
        load(rig, saved)
    edit_header(saved, "bridge", "links", "0", "fuser", "layers", value="terminal")
    edit_header(saved, "bridge", "links", "0", "fuser", "preset", value="c2c")
    with pytest.raises(MismatchError, match=r"missing weights \['eyes_slots\..*unknown ones"):
        load(rig, saved)


def test_an_average_lies_half_way_and_wants_one_bridge_twice(rig: Rig, tmp_path: Path) -> None:
    bridge = rig.bridge([("eyes", "slots")])
    bridge.save_pretrained(tmp_path / "before", torch.float16)
    before = load_file(tmp_path / "before" / "model.safetensors")
    with torch.no_grad():
        for weight in bridge.parameters():
            weight.add_(1.0)
    bridge.save_pretrained(tmp_path / "after")
    average(tmp_path / "before", tmp_path / "after", tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    trained = {name for name, _ in bridge.fusers.named_parameters()}
    for name, value in before.items():
        expected = value.float() + (0.5 if name in trained else 0.0)
        torch.testing.assert_close(mean[name].float(), expected, atol=2e-3, rtol=0)
        assert mean[name].dtype == torch.float16
    loaded = Bridge.from_pretrained(tmp_path / "mean", rig.target, rig.sources)
    assert loaded.config == bridge.config
    rig.bridge([("eyes", "slots"), ("reader", "aligned")]).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="differ in bridge"):
        average(tmp_path / "before", tmp_path / "other", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_source_that_no_link_reads_is_not_asked_for(rig: Rig, tmp_path: Path) -> None:
    eyes = rig.sources["eyes"]
    Bridge(rig.target, {"eyes": eyes, "idle": eyes}, rig.bridge([EYES]).config).save_pretrained(
        tmp_path
    )
    Bridge.from_pretrained(tmp_path, rig.target, {"eyes": eyes})
    with pytest.raises(ConfigError, match="leave revision='v1' out"):
        Bridge.from_pretrained(tmp_path, rig.target, rig.sources, revision="v1")


def test_a_stopped_save_leaves_what_was_there_whole(
    rig: Rig, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = rig.bridge([EYES])
    own = Path.write_text

    def full(self: Path, text: str, **kwargs: Any) -> int:
        own(self, text[:10], **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_new_weights_beside_an_old_config_are_refused(rig: Rig, tmp_path: Path) -> None:
    rig.bridge([EYES]).save_pretrained(tmp_path / "old")
    rig.bridge([EYES], fresh=True, gate="straight_through").save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / "old" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"config\.json is of other weights"):
        Bridge.from_pretrained(tmp_path / "old", rig.target, rig.sources)


def test_a_header_that_leaves_a_source_out_is_refused(rig: Rig, saved: Path) -> None:
    header = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**header, "sources": {}}))
    with pytest.raises(MismatchError, match="does not say which models"):
        Bridge.from_pretrained(saved, rig.target, rig.sources)


def test_a_fuser_trained_at_no_known_revision_takes_any(rig: Rig, saved: Path) -> None:
    rig.target = Target(rig.target.model, rig.target.tokenizer, "tiny/target", "t2")
    with pytest.raises(MismatchError, match="load that model at that revision"):
        load(rig, saved)
    header = json.loads((saved / "config.json").read_text())
    header["target"]["revision"] = None
    (saved / "config.json").write_text(json.dumps(header))
    load(rig, saved)

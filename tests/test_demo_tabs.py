"""What the other tabs do, without a browser: a look inside, the scene builder, a pair of one's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from mm_c2c import Bridge, SourceInput
from mm_c2c.align.patches import finest_patches
from mm_c2c.demo.builder import (
    BACKGROUNDS,
    MAX_STICKERS,
    SCRIPT,
    STICKERS,
    canvas_props,
    draw,
    first_question,
    read_scene,
)
from mm_c2c.demo.compare import Look, columns_of
from mm_c2c.demo.inside import (
    HANDED,
    gates_svg,
    inside_html,
    look_inside,
    shuffle_patches,
    tamper,
    tampered_html,
)
from mm_c2c.demo.own import check_pair, load_pair
from mm_c2c.demo.results import run_html, runs
from mm_c2c.errors import ConfigError, InputError, MismatchError
from mm_c2c.evaluation.arms import Setting
from mm_c2c.evaluation.diagnostics import scale_gates
from mm_c2c.reference.concepts import BY_NAME
from mm_c2c.reference.models import SOURCE_FOLDER, SOURCE_NAME, load_source
from mm_c2c.reference.scenes import CAPTION_REQUEST

QUESTION = "where is it ?"


@pytest.fixture
def look(bridge: Bridge, pictures: list[Image.Image]) -> Look:
    """Of a bridge whose fuser makes the target talk, which says nothing by itself."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bridge.fusers.parameters():
            parameter.normal_(std=1.0)
    setting = Setting(bridge=bridge, source_name=SOURCE_NAME, request=CAPTION_REQUEST)
    return Look(setting, pictures[0])


def test_a_look_inside_says_what_the_answer_drew_on(look: Look) -> None:
    found = look_inside(look, QUESTION)
    assert found.answer == tamper(look, QUESTION).answer
    assert look.perceived == 1
    assert found.maps.attention.shape == (4, 4)
    (fuser,) = look.setting.bridge.fusers.values()
    torch.testing.assert_close(found.gates, fuser.gates())
    # Slots hold one token each before fusing, told apart by their place in line.
    assert not torch.equal(found.ranks_before, found.ranks_after)
    shown = inside_html(found, look.picture)
    assert shown.count("<img ") == 3
    assert shown.count("alt=") == 3
    assert shown.count('role="img" aria-label="') == 2


def test_gates_are_drawn_as_high_as_they_are() -> None:
    drawn = gates_svg(torch.tensor([[0.25, 1.0], [0.5, 0.0]]))
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([0-9.]+)"', drawn)]
    assert [h / max(heights) for h in heights] == [0.25, 1.0, 0.5, 0.0]


def test_what_is_said_to_be_handed_over_is(
    look: Look, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    fuse_slots = Bridge.fuse_slots

    def note(self, caches):
        given.append(caches[SOURCE_NAME])
        return fuse_slots(self, caches)

    monkeypatch.setattr(Bridge, "fuse_slots", note)
    found = {h: tamper(look, QUESTION, handed=h, other=pictures[1]) for h in HANDED}
    assert given[0] is look.cache, "the look's own slots"
    own, other, shuffled, zeroed = given[1:]
    assert own is look.cache
    second = look.setting.source.prefill([SourceInput(images=(pictures[1],))])
    assert torch.equal(other.layers[0].keys, second.layers[0].keys)
    assert torch.equal(shuffled.layers[0].keys, own.layers[0].keys)
    assert not torch.equal(shuffled.patches, own.patches)
    assert not any(kv.keys.any() or kv.values.any() for kv in zeroed.layers)
    assert [h for h, f in found.items() if f.source_answer is None] == ["zeroed"]
    shown = tampered_html(found["other"], look, "other", 1.0, pictures[1])
    assert shown.count("<img ") == 2


def test_open_gates_change_nothing_and_closed_ones_hide_the_cache(
    look: Look, pictures: list[Image.Image]
) -> None:
    same = tamper(look, QUESTION, gate=1)
    assert same.altered == same.answer
    shut = tamper(look, QUESTION, gate=0)
    assert shut.altered == tamper(look, QUESTION, gate=0, handed="other", other=pictures[1]).altered
    assert shut.altered != shut.answer
    assert "The answer changed." in tampered_html(shut, look, "own", 0.0, pictures[1])


def test_scaled_gates_are_open_by_that_share(look: Look) -> None:
    bridge = look.setting.bridge
    (name,) = bridge.fusers
    for factor in (0.0, 0.3, 1.0):
        scaled = scale_gates(bridge, name, torch.tensor(factor)).fusers[name]
        torch.testing.assert_close(scaled.gates(), factor * bridge.fusers[name].gates())
    assert torch.equal(scaled.gate_logits, bridge.fusers[name].gate_logits)


def test_shuffled_patches_are_the_same_in_other_places(look: Look) -> None:
    before, after = finest_patches(look.cache, 0), finest_patches(shuffle_patches(look.cache), 0)
    assert sorted(before.flatten().tolist()) == sorted(after.flatten().tolist())
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"handed": "mine"}, "own, other, shuffled, zeroed"),
        ({"gate": 1.5}, "from 0 to 1, got 1.5"),
        ({"handed": "other"}, "choose one"),
    ],
)
def test_what_cannot_be_handed_over_says_so(look: Look, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tamper(look, QUESTION, **settings)


def test_the_question_aware_relay_takes_the_place_of_its_stand_in(look: Look) -> None:
    without = columns_of(look.setting, ["left"])
    assert without == ["fused", "caption_relay", "caption_relay_options", "blind", "source"]
    assert "caption_relay_options" not in columns_of(look.setting, [])
    with_prompts = replace(look.setting, prompts=Path("prompts.json"))
    assert columns_of(with_prompts, [])[2] == "question_aware_relay"
    assert len(columns_of(with_prompts, ["left"])) == 5


# --- the scene builder ---------------------------------------------------------------------


def scene_json(**changes: object) -> str:
    return json.dumps({"stickers": [{"name": "cat", "x": 0.8, "y": 0.2, "size": 0.3} | changes]})


def test_a_scene_is_drawn_where_the_stickers_lie() -> None:
    scene = read_scene(scene_json())
    (sticker,) = scene.stickers
    assert (sticker.place, sticker.angle) == ("top right", 0)
    assert "cat" in first_question(scene) or "top right" in first_question(scene)
    box = ImageChops.difference(draw(scene), draw(replace(scene, stickers=()))).getbbox()
    left, top, right, bottom = (edge / draw(scene).width for edge in box)
    assert (left + right) / 2 == pytest.approx(0.8, abs=0.02)
    assert (top + bottom) / 2 == pytest.approx(0.2, abs=0.02)
    assert max(right - left, bottom - top) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has 0 stickers"),
        ("not json", "cannot be read"),
        ("[1]", "cannot be read"),
        (scene_json(name="unicorn"), "no sticker 'unicorn'; known: apple, banana"),
        (scene_json(x=1.5), "x and y go from 0 to 1"),
        (scene_json(size=3), "size from 0.15 to 0.6"),
        (scene_json(size=float("nan")), "size from 0.15"),
        (
            json.dumps({"stickers": [{"name": "cat", "x": 0, "y": 0, "size": 0.3}] * 7}),
            f"1 to {MAX_STICKERS}",
        ),
    ],
)
def test_a_scene_that_cannot_be_drawn_says_what_to_do(text: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_scene(text)


def test_the_canvas_offers_what_can_be_drawn() -> None:
    props = canvas_props()
    assert set(props["stickers"]) == set(STICKERS) <= set(BY_NAME)
    assert not any(BY_NAME[name].heldout for name in STICKERS)
    assert len(props["backgrounds"]) == len(BACKGROUNDS)
    assert all(data.startswith("data:image/webp") for data in props["backgrounds"])
    assert all(f"limits.{key}" in SCRIPT.read_text("utf-8") for key in props["limits"])


# --- results -------------------------------------------------------------------------------


def test_shipped_results_are_shown_from_their_json() -> None:
    assert len(runs()) == 7
    title, folder = next(iter(runs().items()))
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    shown = run_html(title)
    assert f"n = {summary['n']:,}" in shown
    assert shown.count("<svg") == len(summary["kinds"]) + 2
    assert f"<td>{100 * summary['arms']['fused']['accuracy'][0]:.1f}</td>" in shown


# --- a pair of one's own -------------------------------------------------------------------


@pytest.fixture
def own(bridge: Bridge, tmp_path: Path) -> dict[str, str]:
    """The reference source and the tiny target as folders, and an untrained bridge between them."""
    from mm_c2c import BridgeConfig, FuserConfig, LinkConfig, Target
    from mm_c2c.sources.vlm import VLMSource

    folder = tmp_path / "target"
    bridge.target.model.save_pretrained(folder)
    bridge.target.tokenizer.save_pretrained(folder)
    target = Target(bridge.target.model, bridge.target.tokenizer, str(folder))
    loaded = load_source()
    source = VLMSource(loaded.model, loaded.processor, str(SOURCE_FOLDER))
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=8, rank=2)
    link = LinkConfig(source="eyes", geometry="slots", rows=3, cols=3, fuser=fuser)
    config = BridgeConfig(links=(link,), slot_token="a")
    Bridge(target, {"eyes": source}, config).save_pretrained(tmp_path / "bridge")
    return {
        "source": str(SOURCE_FOLDER),
        "target": str(folder),
        "bridge": str(tmp_path / "bridge"),
    }


def test_a_pair_of_ones_own_is_loaded_step_by_step_and_can_be_asked(
    own: dict[str, str], pictures: list[Image.Image]
) -> None:
    *steps, last = load_pair(**own)
    assert [step.text[:6] for step in steps] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert all(step.setting is None for step in steps)
    assert last.setting is not None
    assert last.setting.source_name == "eyes"
    seen = last.setting.source.prefill([SourceInput(images=(pictures[0],))])
    assert last.setting.bridge.fuse_slots({"eyes": seen}).batch_size == 1
    tamper(Look(last.setting, pictures[0]), QUESTION)


def test_a_pair_that_does_not_fit_is_refused_before_a_weight_is_read(
    own: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="for: source, target"):
        check_pair(" ", "", own["bridge"])
    with pytest.raises(MismatchError, match=r"trained for the target .*, got 'other/llm'"):
        check_pair(own["source"], "other/llm", own["bridge"])
    with pytest.raises(MismatchError, match="not a saved bridge"):
        check_pair(own["source"], own["target"], str(tmp_path))
    path = Path(own["bridge"]) / "config.json"
    header = json.loads(path.read_text("utf-8"))
    header["target"]["model_type"] = "gemma3"
    path.write_text(json.dumps(header), "utf-8")
    with pytest.raises(MismatchError, match="of type 'gemma3'"):
        check_pair(**own)


# --- who can reach the page ----------------------------------------------------------------


def test_the_page_is_opened_wider_only_with_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_c2c.demo.serve import AUTH_VARIABLE, Exposure

    silent = {"host": None, "port": None, "share": False, "auth": None}
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    assert Exposure.from_environment(**silent).is_private
    for wide in ({"share": True}, {"host": "0.0.0.0"}):
        with pytest.raises(ConfigError, match="--auth user:password"):
            Exposure.from_environment(**silent | wide)
        assert not Exposure.from_environment(**silent | wide | {"auth": "a:b"}).is_private
    with pytest.raises(ConfigError, match="user:password"):
        Exposure(auth="nobody")
    monkeypatch.setenv(AUTH_VARIABLE, "me:secret")
    assert Exposure.from_environment(**silent | {"share": True}).auth == "me:secret"
    monkeypatch.delenv(AUTH_VARIABLE)
    monkeypatch.setenv("SPACE_ID", "me/space")
    space = Exposure.from_environment(**silent)
    assert (space.host, space.is_private) == ("0.0.0.0", False)

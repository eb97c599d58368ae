"""Parts of a fuser switched off, and effective ranks."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_c2c import Bridge, FuserConfig, LinkConfig
from mm_c2c.bridge import BridgeConfig
from mm_c2c.cache import read_layers
from mm_c2c.errors import ConfigError, InputError
from mm_c2c.evaluation import diagnosis_report, diagnostics
from mm_c2c.evaluation.arms import Reply
from mm_c2c.evaluation.arms.fused import Fused
from mm_c2c.evaluation.attribution import attention_outputs
from mm_c2c.evaluation.diagnosis_report import look, write_report
from mm_c2c.evaluation.diagnostics import DiagnosticsConfig, diagnose, effective_rank, text_table
from mm_c2c.evaluation.tasks import load_items
from mm_c2c.images import load_image
from mm_c2c.reference.models import SOURCE_NAME
from mm_c2c.rope import derotate
from mm_c2c.sources.action import PI0Source


@pytest.fixture
def trained(bridge: Bridge) -> Bridge:
    """A bridge whose fuser does something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for param in bridge.fusers.parameters():
            param.normal_(std=0.5)
    return bridge


@pytest.fixture
def config(tmp_path: Path, pictures: list[Image.Image]) -> DiagnosticsConfig:
    rows = []
    for index, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / f"{index}.png")
        row = {"image": f"{index}.png", "question": "What?", "answer": "cat", "caption": "a cat"}
        rows.append(json.dumps(row))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return DiagnosticsConfig(
        items=tmp_path / "items.jsonl", grids=((1, 1), (3, 3)), resamples=20, batch_size=2
    )


def build_variants(trained: Bridge, config: DiagnosticsConfig) -> dict[str, Bridge]:
    (link,) = trained.config.links
    found = diagnostics._variants(trained, link, config)
    return {label: variant.build() for label, variant in found.items()}


def test_effective_rank_counts_equal_directions() -> None:
    for count in (1, 2, 5):
        basis = torch.linalg.qr(torch.randn(8, 8))[0][:count]
        states = basis.repeat_interleave(3, dim=0)
        assert effective_rank(states).item() == pytest.approx(count, rel=1e-4)
    assert effective_rank(torch.zeros(2, 4, 3)).tolist() == [0.0, 0.0]
    # Two directions, one with three times the strength of the other: entropy of (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(uneven).item() == pytest.approx(math.exp(entropy))


def test_a_variant_fuses_only_what_it_says(
    trained: Bridge, config: DiagnosticsConfig, pictures: list[Image.Image]
) -> None:
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    variants = build_variants(trained, config)
    (name,) = trained.fusers
    whole = read_layers(trained.perceive(pictures[0]).past_key_values)[0]
    closed = diagnostics.scale_gates(trained, name, torch.zeros(len(whole), 2))
    alone = read_layers(closed.perceive(pictures[0]).past_key_values)[0]
    keys = read_layers(variants["keys only"].perceive(pictures[0]).past_key_values)[0]
    for layer, (own, fused, found) in enumerate(zip(alone, whole, keys, strict=True)):
        assert not torch.equal(own.values, fused.values), layer
        torch.testing.assert_close(found.keys, fused.keys)
        assert torch.equal(found.values, own.values)
    values = read_layers(variants["values only"].perceive(pictures[0]).past_key_values)[0]
    for own, fused, found in zip(alone, whole, values, strict=True):
        assert torch.equal(found.keys, own.keys)
        torch.testing.assert_close(found.values, fused.values)
    first = read_layers(variants["first 1 layers only"].perceive(pictures[0]).past_key_values)[0]
    torch.testing.assert_close(first[0].values, whole[0].values)
    assert torch.equal(first[1].values, alone[1].values)
    assert variants["3 x 3 slots"].config.links[0].num_slots == 9
    nothing = read_layers(variants["nothing written"].perceive(pictures[0]).past_key_values)[0]
    for own, shut in zip(alone, nothing, strict=True):
        assert torch.equal(shut.keys, own.keys)
        assert torch.equal(shut.values, own.values)
    assert all(torch.equal(before[n], weight) for n, weight in trained.state_dict().items())


def test_slots_that_are_taken_out_are_gone_and_the_others_close_up(
    trained: Bridge, config: DiagnosticsConfig, pictures: list[Image.Image]
) -> None:
    variants = build_variants(trained, config)
    whole, half = (variants[v].perceive(pictures[:2]) for v in ("whole", "every other slot"))
    length = whole.input_ids.shape[1]
    stay = [*range(length - 4), length - 4, length - 2]
    assert half.input_ids.equal(whole.input_ids[:, stay])
    old, new = (torch.tensor([places] * 2) for places in (stay, range(len(stay))))
    for index, (fused, found) in enumerate(
        zip(*(read_layers(seen.past_key_values)[0] for seen in (whole, half)), strict=True)
    ):
        assert torch.equal(found.values, fused.values[:, :, stay])
        spec = trained.target.rope(length)[index]
        torch.testing.assert_close(
            derotate(found.keys, new, spec), derotate(fused.keys[:, :, stay], old, spec)
        )
    # The question comes right after them, and as far as it can see, nothing is missing.
    fused_inputs = variants["every other slot"].fuse(half, ["What?", "Where?"])
    assert fused_inputs["attention_mask"].shape == fused_inputs["input_ids"].shape
    none = variants["no slots"].perceive(pictures[:2])
    asked = variants["no slots"].fuse(none, ["What?", "What?"])
    alone = trained.fuse(None, ["What?"])
    assert asked["input_ids"].equal(alone["input_ids"].expand(2, -1))


def test_a_stopped_diagnosis_goes_on_where_it_stopped(
    trained: Bridge, config: DiagnosticsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    expected = diagnose(trained, config, out, progress=False)
    assert expected == diagnose(trained, config, progress=False)
    whole = (out / "answers.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    asked = []
    answer_rows = diagnostics._answer_rows
    monkeypatch.setattr(
        diagnostics, "_answer_rows", lambda *args: asked.append(args[0]) or answer_rows(*args)
    )
    assert diagnose(trained, config, out, progress=False) == expected
    assert asked == list(expected["variants"])[2:]
    assert (out / "answers.jsonl").read_text() == whole
    with pytest.raises(ConfigError, match="resamples differ"):
        diagnose(trained, dataclasses.replace(config, resamples=30), out, progress=False)


def test_a_diagnosis_has_a_row_for_every_variant(
    trained: Bridge,
    config: DiagnosticsConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = diagnose(trained, config, progress=False)
    assert result["n"] == 2
    assert {"whole", "keys only", "values only", "1 x 1 slots"} <= result["variants"].keys()
    assert [row["slots"] for row in result["slots"]] == [0, 1, 2, 4, 9]
    cosine = result["attention_cosine"]
    assert cosine["before"] != cosine["after"]
    assert all(-1 <= value <= 1 for value in cosine["after"])
    ranks = result["effective_rank"]
    assert ranks["before"] != ranks["after"]
    table = text_table(result)
    assert all(label in table for label in result["variants"])

    # Random weights may answer nothing, and then there is nothing to map.
    monkeypatch.setattr(Fused, "answer", lambda *_: [Reply("the red one")])
    looks = look(trained, dataclasses.replace(config, map_pictures=1))
    assert list(looks[0].maps) == ["written, K", "written, V", "weight, K", "weight, V", "read"]
    write_report(result, looks, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == result
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {label} |" in text for label in result["variants"])
    names = re.findall(r"\]\((map-0-[\w-]+\.png)\)", text)
    assert len(names) == 1 + len(looks[0].maps)
    sizes = {load_image(tmp_path / "out" / name).size for name in names}
    assert sizes == {looks[0].picture.size}
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<svg") == html.count("aria-label=") == 5
    assert html.count("<img") == len(names)

    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: parts -->\nstale\n<!-- end of results -->\n", "utf-8")
    diagnosis_report.main([str(tmp_path / "out"), "--readme", str(readme), "--section", "parts"])
    section = readme.read_text(encoding="utf-8")
    assert "stale" not in section
    assert all(f"| {label} |" in section for label in result["variants"])
    keys = [row[0] for row in ranks["after"]]
    assert f" and {sum(keys) / len(keys):.1f} after fusing, " in section
    assert section.count(f" and {sum(cosine['after']) / len(cosine['after']):.2f}.") == 1
    with pytest.raises(InputError, match="no diagnosis"):
        diagnosis_report.diagnosis_section(tmp_path)


def test_each_layer_can_be_the_only_one_that_is_fused(
    trained: Bridge, config: DiagnosticsConfig
) -> None:
    config = dataclasses.replace(config, each_layer=True, cosine_items=0)
    variants = build_variants(trained, config)
    picture = load_items(config.items)[0].picture()
    closed, _ = read_layers(variants["nothing written"].perceive(picture).past_key_values)
    labels = [label for label in variants if re.fullmatch(r"layer \d+ only", label)]
    assert len(labels) == len(closed)
    for label in labels:
        written, _ = read_layers(variants[label].perceive(picture).past_key_values)
        changed = [
            at
            for at, (a, b) in enumerate(zip(closed, written, strict=True))
            if not a[1].equal(b[1])
        ]
        assert label == f"layer {changed[0]} only"
        assert len(changed) == 1


def test_gates_are_masked_where_they_are(trained: Bridge, config: DiagnosticsConfig) -> None:
    (link,) = trained.config.links
    trained.fusers.to("meta")
    for label, variant in diagnostics._variants(trained, link, config).items():
        (factor,) = variant.build.args[2:] if "scale_gates" in str(variant.build) else (None,)
        assert factor is None or factor.device.type == "meta", label


def test_a_policy_that_reads_a_state_is_diagnosed_too(
    pi0: PI0Source, bridge: Bridge, config: DiagnosticsConfig, tmp_path: Path
) -> None:
    fuser = FuserConfig(source=pi0.shape, target=bridge.target.shape, hidden_size=8, rank=2)
    link = LinkConfig(source="arm", geometry="slots", rows=2, cols=2, fuser=fuser)
    slots = dataclasses.replace(bridge.config, links=(link,))
    policy = Bridge(bridge.target, {"arm": pi0}, slots).eval()
    rows = [json.loads(line) for line in config.items.read_text().splitlines()]
    rows = [row | {"state": [0.1, 0.2, 0.3], "text": "go"} for row in rows]
    config.items.write_text("\n".join(map(json.dumps, rows)))
    result = diagnose(policy, config, progress=False)
    assert result["n"] == 2
    assert len(result["effective_rank"]["after"]) == bridge.target.shape.num_layers
    write_report(result, look(policy, config), tmp_path / "report")
    with pytest.raises(ConfigError, match="rank_pictures"):
        dataclasses.replace(config, rank_pictures=0)


def test_cosines_compare_with_the_target_that_reads_a_description(
    trained: Bridge, config: DiagnosticsConfig
) -> None:
    item, _ = load_items(config.items)
    found = diagnostics._cosines(trained, trained, [item], config)
    assert found is not None
    count = len(trained.question_tokens([item.question])[0]) - 1
    told = trained.fuse(None, [f"The picture shows: a cat\n{item.question}"])
    fused = trained.fuse(trained.perceive(item.picture()), [item.question])
    first, second = (attention_outputs(trained, inputs, count) for inputs in (told, fused))
    expected = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    assert found["after"] == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
    undescribed = [item._replace(description=None)]
    assert diagnostics._cosines(trained, trained, undescribed, config) is None


def test_only_a_single_link_with_slots_is_diagnosed(
    bridge: Bridge, config: DiagnosticsConfig
) -> None:
    (link,) = bridge.config.links
    aligned = dataclasses.replace(link, geometry="aligned")
    other = Bridge(bridge.target, bridge.sources, BridgeConfig(links=(aligned,), slot_token="a"))
    with pytest.raises(ConfigError, match="must have one link, with slots"):
        diagnose(other, config, progress=False)
    with pytest.raises(ConfigError, match=SOURCE_NAME):
        diagnose(bridge, dataclasses.replace(config, source="other"), progress=False)

"""The command line, on a tiny pair that stands in for the reference pair."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cli import main
from mm_c2c.evaluation.baselines import Fused, SourceAlone, arms, shuffled, timed, zeroed
from mm_c2c.evaluation.run import EvaluationConfig, evaluate, table
from mm_c2c.reference import models
from mm_c2c.sources import SourceInput
from mm_c2c.sources.vlm import VLMSource


@pytest.fixture
def bridge(tiny_target: Any, tiny_target_tokenizer: Any, tiny_llava: Any) -> Bridge:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny")
    source = VLMSource(tiny_llava.model, tiny_llava.processor, "tiny-llava")
    fuser = FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=4)
    link = LinkConfig(source=models.SOURCE_NAME, geometry="slots", rows=2, cols=2, fuser=fuser)
    config = BridgeConfig(links=(link,), slot_token="a")
    return Bridge(target, {models.SOURCE_NAME: source}, config).eval()


@pytest.fixture
def picture(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    pictures[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def tiny_reference(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    monkeypatch.setattr(models, "load_bridge", lambda: bridge)
    return bridge


@pytest.mark.usefixtures("tiny_reference")
def test_ask_prints_one_json_object(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--image", str(picture), "Where is it?", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["question"] == "Where is it?"
    assert list(report["arms"]) == ["fused", "blind", "caption_relay", "source"]
    for arm in report["arms"].values():
        assert arm["total_ms"] >= arm["ttft_ms"] > 0
        assert isinstance(arm["answer"], str)
        assert arm["tokens"] >= 0


@pytest.mark.usefixtures("tiny_reference")
def test_ask_prints_every_arm_and_the_caption(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--image", str(picture), "Where is it?"]) == 0
    printed = capsys.readouterr().out
    for words in ("fused", "blind", "caption_relay", "source", "caption:", "first token"):
        assert words in printed


def test_streaming_prints_what_generating_gives(
    picture: Path, tiny_reference: Bridge, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm_c2c.images import load_image

    perception = tiny_reference.perceive(load_image(picture))
    expected = tiny_reference.generate(
        perception, ["Where is it?"], max_new_tokens=12, do_sample=False
    )[0]
    argv = ["ask", "--image", str(picture), "Where is it?", "--only", "fused", "--stream"]
    assert main(argv) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "--image", "absent.png", "What?"], "there is no file"),
        (["ask", "--image", "absent.png", "  "], "the question is empty"),
        (["ask", "--image", "absent.png", "What?", "--stream"], "--stream goes with --only"),
        (["inspect", "no/such/folder"], "neither a saved bridge nor a model"),
        (["evaluate", "--config", "absent.yaml"], "cannot read config"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("mm-c2c: ")
    assert "Traceback" not in printed.err
    assert not printed.out


def test_inspect_describes_a_saved_bridge(
    bridge: Bridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bridge.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in bridge.fusers.parameters())
    assert f"{count:,} parameters" in printed
    assert "3 layers, 2 KV heads of 8" in printed
    assert "slots   2 x 2" in printed


def test_inspect_describes_a_model_folder(
    tiny_target: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_target.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "3 layers, 2 KV heads of 8, 192 bytes" in capsys.readouterr().out


def test_a_timed_answer_is_the_arms_own(bridge: Bridge, pictures: list[Image.Image]) -> None:
    source = bridge.sources[models.SOURCE_NAME]
    answer = timed(SourceAlone(source), bridge, pictures[0], "What?")
    item = SourceInput(text="What?", images=(pictures[0],))
    expected = source.generate([item], max_new_tokens=12, do_sample=False)[0]
    assert answer.answer == expected.strip()
    assert answer.relayed is None
    relay = timed(arms(bridge, source, "Say.")["caption_relay"], bridge, pictures[0], "What?")
    assert relay.relayed is not None
    fused = timed(Fused(bridge), bridge, pictures[0], "What?")
    assert fused.total_ms >= fused.ttft_ms > 0


def test_controls_move_or_empty_every_row(bridge: Bridge, pictures: list[Image.Image]) -> None:
    source = bridge.sources[models.SOURCE_NAME]
    cache = source.prefill([SourceInput(images=(picture,)) for picture in pictures])
    moved = shuffled(cache)
    for before, after in zip(cache.layers, moved.layers, strict=True):
        assert before.keys[1].equal(after.keys[0])
        assert not before.keys[0].equal(after.keys[0])
    assert all(not kv.keys.any() and not kv.values.any() for kv in zeroed(cache).layers)


def test_an_evaluation_counts_every_item_once(
    bridge: Bridge, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    rows = []
    for index in range(5):
        pictures[index % 2].save(tmp_path / f"{index}.png")
        question = {"image": f"{index}.png", "kind": "what", "question": f"What {index}?"}
        rows.append(json.dumps({**question, "answer": "cat"}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    config = EvaluationConfig(items=tmp_path / "items.jsonl", batch_size=2, timed=1, resamples=20)
    result = evaluate(bridge, config, progress=False)
    assert result["n"] == 5
    assert {name: row["n"] for name, row in result["arms"].items()} == dict.fromkeys(
        ("fused", "blind", "caption_relay", "source", "shuffled", "zeroed"), 5
    )
    # A fuser that was never trained changes nothing: whatever the cache, the answer is the same.
    for item in result["items"]:
        assert item["fused"] == item["shuffled"] == item["zeroed"]
    assert result["time"]["fused"]["n"] == 1
    assert "retention" in table(result)

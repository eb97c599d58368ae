"""The command line, on a tiny pair that stands in for the reference pair."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mm_c2c import Bridge, Target
from mm_c2c.cli import main
from mm_c2c.config import from_dict
from mm_c2c.evaluation.arms import MAX_NEW_TOKENS
from mm_c2c.evaluation.arms.prompts import RelayPrompt, read_winner
from mm_c2c.evaluation.prompt_search import PromptSearchConfig
from mm_c2c.reference import models


@pytest.fixture
def picture(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    pictures[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def tiny_reference(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    monkeypatch.setattr(models, "load_bridge", lambda **_: bridge)
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


def test_evaluate_loads_the_target_in_the_dtype_it_is_given(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(
        models, "load_bridge", lambda dtype, device: asked.append((dtype, device)) or bridge
    )
    words = ["evaluate", "--json", "dtype=bfloat16", "limit=2", "timed=0", "arms=[blind]"]
    assert main(words) == 0
    assert asked == [(torch.bfloat16, "cpu")]
    capsys.readouterr()


def test_the_quickstart_and_the_readme_run_without_a_download(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(models.__file__).parents[2]
    words = [sys.executable, "demos/quickstart.py", "--tiny"]
    run = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\ncaption_relay ") == 3
    first, second, third = re.findall(
        r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(root)
    monkeypatch.setattr(models, "load_bridge", lambda: bridge)
    code = (first + second).replace('"seen.safetensors"', repr(str(tmp_path / "seen.safetensors")))
    known: dict[str, Any] = {}
    exec(code, known)
    assert known["seen"].batch_size == 1
    monkeypatch.setattr(Target, "from_pretrained", lambda name: bridge.target)
    monkeypatch.setattr("mm_c2c.load_source", lambda name: bridge.sources[models.SOURCE_NAME])
    exec(
        third.replace('"my-fuser"', repr(str(tmp_path / "my-fuser"))).replace(
            "BridgeConfig(", 'BridgeConfig(slot_token="a", '
        ),
        known,
    )
    assert (tmp_path / "my-fuser" / "model.safetensors").exists()


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
        perception, ["Where is it?"], max_new_tokens=MAX_NEW_TOKENS, do_sample=False
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
        (["evaluate", "absent.yaml"], "cannot read config"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--out", "file"], "--out: cannot make the folder file: File exists"),
        (["diagnose", "--out", "file"], "--out: cannot make the folder file: File exists"),
        (
            ["prompts", "--out", ".", "items=a.jsonl"],
            "expected a file to write to, got the folder .",
        ),
        (["prompts", "--out", "file/a.json", "items=a.jsonl"], "cannot make the folder file"),
        (["evaluate", "file"], "file is not valid YAML: 'utf-8' codec"),
        (["demo", "--port", "99999"], "--port must be from 1 to 65535, got 99999"),
    ],
)
def test_what_cannot_come_to_an_end_is_refused_before_a_model_is_loaded(
    argv: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_bridge", lambda **_: pytest.fail("loaded"))
    assert main(argv) == 1
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_bridge", lambda **_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    assert f"cannot be served at port {port} of 127.0.0.1: " in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_reference")
def test_evaluate_takes_its_settings_from_the_command_line(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"image": picture.name, "kind": "what", "question": "What?", "answer": "cat"}
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    out = tmp_path / "run"
    settings = [f"items={tmp_path / 'mine.jsonl'}", "timed=1", "resamples=20", "limit=2"]
    # The shipped ones are the reference target's.
    settings += ["connector=null", "aligned_bridge=null"]
    assert main(["evaluate", "--json", "--out", str(out), *settings]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["n"] == 2
    assert printed["config"]["resamples"] == 20
    assert "question_aware_relay" in printed["arms"]  # in the words that are shipped
    assert printed["config"]["items"] == f"{tmp_path.name}/mine.jsonl"
    # The items of a user have no true description, and a tiny pair has nothing to retain.
    assert "true_description" not in printed["arms"]
    assert printed["retention"]["over_blind"] == [None, None, None]
    assert json.loads((out / "summary.json").read_text()) == printed
    assert "n/a" in (out / "report.md").read_text()
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    # The same from a file, which other settings may follow.
    file = tmp_path / "mine.yaml"
    file.write_text(f"items: {tmp_path / 'mine.jsonl'}\ntimed: 0\narms: [fused, blind]")
    assert main(["evaluate", str(file), "--json", "resamples=20"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (printed["n"], list(printed["arms"])) == (3, ["fused", "blind"])
    assert printed["config"]["resamples"] == 20


@pytest.mark.usefixtures("tiny_reference")
def test_prompts_writes_what_it_found(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"image": picture.name, "question": "What?", "answer": "cat"}
    (tmp_path / "items.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    items = f"items={tmp_path / 'items.jsonl'}"
    out = tmp_path / "prompts.json"
    few = ["limit=1", "examples=1", "templates=['{caption} {question}']"]
    assert main(["prompts", items, *few, "--out", str(out)]) == 0
    assert "n = 1" in capsys.readouterr().out
    assert json.loads(out.read_text())["winner"]["template"] == "{caption} {question}"
    assert main(["prompts", "limit=1"]) == 1
    assert "items" in capsys.readouterr().err


def test_the_shipped_search_has_a_winner_of_its_own_table() -> None:
    path = models.HERE / "prompts.json"
    result = json.loads(path.read_text())
    settings = from_dict(PromptSearchConfig, result["config"])
    assert len(result["table"]) == 4 * len(settings.requests) * len(settings.templates)
    best = max(result["table"], key=lambda row: (row["in_a_sentence"][0], row["accuracy"][0]))
    assert read_winner(path) == from_dict(RelayPrompt, best["prompt"])

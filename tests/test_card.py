"""The model card, and the way to the Hub and back, without a Hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from mm_c2c import Bridge, hub
from mm_c2c.cli import main
from mm_c2c.errors import FetchError, InputError, MismatchError
from mm_c2c.evaluation.card import write_card
from mm_c2c.evaluation.report import brief
from mm_c2c.evaluation.run import EvaluationConfig, evaluate
from mm_c2c.reference import models


@pytest.fixture
def saved(bridge: Bridge, tmp_path: Path) -> Path:
    """A bridge on disk in half precision, and in memory as it is there."""
    torch.manual_seed(0)
    for weights in bridge.fusers.parameters():
        weights.data = torch.randn(weights.shape).half().float()
    bridge.save_pretrained(tmp_path / "bridge", dtype=torch.float16)
    return tmp_path / "bridge"


@pytest.fixture
def run(bridge: Bridge, saved: Path, pictures: list[Image.Image], tmp_path: Path) -> Path:
    """An evaluation of it."""
    rows = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "What?", "answer": "cat"})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvaluationConfig(
        items=tmp_path / "items.jsonl",
        arms=("fused", "zeroed", "source"),
        batch_size=2,
        timed=0,
        resamples=20,
    )
    evaluate(bridge, config, tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_a_card_says_what_the_evaluation_says(bridge: Bridge, saved: Path, run: Path) -> None:
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    summary["arms"]["fused"]["accuracy"] = [0.777142, 0.75, 0.8]
    summary["retention"] = {"over_zeroed": [0.87, 0.84, 0.91], "over_blind": [None] * 3}
    path.write_text(json.dumps(summary))
    written = write_card(saved, run, licence="apache-2.0", name="user/my-fuser")
    card = ModelCard.load(saved / "README.md")
    assert card.content == written.content
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "mm_c2c"
    assert card.data.base_model is None  # "tiny" and "tiny-llava" are no names of the Hub
    assert card.data.model_name == "my-fuser"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("exact_match", 0.7771),
        ("retention_over_zeroed", 0.87),
    ]
    assert "n = 2, 95 % interval 0.750 to 0.800" in card.data.eval_results[0].metric_name
    assert brief(summary).strip() in card.text
    count = sum(p.numel() for p in bridge.fusers.parameters())
    size = (saved / "model.safetensors").stat().st_size / 1e6
    assert f"{count:,} parameters, {size:.1f} MB" in card.text
    assert "| source `stickers` | `tiny-llava` | not pinned | llava |" in card.text
    assert "| stickers | slots | 2 x 2 | small | mix | 16 | 4 |" in card.text
    share = 100 * summary["arms"]["zeroed"]["accuracy"][0]
    assert f"{share:.1f} % are right with an empty cache" in card.text
    assert 'Bridge.from_pretrained("user/my-fuser", target, {"stickers": stickers})' in card.text


def test_a_card_names_models_of_the_hub_and_how_to_load_them(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved / "config.json"
    header = json.loads(path.read_text())
    header["target"] = {"model": "org/llm", "revision": "abc", "model_type": "llama"}
    header["sources"]["stickers"] |= {"model": "org/vlm", "model_type": "qwen2_5_vl"}
    header["sources"]["arm"] = {"model": "org/vla", "revision": None, "model_type": "smolvla"}
    path.write_text(json.dumps(header))
    card = write_card(saved)
    assert card.data.base_model == ["org/llm", "org/vla", "org/vlm"]
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "Nothing was measured." in card.text
    assert "Not stated." in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'target = Target.from_pretrained("org/llm", revision="abc")' in code
    assert 'stickers = load_source("org/vlm")' in code
    assert "arm = ...  # org/vla" in code
    (imported,) = (line for line in code.splitlines() if "import" in line)
    exec(imported)
    (tmp_path / "org/vlm").mkdir(parents=True)  # which is no repository then
    monkeypatch.chdir(tmp_path)
    card = write_card(saved)
    assert card.data.base_model == ["org/llm", "org/vla"]
    assert "stickers = ...  # org/vlm" in card.text


def test_a_card_of_another_fusers_evaluation_is_refused(
    bridge: Bridge, saved: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no finished run"):
        write_card(saved, tmp_path)
    path = run / "summary.json"
    path.write_text(json.dumps({"arms": {"source": {}}}))
    with pytest.raises(InputError, match="with an arm 'fused'"):
        write_card(saved, run)
    path.write_text(json.dumps({"arms": {"fused": {}}, "config": {"fuser": "0"}}))
    with pytest.raises(MismatchError, match="other weights"):
        write_card(saved, run)
    (saved / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match="not a saved bridge"):
        write_card(saved)


def test_the_shipped_evaluation_is_of_the_shipped_fuser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(models.BRIDGE_FOLDER / name)
    run = models.BRIDGE_FOLDER / "evaluation"
    assert main(["card", str(tmp_path), "--evaluation", str(run), "--licence", "apache-2.0"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert card.data.eval_results[0].metric_type == "exact_match"


def test_a_bridge_goes_to_the_hub_and_comes_back(
    bridge: Bridge, saved: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    there = tmp_path / "there"

    class FakeApi:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("create", (repo_id, kwargs)))

        def upload_folder(
            self, *, folder_path: Path, allow_patterns: list[str], **kwargs: Any
        ) -> Any:
            there.mkdir()
            for name in allow_patterns:
                (there / name).write_bytes((folder_path / name).read_bytes())
            calls.append(("upload", kwargs))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(hub, "HfApi", FakeApi)
    url = bridge.push_to_hub(
        "user/fuser",
        run,
        licence="mit",
        dtype=torch.float16,
        private=True,
        token="t",
        revision="dev",
    )
    assert url == "https://hub/commit/1"
    assert calls == [
        ("token", "t"),
        ("create", ("user/fuser", {"private": True, "exist_ok": True})),
        ("upload", {"repo_id": "user/fuser", "revision": "dev", "commit_message": "Upload fuser"}),
    ]
    assert {path.name for path in there.iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip
    assert ModelCard.load(there / "README.md").data.license == "mit"

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("user/fuser", "dev")
        assert allow_patterns == ["config.json", "model.safetensors"]
        return str(there)

    monkeypatch.setattr(hub, "snapshot_download", download)
    back = Bridge.from_pretrained("user/fuser", bridge.target, bridge.sources, "dev")
    expected = bridge.fusers.state_dict()
    assert all(w.equal(expected[name]) for name, w in back.fusers.state_dict().items())


def test_a_repository_that_cannot_be_had_is_no_folder(
    bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FetchError, match="'user/fuser' is no folder here"):
        hub.fetch_folder("user/fuser")
    # What cannot be a repository is not looked for there.
    for name in (tmp_path / "x", str(tmp_path / "x"), "fuser"):
        with pytest.raises(MismatchError, match="not a saved bridge"):
            Bridge.from_pretrained(name, bridge.target, bridge.sources)


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ('{"arms": ', r"summary\.json cannot be read"),
        ("[]", r"summary\.json: expected names and values, got \[\]"),
        ('{"n": 3}', r"is no run of mm-c2c evaluate with an arm 'fused'"),
    ],
)
def test_a_card_wants_a_whole_summary(
    saved: Path, tmp_path: Path, summary: str, message: str
) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(InputError, match=message):
        write_card(saved, tmp_path)

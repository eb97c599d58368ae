"""Vision-language models as sources; a family gets a class only for what truly differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from mm_c2c.align.tokens import locate_text
from mm_c2c.cache import PatchGrid, PositionKind, SourceCache
from mm_c2c.errors import InputError, ShapeError
from mm_c2c.sources.base import TEXT_MARK, FrozenReader, SourceInput, count_positions


class VLMSource(FrozenReader):
    """Reads pictures and a question as the model's own processor lays them out.

    As it stands it serves LLaVA: square pictures, one token a patch, positions from 0.
    """

    first_position = 0
    # What the processor appends to the rendered prompt.
    prompt_end = ""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, name, revision)
        self.processor = processor

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of pictures, each with a question or without.

        Raises:
            InputError: a row has no picture.
        """
        rendered = [self.render(item) for item in inputs]
        encoded = self._encode(inputs, rendered, return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")
        mask = encoded["attention_mask"]
        position_ids = count_positions(mask, self.first_position)
        layers, indices, rope = self.read(encoded, position_ids)
        grids = self.grids(inputs, encoded)
        is_image = encoded["input_ids"] == self.model.config.image_token_id
        spans = torch.stack(
            [
                self._spans(offsets[row], is_image[row], rendered[row], item)
                for row, item in enumerate(inputs)
            ]
        )
        kinds = torch.full_like(mask, PositionKind.TEMPLATE)
        kinds[spans[..., 1] > spans[..., 0]] = PositionKind.TEXT
        kinds[is_image] = PositionKind.IMAGE
        kinds[mask == 0] = PositionKind.PAD
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=position_ids,
            kinds=kinds,
            patches=_patches(is_image, grids),
            grids=grids,
            spans=spans,
            texts=tuple(item.text.strip() for item in inputs),
            rope=rope,
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The model's own answers."""
        encoded = self._encode(inputs, [self.render(item) for item in inputs])
        out = self.model.generate(**self._known(encoded), **kwargs)
        return self.processor.batch_decode(
            out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def render(self, item: SourceInput) -> str:
        """The prompt in the model's own template, image placeholders unexpanded."""
        parts: list[Any] = [{"type": "image"}] * len(item.images)
        parts.append({"type": "text", "text": item.text.strip()})
        turns: list[Any] = [{"role": "user", "content": parts}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))

    def grids(
        self, inputs: Sequence[SourceInput], encoded: Mapping[str, Tensor]
    ) -> tuple[tuple[PatchGrid, ...], ...]:
        """Patch grid of each image of each row, after merging."""
        patch = self.model.config.vision_config.patch_size
        height, width = encoded["pixel_values"].shape[-2:]
        return tuple((PatchGrid(height // patch, width // patch),) * len(i.images) for i in inputs)

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        for row, item in enumerate(inputs):
            if not item.images:
                raise InputError(f"row {row}: {self.origin.model} needs a picture, got none")
        pictures = [list(item.images) for item in inputs]
        encoded = self.processor(
            images=pictures, text=list(rendered), padding=True, return_tensors="pt", **kwargs
        )
        return {key: value.to(self.model.device) for key, value in encoded.items()}

    def _known(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in encoded.items() if key in self._known_arguments}

    def _spans(self, offsets: Tensor, is_image: Tensor, rendered: str, item: SourceInput) -> Tensor:
        """Characters of the question that each position covers.

        Offsets count in the prompt with expanded image placeholders, which stand before the text:
        from the end, both prompts agree.
        """
        text = item.text.strip()
        if not text:
            return torch.full_like(offsets, -1)
        start = self.render(replace(item, text=TEXT_MARK)).index(TEXT_MARK)
        shift = int(offsets.max()) - len(rendered) - len(self.prompt_end)
        moved = (offsets - shift).masked_fill(is_image.unsqueeze(1), -1)
        moved = moved.masked_fill((offsets[:, 1] <= offsets[:, 0]).unsqueeze(1), -1)
        return locate_text(trim_spans(moved, rendered), rendered, text, start)


class PaliGemmaSource(VLMSource):
    """PaliGemma: no chat template, positions from 1, attention both ways over the prompt."""

    first_position = 1
    prompt_end = "\n"

    def render(self, item: SourceInput) -> str:
        """Image placeholders, then the question; the processor adds the rest."""
        return "<image>" * len(item.images) + item.text.strip()


class Gemma3Source(VLMSource):
    """Gemma 3: each picture pooled to a square of `mm_tokens_per_image`, without pan and scan."""

    def grids(
        self, inputs: Sequence[SourceInput], encoded: Mapping[str, Tensor]
    ) -> tuple[tuple[PatchGrid, ...], ...]:
        """The same square for each picture."""
        side = math.isqrt(self.model.config.mm_tokens_per_image)
        return tuple((PatchGrid(side, side),) * len(item.images) for item in inputs)


def trim_spans(spans: Tensor, text: str) -> Tensor:
    """Spans without the white space before a word, as `token_spans` gives them."""
    rows = []
    for start, end in spans.tolist():
        word = text[start:end] if 0 <= start < end else ""
        start += len(word) - len(word.lstrip()) if word.strip() else 0
        rows.append((start, end))
    return torch.tensor(rows, device=spans.device)


def _patches(is_image: Tensor, grids: tuple[tuple[PatchGrid, ...], ...]) -> Tensor:
    """`(batch, seq_len, 3)`: image, row and column of each patch, in reading order."""
    patches = torch.full((*is_image.shape, 3), -1, device=is_image.device)
    for row, row_grids in enumerate(grids):
        cells = [
            (image, r, c)
            for image, grid in enumerate(row_grids)
            for r in range(grid.rows)
            for c in range(grid.cols)
        ]
        found = int(is_image[row].sum())
        if found != len(cells):
            raise ShapeError(
                f"row {row}: the prompt has {found} image positions, its grids {row_grids} "
                f"have {len(cells)} patches"
            )
        patches[row, is_image[row]] = torch.tensor(cells, device=is_image.device).view(-1, 3)
    return patches

"""Vision models whose text decoder looks at the picture by cross-attention.

What is read are the keys and values of its cross-attention layers: one position for each state that
they look at. They carry no rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from mm_c2c.cache import (
    CacheShape,
    LayerKV,
    PositionKind,
    SourceCache,
    empty_spans,
)
from mm_c2c.errors import InputError
from mm_c2c.geometry import cache_layout
from mm_c2c.sources.base import SourceInput
from mm_c2c.sources.views import View, by_row, place, tiled_view, whole_view
from mm_c2c.sources.vlm import VLMSource


class MllamaSource(VLMSource):
    """Llama 3.2 Vision: tiles of a canvas that the picture fills from the top left.

    The cache holds the picture alone, whatever the question: its positions are the tiles' patches,
    each tile led by a summary that is no patch.
    """

    reads_on = False

    @property
    def shape(self) -> CacheShape:
        """Geometry of the cross-attention layers, which a prefill without picture leaves empty."""
        return cache_layout(self.model.config).shape

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of pictures; the questions leave no trace.

        Raises:
            InputError: a row has no picture.
        """
        encoded = self._encode(inputs, [self.render(item) for item in inputs])
        layers, indices, rope = self.read(encoded, self._position_ids(encoded))
        rows = by_row(inputs, self.views(encoded, [p for item in inputs for p in item.images]))
        batch, _, tiles = encoded["aspect_ratio_mask"].shape
        seq_len = layers[0].keys.shape[2]
        width = tiles * self.model.model.vision_model.num_patches
        is_image = torch.zeros(batch, seq_len, dtype=torch.bool, device=self.model.device)
        for row, pictures in enumerate(rows):
            for image, (view,) in enumerate(pictures):
                is_image[row, image * width : image * width + len(view.cells)] = True
        patches, grids = place(is_image, rows)
        return SourceCache(
            layers=layers,
            layer_indices=indices,
            position_ids=torch.arange(seq_len, device=is_image.device).expand(batch, -1),
            kinds=torch.where(is_image, PositionKind.IMAGE, PositionKind.PAD),
            patches=patches,
            grids=grids,
            spans=empty_spans(batch, seq_len).to(is_image.device),
            texts=tuple(item.text.strip() for item in inputs),
            rope=rope,
            origin=self.origin,
        )

    def select_layers(
        self, layers: tuple[LayerKV, ...], indices: tuple[int, ...]
    ) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
        """The cross-attention layers."""
        wanted = self.model.config.text_config.cross_attention_layers
        kept = [at for at, index in enumerate(indices) if index in wanted]
        return tuple(layers[at] for at in kept), tuple(indices[at] for at in kept)

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """One view: the tiles joined, and cut to the part of the canvas that the picture fills."""
        vision, tiles = self.model.config.vision_config, self.processor.image_processor
        size, side = vision.image_size, vision.image_size // vision.patch_size
        views = []
        for picture in pictures:
            height, width = picture.height, picture.width
            canvas = get_optimal_tiled_canvas(height, width, tiles.max_image_tiles, size)
            filled = get_image_size_fit_to_canvas(height, width, *canvas, tile_size=size)
            rows, cols = (math.ceil(pixels / vision.patch_size) for pixels in filled)
            joined = tiled_view(canvas[0] // size, canvas[1] // size, side, side).cells
            cells = []
            for first in range(0, len(joined), side * side):
                cells.append((-1, -1))
                for row, col in joined[first : first + side * side]:
                    cells.append((row, col) if row < rows and col < cols else (-1, -1))
            views.append((View(rows, cols, tuple(cells)),))
        return views


class Florence2Source(VLMSource):
    """Florence-2: what its encoder made of the picture and of the question, as the decoder sees it.

    A summary of the picture, which is no patch, stands before the patches.
    """

    one_picture = True
    reads_on = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, processor, name, revision)
        self.prompt_end = processor.tokenizer.eos_token

    def render(self, item: SourceInput) -> str:
        """The question; the processor puts the picture before it.

        Raises:
            InputError: a task's token, which the processor would replace by a sentence.
        """
        tasks = self.processor.task_prompts_without_inputs | self.processor.task_prompts_with_input
        for token, words in tasks.items():
            if token in item.text:
                raise InputError(f"write the task out instead of {token}, such as: {words}")
        return item.text.strip()

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """One view: a square of patches, after the summary."""
        side = math.isqrt(self.processor.num_image_tokens - 1)
        view = whole_view(side, side)
        return [(view._replace(cells=((-1, -1), *view.cells)),)] * len(pictures)

"""Families of vision-language models: of each, only what it does unlike the others."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mm_c2c.cache import LayerKV
from mm_c2c.errors import UnsupportedError
from mm_c2c.sources.base import SourceInput, count_positions
from mm_c2c.sources.views import View, queries, tiled_view, view_of_marks, whole_view
from mm_c2c.sources.vlm import VLMSource


class PaliGemmaSource(VLMSource):
    """PaliGemma: no chat template, positions from 1, attention both ways over the prompt."""

    first_position = 1
    prompt_end = "\n"

    def render(self, item: SourceInput) -> str:
        """Image placeholders, then the question; the processor adds the rest."""
        return "<image>" * len(item.images) + item.text.strip()


class Gemma3Source(VLMSource):
    """Gemma 3: each picture pooled to a square of `mm_tokens_per_image`, without pan and scan."""

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """The same square for each picture."""
        side = math.isqrt(self.model.config.mm_tokens_per_image)
        return [(whole_view(side, side),)] * len(pictures)


class Gemma4Source(VLMSource):
    """Gemma 4: patches pooled by squares; layers whose K and V are shaped unlike most are left out.

    Those are the full-attention layers, one in a few, with longer heads. Of layers that share their
    K and V, the one that made them is read.
    """

    takes_videos = True
    reads_on = False

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """One view: the grid of patches, pooled."""
        return self._pooled(encoded["image_position_ids"])

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """A grid for each frame."""
        frames = iter(self._pooled(encoded["video_position_ids"]))
        return [[next(frames) for _ in video] for video in videos]

    def _pooled(self, position_ids: Tensor) -> list[tuple[View, ...]]:
        """Of each picture, whose patches lie at `(pictures, patches, 2)`, the grid."""
        size = self.model.config.vision_config.pooling_kernel_size
        grids = (position_ids.amax(1) + 1) // size
        return [(whole_view(rows, cols),) for cols, rows in grids.tolist()]

    def select_layers(
        self, layers: tuple[LayerKV, ...], indices: tuple[int, ...]
    ) -> tuple[tuple[LayerKV, ...], tuple[int, ...]]:
        """The layers of the most common geometry, since a fuser stacks its layers."""
        sizes = [(kv.keys.shape[1], kv.keys.shape[3]) for kv in layers]
        (common, _), *_ = Counter(sizes).most_common(1)
        kept = [at for at, size in enumerate(sizes) if size == common]
        return tuple(layers[at] for at in kept), tuple(indices[at] for at in kept)


class QwenVLSource(VLMSource):
    """Qwen2-VL, 2.5 and 3, Qwen3.5, GLM-4V: a grid as the picture is shaped, in M-RoPE.

    A video is as many grids as there are groups of frames (of two, in the published models).
    """

    takes_videos = True

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """One view: the grid of patches, merged by squares."""
        return [(view,) for _, view in self._grids(encoded["image_grid_thw"])]

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """The same grid for each group of frames."""
        return [[(view,)] * count for count, view in self._grids(encoded["video_grid_thw"])]

    def _grids(self, sizes: Tensor) -> list[tuple[int, View]]:
        """Groups of frames, and the grid of patches of each, merged by squares."""
        merge = self.model.config.vision_config.spatial_merge_size
        return [
            (count, whole_view(rows // merge, cols // merge))
            for count, rows, cols in sizes.tolist()
        ]

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        encoded = super()._encode(inputs, rendered, **kwargs)
        marked = (encoded["input_ids"] == self.model.config.video_token_id).any()
        if {"image_grid_thw", "video_grid_thw"} <= encoded.keys() and not marked:
            # GLM-4V's model puts features in one place for both, and torch would say no more.
            raise UnsupportedError(
                f"{self.origin.model} cannot tell pictures from videos of one batch; show it either"
            )
        return encoded


class IdeficsSource(VLMSource):
    """Idefics 3: tiles, then the whole picture; a small one is shown whole only."""

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """The tiles joined, and an overview as large as one tile."""
        side = math.isqrt(self.processor.image_seq_len)
        overview = whole_view(side, side)
        views = []
        for picture in pictures:
            _, tile_rows, tile_cols = self.processor.image_processor.get_number_of_image_patches(
                picture.height, picture.width
            )
            tiles = tiled_view(tile_rows, tile_cols, side, side)
            views.append((tiles, overview) if tiles.cells else (overview,))
        return views


class SmolVLMSource(IdeficsSource):
    """SmolVLM: as Idefics 3; each frame of a video is shown whole."""

    takes_videos = True
    equal_videos = True

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """A square for each frame, as large as one tile."""
        side = math.isqrt(self.processor.image_seq_len)
        return [[(whole_view(side, side),)] * len(video) for video in videos]

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        if any(item.images for item in inputs) and any(item.videos for item in inputs):
            # Its processor has one name for the pixels of both.
            raise UnsupportedError(
                f"{self.origin.model} cannot see pictures beside videos in one batch; show it either"
            )
        return super()._encode(inputs, rendered, **kwargs)


class InternVLSource(VLMSource):
    """InternVL: tiles, then a thumbnail; a picture of one tile, or a video's frame, has none."""

    takes_videos = True
    equal_videos = True

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """The tiles joined, and a thumbnail as large as one tile."""
        shrink = self.processor.image_processor
        side = math.isqrt(self.processor.image_seq_length)
        views = []
        for picture in pictures:
            tile_cols, tile_rows = get_optimal_tiled_canvas(
                (picture.height, picture.width),
                (shrink.size["height"], shrink.size["width"]),
                shrink.min_patches,
                shrink.max_patches,
            )
            tiles = tiled_view(tile_rows, tile_cols, side, side)
            views.append((tiles, whole_view(side, side)) if tile_rows * tile_cols > 1 else (tiles,))
        return views

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """One tile for each frame."""
        side = math.isqrt(self.processor.image_seq_length)
        return [[(whole_view(side, side),)] * len(video) for video in videos]


class LlavaNextSource(VLMSource):
    """LLaVA-NeXT: an overview, then joined tiles cut to the picture.

    The rows of the tiles end in a learned feature that is no patch. LLaVA-OneVision shows several
    pictures of one prompt whole only, padded to a square.
    """

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """What the model's own packing makes of features that only mark where a row ends."""
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = encoded["image_sizes"].cpu()
        in_row = encoded.get("batch_num_images", torch.ones(len(sizes), dtype=torch.long)).cpu()
        tiled = (in_row == 1).repeat_interleave(in_row).tolist()
        counts = [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            if is_tiled
            else 1
            for size, is_tiled in zip(sizes, tiled, strict=True)
        ]
        pack = self.model.base_model.pack_image_features
        wanted = {"vision_feature_select_strategy", "vision_aspect_ratio"}
        settings = {
            key: getattr(config, key) for key in wanted & set(inspect.signature(pack).parameters)
        }
        packed, _ = pack(
            [torch.zeros(count, side * side, 1) for count in counts],
            sizes,
            image_newline=torch.ones(1),
            **settings,
        )
        overview = whole_view(side, side)
        return [(overview, view_of_marks(marks[side * side :, 0])) for marks in packed]


class LlavaOnevisionSource(LlavaNextSource):
    """LLaVA-OneVision: as LLaVA-NeXT; the patches of a video's frames shrunk to half, a side.

    A video ends in a learned feature that is no patch.
    """

    takes_videos = True
    equal_videos = True

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """A square for each frame, the last of a video with the end mark."""
        vision = self.model.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        frame = whole_view(side, side)
        last = View(side, side, (*frame.cells, (-1, -1)))
        return [[(frame,)] * (len(video) - 1) + [(last,)] for video in videos]


class Lfm2VLSource(VLMSource):
    """LFM2-VL: tiles, then a thumbnail as the picture is shaped; a small picture is shown whole."""

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """The tiles joined, and the thumbnail; the prompt's tags say how many tiles there are."""
        shrink = self.model.config.downsample_factor
        shapes = iter((-(-encoded["spatial_shapes"] // shrink)).tolist())
        views = []
        for prompt in self.processor.tokenizer.batch_decode(encoded["input_ids"]):
            for part in prompt.split(self.processor.image_start_token)[1:]:
                shown, _, _ = part.partition(self.processor.image_end_token)
                tags = re.findall(r"<\|img_row_(\d+)_col_(\d+)\|>", shown)
                picture = []
                if tags:
                    tile, *_ = [next(shapes) for _ in tags]
                    picture.append(tiled_view(*map(int, tags[-1]), *tile))
                if not tags or self.processor.image_thumbnail_token in shown:
                    picture.append(whole_view(*next(shapes)))
                views.append(tuple(picture))
        return views


class Blip2Source(VLMSource):
    """BLIP-2 over OPT or T5: the picture summed up by queries, then the question.

    Of T5, what its encoder made of them, as the decoder sees it.
    """

    one_picture = True
    reads_on = False

    def render(self, item: SourceInput) -> str:
        """The words BLIP-2 was trained with; the processor puts the queries before them."""
        text = item.text.strip()
        return f"Question: {text} Answer:" if text else ""

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """Queries, without a grid."""
        return [(queries(self.model.config.num_query_tokens),)] * len(pictures)


class Kosmos2Source(VLMSource):
    """KOSMOS-2: the picture summed up by queries, then the question; positions after padding's."""

    one_picture = True
    reads_on = False

    def render(self, item: SourceInput) -> str:
        """The question; the processor puts the queries before it."""
        return item.text.strip()

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """Queries, without a grid."""
        return [(queries(self.model.config.latent_query_num),)] * len(pictures)

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """Answers row by row, since the model counts padding when it writes."""
        return [
            text
            for item in inputs
            for text in super(Kosmos2Source, self).generate([item], **kwargs)
        ]

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Row by row, since the processor pads neither offsets nor on the side asked for."""
        count = self.model.config.latent_query_num
        rows = [
            super(Kosmos2Source, self)._encode([item], [text], num_image_tokens=count, **kwargs)
            for item, text in zip(inputs, rendered, strict=True)
        ]
        width = max(row["input_ids"].shape[1] for row in rows)
        pad_id = self.processor.tokenizer.pad_token_id

        def pad(key: str, value: Tensor) -> Tensor:
            """On the left, along the sequence."""
            missing = width - value.shape[1]
            sides = (0, 0) * (value.ndim - 2) + (missing, 0)
            return F.pad(value, sides, value=pad_id if key == "input_ids" else 0)

        pixels = torch.cat([row.pop("pixel_values") for row in rows])
        joined = {key: torch.cat([pad(key, row[key]) for row in rows]) for key in rows[0]}
        return {**joined, "pixel_values": pixels}

    def _is_image(self, encoded: Mapping[str, Tensor]) -> Tensor:
        return encoded["image_embeds_position_mask"].bool()

    def _position_ids(self, encoded: Mapping[str, Tensor]) -> Tensor:
        padding = self.model.config.text_config.pad_token_id
        return count_positions(encoded["attention_mask"], first=padding + 1)

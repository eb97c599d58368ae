"""Vision-language models as sources; a family gets a class only for what truly differs."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.video_utils import VideoMetadata

from mm_c2c.align.tokens import locate_text
from mm_c2c.cache import LayerKV, PositionKind, SourceCache
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.sources.base import TEXT_MARK, FrozenReader, SourceInput, count_positions
from mm_c2c.sources.views import (
    View,
    by_row,
    place,
    queries,
    tiled_view,
    view_of_marks,
    whole_view,
)


class VLMSource(FrozenReader):
    """Reads pictures and a question as the model's own processor lays them out.

    As it stands it serves LLaVA (Pixtral among them) and Mistral 3: one view a picture, one token a
    patch. Positions are the model's own where it computes them (M-RoPE), and else count from
    `first_position`.
    """

    first_position = 0
    # What the processor appends to the rendered prompt.
    prompt_end = ""
    # Whether a prompt can show one picture only.
    one_picture = False
    # Whether the model merges a video's frames in time.
    takes_videos = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, name, revision)
        self.processor: Any = processor  # each family's has attributes of its own
        # A decoder reads on at the end of a prompt, which must not be padding; an encoder counts
        # padding that stands before a position.
        self.padding_side = "right" if model.config.is_encoder_decoder else "left"

    def prefill(self, inputs: Sequence[SourceInput]) -> SourceCache:
        """Read a batch of pictures, each with a question or without.

        Raises:
            InputError: a row shows nothing.
            UnsupportedError: a row shows a video, and the model or its processor takes none.
        """
        rendered = [self.render(item) for item in inputs]
        encoded = self._encode(inputs, rendered, return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")
        mask = encoded["attention_mask"]
        position_ids = self._position_ids(encoded)
        layers, indices, rope = self.read(encoded, position_ids)
        is_image = self._is_image(encoded)
        pictures = [picture for item in inputs for picture in item.images]
        views = self.views(encoded, pictures) if pictures else ()
        patches, grids = place(is_image, by_row(inputs, views, self.video_views(encoded)))
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
            patches=patches,
            grids=grids,
            spans=spans,
            texts=tuple(item.text.strip() for item in inputs),
            rope=rope,
            origin=self.origin,
        )

    def generate(self, inputs: Sequence[SourceInput], **kwargs: Any) -> list[str]:
        """The model's own answers."""
        encoded = self._encode(inputs, [self.render(item) for item in inputs])
        base = self.model.base_model
        before = getattr(base, "rope_deltas", None)
        try:
            out = self.model.generate(**self._known(encoded), **kwargs)
        finally:
            # M-RoPE models keep the last prompt's offset between calls.
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = before
        start = 0 if self.model.config.is_encoder_decoder else encoded["input_ids"].shape[1]
        return self.processor.batch_decode(out[:, start:], skip_special_tokens=True)

    def render(self, item: SourceInput) -> str:
        """The prompt in the model's own template, image placeholders unexpanded."""
        parts: list[Any] = [{"type": "image"}] * len(item.images)
        parts += [{"type": "video"}] * len(item.videos)
        parts.append({"type": "text", "text": item.text.strip()})
        turns: list[Any] = [{"role": "user", "content": parts}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """The views of each picture of the batch, in the order of the prompt."""
        config = self.model.config
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        sizes = encoded.get("image_sizes")
        if sizes is None:  # all alike
            sizes = torch.tensor([encoded["pixel_values"].shape[-2:]] * len(pictures))
        return [(whole_view(rows, cols),) for rows, cols in (sizes // side).tolist()]

    def video_views(self, encoded: Mapping[str, Tensor]) -> Sequence[Sequence[tuple[View, ...]]]:
        """Of each video of the batch, the views of each group of frames that is merged."""
        del encoded
        return ()

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        for row, item in enumerate(inputs):
            self._check_shown(item, f"row {row}: {self.origin.model}")
        shown: dict[str, Any] = {"images": [list(item.images) for item in inputs]}
        videos = [list(video) for item in inputs for video in item.videos]
        if videos:
            # Without metadata the processor takes the frames for some of a longer video.
            kwargs["video_metadata"] = [
                VideoMetadata(
                    total_num_frames=len(video),
                    fps=item.fps,
                    frames_indices=list(range(len(video))),
                )
                for item in inputs
                for video in item.videos
            ]
            shown = {"images": None, "videos": videos, "do_sample_frames": False}
            if any(item.images for item in inputs):
                shown["images"] = [picture for item in inputs for picture in item.images]
        encoded = self.processor(
            **shown,
            text=list(rendered),
            padding=True,
            padding_side=self.padding_side,
            return_tensors="pt",
            **kwargs,
        )
        return {key: torch.as_tensor(v).to(self.model.device) for key, v in encoded.items()}

    def _check_shown(self, item: SourceInput, who: str) -> None:
        if not item.images and not item.videos:
            raise InputError(f"{who} needs a picture, got none")
        if self.one_picture and len(item.images) > 1:
            raise InputError(f"{who} takes one picture, got {len(item.images)}")
        if item.videos and not self.takes_videos:
            raise UnsupportedError(f"{who} takes no video; give its frames as images")
        if item.videos and getattr(self.processor, "video_processor", None) is None:
            raise UnsupportedError(
                f"{who} has a processor without its video part, which needs torchvision: install "
                "the torchvision of your torch and load the model again, or give frames as images"
            )
        for video in item.videos:
            sizes = sorted({frame.size for frame in video})
            if not sizes:
                raise InputError(f"{who} expects a video of one frame or more, got none")
            if len(sizes) > 1:
                raise InputError(f"{who} expects a video's frames alike in size, got {sizes}")

    def _position_ids(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """`(batch, seq_len)`; `(3, batch, seq_len)` where the model tells rows and columns apart."""
        find = getattr(self.model.base_model, "get_rope_index", None)
        if find is None:
            return count_positions(encoded["attention_mask"], self.first_position)
        wanted = inspect.signature(find).parameters
        position_ids, _ = find(**{key: encoded[key] for key in wanted if key in encoded})
        return position_ids

    def _is_image(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """`(batch, seq_len)`: where the model puts what it made of the pictures."""
        return encoded["input_ids"] == self.model.config.image_token_id

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
        end = int(offsets.masked_fill(is_image.unsqueeze(1), 0).max())
        shift = end - len(rendered) - len(self.prompt_end)
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

    def views(
        self, encoded: Mapping[str, Tensor], pictures: Sequence[Image.Image]
    ) -> Sequence[tuple[View, ...]]:
        """One view: the grid of patches, pooled."""
        size = self.model.config.vision_config.pooling_kernel_size
        grids = (encoded["image_position_ids"].amax(1) + 1) // size
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

    def video_views(self, encoded: Mapping[str, Tensor]) -> Sequence[Sequence[tuple[View, ...]]]:
        """The same grid for each group of frames."""
        if "video_grid_thw" not in encoded:
            return ()
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

    def _is_image(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Patches of pictures and of videos."""
        config = self.model.config
        ids = encoded["input_ids"]
        return (ids == config.image_token_id) | (ids == config.video_token_id)


class IdeficsSource(VLMSource):
    """Idefics 3 and SmolVLM: tiles, then the whole picture; a small one is shown whole only."""

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


class InternVLSource(VLMSource):
    """InternVL: tiles, then a thumbnail; a picture of one tile has none."""

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


class LlavaNextSource(VLMSource):
    """LLaVA-NeXT and LLaVA-OneVision: an overview, then joined tiles cut to the picture.

    The rows of the tiles end in a learned feature that is no patch. OneVision shows several pictures
    of one prompt whole only, padded to a square.
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


def trim_spans(spans: Tensor, text: str) -> Tensor:
    """Spans without the white space before a word, as `token_spans` gives them."""
    rows = []
    for start, end in spans.tolist():
        word = text[start:end] if 0 <= start < end else ""
        start += len(word) - len(word.lstrip()) if word.strip() else 0
        rows.append((start, end))
    return torch.tensor(rows, device=spans.device)

"""Vision-language models as sources; a family gets a class only for what truly differs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.video_utils import VideoMetadata

from mm_c2c.align.tokens import locate_text
from mm_c2c.cache import PositionKind, SourceCache
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.sources.base import TEXT_MARK, FrozenReader, SourceInput, count_positions
from mm_c2c.sources.views import (
    View,
    by_row,
    place,
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
    # Whether a prompt can show a video.
    takes_videos = False
    # Whether the model can read on, token by token, behind the K and V that are kept of a prompt.
    reads_on = True
    # Whether the videos of a batch must have as many frames each.
    equal_videos = False

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
        videos = [video for item in inputs for video in item.videos]
        groups = self.video_views(encoded, videos) if videos else ()
        patches, grids = place(is_image, by_row(inputs, views, groups))
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
        out = self._generate(encoded, **kwargs)
        start = 0 if self.model.config.is_encoder_decoder else encoded["input_ids"].shape[1]
        return self.processor.batch_decode(out[:, start:], skip_special_tokens=True)

    def _generate(self, encoded: Mapping[str, Any], **kwargs: Any) -> Any:
        """`model.generate`, which leaves nothing behind.

        M-RoPE models keep the last prompt's offset between calls, and whoever is in the middle of
        another one goes on by it.
        """
        base = self.model.base_model
        before = getattr(base, "rope_deltas", None)
        try:
            return self.model.generate(**self._known(encoded), **kwargs)
        finally:
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = before

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

    def video_views(
        self, encoded: Mapping[str, Tensor], videos: Sequence[Sequence[Image.Image]]
    ) -> Sequence[Sequence[tuple[View, ...]]]:
        """Of each video of the batch, the views of each group of frames that the model merges."""
        del encoded, videos
        return ()

    def _encode(
        self, inputs: Sequence[SourceInput], rendered: Sequence[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        marks = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video")]
        for row, item in enumerate(inputs):
            self._check_shown(item, f"row {row}: {self.origin.model}")
            for mark in marks:
                if isinstance(mark, str) and mark in item.text:
                    raise InputError(
                        f"row {row}: {self.origin.model} takes {mark} in a text for a picture's "
                        f"place; write {item.text.strip()!r} without it"
                    )
        counts = sorted({len(video) for item in inputs for video in item.videos})
        if self.equal_videos and len(counts) > 1:
            raise InputError(
                f"{self.origin.model} expects the videos of a batch to have as many frames each, "
                f"got {counts}; show them in batches of equal ones"
            )
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
            shown |= {"videos": videos, "do_sample_frames": False}
            if not any(item.images for item in inputs):
                shown["images"] = None
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
        """`(batch, seq_len)`: where the model puts what it made of pictures and videos."""
        config, ids = self.model.config, encoded["input_ids"]
        is_video = ids == getattr(config, "video_token_id", config.image_token_id)
        return (ids == config.image_token_id) | is_video

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


def trim_spans(spans: Tensor, text: str) -> Tensor:
    """Spans without the white space before a word."""
    rows = []
    for start, end in spans.tolist():
        word = text[start:end] if 0 <= start < end else ""
        start += len(word) - len(word.lstrip()) if word.strip() else 0
        rows.append((start, end))
    return torch.tensor(rows, device=spans.device)

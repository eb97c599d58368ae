"""Videos for the tiny models: their processors' video part, without torchvision.

The stand-ins make of frames what transformers' own video processors make of them (where torchvision
is installed, a test compares the two), since those cannot be imported without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from families import FAMILIES
from PIL import Image
from tiny_vlm import TinyVLM
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

MERGING_FAMILIES = ("glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl")
VIDEO_FAMILIES = (*MERGING_FAMILIES, "gemma4", "internvl", "llava_onevision", "smolvlm")
# As the published chat templates write a video; what Qwen3's and GLM's processors put around each
# group of frames, they put there themselves.
_SHOWN = {
    "gemma4": "<|video|>",
    "glm4v": "<|begin_of_video|><|video|><|end_of_video|>",
    "internvl": "<video>",
    "llava_onevision": "<video>",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>",
}


class StandIn:
    """A video processor that leaves what `make` does to its subclasses."""

    def __call__(
        self,
        videos: Sequence[Sequence[Image.Image]],
        *,
        video_metadata: Sequence[VideoMetadata],
        do_sample_frames: bool,
        **_: Any,
    ) -> BatchFeature:
        """See transformers' video processors."""
        assert not do_sample_frames
        return BatchFeature({**self.make(videos), "video_metadata": list(video_metadata)})

    def make(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """What the model is given of videos."""
        raise NotImplementedError


class MergedFrames(StandIn):
    """Frames, prepared as pictures are, merged two by two."""

    temporal_patch_size = 2
    merge_size = 2

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def make(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """See `StandIn`."""
        pixels, grids = [], []
        for frames in videos:
            even = [*frames, *frames[len(frames) - len(frames) % 2 :]]  # the last one twice
            encoded = self.image_processor(list(even), return_tensors="pt")
            (size,) = encoded["image_grid_thw"][:, 1:].unique(dim=0).tolist()
            patches = encoded["pixel_values"].unflatten(0, (len(even), -1))
            # A picture is shown as two frames that are alike: (groups, patches, channels, 2, pixels).
            alike = patches.unflatten(2, (3, 2, -1))
            merged = torch.stack([alike[::2, :, :, 0], alike[1::2, :, :, 1]], dim=3)
            pixels.append(merged.flatten(2).flatten(0, 1))
            grids.append([len(even) // 2, *size])
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
        }


class WholeFrames(StandIn):
    """Frames, each a square of one size."""

    num_frames = 64
    fps = 1

    def __init__(self, image_processor: Any, side: int, *, is_padded: bool) -> None:
        self.side = side
        self.is_padded = is_padded
        self.mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(image_processor.image_std).view(3, 1, 1)

    def make(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """See `StandIn`."""
        pixels = torch.stack([torch.stack([self._prepare(f) for f in frames]) for frames in videos])
        made = {"pixel_values" if self.is_padded else "pixel_values_videos": pixels}
        if self.is_padded:
            made["pixel_attention_mask"] = torch.ones_like(pixels[:, :, 0], dtype=torch.long)
        return made

    def _prepare(self, frame: Image.Image) -> torch.Tensor:
        size = (self.side, self.side)
        shown = frame.resize(size, Image.Resampling.BICUBIC) if frame.size != size else frame
        rgb = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
        return (rgb - self.mean) / self.std


class PooledFrames(StandIn):
    """Frames, prepared as pictures are, each for itself."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def make(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """See `StandIn`."""
        encoded = [self.image_processor(list(frames), return_tensors="pt") for frames in videos]
        return {
            "pixel_values_videos": torch.cat([one["pixel_values"] for one in encoded]),
            "video_position_ids": torch.cat([one["image_position_ids"] for one in encoded]),
            "num_frames_per_video": torch.tensor([len(frames) for frames in videos]),
            "num_soft_tokens_per_video": [
                int(one["num_soft_tokens_per_image"][0]) for one in encoded
            ],
        }


def stand_in(name: str, image_processor: Any) -> Any:
    """What makes a family's videos in these tests."""
    if name in MERGING_FAMILIES:
        return MergedFrames(image_processor)
    if name == "gemma4":
        return PooledFrames(image_processor)
    side = 28 if name == "llava_onevision" else 16
    return WholeFrames(image_processor, side, is_padded=name == "smolvlm")


def build_with_videos(name: str) -> TinyVLM:
    """The tiny model of a family, whose processor also takes videos."""
    tiny = FAMILIES[name].build()
    processor: Any = tiny.processor
    shown = _SHOWN.get(name, "<|video_pad|>")
    for owner in (processor, processor.tokenizer):
        owner.chat_template = owner.chat_template.replace(
            "{% else %}{{ part['text'] }}",
            f"{{% elif part['type'] == 'video' %}}{{{{ '{shown}\\n' }}}}"
            "{% else %}{{ part['text'] }}",
        )
    processor.video_processor = stand_in(name, processor.image_processor)
    return tiny

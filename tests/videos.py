"""Videos for the tiny Qwen-VL models: their processors' video part, without torchvision.

`MergedFrames` makes of frames what transformers' own video processors make of them (where
torchvision is installed, a test compares the two), since those cannot be imported without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from families import FAMILIES, TinyVLM
from PIL import Image
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

VIDEO_FAMILIES = ("glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl")
# As the published chat templates write a video; what Qwen3's and GLM's processors put around each
# group of frames, they put there themselves.
_SHOWN = {
    "glm4v": "<|begin_of_video|><|video|><|end_of_video|>",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>",
}


class MergedFrames:
    """Frames, prepared as pictures are, merged two by two."""

    temporal_patch_size = 2
    merge_size = 2

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

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
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(pixels),
                "video_grid_thw": torch.tensor(grids),
                "video_metadata": list(video_metadata),
            }
        )


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
    processor.video_processor = MergedFrames(processor.image_processor)
    return tiny

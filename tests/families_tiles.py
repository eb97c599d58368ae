"""Tiny real vision-language models that show a picture in tiles, each with its own processor."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_vlm import TinyVLM, make_tokenizer, make_vlm, siglip, unchecked, vision_config
from transformers import (
    Idefics3Processor,
    InternVLProcessor,
    Lfm2VlProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ImagesKwargs


def build_idefics(
    model_type: str, processor_class: type[ProcessorMixin], image_processor: Any
) -> TinyVLM:
    """Tiles of 16 pixels a side, 4 x 4 patches each, shuffled to 2 x 2."""
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    tokenizer = make_tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tags
    )
    image_processor = image_processor(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, resample=2
    )
    return make_vlm(
        model_type,
        processor_class(image_processor, tokenizer, image_seq_len=4),
        vision_config={**siglip(image_size=16, patch_size=4), "model_type": f"{model_type}_vision"},
        text_config={"model_type": "llama"},
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_idefics3() -> TinyVLM:
    """Idefics 3 over a Llama."""
    return build_idefics("idefics3", Idefics3Processor, Idefics3ImageProcessorPil)


def build_smolvlm() -> TinyVLM:
    """SmolVLM: as Idefics 3."""
    # Spells out the number of a video's frames; its package is not installed.
    processing_smolvlm.num2words = str
    processor = partial(
        unchecked(processing_smolvlm.SmolVLMProcessor),
        video_processor=SimpleNamespace(num_frames=1, fps=1),
    )
    return build_idefics("smolvlm", processor, SmolVLMImageProcessorPil)


def build_internvl() -> TinyVLM:
    """InternVL: tiles of 16 pixels a side, 4 x 4 patches each, shuffled to 2 x 2."""
    tokenizer = make_tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=6)
    return make_vlm(
        "internvl",
        unchecked(InternVLProcessor)(image_processor, tokenizer, None, image_seq_length=4),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (16, 16),
            "patch_size": (4, 4),
        },
        text_config={"model_type": "qwen3", "head_dim": 10},
        image_seq_length=4,
    )


def build_llava_next() -> TinyVLM:
    """LLaVA-NeXT: tiles of 28 pixels a side, 4 x 4 patches each."""
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor,
        make_tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return make_vlm(
        "llava_next",
        processor,
        vision_config=vision_config("clip_vision_model", image_size=28),
        text_config={"model_type": "mistral"},
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )


def build_llava_onevision() -> TinyVLM:
    """LLaVA-OneVision: tiles of 28 pixels a side, 4 x 4 patches each, shrunk to 2 tiles' worth."""
    pinpoints = [[28, 56], [56, 28], [56, 112]]
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = unchecked(LlavaOnevisionProcessor)(
        image_processor,
        make_tokenizer("<image>", "<video>"),
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return make_vlm(
        "llava_onevision",
        processor,
        vision_config=siglip(),
        text_config={"model_type": "qwen2"},
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        video_token_id=processor.video_token_id,
    )


class TiledKwargs(ImagesKwargs, total=False):
    """What LFM2-VL's processor asks for beyond the usual."""

    return_row_col_info: bool


class TiledImages(SiglipImageProcessorPil):
    """LFM2-VL's image processor in short, without torchvision: tiles of 8 pixels, patches of 2."""

    valid_kwargs = TiledKwargs
    use_thumbnail = True
    tile_size, encoder_patch_size, downsample_factor = 8, 2, 2

    def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
        side = self.tile_size
        shown: list[np.ndarray] = []
        rows, cols, sizes = [], [], []
        for picture in [picture for row in images for picture in row]:
            high, wide = (max(1, round(size / side)) for size in picture.size[::-1])
            whole = np.asarray(picture.resize((wide * 4, high * 4), Image.Resampling.BOX))
            if high * wide > 1:
                fine = np.asarray(picture.resize((wide * side, high * side), Image.Resampling.BOX))
                tiles = fine.reshape(high, side, wide, side, 3).swapaxes(1, 2)
                shown += list(tiles.reshape(-1, side, side, 3))
            else:
                whole = np.asarray(picture.resize((side, side), Image.Resampling.BOX))
            shown.append(whole)
            rows.append(high)
            cols.append(wide)
            sizes.append(whole.shape[:2])
        shapes = torch.tensor([image.shape[:2] for image in shown]) // 2
        lengths = shapes.prod(1)
        pixels = torch.zeros(len(shown), int(lengths.max()), 12)
        for index, image in enumerate(shown):
            (high, wide), patch = shapes[index].tolist(), self.encoder_patch_size
            patches = image.reshape(high, patch, wide, patch, 3).swapaxes(1, 2)
            patches = patches.reshape(high * wide, -1).astype(np.float32)
            pixels[index, : high * wide] = torch.from_numpy(patches) / 127.5 - 1
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": (torch.arange(pixels.shape[1]) < lengths[:, None]).int(),
            "spatial_shapes": shapes,
            "image_rows": rows,
            "image_cols": cols,
            "image_sizes": sizes,
        }


def build_lfm2_vl() -> TinyVLM:
    """LFM2-VL: cells of 4 pixels, tiles of 2 x 2; two of four layers convolve, and keep no keys."""
    tags = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 8) for col in range(1, 8)]
    tokenizer = make_tokenizer(
        "<image>",
        *tags,
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    return make_vlm(
        "lfm2_vl",
        unchecked(Lfm2VlProcessor)(TiledImages(), tokenizer),
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 2,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
        },
        projector_hidden_size=16,
        downsample_factor=2,
    )


def build_mllama() -> TinyVLM:
    """Llama 3.2 Vision: up to 4 tiles of 28 pixels, 4 x 4 patches each; layers 1 and 3 look."""
    tokenizer = make_tokenizer("<|image|>", "<|python_tag|>")
    image_processor = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    return make_vlm(
        "mllama",
        MllamaProcessor(image_processor, tokenizer),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
        },
        text_config={
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    )

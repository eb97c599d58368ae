"""Families of vision-language models, and how each lays pictures out; weights come from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from families_queries import build_blip2, build_blip2_t5, build_kosmos2
from families_tiles import (
    build_idefics3,
    build_internvl,
    build_lfm2_vl,
    build_llava_next,
    build_llava_onevision,
    build_mllama,
    build_smolvlm,
)
from families_views import (
    build_florence2,
    build_gemma3,
    build_gemma4,
    build_glm4v,
    build_llava,
    build_mistral3,
    build_paligemma,
    build_pixtral,
    build_qwen2_5_vl,
    build_qwen2_vl,
    build_qwen3_5,
    build_qwen3_vl,
)
from tiny_vlm import TinyVLM


class Family(NamedTuple):
    """How a family shows pictures.

    Attributes:
        build: makes the model and its processor.
        shown: by height and width of a picture in pixels, the rows and columns of each of its
            views, in the order of the prompt; empty for queries, which have no grid.
        reads_words: whether the cache has positions for the question.
        brightened: how much of a patch's height and width to paint, from its top left.
    """

    build: Callable[[], TinyVLM]
    shown: dict[tuple[int, int], list[tuple[int, int]]]
    reads_words: bool = True
    brightened: float = 1.0


# A grid as the picture is shaped, a cell of 8 pixels.
AS_SHAPED = {(16, 32): [(2, 4)], (40, 24): [(5, 3)]}


# Tiles of 2 x 2 cells, three along the longer side, then an overview of 2 x 2.
TILED = {(32, 48): [(4, 6), (2, 2)], (48, 16): [(6, 2), (2, 2)], (48, 48): [(6, 6), (2, 2)]}


FAMILIES = {
    "blip-2": Family(build_blip2, {}),
    "blip-2_t5": Family(build_blip2_t5, {}),
    # Its convolutions centre each patch on the top left of its cell.
    "florence2": Family(build_florence2, {(64, 64): [(4, 4)]}, brightened=0.25),
    "gemma3": Family(build_gemma3, {(42, 42): [(3, 3)]}),
    "gemma4": Family(build_gemma4, {(20, 48): [(5, 12)], (48, 20): [(12, 5)], (32, 32): [(8, 8)]}),
    "glm4v": Family(build_glm4v, AS_SHAPED),
    "idefics3": Family(build_idefics3, TILED),
    "internvl": Family(
        build_internvl,
        {(32, 48): [(4, 6), (2, 2)], (48, 16): [(6, 2), (2, 2)], (16, 16): [(2, 2)]},
    ),
    "kosmos-2": Family(build_kosmos2, {}),
    "lfm2_vl": Family(
        build_lfm2_vl,
        {(16, 24): [(4, 6), (2, 3)], (24, 8): [(6, 2), (3, 1)], (8, 8): [(2, 2)]},
    ),
    "llava": Family(build_llava, {(28, 28): [(4, 4)]}),
    "llava_next": Family(
        build_llava_next, {(28, 56): [(4, 4), (4, 8)], (56, 42): [(4, 4), (8, 6)]}
    ),
    "llava_onevision": Family(
        build_llava_onevision,
        # The last grid has 8 x 16 patches, and is shrunk.
        {(28, 56): [(4, 4), (4, 8)], (28, 42): [(4, 4), (4, 6)], (56, 112): [(4, 4), (4, 8)]},
    ),
    "mistral3": Family(build_mistral3, AS_SHAPED),
    "mllama": Family(
        build_mllama,
        # The last fills a canvas of 2 x 2 tiles up to its last columns.
        {(28, 28): [(4, 4)], (28, 56): [(4, 8)], (56, 42): [(8, 6)]},
        reads_words=False,
    ),
    "paligemma": Family(build_paligemma, {(21, 21): [(3, 3)]}),
    "pixtral": Family(build_pixtral, {(16, 32): [(4, 8)], (28, 20): [(7, 5)]}),
    "qwen2_5_vl": Family(build_qwen2_5_vl, AS_SHAPED),
    "qwen2_vl": Family(build_qwen2_vl, AS_SHAPED),
    "qwen3_5": Family(build_qwen3_5, AS_SHAPED),
    "qwen3_vl": Family(build_qwen3_vl, AS_SHAPED),
    "smolvlm": Family(build_smolvlm, TILED),
}

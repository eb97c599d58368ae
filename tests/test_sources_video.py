"""Videos: frame by frame, or merged in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from test_sources_families import CLOSE, WORDS, features_change, painted, plain_layers
from transformers.video_utils import VideoMetadata
from videos import MERGING_FAMILIES, VIDEO_FAMILIES, build_with_videos, stand_in

from mm_c2c import Bridge, BridgeConfig, FuserConfig, LinkConfig, Target
from mm_c2c.cache import PatchGrid
from mm_c2c.errors import InputError, UnsupportedError
from mm_c2c.sources import SourceInput, source_class

SIZE = (48, 64)


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def source(request: pytest.FixtureRequest) -> Any:
    tiny = build_with_videos(request.param)
    read = source_class(tiny.model.config.model_type, has_vision=True)
    return read(tiny.model, tiny.processor, f"tiny/{request.param}")


def frames(count: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, ...]:
    """A bright bar that moves down."""
    return tuple(painted(size, (8 * k, 8 * k + 8, 0, size[1])) for k in range(count))


def metadata(video: Sequence[Image.Image]) -> VideoMetadata:
    """Of two frames a second."""
    indices = list(range(len(video)))
    return VideoMetadata(total_num_frames=len(video), fps=2.0, frames_indices=indices)


def test_a_video_leaves_what_the_model_itself_leaves_of_it(source: Any) -> None:
    video = frames(4)
    cache = source.prefill([SourceInput(text=WORDS[0], videos=(video,))])
    item = SourceInput(text=WORDS[0], videos=(video,))
    encoded = source.processor(
        videos=[list(video)],
        text=[source.render(item)],
        video_metadata=[metadata(video)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    layers = plain_layers(source, source._known(encoded))
    for kv, index in zip(cache.layers, cache.layer_indices, strict=True):
        kept = layers[index].keys.shape[2]  # a sliding layer keeps its window only
        torch.testing.assert_close(kv.keys[:, :, -kept:], layers[index].keys, **CLOSE)
        torch.testing.assert_close(kv.values[:, :, -kept:], layers[index].values, **CLOSE)


def merged(source: Any) -> int:
    """How many frames make one picture."""
    return 2 if source.origin.model.removeprefix("tiny/") in MERGING_FAMILIES else 1


def test_a_video_is_a_picture_for_each_frame_or_for_every_two(source: Any) -> None:
    (grids,) = source.prefill([SourceInput(videos=(frames(6),))]).grids
    size = grids[0][:2]
    assert grids == tuple(PatchGrid(*size, image) for image in range(6 // merged(source)))
    assert 1 < size[0] <= size[1]
    if source.origin.model_type in ("internvl", "llava_onevision", "smolvlm"):
        return  # which show a picture in more views than a frame
    (still,) = source.prefill([SourceInput(images=frames(1))]).grids
    assert still[0][:2] == size


@pytest.mark.parametrize("group", [0, 1])
def test_what_changes_in_a_frame_changes_where_the_cache_says_it_is_shown(
    source: Any, group: int
) -> None:
    dark = (painted(SIZE, None),) * (2 * merged(source))
    box = (SIZE[0] // 2, SIZE[0], 0, SIZE[1] // 2)  # the lower left
    lit = list(dark)
    lit[merged(source) * (group + 1) - 1] = painted(SIZE, box)
    looks = [SourceInput(videos=(dark,)), SourceInput(videos=(tuple(lit),))]
    cache, change = features_change(source, looks)
    most = cache.patches[0, change[0].argmax()].tolist()
    grid = cache.grids[0][most[0]]
    assert (grid.image, most[0]) == (group, group)
    assert most[1] >= grid.rows // 2
    assert most[2] < -(-grid.cols // 2)
    elsewhere = (cache.patches[0, :, 0] >= 0) & (cache.patches[0, :, 0] != group)
    assert change[0, elsewhere].max() < 1e-3 * change[0].max()


def test_a_row_of_a_batch_is_read_as_it_is_alone(source: Any) -> None:
    looks = [
        SourceInput(text=WORDS[0], videos=(frames(4),)),
        SourceInput(text=WORDS[1], images=frames(1, (32, 32)), videos=(frames(2), frames(2))),
        SourceInput(text=WORDS[1], images=frames(1)),
    ]
    unmixed = {"glm4v": "cannot tell pictures from", "smolvlm": "cannot see pictures beside"}
    if (why := unmixed.get(source.origin.model_type)) is not None:
        with pytest.raises(UnsupportedError, match=f"{why} videos"):
            source.prefill(looks)
        looks = [replace(look, images=()) for look in looks[:2]]
    if source.equal_videos:
        with pytest.raises(InputError, match=r"as many frames each, got \[2, 4\]"):
            source.prefill(looks)
        looks[0] = replace(looks[0], videos=(frames(2),))
    together = source.prefill(looks)
    assert [len({grid.image for grid in grids}) for grids in together.grids] == [
        len(look.images) + sum(len(video) // merged(source) for video in look.videos)
        for look in looks
    ]
    for row, look in enumerate(looks):
        alone = source.prefill([look])
        length = alone.seq_len
        assert alone.grids[0] == together.grids[row]
        assert torch.equal(alone.patches[0], together.patches[row, -length:])
        assert torch.equal(alone.spans[0], together.spans[row, -length:])
        for one, other in zip(together.layers, alone.layers, strict=True):
            torch.testing.assert_close(one.values[row, :, -length:], other.values[0], **CLOSE)
            torch.testing.assert_close(one.keys[row, :, -length:], other.keys[0], **CLOSE)


def test_words_behind_a_video_are_found(source: Any) -> None:
    cache = source.prefill([SourceInput(text=WORDS[1], videos=(frames(4),))])
    starts, ends = cache.spans[0].unbind(1)
    read = [WORDS[1][a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if b > a]
    assert "".join(read).replace(" ", "") == WORDS[1].replace(" ", "")


def test_how_fast_a_video_runs_is_told_where_the_model_minds(source: Any) -> None:
    slow = SourceInput(text=WORDS[0], videos=(frames(4),), fps=1.0)
    one, other = (source.prefill([look]) for look in (slow, replace(slow, fps=4.0)))
    same = one.seq_len == other.seq_len and torch.equal(one.position_ids, other.position_ids)
    alike = same and torch.equal(one.layers[-1].keys, other.layers[-1].keys)
    timeless = ("internvl", "llava_onevision", "qwen2_vl")
    assert alike == (source.origin.model_type in timeless)


def test_a_video_is_fused_and_answered_about(
    source: Any, tiny_target: Any, tiny_target_tokenizer: Any
) -> None:
    target = Target(tiny_target, tiny_target_tokenizer, "tiny/target")
    link = LinkConfig(
        source="eyes",
        geometry="slots",
        rows=2,
        cols=2,
        images=6 // merged(source),
        fuser=FuserConfig(source=source.shape, target=target.shape, hidden_size=16, rank=8),
    )
    config = BridgeConfig(links=(link,), slot_token="a")
    bridge = Bridge(target, {"eyes": source}, config).eval()
    short = 6 if source.equal_videos else 4
    looks = [SourceInput(videos=(frames(6),)), SourceInput(videos=(frames(short),))]
    seen = bridge.perceive(looks)
    assert len(bridge.generate(seen, list(WORDS), max_new_tokens=2, do_sample=False)) == 2


def test_a_source_answers_about_a_video_itself(source: Any) -> None:
    looks = [SourceInput(text=WORDS[0], videos=(frames(4),))]
    written = source.generate(looks, max_new_tokens=3, do_sample=False)
    assert len(written) == 1
    assert isinstance(written[0], str)


def test_what_cannot_be_shown_as_a_video_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: tiny/.* needs a picture, got none"):
        source.prefill([SourceInput(videos=(frames(2),)), SourceInput(text="x")])
    mixed = (*frames(1), *frames(1, (32, 32)))
    with pytest.raises(InputError, match=r"frames alike in size, got \[\(32, 32\), \(64, 48\)\]"):
        source.prefill([SourceInput(videos=(mixed,))])
    with pytest.raises(InputError, match="a video of one frame or more, got none"):
        source.prefill([SourceInput(videos=((),))])


def test_a_processor_without_its_video_part_says_what_it_needs() -> None:
    tiny = build_with_videos("qwen2_vl")
    tiny.processor.video_processor = None  # type: ignore[attr-defined]
    source = source_class("qwen2_vl", has_vision=True)(tiny.model, tiny.processor, "tiny/qwen")
    with pytest.raises(UnsupportedError, match="its video part, which needs torchvision"):
        source.prefill([SourceInput(videos=(frames(2),))])


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_stand_in_makes_what_the_real_video_processor_makes(name: str) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    processor: Any = build_with_videos(name).processor
    images = processor.image_processor
    real, size = real_video_processor(name, images)
    video = [list(frames(4, size)), list(frames(4, size) if size != SIZE else frames(2, (32, 32)))]
    told = {
        "video_metadata": [metadata(frames) for frames in video],
        "do_sample_frames": False,
        "return_tensors": "pt",
    }
    expected, found = real(video, **told), stand_in(name, images)(video, **told)
    assert found.keys() == expected.keys() | {"video_metadata"}
    for key in set(found) - {"video_metadata"}:
        torch.testing.assert_close(
            torch.as_tensor(found[key]), torch.as_tensor(expected[key]), rtol=1e-5, atol=1e-5
        )


def real_video_processor(name: str, images: Any) -> tuple[Any, tuple[int, int]]:
    """As the tiny picture processor is set, and the size of frames that it does not resize.

    What sets a size differs: pixels' resampling is none of the stand-ins' business.
    """
    import transformers

    alike = {"image_mean": images.image_mean, "image_std": images.image_std}
    if name in MERGING_FAMILIES:
        kind = "Qwen3VL" if name.startswith("qwen3") else "Qwen2VL"
        alike |= {
            "patch_size": images.patch_size,
            "merge_size": images.merge_size,
            "temporal_patch_size": images.temporal_patch_size,
            "size": {"shortest_edge": 64, "longest_edge": 64**4},
        }
        chosen = "Glm4v" if name == "glm4v" else kind
        return getattr(transformers, f"{chosen}VideoProcessor")(**alike), SIZE
    if name == "gemma4":
        alike |= {"patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": 70}
        return transformers.Gemma4VideoProcessor(**alike), (28, 40)
    side = stand_in(name, images).side
    if name == "smolvlm":
        alike |= {"size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}}
        return transformers.SmolVLMVideoProcessor(**alike), (side, side)
    kind = "InternVL" if name == "internvl" else "LlavaOnevision"
    alike["size"] = {"height": side, "width": side}
    return getattr(transformers, f"{kind}VideoProcessor")(**alike), (side, side)

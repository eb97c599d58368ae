"""Pictures that users hand in."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_c2c import images
from mm_c2c.errors import InputError
from mm_c2c.images import load_image


def test_a_picture_comes_back_as_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 7), (255, 0, 0, 128)).save(tmp_path / "a.png")
    picture = load_image(tmp_path / "a.png")
    assert (picture.mode, picture.size) == ("RGB", (5, 7))


def test_a_picture_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (4, 8)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_image(tmp_path / "absent.png")


def test_junk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="is not a picture"):
        load_image(tmp_path / "a.png")


def test_a_cut_off_picture_is_an_error(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut off"):
        load_image(tmp_path / "a.png")


def test_an_animation_is_an_error(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="animated"):
        load_image(tmp_path / "a.gif")


def test_of_a_phones_two_pictures_the_first_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 8), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    red, _, blue = load_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 200 > 50 > blue


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_a_pixel_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    found = np.asarray(load_image(tmp_path / f"a.{suffix}"))
    np.testing.assert_allclose(found, np.stack([values / 257] * 3, axis=2), atol=1)


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_values_of_unknown_range_are_refused(tmp_path: Path, dtype: type, mode: str) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=rf"\(mode {mode}\).* scale its values to 0 to 255"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 4\xbe 4 255 " + bytes(48))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.tiff")
    whole = (tmp_path / "a.tiff").read_bytes()
    paths = [tmp_path / "a.ppm"]
    for place in range(8, len(whole)):  # the first eight bytes say that it is a TIFF
        paths.append(tmp_path / f"{place}.tiff")
        paths[-1].write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    refused = 0
    for path in paths:
        try:
            load_image(path)
        except InputError:
            refused += 1
    assert refused > 10


def test_a_huge_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(InputError, match="20 x 20 pixels"):
        load_image(tmp_path / "a.png")


def test_what_pillow_stumbles_over_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (RuntimeError("Failed to decode frame 0"), AttributeError("mode")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(images, "_read", fail)
        with pytest.raises(InputError, match=f"cannot be read, it may be cut off: {error}"):
            load_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)


def test_a_picture_without_pixels_is_an_error() -> None:
    with pytest.raises(InputError, match="row 0 has 0 x 4 pixels"):
        images.to_rgb(Image.new("RGB", (0, 4)), "row 0")

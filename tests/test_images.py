"""Pictures that users hand in."""

from pathlib import Path

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


def test_a_huge_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(InputError, match="20 x 20 pixels"):
        load_image(tmp_path / "a.png")

"""Reading pictures that a user hands in, and refusing what cannot be one."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mm_c2c.errors import InputError

MAX_PIXELS = 50_000_000


def load_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, upright.

    Args:
        path: a file of any format Pillow reads, of one frame and at most 50 megapixels. Of a
            phone's JPEG with several pictures (MPO) the first is taken; 16 bits a pixel become 8.

    Raises:
        InputError: the file is missing, is no picture, is cut off, animated or too large, or its
            values are not known to be brightness.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # The size is checked below, by a rule of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return _read(path, picture)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give the path of a picture") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; give the path of a picture in it") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is far too large: scale it down") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not a picture that can be read; save it as PNG or JPEG"
        ) from error
    # Of a damaged file, Pillow also raises what its own parsing stumbles over.
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        struct.error,
    ) as error:
        raise InputError(f"{path} cannot be read, it may be cut off: {error}") from error


def _read(path: Path, picture: Image.Image) -> Image.Image:
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise InputError(
            f"{path} is animated or has several pages; save one as PNG and ask about it"
        )
    if picture.width * picture.height > MAX_PIXELS:
        raise InputError(
            f"{path} has {picture.width} x {picture.height} pixels; the limit is "
            f"{MAX_PIXELS // 1_000_000} megapixels: scale it down"
        )
    return to_rgb(picture, str(path))


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture as RGB, upright; 16 bits a pixel become 8.

    Args:
        picture: of any mode.
        name: what an error calls it.

    Raises:
        InputError: its values are not known to be brightness.
    """
    if not all(picture.size):
        raise InputError(f"{name} has {picture.width} x {picture.height} pixels; there is nothing")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32 bits a pixel (mode {upright.mode}), whose range is not known; scale "
            "its values to 0 to 255 and save it with 8 bits"
        )
    if upright.mode.startswith("I;16"):
        # Pillow cuts off at 255 what it should scale.
        upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return upright.convert("RGB")

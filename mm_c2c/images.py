"""Reading pictures that a user hands in, and refusing what cannot be one."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mm_c2c.errors import InputError

MAX_PIXELS = 50_000_000


def load_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, upright.

    Args:
        path: a file of any format Pillow reads, of one frame and at most 50 megapixels.

    Raises:
        InputError: the file is missing, is no picture, is cut off, animated or too large.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # The size is checked below, by a rule of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if getattr(picture, "n_frames", 1) > 1:
                    raise InputError(f"{path} is animated; save one frame as PNG and ask about it")
                if picture.width * picture.height > MAX_PIXELS:
                    raise InputError(
                        f"{path} has {picture.width} x {picture.height} pixels; the limit is "
                        f"{MAX_PIXELS // 1_000_000} megapixels: scale it down"
                    )
                return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is far too large: scale it down") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that can be read") from error
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read, it may be cut off: {error}") from error

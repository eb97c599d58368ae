"""Emoji artwork as cut-outs: fetched from npm packages, rasterised, cropped to what is drawn.

Only making new scenes needs this module; the scenes the library ships are pictures already.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mm_c2c.errors import ConfigError, FetchError
from mm_c2c.reference.concepts import CONCEPTS, Concept

logger = logging.getLogger(__name__)

STICKER_PIXELS = 128


class Artwork(NamedTuple):
    """Where one style's pictures come from.

    Attributes:
        package: npm package and exact version.
        layout: `iconify` (one JSON of SVG bodies), `svg` or `webp` (a folder, by code point).
        folder: the folder in the package, for `svg` and `webp`.
        licence: of the artwork.
    """

    package: str
    layout: str
    folder: str
    licence: str


STYLES: dict[str, Artwork] = {
    "fluent-3d": Artwork("@lobehub/fluent-emoji-3d@1.1.0", "webp", "assets", "MIT"),
    "fluent-flat": Artwork("@iconify-json/fluent-emoji-flat@1.2.6", "iconify", "", "MIT"),
    "noto": Artwork("@iconify-json/noto@1.2.9", "iconify", "", "Apache-2.0"),
    "noto-v1": Artwork("@iconify-json/noto-v1@1.2.5", "iconify", "", "Apache-2.0"),
    "openmoji": Artwork("openmoji@17.0.0", "svg", "color/svg", "CC-BY-SA-4.0"),
    "emojione": Artwork("@iconify-json/emojione@1.2.3", "iconify", "", "CC-BY-4.0"),
    "emojione-v1": Artwork("@iconify-json/emojione-v1@1.2.3", "iconify", "", "CC-BY-SA-4.0"),
    "fxemoji": Artwork("@iconify-json/fxemoji@1.2.2", "iconify", "", "Apache-2.0"),
    "twemoji": Artwork("@iconify-json/twemoji@1.2.5", "iconify", "", "CC-BY-4.0"),
}
TRAIN_STYLES = (
    "fluent-3d",
    "fluent-flat",
    "noto",
    "noto-v1",
    "openmoji",
    "emojione",
    "emojione-v1",
)
DEV_STYLE = "fxemoji"
TEST_STYLE = "twemoji"


def fetch_artwork(style: str, folder: Path) -> Path:
    """Download and unpack one style's npm package; a second call finds it there.

    Args:
        style: a key of `STYLES`.
        folder: where packages are kept.

    Returns:
        The unpacked package.

    Raises:
        FetchError: npm is missing, or the package cannot be had.
    """
    if style not in STYLES:
        raise ConfigError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    home = folder / style
    if home.is_dir():
        return home
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            subprocess.run(
                ["npm", "pack", "--silent", STYLES[style].package],
                cwd=scratch,
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError as error:
            raise FetchError("npm was not found; install Node.js to fetch artwork") from error
        except subprocess.CalledProcessError as error:
            raise FetchError(f"npm pack {STYLES[style].package}: {error.stderr.strip()}") from error
        archive = next(Path(scratch).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (Path(scratch) / "package").rename(home)
    return home


def load_stickers(style: str, folder: Path) -> dict[str, Image.Image]:
    """Cut-outs of one style, by concept name; concepts the style does not draw are absent.

    Returns:
        RGBA pictures, cropped to their opaque part, the longer side `STICKER_PIXELS`.
    """
    package = fetch_artwork(style, folder)
    art = STYLES[style]
    reader = {
        "iconify": functools.partial(_read_iconify, _iconify_bodies(package)),
        "svg": functools.partial(_read_svg, package / art.folder),
        "webp": functools.partial(_read_webp, package / art.folder),
    }[art.layout]
    stickers = {}
    for concept in CONCEPTS:
        picture = reader(concept)
        if picture is None:
            logger.info("%s does not draw %s", style, concept.name)
        else:
            stickers[concept.name] = _crop(picture)
    return stickers


class _IconifySet(NamedTuple):
    bodies: dict[str, str]
    width: int
    height: int


def _iconify_bodies(package: Path) -> _IconifySet:
    path = package / "icons.json"
    if not path.is_file():
        return _IconifySet({}, 0, 0)
    data = json.loads(path.read_text(encoding="utf-8"))
    bodies = {name: icon["body"] for name, icon in data["icons"].items()}
    for alias, target in data.get("aliases", {}).items():
        bodies.setdefault(alias, bodies.get(target["parent"], ""))
    return _IconifySet(bodies, data["width"], data["height"])


def _read_iconify(icons: _IconifySet, concept: Concept) -> Image.Image | None:
    body = icons.bodies.get(concept.icon) or icons.bodies.get(concept.icon.replace("-", ""))
    if not body:
        return None
    return _rasterise(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {icons.width} {icons.height}">{body}</svg>'
    )


def _read_svg(folder: Path, concept: Concept) -> Image.Image | None:
    path = folder / f"{concept.code.upper()}.svg"
    return _rasterise(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_webp(folder: Path, concept: Concept) -> Image.Image | None:
    for name in (f"{concept.code}.webp", f"{concept.code}-fe0f.webp"):
        if (folder / name).is_file():
            return Image.open(folder / name).convert("RGBA")
    return None


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    pixels = 2 * STICKER_PIXELS
    data = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _crop(picture: Image.Image) -> Image.Image:
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    cut = picture.crop(box)
    scale = STICKER_PIXELS / max(cut.size)
    return cut.resize(
        (max(1, round(cut.width * scale)), max(1, round(cut.height * scale))),
        Image.Resampling.LANCZOS,
    )

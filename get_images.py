"""A folder of images in; named images and their pixels out.

Every script and every room of retrieval/ finds and reads its images here. Data sets are laid out by
`python -m retrieval.datasets`.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, UnidentifiedImageError
except ModuleNotFoundError as missing:  # the scripts come here first
    hint = "run `make demo` once and `source .venv/bin/activate`, or `pip install -r requirements.txt`"
    raise SystemExit(f"error: {missing}: {hint}") from None

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HIDDEN = (".", "__MACOSX")  # what a name of no user's begins with
NO_FILES_OF_A_USER = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders

log = logging.getLogger("retrieval.images")
# Only its error, at twice the size, counts.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- find -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """An image on disk. Its name is its path below the folder that was searched, in POSIX form."""

    name: str
    path: Path


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its end, and if no part of it is hidden."""
    hidden = any(part.startswith(HIDDEN) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def label_of(name: str) -> str | None:
    """The label of an image: the first folder of its name, or None where it has none.

    >>> label_of("forest/autumn/20056.jpg"), label_of("20056.jpg")
    ('forest', None)
    """
    first, slash, _ = name.partition("/")
    return first if slash else None


def find_images(folder: Path | str) -> list[ImageFile]:
    """Every image at or below `folder`, sorted by name.

    An image is what ends in one of SUFFIXES, in any letter case. Hidden files and folders are left out,
    and it is said if other files are. Links are followed: each folder is entered once, so that a loop of
    links ends. An image that cannot be read is found all the same: whoever reads it says so.

    Raises NotADirectoryError where there is no such folder, FileNotFoundError where it holds no image.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: give one that holds images")
    files = [(name, path) for name, path in _walk(folder) if not name.lower().endswith(NO_FILES_OF_A_USER)]
    images = [ImageFile(name, Path(path)) for name, path in files if name.lower().endswith(SUFFIXES)]
    others = [name for name, _ in files if not name.lower().endswith(SUFFIXES)]
    if not images:
        seen = f"only {len(others)} other files, such as {others[0]}" if others else "no files at all"
        raise FileNotFoundError(f"{folder} holds no images, {seen}: give one with {' '.join(SUFFIXES)} files")
    if others:
        log.warning("%d files in %s are not taken for images, such as %s", len(others), folder, others[0])
    return sorted(images, key=lambda image: image.name)


def _walk(top: Path | str) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of every visible file below `top`: real folders first, then those behind links."""
    entered = set()
    real, links = deque([("", os.fspath(top))]), deque()
    while real or links:
        prefix, folder = (real or links).popleft()
        place = os.path.realpath(folder)
        if place in entered:
            continue
        entered.add(place)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(HIDDEN)]
            visible.sort(key=lambda entry: entry.name)
        for entry in visible:
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else real).append((f"{prefix}{entry.name}/", entry.path))
            else:
                yield prefix + entry.name, entry.path


def find_query_and_gallery(query_dir: Path, gallery_dir: Path) -> tuple[list[ImageFile], list[ImageFile]]:
    """The images of both folders; a folder inside the other is allowed, and said. Raises as find_images."""
    queries, gallery = find_images(query_dir), find_images(gallery_dir)
    query_root, gallery_root = query_dir.resolve(), gallery_dir.resolve()
    if query_root.is_relative_to(gallery_root) or gallery_root.is_relative_to(query_root):
        log.warning(
            "the query folder %s and the gallery folder %s share images: a query can find itself",
            query_dir, gallery_dir,
        )  # fmt: skip
    return queries, gallery


# ---- read -----------------------------------------------------------------------------------------


class UnreadableImageError(OSError):
    """A file that gives no pixels; the message says why."""


def read_image(path: Path | str, enough: int | None = None) -> np.ndarray:
    """The pixels of an image file as a viewer shows them: uint8 RGB, (height, width, 3).

    EXIF orientation is applied, transparency lies over white, 16 bits are scaled to 8, the first frame of an
    animation counts. Colour profiles are not applied: the networks were trained without them. Where a
    shorter side of `enough` pixels is enough, a JPEG with a much longer one is decoded at a half, a quarter
    or an eighth of its size. By Pillow: torchvision's decoder, which is to go, gives the same pixels of a
    JPEG as fast, but takes three seconds to be imported.

    Raises UnreadableImageError for whatever is broken, is no image, or has more pixels than Pillow's limit
    for what it calls a decompression bomb (about 179 million).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImageError("not a regular file")
        with open(path, "rb") as file, Image.open(file) as image:
            if enough and image.format == "JPEG" and min(image.size) >= 2 * enough:
                image.draft(
                    image.mode, tuple(math.ceil(enough * side / min(image.size)) for side in image.size)
                )
            return np.array(_to_rgb(image))
    except Exception as error:  # decoders raise anything on broken bytes, and no file may cost the run
        raise UnreadableImageError(_reason(error, path)) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, also where the metadata are broken: the pixels may not be."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # anything, on broken bytes; if the pixels are broken too, decoding them will say so
        return 1
    return orientation if orientation in range(1, 9) else 1


TURNS = {  # EXIF orientation → what makes it upright: Exif 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright, over white."""
    image.load()  # Pillow turns a TIFF by itself while loading, and then takes the tag away
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits, or of floats
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels as 0..255. White is 65535 for integers, 1.0 for floats, or the largest level if above."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    white = max(1.0 if image.mode == "F" else 65535.0, float(levels.max()))
    return Image.fromarray((levels.clip(min=0) * (255 / white)).round().astype(np.uint8))


def _reason(error: Exception, path: Path | str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if os.path.getsize(path) else "an empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


# ---- data sets have moved -------------------------------------------------------------------------


if __name__ == "__main__":
    raise SystemExit(
        "error: get_images.py lays out no data sets any more: "
        "run `python -m retrieval.datasets sample --out data/sample` (or intel, split, competition)"
    )

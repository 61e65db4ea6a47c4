"""A folder in; its images, sorted by name, and their pixels out.

All scripts and folders of the project find and read images with this file. It imports nothing of the project.
Data sets are laid out by `python -m retrieval.datasets`.
"""

from __future__ import annotations

import io
import logging
import math
import os
import stat
import struct
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Importing a plugin registers its format, and Image.open then imports no other: see FORMATS.
from PIL import (  # noqa: F401  # isort: skip
    AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Jpeg2KImagePlugin, JpegImagePlugin,
    PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin,
)  # fmt: skip

# A file with one of these is taken for an image; any other file is opened to see whether it is one.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".jp2", ".avif", ".heic", ".heif")  # fmt: skip
HIDDEN = (".", "__MACOSX")  # folders whose names begin so are skipped, and files unless they are images
BY_WINDOWS = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders
VERSION = 1  # part of the cache key: raise it when read_image moves pixels by more than rounding

# Pillow's names of the formats that are read, whatever the suffix; MPO is read as JPEG. None of them runs a
# program, as EPS runs Ghostscript, or holds pictures whose size its header hides, as ICO does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
EXTRA_FORMATS = ("HEIF",)  # read where pillow-heif is installed: the photographs of an iPhone
MOST_PIXELS = 2**28  # a phone takes photographs of 200 million, and such a PNG needs 2.8 GB to be read
MOST_BYTES = 2**30  # of a file: 100 million pixels of 16-bit RGB without compression are 0.6 GB

# Of PNG: the first bytes, the channels of its kinds of colour, and the chunks that pixels need (RFC 2083).
PNG, PNG_CHANNELS = b"\x89PNG\r\n\x1a\n", {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

log = logging.getLogger("retrieval.images")
# Pillow raises an error above twice this number, also for pictures inside a file. Its warning is not needed.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()


# ---- find -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """An image on disk. Its name is its path below the folder that was searched, in POSIX form."""

    name: str
    path: Path


def is_image(name: str) -> bool:
    """Return whether a name is an image's: it ends in one of SUFFIXES and has no hidden part."""
    hidden = any(part.startswith(HIDDEN) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def holds_image(path: Path | str) -> bool:
    """Return whether a file's header is that of an image in one of FORMATS, whatever its name."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            with open_image(file):
                return True
    except Exception:  # decoders raise anything on broken bytes
        return False


def may_begin_image(start: bytes) -> bool:
    """Return whether the first 16 bytes of a file may be those of an image in one of FORMATS."""
    accepts = (Image.OPEN[name][1] for name in _formats())
    return any(accept(start) is True for accept in accepts if accept)


def label_of(name: str) -> str | None:
    """Return the label of an image: the first folder of its name, or None.

    >>> label_of("forest/autumn/20056.jpg"), label_of("20056.jpg")
    ('forest', None)
    """
    first, slash, _ = name.partition("/")
    return first if slash else None


def find_images(folder: Path | str) -> list[ImageFile]:
    """Return every image in `folder` and the folders below it, sorted by name.

    An image is a file whose name ends in one of SUFFIXES, in any letter case, or whose bytes are an image's.
    A file with such a name is not opened: if it is broken, it fails when it is read. Hidden folders are
    skipped silently, other files and unreadable folders with a warning. Links are followed, but no folder is
    entered twice, so that a loop of links ends.

    Raises NotADirectoryError if there is no such folder, FileNotFoundError if it holds no image.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: give one that holds images")
    images, others = [], []
    for name, path in _walk(folder):
        hidden = name.rpartition("/")[2].startswith(HIDDEN)
        if (name.lower().endswith(SUFFIXES) and not hidden) or holds_image(path):
            images.append(ImageFile(name, Path(path)))
        elif not hidden and not name.lower().endswith(BY_WINDOWS):
            others.append(name)
    if not images:
        seen = f"only {by_kind(others)}" if others else "no files at all"
        raise FileNotFoundError(f"{folder} holds no images, {seen}: give one with images, such as .jpg files")
    if others:
        log.warning("files in %s that are no images are left out: %s", folder, by_kind(others))
    if dotted := [image.name for image in images if image.path.name.startswith(HIDDEN)]:
        log.warning("hidden files in %s are images, and are taken: %s", folder, by_kind(dotted))
    return sorted(images, key=lambda image: image.name)


def by_kind(names: list[str]) -> str:
    """Return how many names there are of each suffix, and the first five of them.

    >>> by_kind(["a.txt", "README", "b.txt"])
    '2 .txt (a.txt, b.txt), 1 without a suffix (README)'
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(Path(name).suffix.lower() or "without a suffix", []).append(name)
    return ", ".join(
        f"{len(of_kind)} {kind} ({', '.join(of_kind[:5])}{', …' if len(of_kind) > 5 else ''})"
        for kind, of_kind in sorted(kinds.items(), key=lambda item: -len(item[1]))
    )


def _walk(top: Path | str) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the files below `top`, but in hidden folders: real folders before links."""
    entered = set()
    real, links = deque([("", os.fspath(top))]), deque()
    while real or links:
        prefix, folder = (real or links).popleft()
        place = os.path.realpath(folder)
        if place in entered:
            continue
        entered.add(place)
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            log.warning("the folder %s cannot be read, and its images are left out: %s",
                        folder, _reason(error))  # fmt: skip
            continue
        for entry in found:
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                if not entry.name.startswith(HIDDEN):
                    (links if is_link else real).append((f"{prefix}{entry.name}/", entry.path))
            else:
                yield prefix + entry.name, entry.path


def find_query_and_gallery(query_dir: Path, gallery_dir: Path) -> tuple[list[ImageFile], list[ImageFile]]:
    """Return the images of both folders; raises as find_images.

    Warns if one folder lies in the other, and if they look swapped.
    """
    queries, gallery = find_images(query_dir), find_images(gallery_dir)
    query_root, gallery_root = query_dir.resolve(), gallery_dir.resolve()
    if query_root.is_relative_to(gallery_root) or gallery_root.is_relative_to(query_root):
        log.warning(
            "the query folder %s and the gallery folder %s share images: a query can find itself "
            "(--exclude_self leaves its file out)", query_dir, gallery_dir,
        )  # fmt: skip
    elif why := why_swapped(query_dir, gallery_dir, queries, gallery):
        log.warning("are --query_dir %s and --gallery_dir %s swapped? %s", query_dir, gallery_dir, why)
    return queries, gallery


def why_swapped(
    query_dir: Path, gallery_dir: Path, queries: list[ImageFile], gallery: list[ImageFile]
) -> str:
    """Return why the two folders look swapped, or nothing."""
    if "gallery" in query_dir.name.lower() or "query" in gallery_dir.name.lower():
        return "so their names say"
    if len(queries) > 2 * len(gallery):
        return f"there are {len(queries)} queries, but only {len(gallery)} gallery images"
    labels, answers = ({label_of(image.name) for image in images} for images in (queries, gallery))
    if answers < labels and len(labels) > 2 * len(answers):
        return f"the queries have {len(labels)} labels, but the gallery has only {len(answers)} of them"
    return ""


# ---- read -----------------------------------------------------------------------------------------


class UnreadableImageError(OSError):
    """An image file that cannot be decoded; the message says why."""


class TooManyPixelsError(UnreadableImageError):
    """An image with more pixels than there is memory for."""


class Decoded(NamedTuple):
    """The pixels of an image file, uint8 RGB (height, width, 3), and what is wrong with it, if anything."""

    pixels: np.ndarray
    damage: str | None = None  # a part of the pixels, or something else in the file, is broken


def read_image(path: Path | str, enough: int | None = None) -> np.ndarray:
    """Return the pixels of an image file as a viewer shows them: uint8 RGB, (height, width, 3).

    Raises UnreadableImageError as read_bytes and decode_image do.
    """
    return decode_image(read_bytes(path), enough).pixels


def read_bytes(path: Path | str) -> bytes:
    """Return the bytes of an image file.

    Raises UnreadableImageError if that fails, or the file is no regular file or larger than MOST_BYTES.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError("not a regular file")
            if found.st_size > MOST_BYTES:
                raise UnreadableImageError(f"{found.st_size} bytes: more than the limit of {MOST_BYTES}")
            return file.read()
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null byte in the path
        raise UnreadableImageError(_reason(error)) from error


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a pipe would block until somebody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image as Image.open does, if it has one of FORMATS or EXTRA_FORMATS: read its header only."""
    return Image.open(file, formats=_formats())


def _formats() -> tuple[str, ...]:
    return FORMATS + tuple(name for name in EXTRA_FORMATS if name in Image.OPEN)


def decode_image(content: bytes, enough: int | None = None, most_pixels: int = MOST_PIXELS) -> Decoded:
    """Return the pixels of an image file's bytes, as a viewer shows them, and what is wrong with the file.

    EXIF orientation is applied, transparent pixels are blended with white, 16 bits are scaled to 8, and only
    the first frame of an animation is read. Colour profiles are ignored, since the networks were trained
    without them. If `enough` is given, a JPEG whose shorter side is at least twice as long is decoded at 1/2,
    1/4 or 1/8 of its size, as long as `enough` pixels are left. Where a JPEG or PNG is cut, or the text in a
    PNG is broken, the pixels that are there are returned; those that are missing are grey or black.

    Raises UnreadableImageError if there are no such pixels, or more than MOST_PIXELS, or the bytes are no
    image in one of FORMATS; TooManyPixelsError if more than `most_pixels` would have to be in memory at once.
    """
    if not content:
        raise UnreadableImageError("an empty file")
    try:
        return Decoded(_decode(content, enough, most_pixels))
    except TooManyPixelsError:
        raise
    except Exception as error:  # decoders raise anything on broken bytes, and no file may cost the run
        reason = _reason(error)
        damage = "broken, but not its pixels" if isinstance(error, UnidentifiedImageError) else reason
    try:
        pixels = _decode(_mended(content, most_pixels), enough, most_pixels)
    except TooManyPixelsError:
        raise
    except Exception:
        raise UnreadableImageError(reason) from None
    if pixels.min() == pixels.max():  # one colour: most likely not one pixel was decoded
        raise UnreadableImageError(reason)
    return Decoded(pixels, damage)


def _decode(content: bytes, enough: int | None, most_pixels: int) -> np.ndarray:
    with open_image(io.BytesIO(content)) as image:
        pixels = image.width * image.height
        if enough and image.format == "JPEG" and min(image.size) >= 2 * enough:
            image.draft(image.mode, tuple(math.ceil(enough * side / min(image.size)) for side in image.size))
            if "progressive" not in image.info:  # whose coefficients are in memory at full size
                pixels = image.width * image.height
        _refuse_too_many(pixels, most_pixels)
        return np.array(_to_rgb(image))


def _refuse_too_many(pixels: int, most_pixels: int) -> None:
    if pixels > most_pixels:
        raise TooManyPixelsError(
            f"{pixels} pixels: more than the {most_pixels} that fit into memory, so make it smaller"
        )


# Pillow reads broken files if LOAD_TRUNCATED_IMAGES is set, but then all formats, in all threads, in silence.
def _mended(content: bytes, most_pixels: int) -> bytes:
    """Return a JPEG with an end, or a PNG of its pixels alone; nothing for other bytes."""
    if content.startswith(b"\xff\xd8"):
        return content + b"\xff\xd9"  # the marker of the end
    return _pixels_of_png(content, most_pixels) if content.startswith(PNG) else b""


def _pixels_of_png(content: bytes, most_pixels: int) -> bytes:
    """Return a whole PNG with those pixels of a broken one that can be decompressed; the others are 0."""
    at, chunks, packed = len(PNG), {}, bytearray()
    while at < len(content):
        length, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        chunk = content[at + 8 : at + 8 + length]
        chunks.setdefault(kind, chunk)
        packed += chunk if kind == b"IDAT" else b""
        at += length + 12
    width, height, bits, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    _refuse_too_many(width * height, most_pixels)
    line = math.ceil(width * bits * PNG_CHANNELS[colours] / 8) + 1
    enough = line * height + 4 * (line + height)  # bytes: interlaced lines are shorter, but twice as many
    unpacker, lines = zlib.decompressobj(), bytearray()
    with suppress(zlib.error):
        for start in range(0, len(packed), 256):
            if unpacker.eof or len(lines) >= enough:
                break
            lines += unpacker.decompress(packed[start : start + 256], enough - len(lines))
    chunks[b"IDAT"] = zlib.compress(lines.ljust(enough, b"\0"), level=1)
    chunks[b"IEND"] = b""
    return PNG + b"".join(_chunk(kind, chunks[kind]) for kind in PNG_CHUNKS if kind in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG (RFC 2083, 3.2): a length, four letters, the content, a checksum."""
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, upright, over white."""
    image.load()  # Pillow rotates a TIFF while loading it, and removes the orientation tag
    with suppress(Exception):  # broken metadata raises anything; the pixels may be intact
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits, or of floats
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels to 0..255. White is 65535 for integers, 1.0 for floats, or a larger level."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    white = max(1.0 if image.mode == "F" else 65535.0, float(levels.max()))
    return Image.fromarray((levels.clip(min=0) * (255 / white)).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in one of the formats {', '.join(_formats())}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


if __name__ == "__main__":
    print(
        "error: get_images.py has no commands; to lay out a data set, "
        "run `python -m retrieval.datasets sample --out data/sample` (or intel, split, competition)",
        file=sys.stderr,
    )
    sys.exit(2)

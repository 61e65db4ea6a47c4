"""Files of images in; those that can be read, and why others cannot, out."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from get_images import ImageFile, UnreadableImageError, by_kind, find_images, holds_image, read_image
from retrieval.errors import InputError

log = logging.getLogger("retrieval.datasets")


def readable_images(folder: Path, source: Path) -> tuple[list[ImageFile], dict[str, dict[str, str]]]:
    """Return the images below a folder that can be read, and of the others {"unreadable": {name: why}}.

    A file called `train\\ann\\1.jpg`, of a zip of Windows that was unpacked, gets the name train/ann/1.jpg.
    Warns of files that cannot be read. Raises InputError if no file can, or two have one name.
    """
    files = [_with_slashes(image) for image in find_images(folder)]
    ((name, count),) = Counter(image.name for image in files).most_common(1)
    if count > 1:
        raise InputError(f"{source} holds {name} {count} times, with / and with \\: remove all but one")
    reasons = {image.name: why for image in files if (why := _why_unreadable(image.path))}
    if reasons:
        shown = ", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:5])
        log.warning("%d files of %s cannot be read and are left out: %s%s",
                    len(reasons), source, shown, ", …" * (len(reasons) > 5))  # fmt: skip
    if len(reasons) == len(files):
        raise InputError(f"no image of {source} can be read: mend what the warning says, or copy it anew")
    return [image for image in files if image.name not in reasons], {"unreadable": reasons} if reasons else {}


def _with_slashes(image: ImageFile) -> ImageFile:
    name = image.name.replace("\\", "/")
    return image if ".." in name.split("/") else ImageFile(name, image.path)


def _why_unreadable(path: Path) -> str | None:
    """Return why a file cannot be read, or None if it can; a pipe is not opened, since that would wait."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a regular file"
        with open(path, "rb") as file:
            file.read(1)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        return error.strerror.lower()
    return None


def warn_of_unreadable(queries: list[ImageFile]) -> None:
    """Warn of queries that cannot be decoded, before time is spent on embedding."""

    def _readable(query: ImageFile) -> bool:
        try:  # the pixels may be whole although the header is broken
            return holds_image(query.path) or read_image(query.path).size > 0
        except UnreadableImageError:
            return False

    with ThreadPoolExecutor() as pool:
        readable = list(pool.map(_readable, queries))
    if broken := [query.name for query, good in zip(queries, readable, strict=True) if not good]:
        log.warning("queries that no decoder opens get the gallery in its order: %s%s",
                    by_kind(broken), _heif_hint(broken))  # fmt: skip


def _heif_hint(names: list[str]) -> str:
    missing = "HEIF" not in Image.OPEN and any(name.lower().endswith((".heic", ".heif")) for name in names)
    return " (`pip install pillow-heif` reads .heic)" if missing else ""

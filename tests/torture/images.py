"""Damaged, odd and hostile image files in; each is read, or refused with a sentence.

    python -m tests.torture.images --seed 0 --minutes 1

A case is a file: an image in one of Pillow's formats and modes, cut, with flipped bits, with random
metadata, a bomb, a special file, or one that vanishes or changes while it is read. A reader reads it, as in a
run. A case fails if an error comes out, if there is neither an input of the network nor a sentence, or if
that takes longer than SECONDS. One seed gives the same cases in the same order. Exits with 1 if one failed.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from get_images import FORMATS, ImageFile, find_images
from retrieval.backbones.transform import Transform
from retrieval.embedding.loader import Reader
from tests.torture.campaign import run_generated, temporary

READER = Reader(Transform(64, "bicubic"))
SECONDS = 20  # of one case: none of them takes one on an idle machine
CUTS = 64  # of each image, at even distances
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "I", "I;16", "F", "CMYK", "YCbCr", "LAB", "HSV")
NAMES = ("a b.jpg", "ü.jpg", "e\u0301.jpg", "新.jpg", "-rf.jpg", "a\nb.jpg", "\x1b[31m.jpg", "%s{}.jpg",
         "'\";$(x).jpg", "\u202egpj.jpg", "a" * 251 + ".jpg", "CON.jpg", "a.JPG", "a.jpg.png",
         os.fsdecode(b"\xff\xfe.jpg"))  # fmt: skip


class Case(NamedTuple):
    """What is tried: a name for the log, and the file or a function that reads it."""

    name: str
    content: bytes | Callable[[Path], str]


def campaign(seed: int, minutes: float, folder: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each case, at most `most`, until the time is over; files lie in `folder`."""
    end = time.monotonic() + 60 * minutes
    for number, case in enumerate(cases(np.random.default_rng(seed))):
        if time.monotonic() > end or number == most:
            return
        yield {"campaign": "images", "seed": seed, "number": number, "case": case.name} | tried(case, folder)


def tried(case: Case, folder: Path) -> dict[str, Any]:
    """Return the outcome of a case: what came out, and whether that is a failure."""
    path, start = folder / "case.jpg", time.monotonic()
    path.unlink(missing_ok=True)
    try:
        if callable(case.content):
            found = case.content(folder)
        else:
            path.write_bytes(case.content)
            found = read(ImageFile("case.jpg", path))
        right, outcome = bool(found) and found.isprintable(), found
    except Exception as error:
        right, outcome = False, f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return {"outcome": outcome[:300], "seconds": round(seconds, 2), "failed": not right or seconds > SECONDS}


def read(file: ImageFile) -> str:
    """Read a file as a run does, beside a whole one; return "read" or the sentence that refuses it."""
    good = ImageFile("good.png", _good())
    batch = READER.read_group([file, good])
    assert np.array_equal(batch.pixels[-1], READER.read_group([good]).pixels[0]), "the good image is another"
    assert batch.pixels.dtype == np.uint8
    if batch.unreadable:
        assert batch.names == [good.name]
        return batch.unreadable[file.name]
    assert batch.names == [file.name, good.name]
    assert batch.pixels.shape == (2, 3, 64, 64)
    return "read"


@functools.cache
def _good() -> Path:
    path = temporary() / "good.png"
    _picture(np.random.default_rng(0), "RGB", 40, 30).save(path)
    return path


def cases(rng: np.random.Generator) -> Iterator[Case]:
    """Yield cases without end: a few of each kind in turn."""
    kinds = [
        _whole(rng),
        _cut(rng),
        _flipped(rng),
        _with_metadata(rng),
        _bombs(rng),
        _named(rng),
        _changing(rng),
    ]
    for kind in cycle(kinds):
        for _ in range(8):
            yield next(kind)


# ---- kinds of cases -------------------------------------------------------------------------------


def _images(rng: np.random.Generator, formats: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield small images, named by format and mode: every pair that Pillow can write, then again."""
    Image.init()
    pairs = [(kind, mode) for kind in formats or sorted(Image.SAVE) for mode in MODES]
    while True:
        for number in rng.permutation(len(pairs)):
            kind, mode = pairs[number]
            width, height = (int(side) for side in rng.integers(1, 80, 2))
            frames = [_picture(rng, mode, width, height) for _ in range(1 + 2 * int(rng.random() < 0.2))]
            file = io.BytesIO()
            more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
            try:
                frames[0].save(file, kind, **more)
            except Exception:  # most formats lack some modes
                continue
            yield f"{kind} {mode}{' animated' if more else ''}", file.getvalue()


def _picture(rng: np.random.Generator, mode: str, width: int, height: int) -> Image.Image:
    levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    if mode in ("LAB", "I;16"):
        return Image.frombytes(mode, image.size, rng.bytes(width * height * (3 if mode == "LAB" else 2)))
    return image.convert({"PA": "P"}.get(mode, mode)).convert(mode)


def _whole(rng: np.random.Generator) -> Iterator[Case]:
    for name, content in _images(rng):
        yield Case(name, content)


def _cut(rng: np.random.Generator) -> Iterator[Case]:
    for name, content in _images(rng, list(FORMATS)):
        for part in range(CUTS):
            at = len(content) * part // CUTS
            yield Case(f"{name} cut at {at} of {len(content)}", content[:at])


def _flipped(rng: np.random.Generator) -> Iterator[Case]:
    for name, content in _images(rng, list(FORMATS)):
        for _ in range(50):
            # Half of them near the start, where the header is.
            most = len(content) if rng.random() < 0.5 else min(64, len(content))
            places = sorted(int(at) for at in rng.integers(0, 8 * most, rng.integers(1, 5)))
            changed = bytearray(content)
            for at in places:
                changed[at // 8] ^= 1 << at % 8
            if name.startswith("PNG") and rng.random() < 0.5:
                changed = _with_right_checksums(bytes(changed))
            yield Case(f"{name} with bits {places} flipped", bytes(changed))


def _with_right_checksums(png: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of their contents, so that decoders look at these."""
    found, at = [png[:8]], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4])
        chunk = png[at + 4 : at + 8 + length]
        found.append(png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4))
        at += 12 + length
    return b"".join(found)


def _with_metadata(rng: np.random.Generator) -> Iterator[Case]:
    """Random EXIF in a JPEG, PNG, WebP or TIFF: an orientation, broken tags, or any bytes."""
    while True:
        kind = str(rng.choice(["JPEG", "PNG", "WEBP", "TIFF"]))
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 12))
        content = bytearray(exif.tobytes())
        for at in rng.integers(6, len(content), rng.integers(0, 6)):
            content[at] = int(rng.integers(0, 256))
        file = io.BytesIO()
        try:
            _picture(rng, "RGB", 9, 7).save(file, kind, exif=bytes(content))
        except Exception:  # Pillow does not write every broken one
            continue
        yield Case(f"{kind} with EXIF {content.hex()}", file.getvalue())


def _bombs(rng: np.random.Generator) -> Iterator[Case]:
    """Small files with many pixels, as their headers say, and some that keep the promise."""
    while True:
        width, height = (int(2 ** rng.uniform(12, 31)) for _ in range(2))
        yield Case(f"PNG of {width} x {height}", _png(width, height))
        yield Case(f"BMP of {width} x {height}", _with_size("BMP", 18, "<ii", width, height))
        yield Case(f"GIF of {width} x {height}", _with_size("GIF", 6, "<HH", width % 65536, height % 65536))
        jpeg = _picture(rng, "RGB", 8, 8)
        file = io.BytesIO()
        jpeg.save(file, "JPEG", progressive=bool(rng.integers(2)))
        content = bytearray(file.getvalue())
        at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
        content[at : at + 4] = struct.pack(">HH", height % 65536, width % 65536)
        yield Case(f"JPEG of {width % 65536} x {height % 65536}", bytes(content))
        side = int(rng.integers(10_000, 40_000))
        yield Case(f"PNG of zeros, {side} x {side}", _png(side, side, zlib.compress(bytes(2**22))))
        text = struct.pack(">I", 0)
        yield Case(
            "PNG with a long text",
            _png(8, 8, zlib.compress(bytes(72)), b"zTXtk\0\0" + zlib.compress(bytes(2**26)) + text),
        )


def _png(width: int, height: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a grey PNG with these compressed rows, and another chunk before them."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), extra, b"IDAT" + rows, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
        if chunk
    )


def _with_size(kind: str, at: int, form: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, kind)
    content = bytearray(file.getvalue())
    content[at : at + struct.calcsize(form)] = struct.pack(form, width, height)
    return bytes(content)


def _named(rng: np.random.Generator) -> Iterator[Case]:
    """Odd names and special files, found as a run finds them."""

    def _found(folder: Path, name: str, make: Callable[[Path], Any]) -> str:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            make(Path(place) / name)
            found = find_images(place)
            found[0].name.encode("utf-8", "backslashreplace")
            json.dumps(found[0].name).encode("ascii")
            return read(found[0])

    def _image(path: Path) -> None:
        with open(path, "wb") as file:
            Image.new("RGB", (3, 2)).save(file, "PNG")

    def _sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 2**40)

    special = {"a broken link": lambda path: path.symlink_to("nowhere"),
               "a link to itself": lambda path: path.symlink_to(path.name),
               "a device": lambda path: path.symlink_to("/dev/zero"),
               "an empty file": Path.touch,
               "a sparse file of a terabyte": _sparse}  # fmt: skip
    if hasattr(os, "mkfifo"):
        special["a pipe"] = os.mkfifo
    while True:
        for name in NAMES:
            yield Case(f"named {name!a}", lambda folder, name=name: _found(folder, name, _image))
        for name, make in special.items():
            yield Case(name, lambda folder, make=make: _found(folder, "a.jpg", make))


def _changing(rng: np.random.Generator) -> Iterator[Case]:
    """A file that another thread cuts, replaces or deletes while it is read a few times."""

    def _read(folder: Path, contents: list[bytes], pauses: list[float]) -> str:
        path, done = folder / "changing.jpg", threading.Event()
        path.write_bytes(contents[0])

        def _change() -> None:
            for content, pause in zip(cycle(contents), cycle(pauses), strict=False):
                if done.wait(pause):
                    return
                path.unlink(missing_ok=True)
                if content:
                    path.write_bytes(content)

        thread = threading.Thread(target=_change)
        thread.start()
        try:
            return str(len([read(ImageFile("changing.jpg", path)) for _ in range(20)]))
        finally:
            done.set()
            thread.join()
            path.unlink(missing_ok=True)

    for name, content in _images(rng, list(FORMATS)):
        contents = [content, content[: len(content) // 2], b"", rng.bytes(100)]
        pauses = [float(pause) for pause in rng.uniform(0, 1e-3, 8)]
        yield Case(f"{name} that changes", lambda folder, c=contents, p=pauses: _read(folder, c, p))


# ---- the command line -----------------------------------------------------------------------------


if __name__ == "__main__":
    sys.exit(run_generated("images", campaign))

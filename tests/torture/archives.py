"""Damaged, odd and hostile archives of data sets in; each is unpacked, or refused with a sentence.

    python -m tests.torture.archives --seed 0 --minutes 1

A case is a zip or a tar, plain or compressed by gzip, bzip2 or xz: with flipped bits, cut, spliced, with
paths that lead outside, links, special files, odd names, duplicates, or a promise to grow. A case fails if an
error comes out, if the sentence is not one printable line, if a file lies outside the folder or is left
behind, if what is in the folder is not a regular file of an image, or if that takes longer than SECONDS or
more bytes than MOST. One seed gives the same cases in the same order. Exits with 1 if one failed.
"""

from __future__ import annotations

import gzip
import io
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from PIL import Image

from get_images import is_image, may_begin_image
from retrieval.datasets import archives
from retrieval.datasets.archives import unpacked
from retrieval.errors import InputError, RunError
from tests.torture.campaign import run_generated

SECONDS = 60  # of one case: none of them takes three on an idle machine
MOST = 10**7  # bytes that an archive may write here, where the real limit is a gigabyte
NAMES = (
    "a/x.png", "../x.png", "/x.png", "a/../../x.png", "C:/x.png", "C:\\x.png", "..\\x.png", "\\\\host\\x.png",
    "./x.png", "a//x.png", "a/./x.png", "a/../x.png", "x.png/", "x.png/y.png", "x.png", "X.PNG", "CON.png",
    "a" * 300 + ".png", "a/" * 2000 + "x.png", "\x1b[2J.png", "a\nb.png", "\u202egnp.png", "\udcff.png",
    ".png", "", ".", "/", "a\0b.png", " .png", "新/é.png", "e\u0301.png", "x.png ", "x.txt",
)  # fmt: skip
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
         tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE, tarfile.REGTYPE, b"?")  # fmt: skip
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Case(NamedTuple):
    """What is tried: a name for the log, and the content of the archive."""

    name: str
    content: bytes


def campaign(seed: int, minutes: float, folder: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each case, at most `most`, until the time is over; files lie in `folder`."""
    end = time.monotonic() + 60 * minutes
    with patch.object(archives, "ALWAYS_ALLOWED", MOST):
        for number, case in enumerate(cases(np.random.default_rng(seed))):
            if time.monotonic() > end or number == most:
                return
            yield {"campaign": "archives", "seed": seed, "number": number, "case": case.name} | tried(
                case, folder
            )


def tried(case: Case, folder: Path) -> dict[str, Any]:
    """Return the outcome of a case: what came out, and whether that is a failure."""
    source, inner, start = folder / "archive", folder / "inner", time.monotonic()
    inner.mkdir(exist_ok=True)
    source.write_bytes(case.content)
    try:
        with unpacked(source, inner / "out") as there:
            right, outcome = _is_right(there, len(case.content)), "unpacked"
    except (InputError, RunError) as error:
        right, outcome = str(error).isprintable(), str(error)
    except Exception as error:
        right, outcome = False, f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    left = [path.name for path in folder.rglob("*") if path not in (source, inner)]
    failed = not right or bool(left) or seconds > SECONDS
    return {"outcome": outcome[:300], "left": left, "seconds": round(seconds, 2), "failed": failed}


def _is_right(folder: Path, packed: int) -> bool:
    """Return whether a folder holds regular files of images alone, and no more bytes than it may."""
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    size = sum(path.lstat().st_size for path in files)
    plain = all(stat.S_ISREG(path.lstat().st_mode) and _is_image(path) for path in files)
    return bool(files) and plain and size <= max(MOST, archives.MOST_GROWTH * packed)


def _is_image(path: Path) -> bool:
    return is_image(path.name) or may_begin_image(path.read_bytes()[:16])


def cases(rng: np.random.Generator) -> Iterator[Case]:
    """Yield cases without end: a few of each kind in turn."""
    for kind in cycle([_whole(rng), _damaged(rng), _named(rng), _linked(rng), _bombs(rng)]):
        for _ in range(6):
            yield next(kind)


# ---- kinds of cases -------------------------------------------------------------------------------


def _zip(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def _tar(
    members: list[tuple[str, bytes]], packed: str = "", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{packed}", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _images(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(file, "PNG")
    return [(f"class {number % 3}/{number}.png", file.getvalue()) for number in range(4)] + [
        ("notes.txt", b"a")
    ]


def _packed(rng: np.random.Generator, members: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return the name of a format, drawn at random, and an archive of that format."""
    number = int(rng.integers(8))
    if number < 4:
        return f"zip, method {METHODS[number]}", _zip(members, METHODS[number])
    packed = ("", "gz", "bz2", "xz")[number - 4]
    return f"tar {packed}".strip(), _tar(members, packed)


def _whole(rng: np.random.Generator) -> Iterator[Case]:
    while True:
        yield Case(*_packed(rng, _images(rng)))


def _damaged(rng: np.random.Generator) -> Iterator[Case]:
    """Flip bits of an archive, cut it, or put a part of another one into it."""
    while True:
        (name, content), (_, other) = _packed(rng, _images(rng)), _packed(rng, _images(rng))
        at, kind = int(rng.integers(0, len(content))), str(rng.choice(["flipped", "cut", "spliced"]))
        if kind == "cut":
            yield Case(f"{name} cut at {at}", content[:at])
        elif kind == "spliced":
            start, length = int(rng.integers(0, len(other))), int(rng.integers(1, 1000))
            yield Case(f"{name} spliced at {at}", content[:at] + other[start : start + length] + content[at:])
        else:
            changed = bytearray(content)
            for place in (at, *(int(place) for place in rng.integers(0, len(content), rng.integers(0, 4)))):
                changed[place] ^= 1 << int(rng.integers(8))
            yield Case(f"{name} with bits flipped at {at}", bytes(changed))


def _named(rng: np.random.Generator) -> Iterator[Case]:
    """Paths that lead outside, names that no disk takes, and one name twice, among images."""
    while True:
        images = _images(rng)
        names = [NAMES[number] for number in rng.integers(0, len(NAMES), rng.integers(1, 4))]
        members = images + [(name, images[0][1]) for name in names]
        for make in (_zip, _tar):
            try:
                content = make(members)
            except (ValueError, UnicodeError):  # no such archive can be written
                continue
            yield Case(f"{make.__name__} with {names!a:.80}", content)


def _linked(rng: np.random.Generator) -> Iterator[Case]:
    """Links and special files, also before a file that would be written through them."""
    while True:
        kind, link = (
            KINDS[rng.integers(len(KINDS))],
            str(rng.choice(["/etc", "..", "class 0/0.png", "x.png", ""])),
        )
        file = io.BytesIO(_tar(_images(rng)))
        with tarfile.open(fileobj=file, mode="a") as archive:
            for name in ("x.png", "x.png/passwd.png"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind if name == "x.png" else tarfile.REGTYPE, link
                archive.addfile(info)
        yield Case(f"tar with type {kind!r} to {link!r}", file.getvalue())
        made = io.BytesIO(_zip(_images(rng)))
        with zipfile.ZipFile(made, "a") as archive:
            info = zipfile.ZipInfo("x.png")
            info.create_system, info.external_attr = 3, int(rng.integers(0, 2**32))
            archive.writestr(info, link)
        yield Case(f"zip with mode {info.external_attr >> 16:o} to {link!r}", made.getvalue())


def _bombs(rng: np.random.Generator) -> Iterator[Case]:
    """Archives that grow, that lie about a size, that have very many members, or lie in one another."""
    while True:
        size = int(10 ** rng.uniform(5, 8))
        zeros = [("a/x.png", bytes(size))]
        yield Case(f"zip of {size} zeros", _zip(zeros))
        packed = str(rng.choice(["gz", "bz2", "xz"]))
        yield Case(f"tar.{packed} of {size} zeros", _tar(zeros, packed))
        yield Case(f"gz of gz of {size} zeros", gzip.compress(gzip.compress(bytes(size))))
        lying, place = bytearray(_zip(_images(rng))), rng.choice([20, 24])  # packed, unpacked
        at = lying.rindex(b"PK\x01\x02") + int(place)
        lying[at : at + 4] = rng.bytes(4)
        yield Case("zip that lies about a size", bytes(lying))
        info = tarfile.TarInfo("x.png")
        info.size = int(2 ** rng.uniform(0, 40))
        yield Case(f"tar that promises {info.size} bytes", info.tobuf() + bytes(10240))
        many = [(f"{number}.png", b"") for number in range(int(rng.integers(1, 3000)))]
        yield Case(f"zip of {len(many)} members", _zip(many))


if __name__ == "__main__":
    sys.exit(run_generated("archives", campaign))

"""Damaged and planted caches in; the vectors of a run without a cache out.

    python -m tests.torture.cache --seed 0 --minutes 1

A case damages the cache of an earlier run: values of rows, bits of the SQLite file or of an exported network,
files of other content. Then it embeds the images again. It fails if an error comes out, or if a vector
differs in a bit from that of a run without a cache. One seed gives the same cases in the same order. Exits
with 1 if a case failed.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from get_images import find_images
from retrieval.backbones.backbone import Backbone, LazyBackbone, place
from retrieval.backbones.transform import Transform
from retrieval.embedding.cache import FILE
from retrieval.embedding.embed import embed
from retrieval.embedding.onnx_runtime import export
from tests.torture.campaign import run_generated

IMAGES = 12
WRONG = ("NULL", "3", "-0.5", "'text'", "CAST(x'fffe' AS TEXT)", "x''", "x'0102030405'", "zeroblob(16)",
         "randomblob(16)", "zeroblob(1000000)", "1e999", "9223372036854775807")  # fmt: skip
COLUMNS = {"vectors": ("maker", "digest", "face", "vector", "checksum"),
           "files": ("path", "look", "digest", "checksum"), "makers": ("maker", "what", "used")}  # fmt: skip


class Small(torch.nn.Module):
    """A convolution, and the means of its channels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = torch.nn.Conv2d(3, 16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu().mean((2, 3)) + 0.01


def backbone_of(seed: int) -> LazyBackbone:
    """Return a small network of random weights."""
    whole = place(
        Backbone(Small(seed), 16, Transform(16, "bicubic"), (0.5,) * 3, (0.5,) * 3, f"small {seed}")
    )
    return LazyBackbone(whole.model_name, whole.transform, "cpu", bytes([seed]) * 32, lambda: whole)


def campaign(seed: int, minutes: float, folder: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each case, at most `most`, until the time is over; files lie in `folder`."""
    rng, end = np.random.default_rng(seed), time.monotonic() + 60 * minutes
    images, whole, cache = folder / "images", folder / "whole", folder / "cache"
    images.mkdir()
    for number in range(IMAGES):
        levels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(levels).save(images / f"{number:02d}.png")
    time.sleep(2.1)  # so that the cache also keeps the looks of the files
    right = _vectors(images, whole)
    _vectors(images, whole, seed=2)
    for number, (name, damage) in enumerate(_damages(rng)):
        if time.monotonic() > end or number == most:
            return
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(whole, cache)
        with suppress(sqlite3.Error):  # the values of one case are refused by the table
            damage(cache)
        yield {"campaign": "cache", "seed": seed, "number": number, "case": name} | _tried(
            images, cache, right
        )


def _vectors(images: Path, cache: Path | None, seed: int = 1) -> np.ndarray:
    return embed(find_images(images), backbone_of(seed), cache=cache, engine="onnx").vectors


def _tried(images: Path, cache: Path, right: np.ndarray) -> dict[str, Any]:
    """Embed twice with the damaged cache; return what came out, and whether that is a failure."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("retrieval").addHandler(handler)
    try:
        same = [np.array_equal(_vectors(images, cache), right) for _ in range(2)]
        outcome = "the same vectors" if all(same) else "other vectors"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("retrieval").removeHandler(handler)
    failed = outcome != "the same vectors"
    return {"outcome": outcome[:300], "warnings": [text[:200] for text in warned], "failed": failed}


def _damages(rng: np.random.Generator) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield damages without end, each a name and a function of the cache's folder: of each kind in turn."""
    for kind in cycle((_rows, _bits_of_the_file, _bits_of_a_network, _planted)):
        yield kind(rng)


def _rows(rng: np.random.Generator) -> tuple[str, Callable[[Path], None]]:
    """Set a column of some rows to a wrong value, or to that of another row."""
    table = str(rng.choice(list(COLUMNS)))
    column = str(rng.choice(COLUMNS[table]))
    value = str(rng.choice([*WRONG, f"(SELECT {column} FROM {table} ORDER BY {column} DESC LIMIT 1)"]))
    fewer = "" if rng.random() < 0.3 or table == "makers" else f" WHERE rowid = {rng.integers(1, IMAGES + 1)}"
    statement = f"UPDATE {table} SET {column} = {value}{fewer}"

    def _damage(cache: Path) -> None:
        with closing(sqlite3.connect(cache / FILE)) as connection, connection:
            connection.execute(statement)

    return statement, _damage


def _flip(file: Path, places: list[int]) -> None:
    content = bytearray(file.read_bytes())
    for bit in places:
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _bits_of_the_file(rng: np.random.Generator) -> tuple[str, Callable[[Path], None]]:
    """Flip bits of the SQLite file, after its journal was written back; or cut it."""
    places, cut = [int(place) for place in rng.integers(0, 2**40, rng.integers(1, 20))], rng.random()

    def _damage(cache: Path) -> None:
        with closing(sqlite3.connect(cache / FILE)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = (cache / FILE).stat().st_size
        if cut < 0.1:
            (cache / FILE).write_bytes((cache / FILE).read_bytes()[: int(10 * cut * size)])
        else:
            _flip(cache / FILE, [place % (8 * size) for place in places])

    return f"the SQLite file with bits {places} flipped, or cut ({cut:.2f})", _damage


def _bits_of_a_network(rng: np.random.Generator) -> tuple[str, Callable[[Path], None]]:
    """Flip bits of an exported network; its vectors are made again."""
    places = [int(place) for place in rng.integers(0, 2**40, rng.integers(1, 4))]

    def _damage(cache: Path) -> None:
        _without_vectors(cache)
        for file in (cache / "networks").iterdir():
            _flip(file, [place % (8 * file.stat().st_size) for place in places])

    return f"exported networks with bits {places} flipped", _damage


def _planted(rng: np.random.Generator) -> tuple[str, Callable[[Path], None]]:
    """Put other content in the place of an exported network or of a refusal."""
    kind = str(rng.choice(["another export", "another's file", "bytes", "nothing", "a refusal", "a folder"]))
    content = rng.bytes(int(rng.integers(1, 5000)))

    def _damage(cache: Path) -> None:
        _without_vectors(cache)
        first, second = sorted((cache / "networks").glob("*.onnx"))
        if kind == "another export":
            first.write_bytes(export(backbone_of(2).load()))
        elif kind == "another's file":
            shutil.copy(second, first)
        elif kind == "a refusal":
            first.with_suffix(".refused").write_bytes(content)
        elif kind == "a folder":
            first.unlink()
            first.mkdir()
        else:
            first.write_bytes(content if kind == "bytes" else b"")

    return f"{kind} in the place of an exported network", _damage


def _without_vectors(cache: Path) -> None:
    with closing(sqlite3.connect(cache / FILE)) as connection, connection:
        connection.execute("DELETE FROM vectors")


if __name__ == "__main__":
    logging.getLogger("retrieval").addHandler(logging.NullHandler())
    sys.exit(run_generated("cache", campaign))

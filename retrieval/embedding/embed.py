"""Images and a backbone in; unit vectors with their names out.

python -m retrieval.embedding --cache_dir DIR                     # what the cache holds
python -m retrieval.embedding --cache_dir DIR --older_than 30     # remove what nobody used for thirty days
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, compress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from get_images import ImageFile
from retrieval.backbones.transform import Square
from retrieval.embedding.cache import Cache, Known, Maker
from retrieval.embedding.loader import Batch, Read, in_batches, read_ahead
from retrieval.embedding.runtime import ONNX_BATCH, TORCH, Engine
from retrieval.errors import InputError
from retrieval.machine import zeros
from retrieval.records import Embeddings

PART = 2**14  # images of which all that is not their vectors is in memory at once
AHEAD_BYTES = 2**26  # of squares that are read ahead
QUEUED = 16  # batches that wait for the network's threads, or are in them, while the cache is written
KEEP_AT_ONCE = 64  # images that the cache takes at once

log = logging.getLogger("retrieval.embedding")


@dataclass
class Made:
    """What became of some images, by their names."""

    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # float32 (dimension,), of unit length
    faces: dict[str, bool] = field(default_factory=dict)  # whether one was found, where one is looked for
    unreadable: dict[str, str] = field(default_factory=dict)  # and why
    unsaved: list[str] = field(default_factory=list)  # crops, and why
    kept: int = 0  # how many of the vectors the cache held

    def saw(self, name: str, face: bool | None) -> None:
        """Note whether an image shows a face, if one is looked for."""
        if face is not None:
            self.faces[name] = face


def embed(
    files: list[ImageFile],
    engine: Engine,
    kind: str = "images",
    save_crops: Path | None = None,
    cache: Cache | None = None,
) -> Embeddings:
    """Embed the files in their order: `Embeddings` with float32 unit vectors (images, dimension).

    Shows a progress bar. A file that cannot be embedded is named in a warning and keeps a row of zeros.
    It is said how many images have no face, if the backbone looks for one. What the network sees of each
    image is written below the folder `save_crops`, if one is given, as PNG under its name. Vectors and crops
    that the cache holds are taken from there, unless crops are to be written, and others go into it. A batch
    that does not fit into the GPU's memory is halved, and said. Raises InputError if not one image could be
    embedded, RunError if a single one does not fit, or a process that looks for faces was killed.
    """
    folder = folder_of_crops(save_crops, kind)
    with tqdm(total=len(files), desc=kind, unit="image") as bar:
        parts = (make(files[start : start + PART], engine, folder, cache, bar)
                 for start in range(0, len(files), PART))  # fmt: skip
        return gather(files, parts, engine, kind)


def folder_of_crops(save_crops: Path | None, kind: str) -> Path | None:
    """Where the crops of such images go, if they are to be written."""
    return save_crops / kind.replace(" ", "_") if save_crops else None


def gather(files: list[ImageFile], parts: Iterable[Made], engine: Engine, kind: str) -> Embeddings:
    """The embeddings of the files from what became of one part of them after the other; warns as embed."""
    rows = {file.name: row for row, file in enumerate(files)}
    whole, vectors = Made(), None
    for part in parts:
        if vectors is None and part.vectors:
            vectors = zeros((len(files), len(next(iter(part.vectors.values())))), np.float32, "vectors")
        for name, vector in part.vectors.items():
            vectors[rows[name]] = vector
        whole.faces |= part.faces
        whole.unreadable |= part.unreadable
        whole.unsaved += part.unsaved
        whole.kept += part.kept
    without_face = [file.name for file in files if whole.faces.get(file.name) is False]
    if whole.kept:
        log.info("%d of %d %s were embedded before", whole.kept, len(files), kind)
    _warn(files, kind, whole.unreadable, without_face, whole.unsaved)
    return Embeddings(list(rows), vectors, without_face if engine.backbone.prepare.looks_for_faces else None)


def make(
    files: list[ImageFile], engine: Engine, save_crops: Path | None, cache: Cache | None, bar: tqdm
) -> Made:
    """Embed some files, or take from the cache what it holds of them."""
    made = Made()
    store = _Store(engine, None if save_crops else cache, files)  # crops are to be looked at: each is made
    for file in files:
        if (known := store.known.get(store.digests.get(file.name))) is not None:
            made.vectors[file.name] = known.vector
            made.saw(file.name, known.face)
    made.kept = len(made.vectors)
    bar.update(made.kept)
    rest = [file for file in files if file.name not in made.vectors]
    if not rest:  # torch, which takes a second, is not needed
        return made
    try:
        for batch, features in _run(rest, engine, store):
            _add(made, batch, features)
            made.unsaved += _save_crops(batch, save_crops) if save_crops else []
            store.keep(made, batch)
            bar.update(len(batch.names) + len(batch.unreadable))
    finally:
        store.flush()
    return made


def _run(rest: list[ImageFile], engine: Engine, store: _Store) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Yield batches with what the network gives for them: reading runs ahead, and so does the network."""
    backbone = engine.backbone
    ahead = max(2 * engine.size * engine.threads, AHEAD_BYTES // (3 * backbone.prepare.size**2))
    in_processes, enough = backbone.prepare.looks_for_faces, backbone.prepare.enough
    reading = read_ahead(rest, backbone.prepare, ahead, in_processes, enough, store.crop)
    with closing(reading):
        first = _load_and_read(engine, reading, in_processes)
        if any(read.square is not None for read in first):
            engine.settle(next(in_batches(first, ONNX_BATCH)).pixels())
        batches = in_batches(chain(first, reading), engine.size)
        if engine.word == TORCH:  # which has threads of its own, and belongs into this one, as its GPU does
            for batch in batches:
                engine.seconds["decode"] += batch.seconds
                yield batch, engine.embed(batch.pixels()) if batch.images else None
            return
        with ThreadPoolExecutor(engine.threads) as pool:
            running: deque[tuple[Batch, Future | None]] = deque()
            for batch in batches:
                engine.seconds["decode"] += batch.seconds
                running.append((batch, pool.submit(engine.embed, batch.pixels()) if batch.images else None))
                if len(running) > max(QUEUED, 2 * engine.threads):
                    yield _result(*running.popleft())
            while running:
                yield _result(*running.popleft())


def _load_and_read(engine: Engine, reading: Iterator[Read], in_processes: bool) -> list[Read]:
    """Load the network, and read the first images: at once, as far as that does not slow down either."""
    if not in_processes:  # threads want Python's lock, too
        engine.load()
        return _first(reading)
    with ThreadPoolExecutor(1) as aside:
        loading = aside.submit(engine.load)
        first = _first(reading)
        loading.result()
    return first


def _first(reading: Iterator[Read]) -> list[Read]:
    """As far as the first images that can be read, at most as many as a batch of ONNX Runtime has."""
    first: list[Read] = []
    for read in reading:
        first.append(read)
        if sum(read.square is not None for read in first) == ONNX_BATCH:
            break
    return first


def _result(batch: Batch, future: Future | None) -> tuple[Batch, np.ndarray | None]:
    return batch, future.result() if future else None


def _add(made: Made, batch: Batch, features: np.ndarray | None) -> None:
    """Add what became of a batch: unit vectors (images, dimension) of its features."""
    made.unreadable |= batch.unreadable
    for name, image in zip(batch.names, batch.images, strict=True):
        made.saw(name, image.face)
    if features is None:
        return
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        vectors = features / lengths
    usable = (np.isfinite(lengths) & (lengths > 0))[:, 0]
    made.vectors |= dict(zip(compress(batch.names, usable), vectors[usable], strict=True))
    made.unreadable |= dict.fromkeys(compress(batch.names, ~usable), "the network gave no usable numbers")


class _Store:
    """What the cache holds of some files, and takes of them, some at a time."""

    def __init__(self, engine: Engine, cache: Cache | None, files: list[ImageFile]) -> None:
        backbone = engine.backbone
        self.engine, self.cache = engine, cache
        self.digests = cache.digests(files) if cache else {}
        self.known = cache.vectors(self._maker(), self.digests.values()) if cache else {}
        self.crops: set[bytes] = set()
        if cache and backbone.prepare.looks_for_faces:
            self.cropper = Maker(engine.crops_key, f"faces of {backbone.prepare.size} pixels")
            self.crops = cache.crops(self.cropper, set(self.digests.values()) - set(self.known))
        self.new: dict[bytes, Known] = {}
        self.new_crops: dict[bytes, Square] = {}

    def _maker(self) -> Maker:
        return Maker(self.engine.key, self.engine.what)

    def crop(self, file: ImageFile) -> Square | None:
        """What the cache holds of a file's crop."""
        digest = self.digests.get(file.name)
        if digest not in self.crops:
            return None
        return self.cache.crop(self.cropper, digest, self.engine.backbone.prepare.size)

    def keep(self, made: Made, batch: Batch) -> None:
        """Keep what was made of a batch, if its bytes are known."""
        for name, image in zip(batch.names, batch.images, strict=True):
            digest = self.digests.get(name)
            if digest and name in made.vectors:
                self.new[digest] = Known(made.vectors[name], image.face)
                if self.engine.backbone.prepare.looks_for_faces and digest not in self.crops:
                    self.new_crops[digest] = image
        if len(self.new) >= KEEP_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self.cache:
            self.cache.keep_vectors(self._maker(), self.new)
            if self.new_crops:
                self.cache.keep_crops(self.cropper, self.new_crops)
        self.new, self.new_crops = {}, {}


def _warn(
    files: list[ImageFile], kind: str, unreadable: dict[str, str], without_face: list[str], unsaved: list[str]
) -> None:
    """Warn of what went wrong with some; raise InputError if not one could be embedded."""
    for name, reason in unreadable.items():
        log.warning("%s in the %s could not be embedded: %s", name, kind, reason)
    if len(unreadable) == len(files):
        raise InputError(f"not one of the {len(files)} {kind} could be embedded: see the reasons above")
    if unsaved:
        log.warning("%d crops could not be written, such as %s", len(unsaved), unsaved[0])
    if without_face:
        log.warning("no face was found in %d of the %d %s, such as %s: a square in the centre stands in "
                    "(--save_crops shows it, and --min_face_size looks for smaller faces)",
                    len(without_face), len(files), kind, without_face[0])  # fmt: skip


def _write_png(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 RGB (3, height, width) as a PNG file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path, "PNG")


def _save_crops(batch: Batch, folder: Path) -> list[str]:
    """Write the crops of a batch; which could not be written, and why: a full disk costs the crops only."""
    unsaved = []
    for name, image in zip(batch.names, batch.images, strict=True):
        path = folder / f"{name}.png"
        try:
            _write_png(image.pixels, path)
        except OSError as error:
            unsaved.append(f"{path} ({error.strerror or error})")
    return unsaved

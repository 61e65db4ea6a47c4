"""Images and a backbone in; unit vectors with their names out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from get_images import ImageFile, find_images
from retrieval.backbones.backbone import Backbone, LazyBackbone, place
from retrieval.distributed import progress_bar
from retrieval.embedding.cache import Cache, CachedVector, CacheKey
from retrieval.embedding.loader import FEW, Batch, Reader, in_groups, named_jpeg, read_ahead
from retrieval.embedding.runtime import Runtime, choose_runtime
from retrieval.errors import InputError
from retrieval.machine import local_world_size, zeros
from retrieval.records import Embeddings

PART = 2**14  # images processed at a time; of earlier ones only the vectors stay in memory
AHEAD_BYTES = 2**26  # of inputs, or of JPEG files, that are read ahead
FILES = 16  # in a group that a reader reads, where the GPU decodes
JPEG_BYTES = 2**28  # of JPEG files in a batch; its last group may exceed this

log = logging.getLogger("retrieval.embedding")


@dataclass
class Notes:
    """What a run reports of some images, beside their vectors."""

    unreadable: dict[str, str] = field(default_factory=dict)  # names, and why
    damaged: dict[str, str] = field(default_factory=dict)  # names of those read in part, and why
    without_face: list[str] = field(default_factory=list)  # names, where faces are looked for
    unsaved: list[str] = field(default_factory=list)  # crops that could not be written, and why
    cached: int = 0  # vectors that came from the cache

    def __add__(self, other: Notes) -> Notes:
        return Notes(self.unreadable | other.unreadable, self.damaged | other.damaged,
                     self.without_face + other.without_face, self.unsaved + other.unsaved,
                     self.cached + other.cached)  # fmt: skip


def embed(
    images: list[ImageFile] | Path | str,
    backbone: Backbone | LazyBackbone | Runtime,
    kind: str = "images",
    save_crops: Path | None = None,
    cache: Cache | Path | str | None = None,
    *,
    batch_size: int | None = None,
    engine: str = "auto",
) -> Embeddings:
    """Embed images in their order; return `Embeddings` with float32 unit vectors (images, dimension).

    `images` are the files that find_images returned, or a folder. `backbone` is one that load_backbone or
    find_backbone returned, one of your own (its network is put on its device, in inference mode), or a
    runtime that is already chosen. `engine` is auto, torch or onnx, and `batch_size` is for torch,
    by default 32 on the CPU and 128 or 512 on a GPU.

    With a folder as `cache`, vectors and crops of faces are read from there and written there. This needs a
    backbone of find_backbone or find_fine_tuned, since the weights of a loaded network may change. With a
    folder `save_crops`, each input of the network is written there as PNG, and the cache is not used.

    Shows a progress bar, called `kind`. Warns of each file that cannot be embedded, whose vector is zero, and
    of images without a face. Raises InputError if no image can be embedded; RunError if a single image does
    not fit into the GPU's memory, or a process that reads images was killed.
    """
    _check_kinds(images, backbone)
    files = images if isinstance(images, list) else find_images(images)
    if cache is not None and not isinstance(cache, Cache):
        cache = Cache(Path(cache).expanduser())
    if not isinstance(backbone, Runtime):
        folder = cache.folder if cache else None
        backbone = choose_runtime(_lazy(backbone, folder), engine, len(files), batch_size, folder)
    vectors, notes = embed_with_notes(files, backbone, kind, save_crops, cache)
    if cache:
        cache.flush()
    report_notes(notes, len(files), kind)
    without_face = notes.without_face if backbone.backbone.transform.detects_faces else None
    return Embeddings([file.name for file in files], vectors, without_face, list(notes.damaged))


def _check_kinds(images: object, backbone: object) -> None:
    """Raise InputError unless these are images and a backbone, as embed takes them."""
    are_files = isinstance(images, list) and images and all(isinstance(file, ImageFile) for file in images)
    if not (are_files or isinstance(images, Path | str)):
        raise InputError("embed takes a folder, or a list of at least one image as find_images returns it, "
                         f"and not {images!r:.60}")  # fmt: skip
    if not isinstance(backbone, Backbone | LazyBackbone | Runtime):
        raise InputError(f"embed takes a backbone, such as load_backbone('dlib'), and not {backbone!r:.60}")


def _lazy(backbone: Backbone | LazyBackbone, folder: Path | None) -> LazyBackbone:
    """Return a LazyBackbone, for a loaded one without a key. Raises InputError if that needs a key."""
    if isinstance(backbone, LazyBackbone):
        return backbone
    if folder:
        raise InputError(
            "a cache needs to know the weights, and those of a loaded network may have changed: embed with "
            f"find_backbone({backbone.model_name!r}) of retrieval.backbones.backbone, or without a cache"
        )
    name = backbone.model_name or type(backbone.network).__name__
    named = replace(backbone, model_name=name)
    return LazyBackbone(name, backbone.transform, backbone.device, b"", lambda: place(named), onnx=named.onnx)


def embed_with_notes(
    files: list[ImageFile], runtime: Runtime, kind: str, save_crops: Path | None, cache: Cache | None
) -> tuple[np.ndarray | None, Notes]:
    """Return the vectors (images, dimension) of the files, None if there is none, and notes for the log."""
    folder = save_crops / kind.replace(" ", "_") if save_crops else None
    rows = {file.name: row for row, file in enumerate(files)}
    vectors, notes = None, Notes()
    if runtime.gpu_decodes is None and any(map(named_jpeg, files)):  # the keys of the cache depend on it
        runtime.settle(files)
    with progress_bar(len(files), kind) as bar:
        for start in range(0, len(files), PART):
            part = _embed_part(files[start : start + PART], runtime, folder, cache, notes, bar)
            for name, (vector, face) in part.items():
                if vectors is None:
                    shape = len(files), len(vector)
                    vectors = zeros(shape, np.float32, "vectors", local_world_size())
                vectors[rows[name]] = vector
                if face is False:
                    notes.without_face.append(name)
    notes.without_face.sort(key=rows.__getitem__)
    return vectors, notes


def report_notes(notes: Notes, total: int, kind: str) -> None:
    """Log what was cached and what went wrong. Raises InputError if not one of the images was embedded."""
    if notes.cached:
        log.info("%d of %d %s were embedded before", notes.cached, total, kind)
    for name, reason in notes.unreadable.items():
        log.warning("%s in the %s could not be embedded: %s", name, kind, reason)
    warn_of_damage(notes.damaged, kind)
    if len(notes.unreadable) == total:
        raise InputError(f"not one of the {total} {kind} could be embedded: see the reasons above")
    if notes.unsaved:
        log.warning("%d crops could not be written, such as %s", len(notes.unsaved), notes.unsaved[0])
    if notes.without_face:
        what = "--save_crops shows it, and --min_face_size looks for smaller faces"
        if len(notes.without_face) > total / 2:
            what = "if they are no portraits, a network for whole images does better"
        log.warning("no face was found in %d of the %d %s, such as %s: a square in the centre stands in (%s)",
                    len(notes.without_face), total, kind, notes.without_face[0], what)  # fmt: skip


def warn_of_damage(damaged: dict[str, str], kind: str) -> None:
    """Name the damaged images, if there are any, and say what is wrong with the first."""
    if damaged:
        log.warning("%d of the %s are damaged (%s), and the pixels that decode are used: %s",
                    len(damaged), kind, next(iter(damaged.values())), ", ".join(damaged))  # fmt: skip


def _embed_part(
    files: list[ImageFile],
    runtime: Runtime,
    save_crops: Path | None,
    cache: Cache | None,
    notes: Notes,
    bar: tqdm,
) -> dict[str, CachedVector]:
    """Embed some files, or read their vectors from the cache; return them by name, and add to the notes."""
    with runtime.timed("cache"):
        entries = _Entries(runtime, None if save_crops else cache, files)  # crops are saved as they are made
    found = {file.name: entries.vectors[digest] for file in files
             if (digest := entries.digests.get(file.name)) in entries.vectors}  # fmt: skip
    notes.cached += len(found)
    bar.update(len(found))
    rest = [file for file in files if file.name not in found]
    if not rest:  # then torch, whose import takes a second, is not needed
        return found
    for batch, features in _run(rest, runtime, entries):
        notes.unreadable |= batch.unreadable
        notes.damaged |= batch.damaged
        with runtime.timed("cache"):
            vectors = _unit_vectors(batch, features, notes)
            entries.write(vectors, batch)
            found |= vectors
            if save_crops:
                notes.unsaved += _save_crops(batch, save_crops)
        bar.update(len(batch.names) + len(batch.unreadable))
    return found


def _run(rest: list[ImageFile], runtime: Runtime, entries: _Entries) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches with the network's output (images, dimension).

    Readers run ahead of the network, and the network runs ahead of what is done with its output.
    """
    cropped, others = entries.with_crops(rest)
    reader = Reader(runtime.backbone.transform, leave_jpegs=bool(runtime.gpu_decodes))
    # Where the GPU decodes, whole files are read ahead: few at a time, and they are joined later.
    group = min(FILES, runtime.batch_size) if runtime.gpu_decodes else runtime.batch_size
    ahead = max(4, 2 * runtime.threads, AHEAD_BYTES // (_bytes_of(others, reader) * group))
    processes = runtime.reads_by_processes and not _gpu_decodes_nearly_all(others, reader)
    with ExitStack() as stack:
        with runtime.timed("wait for images"):  # that is, for the readers to start
            reading = stack.enter_context(read_ahead(others, reader, group, ahead, processes))
        runtime.settle(rest)
        batches = chain(entries.crops(cropped, runtime.batch_size, reader), reading)
        yield from _run_ahead(_joined(batches, runtime.batch_size), runtime)


def _bytes_of(files: list[ImageFile], reader: Reader) -> int:
    """Return about how many bytes of memory an image takes that was read ahead."""
    if not reader.leave_jpegs or not files:
        return 3 * reader.transform.size**2
    some = files[:: max(1, len(files) // 100)]
    return max(1, sum(file.path.stat().st_size for file in some if file.path.is_file()) // len(some))


def _gpu_decodes_nearly_all(files: list[ImageFile], reader: Reader) -> bool:
    """Return whether the GPU decodes nearly all of the files, so that there is little to read but bytes."""
    others = sum(not named_jpeg(file) for file in files)
    return reader.leave_jpegs and others <= FEW


def _joined(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Join small batches as long as they have at most `size` images, and JPEGs of at most JPEG_BYTES."""
    waiting: list[Batch] = []
    images = jpegs = 0
    for batch in batches:
        if waiting and (images + len(batch.names) > size or jpegs > JPEG_BYTES):
            yield Batch.joined(waiting)
            waiting, images, jpegs = [], 0, 0
        waiting.append(batch)
        images += len(batch.names)
        jpegs += sum(len(jpeg.content) for jpeg in batch.jpegs.values())
    if waiting:
        yield Batch.joined(waiting)


def _run_ahead(batches: Iterator[Batch], runtime: Runtime) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch with the network's output; the network has started on later batches by then."""
    running: deque[tuple[Batch, Callable[[], np.ndarray]]] = deque()
    while True:
        with runtime.timed("wait for images"):
            batch = next(batches, None)
        if batch:
            runtime.readers_seconds += batch.seconds
            running.append((batch, runtime.start(batch)))
        while running and (len(running) > runtime.queued or not batch):
            with runtime.timed("network"):
                done, output = running.popleft()
                features = output()
            yield done, features
        if not batch:
            return


def _unit_vectors(batch: Batch, features: np.ndarray, notes: Notes) -> dict[str, CachedVector]:
    """Return the features (images, dimension) as unit vectors, by name; note which of them have no use."""
    found: dict[str, CachedVector] = {}
    if not batch.names:
        return found
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(features, axis=1)
        vectors = features / lengths[:, None]
    for name, face, vector, length in zip(batch.names, batch.faces, vectors, lengths, strict=True):
        if 0 < length < np.inf:
            found[name] = CachedVector(vector, face)
        else:
            notes.unreadable[name] = "the network gave no usable numbers"
    return found


class _Entries:
    """The entries of some files in the cache."""

    def __init__(self, runtime: Runtime, cache: Cache | None, files: list[ImageFile]) -> None:
        self.runtime, self.cache, self.transform = runtime, cache, runtime.backbone.transform
        self.digests = cache.digests(files) if cache else {}
        self.vectors = cache.vectors(self._key(), self.digests.values()) if cache else {}
        self.crops_key = None
        if cache and self.transform.detects_faces:
            self.crops_key = CacheKey(runtime.crops_key, f"faces of {self.transform.size} pixels")
            cache.mark_used(self.crops_key)

    def _key(self) -> CacheKey:
        return CacheKey(self.runtime.key, self.runtime.description)

    def with_crops(self, files: list[ImageFile]) -> tuple[list[ImageFile], list[ImageFile]]:
        """Return the files whose crops are in the cache, and the others."""
        if not self.crops_key:
            return [], files
        kept = self.cache.having_crops(self.crops_key, list(self.digests.values()))
        cropped = [file for file in files if self.digests.get(file.name) in kept]
        return cropped, [file for file in files if self.digests.get(file.name) not in kept]

    def crops(self, files: list[ImageFile], batch_size: int, reader: Reader) -> Iterator[Batch]:
        """Yield batches of the cached crops of files; a file whose crop has gone meanwhile is read."""
        for group in in_groups(files, batch_size):
            digests = [self.digests[file.name] for file in group]
            kept = self.cache.crops(self.crops_key, digests, self.transform.size)
            found = {
                file.name: kept[digest] for file, digest in zip(group, digests, strict=True) if digest in kept
            }
            if found:
                pixels = np.stack([crop.pixels for crop in found.values()])
                faces = [crop.face for crop in found.values()]
                yield Batch(list(found), pixels, faces, digests={name: self.digests[name] for name in found})
            if gone := [file for file in group if file.name not in found]:
                yield reader.read_group(gone)

    def write(self, vectors: dict[str, CachedVector], batch: Batch) -> None:
        """Write the vectors of a batch, by name, and the crops that gave them.

        The digest is that of the bytes that were decoded: the file may have changed since it was looked up.
        Damaged images are read again by each run, so that each names them.
        """
        known = {name: batch.digests[name] for name in vectors if name not in batch.damaged}
        if not self.cache or not known:
            return
        self.cache.keep_vectors(self._key(), {digest: vectors[name] for name, digest in known.items()})
        if self.crops_key:
            images = zip(batch.names, batch.inputs(), strict=True)
            self.cache.keep_crops(self.crops_key, {known[n]: image for n, image in images if n in known})


def _write_png(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 RGB (3, height, width) as a PNG file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path, "PNG")


def _save_crops(batch: Batch, folder: Path) -> list[str]:
    """Write the inputs of a batch as PNG files; return which failed and why, as on a full disk."""
    unsaved = []
    for name, image in zip(batch.names, batch.inputs(), strict=True):
        path = folder / f"{name}.png"
        try:
            _write_png(image.pixels, path)
        except OSError as error:
            unsaved.append(f"{path} ({error.strerror or error})")
    return unsaved

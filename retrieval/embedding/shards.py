"""Images and several processes in; a share for each, written to files as it goes, and all vectors out.

The images are cut into parts, which do not depend on how many processes there are; each process takes every
so-many-th. A part that is on the disk is not made again, whichever run or process wrote it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from get_images import ImageFile, UnreadableImageError, read_image
from retrieval import distributed
from retrieval.embedding.cache import Cache, digest_of_file, look
from retrieval.embedding.embed import Notes, Results, embed_part, report_notes
from retrieval.embedding.runtime import ONNX_BATCH, Runtime
from retrieval.errors import RunError
from retrieval.files import write_whole
from retrieval.machine import zeros
from retrieval.records import Embeddings
from retrieval.run import Run

log = logging.getLogger("retrieval.shards")

FOLDER = "shards"  # in the output folder
NO_FACE_LOOKED_FOR = -1


def embed_together(
    run: Run, files: list[ImageFile], runtime: Runtime, kind: str, cache: Cache | None
) -> Embeddings | None:
    """As embed, each process a share; the first gets all, the others None when all are done.

    After settle_together. The run learns which parts its vectors are from. Raises as embed, and RunError
    where another process has ended, or has not written its parts where this one looks for them.
    """
    parts = _parts(files, runtime)
    share = parts[distributed.number() :: distributed.count()]
    place = functools.partial(_place, run, runtime, kind)
    crops = run.settings.save_crops
    folder = crops / kind.replace(" ", "_") if crops else None
    total, there = sum(map(len, share)), 0
    with tqdm(total=total, desc=f"share of {kind}", unit="image", disable=not distributed.is_first()) as bar:
        for part in share:
            path = place(part)
            if path.is_file() and not folder:  # crops are to be looked at: each is made
                bar.update(len(part))
                there += len(part)
            else:
                write_part(path, part, embed_part(part, runtime, folder, cache, bar))
    distributed.wait()
    if not distributed.is_first():
        return None
    paths = list(map(place, parts))
    missing = [part for path, part in zip(paths, parts, strict=True) if not path.is_file()]
    if missing:
        raise RunError(
            f"{len(missing)} of {len(parts)} parts of the {kind}, such as that of {missing[0][0].name}, are "
            f"not in {run.folder / FOLDER}: all processes must see the same --output_dir and the same "
            "images, which may not change during the run, and have the same --device"
        )
    if there:
        log.info("%d %s of this process's %d were embedded by a run before it ended", there, kind, total)
    run.parts += paths
    rows, vectors, notes = {file.name: row for row, file in enumerate(files)}, None, Notes()
    for results in map(read_part, paths, parts):
        if vectors is None and results.vectors:
            vectors = zeros((len(files), len(next(iter(results.vectors.values())))), np.float32, "vectors")
        for name, vector in results.vectors.items():
            vectors[rows[name]] = vector
        without_face = [name for name, face in results.faces.items() if not face]
        notes += Notes(results.unreadable, without_face, results.unsaved, results.cached)
    report_notes(notes, len(files), kind)
    faces = runtime.backbone.transform.detects_faces
    return Embeddings(
        list(rows), vectors, sorted(notes.without_face, key=rows.__getitem__) if faces else None
    )


def settle_together(runtime: Runtime, files: list[ImageFile]) -> None:
    """Load the engine in every process, also in one without a share, so that all use the same.

    Raises as Runtime.settle, and RunError where another process has ended.
    """
    size = runtime.backbone.transform.size
    pixels = np.zeros((ONNX_BATCH, 3, size, size), np.uint8)
    for row, file in enumerate(files[:ONNX_BATCH]):
        with suppress(UnreadableImageError):  # black will do: whoever embeds it says so
            pixels[row] = runtime.backbone.transform(read_image(file.path)).pixels
    runtime.settle(pixels)


def are_left(run: Run, files: list[ImageFile], runtime: Runtime, kind: str) -> bool:
    """Whether the same run, of any number of processes, has left a part of these files before it ended."""
    folder = run.folder / FOLDER
    if not folder.is_dir():
        return False
    if runtime.backbone.device == "cuda" and not runtime.precision:  # of which their names are not known yet
        return any(folder.glob(f"{_word(kind)}-*.npz"))
    return any(_place(run, runtime, kind, part).is_file() for part in _parts(files, runtime))


def remove_shards(run: Run) -> None:
    """Remove the parts that the vectors of a run are from, when its submission is written."""
    folder = run.folder / FOLDER
    for path in [*run.parts, *folder.glob(".*.npz.unfinished-*")]:  # by a process that was killed
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):  # of others, which lie there, or where there is none
        folder.rmdir()


def _parts(files: list[ImageFile], runtime: Runtime) -> list[list[ImageFile]]:
    size = part_size(len(files), runtime.batch_size)
    return [files[start : start + size] for start in range(0, len(files), size)]


def _place(run: Run, runtime: Runtime, kind: str, part: list[ImageFile]) -> Path:
    """The file of a part of this run."""
    return part_path(run.folder / FOLDER, kind, runtime.key, part, run.settings.verify_cache)


def part_size(images: int, batch: int) -> int:
    """How many images a part has, in whole batches: few, so that shares are even, but not a file for a few.

    A 64th of all, from 65 536 images on 1024, and from 2**20 on a 1024th.

    >>> part_size(100, 32), part_size(100_000, 32), part_size(10_000_000, 32), part_size(100_000_000, 32)
    (32, 1024, 9792, 16384)
    """
    size = min(max(16, min(images // 64, 1024), images // 1024), 2**14)
    return -(-size // batch) * batch


def part_path(folder: Path, kind: str, key: bytes, files: list[ImageFile], verify: bool = False) -> Path:
    """The file of a part: its name follows from all that decides the vectors in it.

    Of the images it takes the size and the time, as a quick look; to verify, their bytes.
    """
    digest = hashlib.sha256(key)
    with ThreadPoolExecutor() as pool:
        read = pool.map(digest_of_file, files) if verify else [b""] * len(files)
        for file, content in zip(files, read, strict=True):
            told = (file.name, look(file.path), content)
            digest.update(repr(told).encode("utf-8", "surrogateescape"))
    return folder / f"{_word(kind)}-{digest.hexdigest()[:32]}.npz"


def _word(kind: str) -> str:
    return kind.replace(" ", "_")


def write_part(path: Path, files: list[ImageFile], made: Results) -> None:
    """Write what became of some files: whole, or not at all."""
    names = [file.name for file in files]
    rows = [row for row, name in enumerate(names) if name in made.vectors]
    vectors = np.stack([made.vectors[names[row]] for row in rows]) if rows else np.zeros((0, 0), np.float32)
    others = {"unreadable": made.unreadable, "unsaved": made.unsaved, "cached": made.cached}
    buffer = io.BytesIO()
    np.savez(buffer, rows=np.array(rows, np.int64), vectors=vectors,
             faces=np.array([made.faces.get(name, NO_FACE_LOOKED_FOR) for name in names], np.int8),
             others=np.frombuffer(json.dumps(others).encode(), np.uint8))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getbuffer())


def read_part(path: Path, files: list[ImageFile]) -> Results:
    """What write_part wrote of these files."""
    names = [file.name for file in files]
    with np.load(path, allow_pickle=False) as part:
        vectors = dict(zip([names[row] for row in part["rows"]], part["vectors"], strict=True))
        looked = zip(names, part["faces"].tolist(), strict=True)
        faces = {name: bool(face) for name, face in looked if face != NO_FACE_LOOKED_FOR}
        return Results(vectors, faces, **json.loads(part["others"].tobytes()))

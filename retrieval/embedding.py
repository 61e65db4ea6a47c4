"""Images and a backbone in; unit vectors with their names out.

python -m retrieval.embedding --cache_dir DIR                     # what the cache holds
python -m retrieval.embedding --cache_dir DIR --older_than 30     # remove what nobody used for thirty days
"""

from __future__ import annotations

import logging
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from get_images import ImageFile
from retrieval import settings
from retrieval.backbones import Backbone, out_of_memory
from retrieval.cache import Cache, Known, contents, prune
from retrieval.ranking import Embeddings
from retrieval.readers import read_batches
from retrieval.settings import InputError, RunError
from retrieval.thumbnails import write_png

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("retrieval.embedding")


class Settings(settings.Form):
    """Say what the cache of embeddings holds, or remove what nobody used."""

    cache_dir: settings.NewFolder = settings.CACHE_DIR
    older_than: settings.Amount | None = None  # days


def main(form: Settings) -> None:
    cache = Cache(form.cache_dir)
    if cache.connection is None:
        raise RunError(f"{form.cache_dir} cannot be read: give another --cache_dir")
    if form.older_than is not None:
        log.info(
            "removed %d vectors that nobody used for %g days", prune(cache, form.older_than), form.older_than
        )
    for what, count, size, used in contents(cache):
        when = datetime.fromtimestamp(used).strftime("%Y-%m-%d %H:%M")
        log.info("%s: %d images, %.1f MB, used %s", what, count, size / 1e6, when)
    log.info(
        "%s holds %.1f MB", cache.folder, sum(file.stat().st_size for file in cache.folder.iterdir()) / 1e6
    )


def embed(
    files: list[ImageFile],
    backbone: Backbone,
    batch_size: int,
    kind: str = "images",
    save_crops: Path | None = None,
    cache: Cache | None = None,
) -> Embeddings:
    """Embed the files in their order: `Embeddings` with float32 unit vectors (images, backbone.dimension).

    Shows a progress bar. A file that cannot be embedded is named in a warning and keeps a row of zeros.
    It is said how many images have no face, if the backbone looks for one. What the network sees of each
    image is written below the folder `save_crops`, if one is given, as PNG under its name. Vectors that the
    cache holds are taken from there, unless crops are to be written, and others go into it. A batch that does
    not fit into the GPU's memory is halved, and said. Raises InputError if not one image could be embedded,
    RunError if a single one does not fit, or a process that looks for faces was killed.
    """
    import torch

    rows = {file.name: row for row, file in enumerate(files)}
    vectors = np.zeros((len(files), backbone.dimension), dtype=np.float32)
    if save_crops:
        cache = None  # each image is to be prepared, so that it can be looked at
    digests, known = cache.look_up(files, backbone) if cache else ({}, {})
    for name, made in known.items():
        vectors[rows[name]] = made.vector
    faces = {name: made.face for name, made in known.items()}
    unreadable: dict[str, str] = {}
    unsaved: list[str] = []
    fits = batch_size
    rest = [file for file in files if file.name not in known]
    with torch.inference_mode(), tqdm(total=len(files), initial=len(known), desc=kind, unit="image") as bar:
        for batch in read_batches(rest, backbone.prepare, batch_size, backbone.looks_for_faces):
            unreadable |= batch.unreadable
            faces |= {name: image.face for name, image in zip(batch.names, batch.images, strict=True)}
            if save_crops:
                folder = save_crops / kind.replace(" ", "_")
                unsaved += [_save(image.pixels, folder / f"{name}.png")
                            for name, image in zip(batch.names, batch.images, strict=True)]  # fmt: skip
            if batch.images:
                pixels = torch.stack([image.pixels for image in batch.images])
                features, fits = embed_what_fits(backbone, pixels, fits)
                lengths = features.norm(dim=1, keepdim=True)
                usable = (lengths.isfinite() & (lengths > 0)).squeeze(1)
                vectors[[rows[name] for name in batch.names]] = (features / lengths).where(usable[:, None], 0)
                unreadable |= dict.fromkeys(
                    compress(batch.names, ~usable), "the network gave no usable numbers"
                )
                if cache:
                    made = [name for name in compress(batch.names, usable) if name in digests]
                    keep = {digests[name]: Known(vectors[rows[name]], faces[name]) for name in made}
                    cache.keep(backbone, keep)
            bar.update(len(batch.names) + len(batch.unreadable))
    without_face = [file.name for file in files if faces.get(file.name) is False]
    if known:
        log.info("%d of %d %s are embedded already: %s", len(known), len(files), kind, cache.folder)
    _warn(files, kind, unreadable, without_face, [reason for reason in unsaved if reason])
    return Embeddings(list(rows), vectors, without_face if backbone.looks_for_faces else None)


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


def _save(pixels: Tensor, path: Path) -> str:
    """Write a crop; why it could not be written, or nothing: a full disk costs the crops only."""
    try:
        write_png(pixels, path)
    except OSError as error:
        return f"{path} ({error.strerror or error})"
    return ""


def embed_what_fits(backbone: Backbone, images: Tensor, fits: int) -> tuple[Tensor, int]:
    """(images, 3, size, size) → (images, dimension) on the CPU, in parts that fit; and their size."""
    import torch

    while True:
        try:
            return torch.cat([backbone.embed(part) for part in images.split(fits)]).cpu(), fits
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if fits == 1:
                raise RunError(
                    f"not one image fits into the memory of {backbone.device}: use --device cpu"
                ) from None
        fits = max(1, min(fits, len(images)) // 2)
        log.warning("the batch does not fit into the memory of %s: trying %d at once", backbone.device, fits)
        torch.accelerator.empty_cache()


if __name__ == "__main__":
    settings.run_script(main, Settings)

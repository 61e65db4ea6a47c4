"""Images and a backbone in; unit vectors with their names out."""

from __future__ import annotations

import logging
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from get_images import ImageFile
from retrieval.backbones import Backbone, out_of_memory
from retrieval.ranking import Embeddings
from retrieval.readers import read_batches
from retrieval.settings import InputError, RunError
from retrieval.thumbnails import write_png

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("retrieval.embedding")


def embed(
    files: list[ImageFile],
    backbone: Backbone,
    batch_size: int,
    kind: str = "images",
    save_crops: Path | None = None,
) -> Embeddings:
    """Embed the files in their order: `Embeddings` with float32 unit vectors (images, backbone.dimension).

    Shows a progress bar. A file that cannot be embedded is named in a warning and keeps a row of zeros.
    It is said how many images have no face, if the backbone looks for one. What the network sees of each
    image is written below the folder `save_crops`, if one is given, as PNG under its name. A batch that does
    not fit into the GPU's memory is halved, and said. Raises InputError if not one image could be embedded,
    RunError if a single one does not fit, or a process that looks for faces was killed.
    """
    import torch

    rows = {file.name: row for row, file in enumerate(files)}
    vectors = np.zeros((len(files), backbone.dimension), dtype=np.float32)
    unreadable: dict[str, str] = {}
    without_face: list[str] = []
    unsaved: list[str] = []
    fits = batch_size
    with torch.inference_mode(), tqdm(total=len(files), desc=kind, unit="image") as bar:
        for batch in read_batches(files, backbone.prepare, batch_size, backbone.looks_for_faces):
            unreadable |= batch.unreadable
            for name, image in zip(batch.names, batch.images, strict=True):
                if image.face is False:
                    without_face.append(name)
                if save_crops:
                    unsaved += [_save(image.pixels, save_crops / kind.replace(" ", "_") / f"{name}.png")]
            if batch.images:
                pixels = torch.stack([image.pixels for image in batch.images])
                features, fits = embed_what_fits(backbone, pixels, fits)
                lengths = features.norm(dim=1, keepdim=True)
                usable = (lengths.isfinite() & (lengths > 0)).squeeze(1)
                vectors[[rows[name] for name in batch.names]] = (features / lengths).where(usable[:, None], 0)
                unreadable |= dict.fromkeys(
                    compress(batch.names, ~usable), "the network gave no usable numbers"
                )
            bar.update(len(batch.names) + len(batch.unreadable))
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

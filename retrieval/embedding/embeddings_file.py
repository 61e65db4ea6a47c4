"""The embeddings of a run in; the file embeddings.npz, written whole and read again, out."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from retrieval.errors import InputError
from retrieval.files import open_whole
from retrieval.records import Embeddings
from retrieval.run import EMBEDDINGS


def write_embeddings(path: Path, queries: Embeddings, gallery: Embeddings) -> None:
    """Write names and float32 unit vectors as a numpy archive, whole or not at all.

    Its arrays are query_names (queries,), queries (queries, dimension), gallery_names (images,) and gallery
    (images, dimension). The row of an unreadable image is zero.
    """
    with open_whole(path) as file:
        np.savez(file, query_names=np.array(queries.names), queries=queries.vectors,
                 gallery_names=np.array(gallery.names), gallery=gallery.vectors)  # fmt: skip


def read_embeddings(folder: Path) -> tuple[Embeddings, Embeddings]:
    """Return the embeddings of the queries and of the gallery from the embeddings.npz in a run's folder.

    Raises InputError if there is none, or the file holds something else.
    """
    path = folder / EMBEDDINGS
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {EMBEDDINGS}: run its command again with --save_embeddings (after choose.py "
            f"run model_not_tuned.py --recipe {folder}/recipe.json --save_embeddings, with the same folders: "
            "the vectors are in the cache), or give the --output_dir of such a run"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return (Embeddings(arrays["query_names"].tolist(), arrays["queries"]),
                    Embeddings(arrays["gallery_names"].tolist(), arrays["gallery"]))  # fmt: skip
    except (BadZipFile, KeyError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a file of --save_embeddings ({error}): make it again") from None

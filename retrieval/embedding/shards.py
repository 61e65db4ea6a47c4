"""Images and a runtime in; the embeddings of this process's shard of them out, with what all have to report.

The cache makes a run resumable: vectors that a killed process had written there are not made again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from get_images import ImageFile
from retrieval.distributed import all_gather, shard
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import Notes, embed_with_notes, report_notes
from retrieval.embedding.runtime import Runtime
from retrieval.records import Embeddings, ShardedEmbeddings


def embed_shard(
    files: list[ImageFile], runtime: Runtime, kind: str, save_crops: Path | None, cache: Cache | None
) -> ShardedEmbeddings:
    """Embed this process's shard of the files, and report what went wrong in the shards of all.

    Raises as embed, and RunError if another process has ended.
    """
    rows = shard(len(files))
    vectors, own_notes = embed_with_notes(files[rows], runtime, kind, save_crops, cache)
    dimensions, notes = zip(*all_gather((0 if vectors is None else vectors.shape[1], own_notes)), strict=True)
    notes = sum(notes, Notes())
    report_notes(notes, len(files), kind)
    if vectors is None:  # an empty shard, or one without a readable image
        vectors = np.zeros((len(files[rows]), max(dimensions)), np.float32)
    faces = runtime.backbone.transform.detects_faces
    names = [file.name for file in files]
    return ShardedEmbeddings(
        names=names,
        own=Embeddings(names[rows], vectors, own_notes.without_face if faces else None),
        start=rows.start,
        unreadable=[name for name in names if name in notes.unreadable],
        without_face=notes.without_face if faces else None,
        damaged=list(notes.damaged),
        cached=notes.cached,
    )


def gather_shards(embeddings: ShardedEmbeddings) -> Embeddings:
    """Return the embeddings of the shards of all processes, in every process."""
    shards = all_gather(embeddings.own.vectors)
    vectors = shards[0] if len(shards) == 1 else np.concatenate(shards)
    return Embeddings(embeddings.names, vectors, embeddings.without_face, embeddings.damaged)

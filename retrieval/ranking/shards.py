"""The ranking of this process's shard of the gallery in; on rank 0 the ranking of the whole gallery out."""

from __future__ import annotations

import numpy as np

from retrieval.distributed import gather
from retrieval.ranking.exact import merge
from retrieval.records import Ranking, ShardedEmbeddings


def merge_shards(
    ranking: Ranking, metrics: dict[str, float], gallery: ShardedEmbeddings, k: int
) -> tuple[Ranking, dict[str, float]] | None:
    """Merge what rank_by returned for the shards of all processes; None on other ranks than 0.

    The k best images of a shard are ranked there, so the k best of all are among them. The recall is the mean
    of the shards, the seconds are the slowest process's. Raises RunError if another process has ended.
    """
    shards = gather((ranking.cosines, ranking.rows + gallery.start, metrics))
    if shards is None:
        return None
    *candidates, metrics_of_shards = zip(*shards, strict=True)
    cosines, rows = merge(*(np.concatenate(parts, axis=1) for parts in candidates), k)
    merged = {}
    for name in metrics:
        values = [metrics[name] for metrics in metrics_of_shards if name in metrics]
        merged[name] = max(values) if name.endswith("seconds") else round(sum(values) / len(values), 4)
    return Ranking(ranking.queries, gallery.names, rows, cosines), merged

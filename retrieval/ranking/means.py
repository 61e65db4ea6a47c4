"""Embeddings and a choice of means in; the ranking that they refine out. docs/means.md describes the means.

Their order: projection, centre, whiten → gallery_augmentation → query_expansion → hubs, rerank or cover.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from retrieval.distributed import several
from retrieval.errors import InputError
from retrieval.flag_values import expansion_of, reciprocal_of
from retrieval.ranking.cover import SHORTLIST, cover, fit_curve
from retrieval.ranking.exact import rank
from retrieval.ranking.fusion import RunVectors, fuse
from retrieval.ranking.hubs import rank_without_hubs
from retrieval.ranking.neighbours import augment_gallery, expand_queries
from retrieval.ranking.projections import centre, lda, project, whiten, within_class
from retrieval.ranking.reciprocal import rank_by_reciprocals
from retrieval.records import Embeddings, Ranking
from retrieval.settings import MeansSettings, Search

Member = tuple[Embeddings, Embeddings, Embeddings | None]  # of one network: queries, gallery, train
PROJECTIONS = {"lda": lda, "within_class": within_class}


@dataclass(frozen=True)
class Means:
    """The means that refine a ranking, with the values of their flags. All are off by default."""

    projection: str | None = None  # lda or within_class: fitted on labelled images
    centre: bool = False
    whiten: bool = False
    gallery_augmentation: str | None = None  # N:ALPHA
    query_expansion: str | None = None  # N:ALPHA
    hubs: int | None = None  # neighbours
    rerank: str | None = None  # k-reciprocal, or k-reciprocal:K1,K2,LAMBDA
    cover: bool = False

    @property
    def learns(self) -> bool:
        """Return whether a means is fitted on labelled images."""
        return bool(self.projection or self.cover)

    def applied(self) -> dict[str, Any]:
        """Return the means that are on, for metrics.json.

        >>> Means(hubs=10).applied()
        {'hubs': 10}
        """
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}


def means_of(settings: MeansSettings) -> Means:
    """Return the means that the settings choose."""
    return Means(**{field.name: getattr(settings, field.name) for field in fields(Means)})


def check_means(means: Means, search: Search, labelled: bool) -> None:
    """Raise InputError if these means exclude one another, or cannot be applied in this run.

    `labelled` says whether there are labelled images to fit a projection or the curve of `cover` on.
    """
    flags = ", ".join(f"--{name}" for name in means.applied())
    order = [f"--{name}" for name in ("hubs", "rerank", "cover") if getattr(means, name)]
    if len(order) > 1:
        raise InputError(f"{' and '.join(order)} each replace the ranking by the cosine: give one of them")
    if means.learns and not labelled:
        flag = "--projection" if means.projection else "--cover"
        raise InputError(f"{flag} is fitted on labelled images: give their folder by --train_dir")
    if flags and search != "exact":
        raise InputError(f"{flags} needs the exact search: leave out --search {search}")
    if flags and several():
        raise InputError(f"{flags} needs all vectors in one process: start the script without torchrun")


def check_fused(means: Means, search: Search, saves: bool) -> None:
    """Raise InputError if --fuse cannot be combined with these settings; `saves` is --save_embeddings."""
    other = {"hubs": means.hubs, "rerank": means.rerank, "cover": means.cover}
    other |= {"search": search != "exact", "save_embeddings": saves}
    if flags := ", ".join(f"--{name}" for name, given in other.items() if given):
        raise InputError(
            f"--fuse ranks by the similarities of several networks, which excludes {flags}: leave out either"
        )
    if several():
        raise InputError("--fuse needs all vectors in one process: start the script without torchrun")


def rank_with(
    means: Means,
    queries: Embeddings,
    gallery: Embeddings,
    train: Embeddings | None = None,
    k: int = 10,
    device: Any = "cpu",
) -> Ranking:
    """Apply the means in their order, and rank the k best gallery images of each query.

    `train` are the labelled embeddings on which --projection and --cover are fitted. The ranking's cosines
    are those of the vectors that are ranked, and `scores` is what --hubs or --rerank orders by. Raises as
    `rank`, check_classes and fit_curve.
    """
    queries, gallery, train = refined(means, queries, gallery, train, device)
    if means.cover:
        return cover(rank(queries, gallery, max(k, SHORTLIST), device), gallery, fit_curve(train), k)
    return _rank(means, queries, gallery, k, device)


def rank_fused(
    means: Means, members: list[Member], weights: list[float], k: int = 10, device: Any = "cpu"
) -> Ranking:
    """Apply the means that move vectors to each network's, and rank by the weighted sum of similarities.

    `members` are the embeddings of each network: queries, gallery and train, of the same images. The
    ranking's cosines are the fused similarities, 0 to 1, as `fuse` has them. --hubs, --rerank and --cover
    are not applied.
    """
    moved = [refined(means, *member, device) for member in members]
    return fuse([RunVectors(queries, gallery) for queries, gallery, _ in moved], weights, k)


def refined(
    means: Means, queries: Embeddings, gallery: Embeddings, train: Embeddings | None, device: Any = "cpu"
) -> tuple[Embeddings, Embeddings, Embeddings | None]:
    """Apply the means that move vectors; return those of queries, gallery and, for --cover, train."""
    projections = [lambda: PROJECTIONS[means.projection](train)] if means.projection else []
    projections += [lambda: centre(gallery)] if means.centre else []
    projections += [lambda: whiten(gallery)] if means.whiten else []
    for fit in projections:  # each on vectors that are projected by those before it
        projection = fit()
        queries, gallery = project(queries, projection), project(gallery, projection)
        train = project(train, projection) if means.cover else train
    if means.gallery_augmentation:
        gallery = augment_gallery(gallery, *expansion_of(means.gallery_augmentation), device)
    if means.query_expansion:
        queries = expand_queries(queries, gallery, *expansion_of(means.query_expansion), device)
    return queries, gallery, train


def _rank(means: Means, queries: Embeddings, gallery: Embeddings, k: int, device: Any) -> Ranking:
    if means.hubs:
        return rank_without_hubs(queries, gallery, k, means.hubs, device)
    if means.rerank:
        return rank_by_reciprocals(queries, gallery, k, *reciprocal_of(means.rerank), device)
    return rank(queries, gallery, k, device)

"""A labelled folder in; a day that it hides, and what a search that did not see it has scored there, out."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import numpy as np

from get_images import ImageFile, label_of
from retrieval.choosing.days import Images, by_identity, draw_days
from retrieval.metrics import compare_identities, first_hit, points_of

if TYPE_CHECKING:
    from retrieval.choosing.recipes import Recipe
    from retrieval.choosing.search import Search

MATCHES = 2  # gallery images of an identity, unless --matches says otherwise

log = logging.getLogger("retrieval.choosing")


def hide_a_day(images: Images, matches: int | None, seed: int) -> Images:
    """Take a day out of the labelled images: flat folders with names that tell nothing, as in a competition.

    The others are what the search may learn from. Half of the identities with a single image are on the day.
    """
    files = images.train
    share = len(images.queries) / (len(images.queries) + len(images.gallery))
    day = draw_days([file.name for file in files], matches or MATCHES, share, 1, seed + 1)[0]
    alone = _alone(files)
    kept = np.random.default_rng(seed).permutation(alone)[: len(alone) // 2]
    gallery = np.setdiff1d(day.gallery, kept)
    learnt = [files[row] for row in np.union1d(day.fit, kept)]
    log.info("rehearsal: %d queries and %d gallery images are hidden from the search, which learns from %d",
             len(day.queries), len(gallery), len(learnt))  # fmt: skip
    hidden = [[ImageFile(_hidden_name(files[row]), files[row].path) for row in np.sort(rows)]
              for rows in (day.queries, gallery)]  # fmt: skip
    return Images(*(sorted(side, key=lambda file: file.name) for side in hidden), learnt)


def _alone(files: list[ImageFile]) -> np.ndarray:
    """Return the rows of the images whose identity has no other one."""
    _, owners, counts = np.unique(
        [label_of(file.name) for file in files], return_inverse=True, return_counts=True
    )
    return np.flatnonzero(counts[owners] == 1)


def _hidden_name(file: ImageFile) -> str:
    return hashlib.md5(file.name.encode(), usedforsecurity=False).hexdigest() + file.path.suffix


def tell_rehearsal(search: Search, labelled: list[ImageFile]) -> None:
    """Log what the hidden day would have scored, and which choices held there.

    `labelled` are all images of the training folder, by whose names the labels of the hidden day are known.
    """
    label_of_name = {_hidden_name(file): label_of(file.name) for file in labelled}
    wanted = [label_of_name[file.name] for file in search.images.queries]
    owners = (
        wanted if by_identity([file.name for file in labelled]) else [f.name for f in search.images.queries]
    )

    def _points(recipe: Recipe) -> np.ndarray:
        ranking = search.rank(recipe)
        rows = [[label_of_name[ranking.gallery[row]] for row in ranked] for ranked in ranking.rows.tolist()]
        return points_of(np.array([first_hit(*pair) for pair in zip(wanted, rows, strict=True)]))

    plain, chosen = _points(search.plain), _points(search.best)
    score, (low, high) = compare_identities(chosen, np.zeros(len(chosen)), owners)
    log.info("rehearsal: the hidden day of %d queries would have scored %.1f [%.0f, %.0f] by %s",
             len(wanted), score, low, high, search.best)  # fmt: skip
    log.info("  the plain way, %s, would have scored %.1f: %+.1f [%+.1f, %+.1f]", search.plain, plain.mean(),
             *_flat(compare_identities(chosen, plain, owners)))  # fmt: skip
    for step in search.steps:
        if step.best == step.before:
            continue
        gain, (low, high) = compare_identities(_points(step.best), _points(step.before), owners)
        held = "held" if low > 0 else "hurt" if high < 0 else "cannot be told from noise"
        did = "took" if step.pays else "left"
        log.info("  %s %s for %s: promised %+.1f, and gave %+.1f [%+.1f, %+.1f], which %s",
                 did, step.best, step.before, step.gain, gain, low, high, held)  # fmt: skip


def _flat(gain: tuple[float, list[float]]) -> tuple[float, float, float]:
    return gain[0], *gain[1]

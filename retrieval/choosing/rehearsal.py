"""A search that did not see a hidden day in; what it would have scored there, and which choices held, out."""

from __future__ import annotations

import logging

import numpy as np

from get_images import ImageFile, label_of
from retrieval.choosing.days import hidden_name
from retrieval.choosing.recipes import Recipe
from retrieval.choosing.search import Search
from retrieval.metrics import compare, first_hit, points_of

log = logging.getLogger("retrieval.choosing")


def tell_rehearsal(search: Search, labelled: list[ImageFile]) -> None:
    """Log what the hidden day would have scored, and which choices held there.

    `labelled` are all images of the training folder, by whose names the labels of the hidden day are known.
    """
    label_of_name = {hidden_name(file): label_of(file.name) for file in labelled}
    wanted = [label_of_name[file.name] for file in search.images.queries]

    def _points(recipe: Recipe) -> np.ndarray:
        ranking = search.rank(recipe)
        rows = [[label_of_name[ranking.gallery[row]] for row in ranked] for ranked in ranking.rows.tolist()]
        return points_of(np.array([first_hit(*pair) for pair in zip(wanted, rows, strict=True)]))

    plain, chosen = _points(search.plain), _points(search.best)
    score, (low, high) = compare(chosen, np.zeros(len(chosen)))
    log.info("rehearsal: the hidden day of %d queries would have scored %.1f [%.0f, %.0f] by %s",
             len(wanted), score, low, high, search.best)  # fmt: skip
    gain, (low, high) = compare(chosen, plain)
    log.info("  the plain way, %s, would have scored %.1f: %+.1f [%+.1f, %+.1f]",
             search.plain, plain.mean(), gain, low, high)  # fmt: skip
    for step in search.steps:
        if step.best == step.before or not search.has_day_of(step.best):
            continue
        gain, (low, high) = compare(_points(step.best), _points(step.before))
        held = "held" if low > 0 else "hurt" if high < 0 else "cannot be told from noise"
        did = "took" if step.pays else "did not take"
        log.info("  %s %s in the place of %s: promised %+.1f, and gave %+.1f [%+.1f, %+.1f], which %s",
                 did, step.best, step.before, step.gain, gain, low, high, held)  # fmt: skip

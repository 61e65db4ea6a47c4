"""Labelled runs of several networks in; the weight of each network in their fusion, by evidence, out."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np

from get_images import label_of
from retrieval.metrics import compare_identities, independent, points_of
from retrieval.ranking.fusion import Normalisation, RunVectors, first_right

SHARES = np.arange(10) / 10  # that a run may get of the sum of weights
SPLITS = 5  # of the identities into two halves

log = logging.getLogger("retrieval.ranking")


class Mix(NamedTuple):
    """The weights of the runs, which add up to 1, and what was tried on the way to them."""

    weights: list[float]
    tried: list[dict[str, Any]]
    labelled: dict[str, Any]  # how the mix, and equal weights, do on the labelled queries


def choose_mix(
    runs: list[RunVectors], names: list[str], normalisation: Normalisation = "min-max", seed: int = 0
) -> Mix:
    """Choose the weights of runs on labelled images; a run that is not shown to help gets weight 0.

    The search starts with the run that scores highest alone, and tries the others once each, from the highest
    score to the lowest: fused = (1 − a) · so far + a · run, for each share a of SHARES. `names` are for the
    log. The gain is measured on queries that did not choose a: the identities are split in two halves, each
    half is scored with the share that is best on the other, and the points are averaged over SPLITS splits. A
    run is taken only if a paired bootstrap over identities puts this gain above 0, corrected for the number
    of runs tried; then its share is the best one of all queries.
    """
    owners = independent([label_of(name) for name in runs[0].queries.names])
    identity = np.eye(len(runs)).tolist()
    alone = points_of(first_right(runs, identity, normalisation))  # (runs, queries)
    order = np.argsort(-alone.mean(1), kind="stable")
    weights, tried = np.array(identity[order[0]]), []
    log.info("%s scores %.1f alone on the labelled queries", names[order[0]], alone[order[0]].mean())
    for run in order[1:]:
        mixes = [((1 - share) * weights + share * np.array(identity[run])).tolist() for share in SHARES]
        points = points_of(first_right(runs, mixes, normalisation))  # (shares, queries)
        gain, interval = held_out_gain(points, owners, tests=len(runs) - 1, seed=seed)
        share = float(SHARES[points.mean(1).argmax()]) if interval[0] > 0 else 0.0
        weights = (1 - share) * weights + share * np.array(identity[run])
        tried.append({"run": names[run], "alone": float(alone[run].mean()), "share": share, "gain": gain,
                      "gain_interval": interval, "points_by_share": points.mean(1).tolist()})  # fmt: skip
        log.info("%s scores %.1f alone; beside the others it gains %+.1f [%+.1f, %+.1f] on held-out halves: "
                 "share %g", names[run], alone[run].mean(), gain, *interval, share)  # fmt: skip
    return Mix(weights.round(6).tolist(), tried, _on_labelled(runs, weights, normalisation, owners))


def held_out_gain(
    points: np.ndarray, owners: list, tests: int = 1, seed: int = 0
) -> tuple[float, list[float]]:
    """Return the gain of choosing among the rows of `points` (choices, queries) over the first row.

    A choice is made on a half of the `owners` of the queries, such as people, and scored on the other half,
    and the reverse, in SPLITS random splits: so the gain is that of the best choice, but no query has a say
    in its own choice. The interval is that of compare_identities, corrected for the number of `tests`.
    """
    held_out = np.mean([_held_out(points, _half(owners, seed + split)) for split in range(SPLITS)], axis=0)
    return compare_identities(held_out, points[0], owners, tests)


def _half(owners: list, seed: int) -> np.ndarray:
    """Return which queries are in the first half: those of a random half of the owners."""
    different, rows = np.unique(owners, return_inverse=True)
    count = len(different)
    return np.isin(rows, np.random.default_rng(seed).permutation(count)[: count // 2])


def _held_out(points: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the points (queries,) of each half with the row of `points` that is best on the other half.

    >>> _held_out(np.array([[0, 0, 9, 9], [5, 5, 0, 0]]), np.array([True, True, False, False]))
    array([0, 0, 0, 0])
    """
    best_on_half, best_on_rest = points[:, half].mean(1).argmax(), points[:, ~half].mean(1).argmax()
    return np.where(half, points[best_on_rest], points[best_on_half])


def _on_labelled(
    runs: list[RunVectors], weights: np.ndarray, normalisation: Normalisation, owners: list
) -> dict[str, Any]:
    """Return the scores of the mix and of equal weights, on the labelled queries that chose the mix."""
    equal = [1 / len(runs)] * len(runs)
    chosen, equally = points_of(first_right(runs, [weights.tolist(), equal], normalisation))
    difference, interval = compare_identities(equally, chosen, owners)
    log.info("on the labelled queries, which chose it, the mix scores %.1f; equal weights score %.1f, "
             "%+.1f [%+.1f, %+.1f]", chosen.mean(), equally.mean(), difference, *interval)  # fmt: skip
    return {
        "queries": len(owners),
        "score": float(chosen.mean()),
        "equal_weights_score": float(equally.mean()),
        "equal_weights_difference": difference,
        "equal_weights_difference_interval": interval,
    }

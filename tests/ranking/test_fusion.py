"""retrieval/ranking/fusion.py, against naive double loops."""

import math

import numpy as np
import pytest
from conftest import vectors_of

from get_images import label_of
from retrieval.metrics import first_hits
from retrieval.ranking import fusion
from retrieval.ranking.fusion import NORMALISATIONS, RunVectors, first_right, fuse
from retrieval.records import UNREADABLE, Embeddings


def run_of(dimension, seed, queries=9, images=40, lost=()):
    """A run of random vectors, of 5 labels; images with the same number modulo 17 are copies."""
    random = np.random.default_rng(seed)
    rows = {f"{n % 5}/{n}.jpg": random.normal(size=dimension) for n in range(queries)}
    copies = random.normal(size=(17, dimension))
    of_gallery = {f"{n % 5}/{n:03}.jpg": copies[n % 17] for n in range(images)}
    rows |= {name: np.zeros(dimension) for name in lost if name in rows}
    of_gallery |= {name: np.zeros(dimension) for name in lost if name in of_gallery}
    return RunVectors(vectors_of(rows), vectors_of(of_gallery))


LOST = ({"1/1.jpg", "2/002.jpg", "3/003.jpg"}, {"1/1.jpg", "2/2.jpg", "3/003.jpg", "0/005.jpg"})


def naive(runs, weights, how, k):
    """The ranking by definition: for each query, each image's weighted mean over the runs that see both."""
    ranked, fused = [], []
    for query in range(len(runs[0].queries.names)):
        tables = []
        for run in runs:
            cosines = {}
            for image, vector in enumerate(run.gallery.vectors):
                if vector.any() and run.queries.vectors[query].any():
                    pairs = zip(run.queries.vectors[query].tolist(), vector.tolist(), strict=True)
                    cosines[image] = round(math.fsum(a * b for a, b in pairs), 12)
            values = list(cosines.values())
            table = {}
            for image, cosine in cosines.items():
                if how == "min-max":
                    table[image] = (cosine - min(values)) / (max(values) - min(values))
                elif how == "z-score":
                    mean = sum(values) / len(values)
                    variance = sum((value - mean) ** 2 for value in values) / len(values)
                    table[image] = (cosine - mean) / math.sqrt(variance)
                else:
                    table[image] = sum(value < cosine for value in values) / len(values)
            tables.append(table)
        scores = {}
        for image in range(len(runs[0].gallery.names)):
            seen = [(w, t[image]) for w, t in zip(weights, tables, strict=True) if w and image in t]
            scores[image] = sum(w * s for w, s in seen) / sum(w for w, _ in seen) if seen else -math.inf
        if all(score == -math.inf for score in scores.values()):  # no run could read the query
            scores = {image: 0.0 if any(w and run.gallery.vectors[image].any()
                                        for w, run in zip(weights, runs, strict=True)) else -math.inf
                      for image in scores}  # fmt: skip
        best = sorted(scores, key=lambda image: (-round(scores[image], 9), image))[:k]
        ranked.append(best)
        fused.append([scores[image] for image in best])
    return ranked, fused


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.3, 0], [0, 0, 2]])
def test_against_a_double_loop(how, weights, monkeypatch):
    runs = [run_of(8, 0), run_of(5, 1), run_of(6, 2)]
    ranked, fused = naive(runs, weights, how, 40)
    ranking = fuse(runs, weights, 40, how)
    assert ranking.rows.tolist() == ranked
    assert np.allclose(ranking.cosines, fused)
    assert (np.diff(ranking.cosines) <= 0).all()
    monkeypatch.setattr(fusion, "BLOCK", 1)  # a query at a time
    one_by_one = fuse(runs, weights, 10, how)
    assert (one_by_one.rows == ranking.rows[:, :10]).all()


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_a_run_has_no_say_about_images_that_it_could_not_read(how):
    runs = [run_of(8, 0, lost=LOST[0]), run_of(5, 1, lost=LOST[1])]
    ranked, fused = naive(runs, [2, 1], how, 40)
    ranking = fuse(runs, [2, 1], 40, how)
    assert ranking.rows.tolist() == ranked
    assert np.allclose(ranking.cosines, np.where(np.isinf(fused), UNREADABLE, fused))
    assert (ranking.rows[:, -1] == 3).all()  # which neither could read
    assert ranking.rows[1].tolist() == [n for n in range(40) if n != 3] + [3]  # neither could read the query


def test_the_fusion_of_a_run_with_itself_is_its_own_ranking_and_scales_change_nothing():
    from retrieval.ranking.exact import rank

    run = run_of(8, 0)
    alone = rank(run.queries, run.gallery)
    for how in ("min-max", "z-score"):
        assert (fuse([run, run], [1, 3], 10, how).rows == alone.rows).all()
    other = run_of(5, 1)
    assert (fuse([run, other], [1, 3]).rows == fuse([run, other], [10, 30]).rows).all()


def test_the_narrow_cosines_of_a_network_count_as_much_as_the_wide_ones_of_another():
    """A network whose cosines differ little ranks as before, and so does its fusion."""
    run, other = run_of(8, 0), run_of(5, 1)
    wide = [np.hstack([part.vectors, np.full((len(part.vectors), 1), 9.0)]) for part in other]
    narrow = RunVectors(*(Embeddings(part.names, vectors.astype(np.float32))
                          for part, vectors in zip(other, wide, strict=True)))  # fmt: skip
    assert (fuse([run, narrow], [1, 1]).rows == fuse([run, other], [1, 1]).rows).mean() > 0.95


@pytest.mark.parametrize("lost", [((), ()), LOST])
def test_the_first_right_image_of_many_mixes_is_that_of_the_ranking(lost):
    runs = [run_of(8, 0, lost=lost[0]), run_of(5, 1, lost=lost[1])]
    mixes = [[1, 0], [0.5, 0.5], [0, 1]]
    found = first_right(runs, mixes)
    for mix, first in zip(mixes, found, strict=True):
        ranking = fuse(runs, mix, 40)
        for query, rank in enumerate(first):
            if not any(part.queries.vectors[query].any() for part, w in zip(runs, mix, strict=True) if w):
                assert rank == 0  # unreadable
            else:
                assert rank == first_hits(ranking)[query]


def test_no_label_changes_a_ranking():
    runs = [run_of(8, 0), run_of(5, 1)]
    renamed = [RunVectors(*(Embeddings([f"x/{n}" for n in range(len(part.names))], part.vectors)
                            for part in run)) for run in runs]  # fmt: skip
    assert label_of(renamed[0].queries.names[0]) == "x"
    assert (fuse(runs, [1, 1]).rows == fuse(renamed, [1, 1]).rows).all()

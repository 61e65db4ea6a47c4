import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from retrieval.report.tsne import affinities, gradient, pca, squared_distances, tsne

RANDOM = np.random.default_rng(0)


def naive_kl(p, positions):
    """KL(p‖q), pair by pair, as the paper has it."""
    k = 1 / (1 + squared_distances(positions.astype(float)))
    np.fill_diagonal(k, 0)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / (k / k.sum())[seen])).sum())


def circle(points):
    angles = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (12, 12)])
def test_pca_is_the_projection_on_the_first_singular_vectors(shape):
    vectors = RANDOM.normal(size=shape)
    centred = vectors - vectors.mean(0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(pca(vectors, 3)) == pytest.approx(np.abs(left * lengths)[:, :3], abs=1e-6)


def test_points_at_equal_distances_have_equal_affinities():
    p = affinities(squared_distances(np.eye(4)), perplexity=3)
    assert p == pytest.approx((1 - np.eye(4)) / 12)


@pytest.mark.parametrize("perplexity", [2, 5, 12])
def test_the_perplexity_is_the_effective_number_of_neighbours(perplexity):
    """On a circle all points have the same neighbourhood, so that a row of p is a point's own, over n."""
    rows = 60 * affinities(squared_distances(circle(60)), perplexity)
    assert rows.sum(1) == pytest.approx(np.ones(60))
    entropy = -(rows * np.log(np.maximum(rows, 1e-300))).sum(1)
    assert np.exp(entropy) == pytest.approx(np.full(60, perplexity), rel=0.01)


@pytest.mark.parametrize("points", [3, 20, 300])  # the last takes three blocks
def test_the_gradient_is_that_of_the_divergence(points):
    p = affinities(squared_distances(RANDOM.normal(size=(points, 5))), perplexity=min(10, (points - 1) / 3))
    positions, step = RANDOM.normal(size=(points, 2)), 1e-5
    found = gradient(p, positions)
    for row, column in ((0, 0), (points // 2, 1), (points - 1, 0)):
        moved = np.zeros_like(positions)
        moved[row, column] = step
        slope = (naive_kl(p, positions + moved) - naive_kl(p, positions - moved)) / (2 * step)
        assert found[row, column] == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", ["digits", "groups", "noise"])
def test_the_map_fits_as_well_as_scikit_learns(kind):
    from sklearn.datasets import load_digits
    from sklearn.manifold import TSNE

    centres = np.repeat(RANDOM.normal(size=(15, 20)), 20, axis=0)
    vectors = {"digits": load_digits().data[:300], "noise": RANDOM.normal(size=(300, 20)),
               "groups": centres + 0.3 * RANDOM.normal(size=(300, 20))}[kind]  # fmt: skip
    p = affinities(squared_distances(pca(vectors, 50)), perplexity=30)
    theirs = TSNE(max_iter=500, random_state=0).fit_transform(vectors)
    assert naive_kl(p, tsne(vectors)) < 1.05 * naive_kl(p, theirs)


@pytest.mark.parametrize(
    "vectors",
    [np.zeros((6, 3)), np.ones((5, 1)), np.eye(5), np.repeat(np.eye(3), 40, axis=0), np.arange(9.0)[:, None]],
    ids=["zeros", "equal", "equally far", "copies", "a line"],
)
def test_few_or_equal_points_have_positions_too(vectors):
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        positions = tsne(vectors.astype(np.float32))
    assert positions.shape == (len(vectors), 2)
    assert np.isfinite(positions).all()


def test_the_report_imports_none_of_the_slow_packages():
    slow = {"torch", "timm", "sklearn", "scipy"}
    code = f"import sys, retrieval.report.run_report; print(sorted({slow} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"

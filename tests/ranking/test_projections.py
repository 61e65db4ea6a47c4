import numpy as np
import pytest
from conftest import embeddings_of, vectors_of
from scipy.linalg import eigh

from retrieval import records
from retrieval.errors import InputError
from retrieval.ranking.projections import centre, check_classes, lda, project, unit, whiten, within_class


@pytest.fixture(params=["in memory", "in chunks"], autouse=True)
def _chunks(request, monkeypatch):
    if request.param == "in chunks":
        monkeypatch.setattr(records, "CHUNK_BYTES", 4 * 5 * 7)  # seven vectors of five dimensions


@pytest.fixture
def gallery():
    vectors = np.random.default_rng(0).normal(size=(30, 5)) * [3, 2, 1, 1, 0.1] + 1
    vectors[[3, 29]] = 0  # unreadable
    return embeddings_of(vectors, "g")


@pytest.fixture
def train():
    """Images of four classes, one of them with a single image, and one that is unreadable."""
    random = np.random.default_rng(1)
    centres, sizes = random.normal(size=(4, 5)), [9, 6, 5, 1]
    rows = {f"{label}/{i}": centres[label] + 0.5 * random.normal(size=5) * [1, 1, 2, 3, 1]
            for label, size in enumerate(sizes) for i in range(size)}  # fmt: skip
    return vectors_of(rows | {"0/broken": np.zeros(5)})


def readable(embeddings):
    return embeddings.vectors[embeddings.vectors.any(axis=1)].astype(np.float64)


def cosines(vectors):
    return unit(vectors) @ unit(vectors).T


def test_centre_subtracts_the_mean_of_what_is_readable(gallery):
    x = readable(gallery)
    projected = project(gallery, centre(gallery))
    assert readable(projected) == pytest.approx(unit(x - x.mean(axis=0)), abs=1e-6)
    assert projected.unreadable == ["g3", "g29"]
    assert projected.vectors.dtype == np.float32


def test_whitened_images_have_the_cosines_of_mahalanobis(gallery):
    x = readable(gallery)
    covariance = np.cov(x.T, bias=True)
    shrunk = covariance + np.trace(covariance) / 5 * np.eye(5)
    d = x - x.mean(axis=0)
    wanted = d @ np.linalg.inv(shrunk) @ d.T  # ⟨x, y⟩ = xᵀ (C + l̄ I)⁻¹ y
    wanted /= np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert cosines(readable(project(gallery, whiten(gallery)))) == pytest.approx(wanted, abs=1e-6)


def naive_scatter(train):
    """The within-class and between-class covariance, by loops."""
    x = readable(train)
    labels = [name[0] for name in train.names if name != "0/broken"]
    within, between, mean = np.zeros((5, 5)), np.zeros((5, 5)), x.mean(axis=0)
    for vector, label in zip(x, labels, strict=True):
        of_class = np.mean([other for other, its in zip(x, labels, strict=True) if its == label], axis=0)
        within += np.outer(vector - of_class, vector - of_class) / len(x)
        between += np.outer(of_class - mean, of_class - mean) / len(x)
    return x, within + np.trace(within) / 5 * np.eye(5), between


def test_within_class_whitens_by_the_covariance_inside_the_classes(train):
    x, within, _ = naive_scatter(train)
    d = x - x.mean(axis=0)
    wanted = d @ np.linalg.inv(within) @ d.T
    wanted /= np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert cosines(readable(project(train, within_class(train)))) == pytest.approx(wanted, abs=1e-6)


def test_lda_is_the_generalised_eigenproblem_beside_the_vector(train):
    x, within, between = naive_scatter(train)
    _, axes = eigh(between, within)  # S_b v = l S_w v, vᵀ S_w v = 1, by rising l
    z = (x - x.mean(axis=0)) @ axes[:, -3:]
    projected = project(train, lda(train))
    assert projected.vectors.shape == (22, 5 + 3)
    assert projected.unreadable == ["0/broken"]
    assert cosines(readable(projected)) == pytest.approx((x @ x.T + cosines(z)) / 2, abs=1e-6)


@pytest.mark.parametrize(("names", "sentence"), [
    (["a/1", "b.jpg"], "b.jpg of --train_dir lies in none: lay the images out as TRAIN_DIR/<class>/x.jpg"),
    (["a/1", "a/2"], "holds 2 images of 1 classes: give the folder above the class folders"),
    (["a/1", "b/1"], "needs two classes or more, and two images of a class, but --train_dir holds 2"),
])  # fmt: skip
def test_a_folder_that_fits_no_projection_is_refused(names, sentence):
    with pytest.raises(InputError, match=sentence):
        check_classes(names)
    with pytest.raises(InputError, match=sentence):
        lda(vectors_of({name: [row + 1, 1] for row, name in enumerate(names)}))

import numpy as np
import pytest
from conftest import embeddings_of

from retrieval import records
from retrieval.ranking.neighbours import augment_gallery, expand_queries


def naive(images, others, neighbours, alpha):
    """The definition, by loops; an image is not its own neighbour."""
    moved = []
    for name, x in zip(images.names, images.vectors.astype(np.float64), strict=True):
        cosines = {row: x @ other for row, other in enumerate(others.vectors.astype(np.float64))
                   if other.any() and others.names[row] != name}  # fmt: skip
        for row in sorted(cosines, key=lambda row: -cosines[row])[:neighbours] if x.any() else []:
            x = x + max(cosines[row], 0) ** alpha * others.vectors[row]
        moved.append(x / (np.linalg.norm(x) or 1))
    return np.array(moved)


@pytest.fixture(params=["in memory", "in chunks"], autouse=True)
def _chunks(request, monkeypatch):
    if request.param == "in chunks":
        monkeypatch.setattr(records, "CHUNK_BYTES", 4 * 5 * 7)  # seven vectors of five dimensions


@pytest.mark.parametrize(("neighbours", "alpha"), [(1, 0), (3, 1), (5, 3), (100, 2.5)])
def test_expansion_and_augmentation_are_their_definitions(neighbours, alpha):
    random = np.random.default_rng(neighbours)
    asked, vectors = random.normal(size=(9, 5)) + 0.5, random.normal(size=(30, 5)) + 0.5
    asked[4], vectors[[0, 13]] = 0, 0
    queries, gallery = embeddings_of(asked, "q"), embeddings_of(vectors, "g")
    expanded = expand_queries(queries, gallery, neighbours, alpha)
    augmented = augment_gallery(gallery, neighbours, alpha)
    assert expanded.vectors == pytest.approx(naive(queries, gallery, neighbours, alpha), abs=1e-6)
    assert augmented.vectors == pytest.approx(naive(gallery, gallery, neighbours, alpha), abs=1e-6)
    assert (expanded.unreadable, augmented.unreadable) == (["q4"], ["g0", "g13"])
    assert (expanded.names, augmented.names) == (queries.names, gallery.names)


def test_a_query_by_hand():
    moved = expand_queries(embeddings_of([[1, 0]], "q"), embeddings_of([[0, 1], [0.6, 0.8]], "g"), 1, 2)
    assert moved.vectors[0] == pytest.approx(np.array([1.216, 0.288]) / np.hypot(1.216, 0.288), abs=1e-6)


def test_more_duplicates_than_neighbours_stay_where_they_are():
    gallery = embeddings_of([[0.6, 0.8]] * 9 + [[1, 0]], "g")
    assert augment_gallery(gallery, 3, 1).vectors[:9] == pytest.approx(gallery.vectors[:9], abs=1e-6)

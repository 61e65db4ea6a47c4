import numpy as np
import pytest
from PIL import Image

from get_images import find_images
from retrieval.metrics import score
from retrieval.ranking.copies import find_copies, without_copies
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings, Ranking


@pytest.fixture
def folders(tmp_path):
    """Queries 0 to 3; the gallery has query 0 once, query 1 twice, and another image of query 2's size."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(5)]
    for folder in ("query", "gallery"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        pictures[number].save(tmp_path / "query" / f"{number}.bmp")  # all of one size
    for name, number in (("a", 0), ("b", 1), ("c", 1), ("d", 4)):
        pictures[number].save(tmp_path / "gallery" / f"{name}.bmp")
    (tmp_path / "query" / "4.png").symlink_to("nowhere")
    (tmp_path / "gallery" / "e.png").symlink_to("nowhere")
    (tmp_path / "query" / "5.png").write_bytes(b"")
    (tmp_path / "gallery" / "f.png").write_bytes(b"")
    return find_images(tmp_path / "query"), find_images(tmp_path / "gallery")


def test_copies_have_the_same_bytes(folders):
    """Files without a byte are none."""
    assert find_copies(*folders) == {0: [0], 1: [1, 2]}


@pytest.mark.parametrize("scores", [False, True])
def test_copies_come_behind_the_others_in_their_order(scores):
    rows = np.array([[3, 0, 2, 1], [1, 2, 0, 3], [0, 1, 2, 3]])
    cosines = np.array([[0.9, 0.8, 0.7, 0.6]] * 3)
    ranking = Ranking(["q0", "q1", "q2"], list("abcd"), rows, cosines, cosines * 2 if scores else None)
    found = without_copies(ranking, {0: [3], 1: [1, 2]}, k=3)
    assert found.rows.tolist() == [[0, 2, 1], [0, 3, 1], [0, 1, 2]]
    assert found.cosines.tolist() == [[0.8, 0.7, 0.6], [0.7, 0.6, 0.9], [0.9, 0.8, 0.7]]
    assert (found.scores is not None) == scores


def test_without_themselves_the_queries_get_what_a_gallery_without_them_gives():
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    images = Embeddings([f"{row:02}.jpg" for row in range(30)], vectors)
    found = without_copies(rank(images, images, 11), {row: [row] for row in range(30)}, 10)
    for row, name in enumerate(images.names):
        others = images.some(np.delete(np.arange(30), row))
        alone = rank(images.some(np.array([row])), others, 10)
        assert found.names()[name] == alone.names()[name]


def test_copies_do_not_count_in_the_metrics():
    """Five images that are queries and gallery, each ranked rightly but for itself."""
    names = ["a/1", "a/2", "b/1", "b/2", "c/1"]
    rows = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [2, 3, 0, 1, 4], [3, 2, 0, 1, 4], [4, 0, 1, 2, 3]])
    ranking = Ranking(names, names, rows, np.tile([0.9, 0.8, 0.7, 0.6, 0.5], (5, 1)))
    found = score(without_copies(ranking, {row: [row] for row in range(5)}, 5))
    assert found["top_1"] == found["top_5"] == found["map_at_r"] == 0.8  # c/1 has no other
    assert found["score"] == 800
    assert found["queries_without_match"] == 1

import numpy as np

from retrieval.ranking.exact import rank
from retrieval.records import Embeddings
from supcon.validation import without_self


def test_an_image_is_no_match_of_itself():
    vectors = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    images = Embeddings(list("abcd"), vectors)
    ranking = without_self(rank(images, images, 3))
    assert ranking.names() == {"a": ["b", "c"], "b": ["c", "a"], "c": ["b", "d"], "d": ["c", "b"]}
    assert np.allclose(ranking.cosines[0], [0.8, 0.6])


def test_where_copies_push_an_image_out_its_last_match_goes():
    images = Embeddings(list("abcd"), np.tile(np.array([[1, 0]], np.float32), (4, 1)))
    names = without_self(rank(images, images, 3)).names()
    assert names == {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"], "d": ["a", "b"]}

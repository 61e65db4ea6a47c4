import numpy as np
import pytest
import torch

from retrieval.backbones.fine_tuned import ALONE, JOINED, MIXED
from retrieval.metrics import compare
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings
from supcon.validation import Candidate, best_of, enough, without_self


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


def candidate(embedding, weight, right):
    """A way to embed that finds this many of a hundred queries at rank 1, and the others not at all."""
    points = [1000] * right + [0] * (100 - right)
    return Candidate(embedding, weight, {"score": 10.0 * right, "points": points}, torch.empty(0))


def test_the_usual_way_to_embed_gives_way_to_what_is_shown_to_be_better():
    untuned = candidate("", 0, 50).metrics
    nearest, careful = candidate(JOINED, 0.25, 55), candidate(JOINED, 0.5, 60)
    usual, tuned = candidate(JOINED, 2.0, 80), candidate(ALONE, 1.0, 82)
    others = [nearest, careful, usual]
    assert best_of([tuned, *others], untuned)[0] is usual  # two of a hundred show nothing
    better = candidate(ALONE, 1.0, 95)
    assert best_of([better, *others], untuned)[0] is better
    shown = [nearest, careful, candidate(JOINED, 2.0, 61)]
    assert best_of(shown, candidate("", 0, 59).metrics)[0] is careful
    assert best_of([better, *others], candidate("", 0, 94).metrics)[0] is nearest
    assert best_of(shown, candidate("", 0, 59).metrics, by_view=True)[0] is nearest


@pytest.mark.parametrize(
    ("best", "untuned", "reason"),
    [
        (
            candidate(ALONE, 1.0, 82),
            50,
            "it is the default, and tuned (score 820) may be higher by chance: +20 [+0, +50] on 100 images",
        ),
        (candidate(MIXED, 0.5, 79), 50, "it is the default, and no other way scores higher"),
        (
            candidate(MIXED, 0.5, 95),
            50,
            "it is shown to be better than the default, untuned + 2 × tuned (score 800)",
        ),
        (
            candidate(ALONE, 1.0, 95),
            94,
            "it stays near the untuned network (score 940): tuned (score 950) is not shown to be better than "
            "that",
        ),
    ],
)
def test_the_reason_of_the_choice_names_what_it_was_compared_with(best, untuned, reason):
    others = [candidate(JOINED, weight, right) for weight, right in ((0.25, 55), (0.5, 60), (2.0, 80))]
    assert best_of([best, *others], candidate("", 0, untuned).metrics)[1] == reason


@pytest.mark.parametrize(("won", "lost"), [(6, 3), (10, 6), (20, 15)])
def test_as_many_images_as_would_tell_tell(won, lost):
    """Of 100 images `won` are found only afterwards, and `lost` only before; and the same shares of more."""

    def gain_on(images):
        share = images // 100
        before = [0] * won * share + [1000] * lost * share + [1000] * (100 - won - lost) * share
        after = [1000] * won * share + [0] * lost * share + [1000] * (100 - won - lost) * share
        return compare(after, before)

    gain, (low, _) = gain_on(100)
    assert low < 0 < gain
    few, many = (int(times * enough(gain, low, 100)) for times in (0.6, 1.5))
    assert gain_on(few)[1][0] <= 0 < gain_on(many)[1][0]

"""retrieval/choosing/recipes.py: recipes in words and as settings, and those that are one step away."""

from pathlib import Path

import pytest

from retrieval.choosing.recipes import Recipe, Source, fusions, neighbours
from retrieval.choosing.settings import source_of
from retrieval.errors import InputError
from retrieval.ranking.means import Means, check_means

DLIB, CLIP = Source("dlib"), Source("clip", "loose")


def changed(recipe):
    """What each neighbour applies."""
    return [other.means.applied() for other in neighbours(recipe, 3)]


def test_a_step_adds_one_means_or_takes_one_away():
    assert {"hubs": 10} in changed(Recipe(DLIB))
    after = changed(Recipe(DLIB, Means(hubs=10, whiten=True)))
    assert {"whiten": True} in after
    assert {"hubs": 10} in after
    assert {"cover": True, "whiten": True} in after  # in place of hubs
    assert {"query_expansion": "3:3", "hubs": 10, "whiten": True} in after
    assert {"hubs": 10, "whiten": True} not in after


@pytest.mark.parametrize("means", [Means(), Means(hubs=10), Means(cover=True, centre=True)])
def test_every_step_can_be_run(means):
    for recipe in neighbours(Recipe(DLIB, means), 3):
        check_means(recipe.means, "exact", True)


def test_a_tuned_network_gets_no_means_that_fit_to_images_it_has_seen():
    tuned = Recipe(Source("clip", checkpoint="/c.pth"))
    assert not any({"projection", "cover"} & set(means) for means in changed(tuned))


def test_a_fused_similarity_keeps_its_order():
    fused = Recipe(DLIB, Means(whiten=True), CLIP, 0.3)
    assert not any({"hubs", "rerank", "cover"} & set(means) for means in changed(fused))


def test_fusions_are_with_the_other_networks():
    found = fusions(Recipe(DLIB, Means(hubs=10, whiten=True)), [DLIB, CLIP])
    assert list(found) == [CLIP]
    assert {(other.second, other.means) for other in found[CLIP]} == {(CLIP, Means(whiten=True))}
    assert [other.share for other in found[CLIP]] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_the_mirror_images_are_seen_by_all_networks_of_a_recipe():
    means = Means(whiten=True)
    seen_by_both = Recipe(Source("dlib", views="flip"), means, Source("clip", "loose", "flip"), 0.3)
    assert Recipe(DLIB, means, CLIP, 0.3).flipped() == seen_by_both
    assert Recipe(DLIB).flipped() == Recipe(Source("dlib", views="flip"))


def test_a_recipe_as_the_settings_of_a_script(tmp_path):
    recipe = Recipe(
        Source("dlib", views="flip"), Means(projection="lda", hubs=10), CLIP._replace(views="flip"), 0.3
    )
    assert recipe.settings(tmp_path) == {
        "model_type": "dlib", "crop": "auto", "views": "flip", "fuse": ["clip@loose=0.3"],
        "train_dir": str(tmp_path), "projection": "lda", "hubs": 10,
    }  # fmt: skip
    assert str(recipe) == "0.7 dlib + flip + 0.3 clip@loose + flip + projection lda + hubs 10"
    tuned = Recipe(Source("clip", checkpoint="/c.pth"))
    assert tuned.settings(Path("train")) == {"weights": "/c.pth", "views": "none"}


def test_models_with_a_crop():
    assert source_of("clip@loose") == Source("clip", "loose")
    with pytest.raises(ValueError, match="one of the crops"):
        source_of("clip@round")
    with pytest.raises(InputError, match="no such backbone"):
        source_of("clop")

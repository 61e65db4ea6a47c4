"""retrieval/choosing/days.py: days look as they should, and nothing of a day is in its fit."""

import numpy as np
import pytest
from conftest import vectors_of

from get_images import label_of
from retrieval.choosing.days import by_identity, draw_days, matches_in, rows_to_learn_from
from retrieval.errors import InputError

PEOPLE = [f"{person:02}/{image}.jpg" for person in range(30) for image in range(6)]
ALONE = [f"alone{person}/0.jpg" for person in range(40)]
SCENES = [f"{scene}/{image:03}.jpg" for scene in "abc" for image in range(80)]


def labels_of(names, rows):
    return [label_of(names[row]) for row in rows]


def test_a_day_of_people_shows_others_than_its_fit():
    names = PEOPLE + ALONE
    for day in draw_days(names, matches=2, share=0.5, count=5):
        queries, gallery, fit = (labels_of(names, rows) for rows in day[:3])
        assert len(queries) == len(set(queries)) == 15  # half of the 30, one image each
        assert sorted(gallery) == sorted(queries * 2 + [label_of(name) for name in ALONE])
        assert not {*queries, *gallery} & set(fit)
        assert len(fit) == 15 * 6


def test_a_day_of_scenes_shows_other_images_of_the_same_classes():
    for day in draw_days(SCENES, matches=9, share=0.25, count=3):
        rows = np.concatenate(day[:3])
        assert len(rows) == len(set(rows)) == len(SCENES)  # no image twice
        assert [len(part) for part in day[:3]] == [30, 90, 120]
        for part in day[:3]:
            assert set(labels_of(SCENES, part)) == set("abc")


def test_days_differ_and_follow_from_the_seed():
    first, second, again = (draw_days(PEOPLE, 2, 0.5, 2, seed) for seed in (0, 1, 0))
    assert not np.array_equal(first[0].queries, first[1].queries)
    assert not np.array_equal(first[0].queries, second[0].queries)
    assert all(map(np.array_equal, first[0][:3] + first[1][:3], again[0][:3] + again[1][:3]))


def test_an_identity_with_few_images_gives_what_it_has():
    names = [f"{person:02}/{image}.jpg" for person in range(20) for image in range(2)]
    (day,) = draw_days(names, matches=5, share=0.5, count=1)
    assert sorted(labels_of(names, day.queries)) == sorted(labels_of(names, day.gallery))


def test_twenty_identities_with_two_images_are_people():
    pairs = [f"{label}/{image}.jpg" for label in range(20) for image in range(2)]
    assert by_identity(pairs)
    assert not by_identity(pairs[:-1])


@pytest.mark.parametrize("names", [SCENES[:80], ["a/1.jpg", "b/1.jpg", "c/1.jpg"]])
def test_without_classes_or_pairs_there_is_nothing_to_choose_by(names):
    with pytest.raises(InputError, match="two classes or more, with two images or more"):
        draw_days(names, 2, 0.5, 1)


@pytest.mark.parametrize("names", [PEOPLE + ALONE, SCENES])
def test_what_a_network_learns_from_leaves_whole_identities_or_a_part_of_each_class(names):
    learn = rows_to_learn_from(names)
    rest = np.setdiff1d(np.arange(len(names)), learn)
    learnt, others = set(labels_of(names, learn)), set(labels_of(names, rest))
    if names is SCENES:
        assert learnt == others == set("abc")
        assert len(learn) == 0.7 * len(names)
    else:
        assert not learnt & others
        assert len(others) == 9  # of 30


@pytest.mark.parametrize("images", [1, 2, 7])
def test_a_look_at_the_gallery_tells_how_many_images_an_identity_has(images):
    random = np.random.default_rng(images)

    def look(people, count):
        centres = random.normal(size=(people, 40))
        return vectors_of({f"{person}/{n}.jpg": centres[person] + 0.3 * random.normal(size=40)
                           for person in range(people) for n in range(count)})  # fmt: skip

    assert matches_in(look(50, images), look(30, 4)) == images

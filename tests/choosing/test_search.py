"""retrieval/choosing/search.py and networks.py, with made-up networks: what is tried, and what is taken."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import vectors_of

from get_images import ImageFile
from retrieval.choosing import networks as networks_module
from retrieval.choosing.days import Images
from retrieval.choosing.evidence import Evidence
from retrieval.choosing.networks import Clock, Networks
from retrieval.choosing.recipes import Recipe, Source
from retrieval.choosing.search import Search
from retrieval.choosing.settings import source_of
from retrieval.embedding.embed import Notes
from retrieval.errors import InputError, NotDownloadedError, RunError
from retrieval.ranking.means import Means
from retrieval.submission.submission_file import read_submission

GOOD, BAD, OTHER = Source("good"), Source("bad"), Source("other")
PEOPLE = 40


@pytest.fixture(autouse=True)
def _few_days(monkeypatch):
    monkeypatch.setattr("retrieval.choosing.search.DAYS_OF_PEOPLE", 3)
    monkeypatch.setattr("retrieval.ranking.cover.PAIRS", 2**10)  # a fit of cover takes most of the time


def files(name, count, people=range(PEOPLE)):
    """Images of each person; the path tells a made-up network who is on it."""
    return [ImageFile(f"{person:02}/{name}{n}.jpg", Path(f"{person}/{name}{n}"))
            for person in people for n in range(count)]  # fmt: skip


class MadeUp:
    """Networks that see each person as a direction, with a noise of their own; `fails` are (model, kind).

    The noises `tuned` and `flip` are those of a fine-tuned network, and of mirror images.
    """

    def __init__(self, fails=(), **noises):
        self.noises, self.fails, self.asked, self.device = noises, fails, Counter(), "cpu"
        self.shares = {}

    def embed(self, source, images, kind):
        self.asked[source, kind, len(images)] += 1
        if (source.model, kind) in self.fails:
            raise RunError(f"{source} fails at the {kind}")
        centres = np.random.default_rng(0).normal(size=(PEOPLE, 12))
        kind_of_noise = "tuned" if source.checkpoint else source.views
        noise = self.noises.get(kind_of_noise, self.noises[source.model])
        random = np.random.default_rng(sum(map(ord, f"{source} {kind}")))
        return vectors_of({file.name: centres[int(file.path.parts[0])] + noise * random.normal(size=12)
                           for file in images})  # fmt: skip

    def runtime(self, source):
        return SimpleNamespace(backbone=SimpleNamespace(device="cpu"))

    def look_for_faces(self, source, gallery):
        if source.model == "faces":
            raise InputError("it looks for faces")

    def fill_cache(self, source, labelled, others, share):
        self.shares[source] = share
        self.embed(source, labelled, "parts")


def search_of(folder, made_up, models=None, train=None, minutes=10, seed=0):
    images = Images(files("q", 1), files("g", 2), train or files("t", 5))
    models = [Source(model) for model in models or made_up.noises if model not in ("tuned", "flip")]
    return Search(images, models, Clock(minutes), made_up, folder, folder / "train", "Team AAA", 2, seed)


def run(search, tune=None):
    """All stages, as in choose.py."""
    search.begin()
    search.try_networks()
    if tune:
        search.try_tuned(tune)
    search.try_fusions()
    search.try_views()
    return search


def test_all_networks_are_compared_before_any_means(tmp_path):
    """So no time goes into means beside a network that another one beats."""
    made_up = MadeUp(bad=3.0, other=3.0, good=0.4)
    search = run(search_of(tmp_path, made_up))
    tried = [[str(tried.recipe) for tried in step.tries] for step in search.steps]
    assert tried[:2] == [["other"], ["good"]]
    assert all(recipe.startswith("good + ") for recipe in tried[2])
    assert made_up.shares[GOOD] == made_up.shares[OTHER] == 0.5  # so that means get some of the time, too
    assert made_up.shares[BAD] == 1


def test_another_network_gets_the_means_that_were_taken(tmp_path):
    search = search_of(tmp_path, MadeUp(good=1.0, other=1.1))
    search.begin()
    search._climb = lambda: setattr(search, "best", Recipe(GOOD, Means(centre=True)))
    search.try_networks()
    tried = [[tried.recipe for tried in step.tries] for step in search.steps]
    assert tried == [[Recipe(OTHER)], [Recipe(OTHER, Means(centre=True))]]


def test_a_better_network_guesses_the_matches_again(tmp_path, caplog):
    """A network that sees nothing takes each of the two gallery images of a person for alone."""
    caplog.set_level("INFO")
    search = search_of(tmp_path, MadeUp(bad=30.0, good=0.4))
    search.matches, search.guesses = None, True
    run(search)
    assert "to bad the gallery looks as if an identity had 1 images" in caplog.text
    assert "to good the gallery looks as if an identity had 2 images" in caplog.text
    assert search.matches == 2
    assert len(search.evidence.days[0].gallery) == 2 * len(search.evidence.days[0].queries)
    tried = [step.before for step in search.steps]
    assert tried[0] == Recipe(BAD)
    assert Recipe(GOOD) in tried


def test_without_labelled_images_the_plain_way_stays(tmp_path):
    search = search_of(tmp_path, MadeUp(bad=3.0, good=0.4))
    search.images = replace(search.images, train=[])
    run(search)
    assert (search.best, search.steps, search.passed_over) == (Recipe(BAD), [], {})
    assert read_submission(tmp_path / "submission.json")["images"]


def test_a_better_network_is_taken_and_the_files_are_of_it(tmp_path):
    search = run(search_of(tmp_path, MadeUp(bad=3.0, good=0.4)))
    assert search.plain == Recipe(BAD)
    assert search.best.source.model == "good"
    submission = read_submission(tmp_path / "submission.json")
    assert submission["images"] == search.rank(search.best).names()
    recipe = json.loads((tmp_path / "recipe.json").read_bytes())
    assert recipe["recipe"] == str(search.best)
    assert recipe["settings"]["model_type"] == "good"
    assert [step["taken"] for step in recipe["steps"]] == [step.pays for step in search.steps]


@pytest.mark.slow
def test_with_shuffled_labels_the_plain_way_stays(tmp_path):
    """20 whole searches with labels that mean nothing: at least 19 have to stay."""
    stays = 0
    for seed in range(20):
        train = files("t", 5)
        order = np.random.default_rng(seed).permutation(len(train))
        shuffled = [ImageFile(file.name, train[row].path) for file, row in zip(train, order, strict=True)]
        search = run(search_of(tmp_path, MadeUp(good=0.8, other=0.8), train=shuffled, seed=seed))
        assert len(search.steps) >= 4  # means, the other network with and without them, a fusion
        stays += search.best == search.plain
    assert stays >= 19


def test_nothing_is_embedded_or_ranked_twice(tmp_path, monkeypatch):
    ranked, rank = Counter(), Evidence._rank
    monkeypatch.setattr(
        Evidence, "_rank",
        lambda self, recipe, day: ranked.update([(recipe, day.queries.tobytes())]) or rank(self, recipe, day),
    )  # fmt: skip
    made_up = MadeUp(good=1.0, other=1.1)
    search = run(search_of(tmp_path, made_up))
    assert len(search.steps) > 3
    assert set(ranked.values()) == {1}
    assert set(made_up.asked.values()) == {1}


def test_fusions_are_tried_before_the_mirror_images_which_pay(tmp_path):
    search = run(search_of(tmp_path, MadeUp(good=1.6, other=2.0, flip=0.2)))
    assert search.best.source.views == "flip"
    tried = [[tried.recipe for tried in step.tries] for step in search.steps]
    fused = [step for step, recipes in enumerate(tried) if any(recipe.second for recipe in recipes)]
    flipped = [step for step, recipes in enumerate(tried) if recipes[0].source.views == "flip"]
    assert fused[0] < flipped[0]


def test_the_mirror_images_are_seen_by_both_networks_of_a_fusion(tmp_path):
    search = search_of(tmp_path, MadeUp(good=1.0, other=1.1))
    search.begin()
    assert search._add(GOOD)
    assert search._add(OTHER)
    fused = Recipe(GOOD, second=OTHER, share=0.5)
    assert search._adopt(fused)
    search.try_views()
    assert [tried.recipe for tried in search.steps[0].tries] == [fused.flipped()]


def test_a_rehearsal_writes_no_submission(tmp_path):
    search = search_of(tmp_path, MadeUp(bad=3.0, good=0.4))
    search.rehearsal = True
    run(search)
    assert search.best.source.model == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_if_the_first_network_fails_the_next_is_the_plain_way(tmp_path, caplog):
    search = run(search_of(tmp_path, MadeUp([("bad", "gallery images")], bad=1.0, faces=1.0, good=1.0)))
    assert search.plain == Recipe(GOOD)
    assert search.passed_over == {"bad": "bad fails at the gallery images", "faces": "it looks for faces"}
    assert json.loads((tmp_path / "recipe.json").read_bytes())["passed_over"] == search.passed_over
    assert "bad is passed over: bad fails at the gallery images" in caplog.text


@pytest.mark.parametrize("model", ["facenet", "clip:base", "clip@loose"])
def test_weights_that_cannot_be_downloaded_are_a_short_warning_and_a_whole_sentence_in_the_recipe(
    model, tmp_path, caplog
):
    search, whole = search_of(tmp_path, MadeUp(good=0.4)), "https://a/b.pth could not be downloaded: put it …"
    search._pass_over(source_of(model), NotDownloadedError(whole))
    assert search.passed_over == {model: whole}
    (record,) = caplog.records
    fetch = f"python -m retrieval.backbones --fetch {model.partition('@')[0]}"
    assert record.getMessage() == f"{model} is passed over: its weights cannot be downloaded ({fetch})"


def test_if_all_fail_nothing_is_written(tmp_path):
    with pytest.raises(RunError, match=r"no network of --models can be used, .*: give others"):
        search_of(tmp_path, MadeUp([("bad", "queries")], bad=1.0)).begin()
    assert not list(tmp_path.iterdir())


def test_a_plain_way_that_cannot_be_measured_stays(tmp_path, caplog):
    search = run(search_of(tmp_path, MadeUp([("bad", "labelled images")], bad=3.0, good=0.4)))
    assert (search.best, search.steps) == (Recipe(BAD), [])
    assert "bad stays, since nothing can be compared with it" in caplog.text


def test_after_the_minutes_nothing_is_tried_and_the_first_submission_stays(tmp_path, caplog):
    made_up = MadeUp(bad=3.0, good=0.4)
    search = run(search_of(tmp_path, made_up, minutes=0), tune=pytest.fail)
    assert (search.best, search.steps) == (Recipe(BAD), [])
    assert {kind for _, kind, _ in made_up.asked} == {"queries", "gallery images"}
    assert "no time is left for it, with 0 s kept for the last run: give more --minutes" in caplog.text
    read_submission(tmp_path / "submission.json")


def test_a_network_that_fails_when_it_is_taken_is_named_and_left_alone(tmp_path):
    """A fusion is taken, and its second network cannot rank the day's queries."""
    search = search_of(tmp_path, MadeUp([("other", "queries")], good=0.9, other=1.0))
    search.begin()
    search._add(GOOD)
    search._add(OTHER)
    before = (tmp_path / "submission.json").read_bytes()
    assert not search._adopt(Recipe(GOOD, second=OTHER, share=0.5))
    assert search.passed_over == {"other": "other fails at the queries"}
    assert search.best == Recipe(GOOD)
    assert (tmp_path / "submission.json").read_bytes() == before
    search.try_fusions()
    assert not search.steps


def test_a_network_that_fails_when_it_is_to_be_taken_ends_no_search(tmp_path):
    search = run(search_of(tmp_path, MadeUp([("good", "gallery images")], bad=3.0, good=0.4)))
    assert search.passed_over == {"good": "good fails at the gallery images"}
    assert search.best.source.model == "bad"
    assert not any(step.best.source.model == "good" for step in search.steps)


def test_too_few_images_for_other_days_end_no_search(tmp_path):
    few = [ImageFile(f"{name}/{n}.jpg", Path(f"{person}/{n}"))
           for person, name in enumerate("abc") for n in range(20)]  # fmt: skip
    search = search_of(tmp_path, MadeUp(good=0.5), train=few)
    run(search, tune=pytest.fail)  # 14 of 20 images of each class would be learnt, and 18 images are left
    assert "days drawn from 18 images of --train_dir have only" in search.passed_over["good fine-tuned"]


def test_a_tuned_network_gets_no_means_that_fit_to_images_it_has_seen(tmp_path):
    search = search_of(tmp_path, MadeUp(good=1.5, tuned=0.3))
    search.begin()
    search._add(GOOD)
    assert search._adopt(Recipe(GOOD, Means(projection="lda", whiten=True)))

    def tune(source, folder, save_dir, minutes, device):
        assert (source, minutes > 4, device) == (GOOD, True, "cpu")
        assert len(list(folder.rglob("*.jpg"))) == 0.7 * PEOPLE * 5  # links
        return Path("tuned.pth")

    search.try_tuned(tune)
    tuned = Source("good", checkpoint=str(Path("tuned.pth").absolute()))
    tried = [tried.recipe for step in search.steps for tried in step.tries if tried.recipe.source == tuned]
    assert search.best.source == tuned
    assert not any(recipe.means.learns for recipe in tried)
    recipe = json.loads((tmp_path / "recipe.json").read_bytes())
    assert recipe["settings"]["weights"] == tuned.checkpoint


def test_a_tuned_network_that_does_not_pay_changes_nothing(tmp_path):
    search = search_of(tmp_path, MadeUp(good=0.5, tuned=3.0))
    search.begin()
    search.try_networks()
    before = search.best, search.images, search.evidence
    search.try_tuned(lambda *_: Path("tuned.pth"))
    assert (search.best, search.images, search.evidence) == before
    search.rank(Recipe(Source("good", checkpoint="tuned.pth")))  # as a rehearsal does

    def fails(*_):
        raise InputError("too few images")

    search.try_tuned(fails)
    assert search.passed_over["good fine-tuned"] == "too few images"
    assert search.evidence is before[2]


# ---- the time that a network takes


@pytest.fixture
def slow(monkeypatch):
    """A network that takes 0.1 s an image and 30 s to load, by a clock of the test's own."""
    clock = SimpleNamespace(now=0.0, cached=0, parts=[])
    monkeypatch.setattr(networks_module.time, "perf_counter", lambda: clock.now)
    runtime = SimpleNamespace(seconds={"load": 0.0})

    def embed_with_notes(part, *_):
        cached = max(0, min(len(part), clock.cached - sum(clock.parts)))
        clock.parts.append(len(part))
        if cached < len(part) and not runtime.seconds["load"]:
            runtime.seconds["load"], clock.now = 30.0, clock.now + 30
        clock.now += 0.1 * (len(part) - cached)
        return None, Notes(cached=cached)

    monkeypatch.setattr(networks_module, "embed_with_notes", embed_with_notes)
    monkeypatch.setattr(Networks, "runtime", lambda *_: runtime)
    return clock


def fill(minutes, others=0):
    Networks(None, Clock(minutes), "cpu", 1000).fill_cache(GOOD, files("t", 25), others)  # 1000 images


def test_a_network_that_would_take_too_long_is_passed_over_with_both_numbers(slow):
    with pytest.raises(RunError, match=r"would take about 113 s, and 77 s are left"):
        fill(2)  # 872 images · 0.1 s · 1.3, and 120 − 30 − 12.8 s
    assert slow.parts == [64, 64]


def test_a_share_of_the_time_is_said(slow):
    with pytest.raises(RunError, match="and 197 s are left, of which a network may take 50%"):
        Networks(None, Clock(4), "cpu", 1000).fill_cache(GOOD, files("t", 25), 0, 0.5)


def test_the_images_of_the_day_count_too(slow):
    fill(3)
    assert slow.parts == [64, 64, 128, 256, 488]
    slow.parts.clear()
    with pytest.raises(RunError, match="would take about 243 s"):
        fill(4, others=1000)


def test_what_comes_from_the_cache_tells_nothing_of_the_speed(slow):
    slow.cached = 250
    with pytest.raises(RunError, match="would take about 63 s"):  # 488 images, after a part with six new ones
        fill(1)
    assert slow.parts == [64, 64, 128, 256]


def test_a_network_without_faces_is_found_out_by_its_first_images(monkeypatch):
    runtime = SimpleNamespace(backbone=SimpleNamespace(transform=SimpleNamespace(detects_faces=True)))
    monkeypatch.setattr(Networks, "runtime", lambda *_: runtime)
    names = [file.name for file in files("t", 25)]
    networks = Networks(None, Clock(1), "cpu", 1)
    notes = Notes(without_face=names[:32])
    monkeypatch.setattr(networks_module, "embed_with_notes", lambda some, *_: (some, notes))
    networks.look_for_faces(GOOD, files("t", 25))
    notes.without_face.append(names[32])
    with pytest.raises(InputError, match="found none in 33 of the first 64 gallery images"):
        networks.look_for_faces(GOOD, files("t", 25))

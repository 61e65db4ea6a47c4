"""choose.py, run as a user runs it: on four handwritten digits, with networks that need no download."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Server, answer, run_here, settings_of

from get_images import find_images
from retrieval.backbones.backbone import find_backbone
from retrieval.choosing.recipes import Recipe, Source, neighbours
from retrieval.embedding.runtime import Runtime
from retrieval.ranking.means import Means
from retrieval.report.choice import read_choice
from retrieval.server.answer_key import key_of_folders
from retrieval.server.serve import local_server
from retrieval.submission.submission_file import read_submission

pytestmark = pytest.mark.slow
FOLDERS = ("--query_dir", "query", "--gallery_dir", "gallery")
FLAGS = ("choose.py", "--train_dir", "train", *FOLDERS)
LITE0, LITE1 = Source("efficientnet_lite0"), Source("efficientnet_lite1")
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": "none", "HF_HOME": "none"}  # nobody listens
FIRST = "results/submission.json holds a valid submission by efficientnet_lite0"


@pytest.fixture(scope="module")
def place(few, sample, exported_once, tmp_path_factory):
    """Folders query, gallery and train, and a cache, which fills from test to test."""
    place = tmp_path_factory.mktemp("choose")
    shutil.copytree(few, place, dirs_exist_ok=True)
    shutil.copytree(exported_once, place / "cache")
    for label in "0123":
        (place / "train" / label).mkdir(parents=True)
        for path in sorted((sample / "train" / label).iterdir())[:16]:
            shutil.copy(path, place / "train" / label)
    return place


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The same, in a folder of the test's own; the search tries two means."""
    for part in ("query", "gallery", "train"):
        (tmp_path / part).symlink_to(place / part)
    monkeypatch.setenv("CACHE_DIR", str(place / "cache"))
    some = lambda recipe, matches: [other for other in neighbours(recipe, matches)  # noqa: E731
                                    if set(other.means.applied()) <= {"hubs", "centre"}]  # fmt: skip
    monkeypatch.setattr("retrieval.choosing.search.neighbours", some)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def choose(*flags, models="efficientnet_lite0", cwd, **environment):
    return run_here(*FLAGS, "--models", models, *flags, cwd=cwd, **environment)


def assert_valid(folder):
    images = read_submission(folder / "results" / "submission.json")["images"]
    assert list(images) == [file.name for file in find_images(folder / "query")]
    known = {file.name for file in find_images(folder / "gallery")}
    assert all(set(names) <= known for names in images.values())


def test_from_three_folders_to_the_submission_of_the_recipe(here, exported_once, monkeypatch):
    """Networks without weights or faces are passed over, and no image goes through a network twice."""
    made, start = Counter(), Runtime.start
    monkeypatch.setattr(
        Runtime, "start",
        lambda self, batch: made.update({self.backbone.model_name: len(batch.names)}) or start(self, batch),
    )  # fmt: skip
    models = "facenet,dlib,efficientnet_lite0,efficientnet_lite0"
    cache = shutil.copytree(exported_once, here / "cache")
    ended = choose("--cache_dir", cache, "--custom_dataset", models=models, cwd=here, **OFFLINE)
    assert ended.returncode == 0, ended.stderr
    assert FIRST in ended.stdout
    assert "warning: facenet is passed over: " in ended.stderr
    assert "dlib is passed over: it looks for faces, and found none in 24 of the first 24" in ended.stderr
    recipe = json.loads((here / "results" / "recipe.json").read_bytes())
    assert set(recipe["passed_over"]) == {"facenet", "dlib"}
    assert "could not be downloaded" in recipe["passed_over"]["facenet"]
    choice = read_choice(here / "results" / "recipe.json")
    assert choice.steps[0].before == "efficientnet_lite0"
    page = (here / "results" / "report.html").read_text()
    assert "Why this recipe" in page
    assert f"<strong>{choice.recipe}</strong>" in page
    assert "nothing was sent" in ended.stdout
    count = sum(len(find_images(here / part)) for part in ("query", "gallery", "train"))
    assert made["efficientnet_lite0"] == count
    assert made["efficientnet_lite0 with flip"] <= count
    assert made["dlib"] == 24
    assert json.loads((here / "results" / "metrics.json").read_bytes())["score"] > 500
    again = run_here("model_not_tuned.py", *FOLDERS, "--recipe", "results/recipe.json", "--no_report",
                     "--output_dir", "again", cwd=here, CACHE_DIR=str(cache))  # fmt: skip
    assert again.returncode == 0, again.stderr
    bodies = [(here / folder / "submission.json").read_bytes() for folder in ("results", "again")]
    assert bodies[0] == bodies[1]


RECIPES = [
    Recipe(LITE0),
    Recipe(LITE0, Means(projection="lda", hubs=10)),
    Recipe(LITE0, Means(projection="within_class", cover=True)),
    Recipe(LITE0, Means(centre=True, query_expansion="6:3", rerank="k-reciprocal")),
    Recipe(LITE0._replace(views="flip"), Means(whiten=True, gallery_augmentation="6:3")),
    Recipe(LITE0, Means(projection="lda", whiten=True), LITE1, 0.3),
    Recipe(LITE0, Means(), LITE0._replace(crop="loose"), 0.5),
    Recipe(LITE0._replace(crop="loose"), Means(), LITE0, 0.1),  # two crops of one network, the second auto
    Recipe(
        LITE0._replace(views="flip"),
        Means(query_expansion="1:3"),
        LITE0._replace(crop="loose", views="flip"),
        0.4,
    ),
]


@pytest.fixture
def search(here):
    import choose
    from retrieval.choosing.search import begin_search
    from retrieval.run import Run

    settings = choose.Settings(train_dir="train", query_dir="query", gallery_dir="gallery",
                               models=["efficientnet_lite0"], cache_dir=os.environ["CACHE_DIR"],
                               group_name="-a, team")  # fmt: skip
    with Run(settings) as run, begin_search(run) as search:
        yield search, settings


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_each_kind_of_recipe_gives_the_same_submission_by_its_script(recipe, search, here, monkeypatch):
    search, settings = search
    if "loose" in {source.crop for source in recipe.sources}:
        for room in ("choosing.networks", "backbones.backbone", "backbones.fused"):
            monkeypatch.setattr(f"retrieval.{room}.find_backbone", _squared)
    for source in (LITE0, *recipe.sources):
        assert search._add(source), search.passed_over
    assert search._adopt(recipe)
    search._write_recipe()
    searched = (here / "results" / "submission.json").read_bytes()
    assert json.loads(searched)["groupname"] == "-a, team"
    import model_not_tuned
    from retrieval.forms import read_form

    arguments = [*search.arguments(settings), "--output_dir=again", "--no_report"]
    arguments.remove("--output_dir=results")
    model_not_tuned.main(read_form(model_not_tuned.Settings, arguments))
    assert (here / "again" / "submission.json").read_bytes() == searched


def _squared(model, device, weights=None, crop="auto", *_):
    """Find a backbone; in place of the loose crop, which needs a detector's weights, it sees 96 pixels."""
    return find_backbone(model, device, image_size=96 if crop == "loose" else None)


# ---- it ends before its time


def started(here, *flags):
    """The process, when it has said that there is a valid submission."""
    command = [sys.executable, "-u", ROOT / "choose.py", *FLAGS[1:], "--models", "efficientnet_lite0", *flags]
    process = subprocess.Popen(command, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while FIRST not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    return process


def test_after_a_kill_at_any_moment_the_submission_is_valid_and_a_rerun_goes_on(here, exported_once):
    random.seed(0)
    cache = shutil.copytree(exported_once, here / "cache")
    for seconds in (0, random.uniform(0, 1), random.uniform(1, 4)):
        process = started(here, "--cache_dir", cache)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert_valid(here)
        json.loads((here / "results" / "recipe.json").read_bytes())
    ended = choose("--minutes", "0.1", cwd=here, CACHE_DIR=str(cache))
    assert ended.returncode == 0, ended.stderr
    assert "24 of 24 gallery images were embedded before" in ended.stdout
    assert_valid(here)


def test_ctrl_c_keeps_the_submission_and_says_how_to_go_on(here):
    process = started(here)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "results/submission.json is valid, by efficientnet_lite0" in said
    assert f"python -m retrieval.submission {here}/results/submission.json --server_url http://HOST" in said
    assert (
        "would search anew, with vectors from the cache, and move this submission to results/earlier" in said
    )
    assert "stopped by Ctrl-C; no file is half-written" in errors
    assert "Traceback" not in errors
    assert_valid(here)


def test_minutes_that_are_too_few_leave_the_plain_submission(here):
    ended = choose("--minutes", "0.01", cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert (
        "warning: efficientnet_lite0 is passed over: no time is left for it, with 25 s kept" in ended.stderr
    )
    assert "nothing can be compared with it: give more --minutes" in ended.stderr
    recipe = json.loads((here / "results" / "recipe.json").read_bytes())
    assert list(recipe["passed_over"]) == ["efficientnet_lite0"]
    assert_valid(here)


def test_if_no_network_runs_a_sentence_says_what_to_do(here):
    ended = choose(models="facenet,resnet50", cwd=here, **OFFLINE)
    assert ended.returncode == 1
    assert ended.stderr.count("is passed over: ") == 2
    assert "error: no network of --models can be used, for the reasons above: give others" in ended.stderr
    assert not (here / "results" / "submission.json").exists()


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (1, "holds 5 images of 5 classes: to choose by them takes"),
        (2, "different queries, and fewer than 20 show nothing"),
    ],
)
def test_labelled_images_that_show_nothing_leave_the_plain_submission(count, reason, here):
    """One image of a class, as a competition may hand out, or too few."""
    for number, path in enumerate(sorted((here / "query").rglob("*.png"))[: 5 * count]):
        (here / "few" / str(number // count)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, here / "few" / str(number // count) / path.name)
    ended = choose("--train_dir", "few", cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert (
        "warning: nothing can be compared, so the first network of --models that runs is the" in ended.stderr
    )
    assert reason in ended.stderr
    assert_valid(here)


# ---- what is sent


@pytest.fixture
def no_page(monkeypatch):
    """Draw no report, which takes seconds."""
    monkeypatch.setattr("retrieval.report.run_report.write_report", lambda *_: "nothing")


@pytest.mark.usefixtures("no_page")
def test_the_first_submission_and_the_best_one_reach_the_server(here):
    key = key_of_folders(find_images(here / "query"), find_images(here / "gallery"))
    with local_server(key, here / "c.sqlite") as url:
        ended = choose("--send_first", "--server_url", url, "--group_name", "Team AAA", cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the server's score: ") == 2
    names = "first_reply.txt", "reply.txt"
    first, last = (json.loads((here / "results" / name).read_bytes()) for name in names)
    assert first["groupname"] == last["groupname"] == "Team AAA"
    metrics = json.loads((here / "results" / "metrics.json").read_bytes())
    assert metrics["server_score"] == last["accuracy"]


@pytest.mark.usefixtures("no_page")
def test_a_server_that_refuses_the_first_submission_does_not_stop_the_search(here):
    with Server(answer(404, b"no"), answer()) as server:
        ended = choose("--send_first", "--server_url", server.url, cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert "error: the server answered 404" in ended.stderr
    assert (here / "results" / "first_reply.txt").read_bytes() == b"no"
    assert "the server's score: 698" in ended.stdout
    assert server.received[-1][3] == (here / "results" / "submission.json").read_bytes()
    assert len(server.received) == 2


def test_a_rehearsal_says_what_the_hidden_day_would_have_scored_and_sends_nothing(here):
    with Server(answer()) as server:
        ended = choose("--rehearse", "--server_url", server.url, cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"rehearsal: the hidden day of \d+ queries would have scored \d+\.\d \[", ended.stdout)
    assert "the plain way, efficientnet_lite0, would have scored" in ended.stdout
    assert not server.received
    assert sorted(os.listdir(here / "results")) == [".lock", "rehearsal"]
    assert os.listdir(here / "results" / "rehearsal") == ["recipe.json"]


@pytest.mark.usefixtures("no_page")
def test_a_server_of_the_runs_own_scores_it(here):
    ended = choose("--server_url", "local", cwd=here)
    assert ended.returncode == 0, ended.stderr
    metrics = json.loads((here / "results" / "metrics.json").read_bytes())
    assert metrics["server_score"] == pytest.approx(metrics["score"], abs=0.01)


# ---- fine-tuning


@pytest.mark.usefixtures("no_page")
def test_a_tuned_network_ends_with_the_script_for_checkpoints(here, monkeypatch, tmp_path_factory):
    import choose
    import fine_tuning
    from retrieval.choosing.search import Search

    folder = tmp_path_factory.mktemp("tuned")
    fine_tuning.main(settings_of(here / "train", folder, epochs=1))
    asked = []

    def tune(source, train_dir, save_dir, minutes, device):
        asked.append((source, len(find_images(train_dir)), device))
        return folder / "save" / "fine_tuned_model.pth"

    def take(search, recipes, every=1):  # whatever it scores
        return bool(recipes[0].source.checkpoint and not search.best.source.checkpoint) and (
            search._adopt(recipes[0]) and (search._write_recipe() or True)
        )

    monkeypatch.setattr(choose, "tune", tune)
    monkeypatch.setattr(Search, "_step", take)
    monkeypatch.setattr("retrieval.choosing.search.check_days", lambda *_: None)  # 20 images are left
    choose.main(choose.Settings(train_dir="train", query_dir="query", gallery_dir="gallery",
                                models=["efficientnet_lite0"], fine_tune=True,
                                cache_dir=os.environ["CACHE_DIR"], custom_dataset=True))  # fmt: skip
    assert asked == [(LITE0, 44, "auto")]  # 11 of 16 images of each class
    metrics = json.loads((here / "results" / "metrics.json").read_bytes())
    assert metrics["tuned"]
    recipe = json.loads((here / "results" / "recipe.json").read_bytes())
    assert Path(recipe["settings"]["weights"]) == folder / "save" / "fine_tuned_model.pth"
    assert_valid(here)


# ---- wrong input


def test_wrong_input_is_a_sentence_before_any_work(here):
    for folder in ("flat", "one/a"):
        (here / folder).mkdir(parents=True)
        for number in range(3):
            shutil.copy(next((here / "query" / "0").iterdir()), here / folder / f"{number}.png")
    (here / "results").mkdir()
    (here / "results" / "submission.json").write_text("earlier")
    for flags, sentence in (
        (("--train_dir", "flat"), "lies in none: lay the images out as"),
        (("--train_dir", "one"), "holds 3 images of 1 classes: give the folder above the class folders"),
        (
            ("--query_dir", "train/0"),
            "--train_dir train holds --query_dir train/0, whose images have no labels",
        ),
        (("--train_dir", "none"), "--train_dir is 'none': there is no folder"),
        (("--query_dir", "none"), "--query_dir is 'none': there is no folder"),
        (("--models", "efficientnet_lit0"), "did you mean efficientnet_lite0?"),
        (("--models", "efficientnet_lite0@round"), "MODEL@CROP with one of the crops none, face"),
        (("--minutes", "0"), "--minutes is '0'"),
        (("--output_dir", "train/results"), "--output_dir train/results lies in the images' folder train"),
        (("--send_first",), "--send_first sends to a server, and with no --server_url nothing is sent"),
        (("--send_first", "--server_url", "http://127.0.0.1:9/", "--custom_dataset"), "leave it out"),
        (("--query_dir", "flat", "--custom_dataset"), "a score needs class folders"),
    ):
        given = [*FLAGS[1:]]
        for name in flags[::2]:  # in place of the right one
            if name in given:
                del given[given.index(name) : given.index(name) + 2]
        ended = run_here("choose.py", *given, *flags, cwd=here)
        assert ended.returncode == 2, (flags, ended.stderr)
        assert sentence in ended.stderr, (flags, ended.stderr)
        assert "Traceback" not in ended.stderr
        assert "embedded" not in ended.stdout
        assert (here / "results" / "submission.json").read_text() == "earlier"
    assert not list(Path(here / "train").glob("results"))
    ended = run_here(*FLAGS, cwd=here, WORLD_SIZE="2", RANK="0")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: choose.py searches in one process: start it with python, and without torchrun\n"
    )

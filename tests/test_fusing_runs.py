"""retrieval/fusion.py: saved runs in, a fused submission out; and --fuse, which does it in one run."""

import json
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from conftest import run_here, vectors_of

from retrieval.embedding.embeddings_file import read_embeddings, write_embeddings
from retrieval.records import Embeddings

PEOPLE = 40


def network(folder, noise, seed, backbone, names=("q", "g")):
    """Save the run of a made-up network, which sees each person as a direction, with this much noise."""
    random, centres = np.random.default_rng(seed), np.random.default_rng(len(backbone))
    directions = centres.normal(size=(PEOPLE, 8))
    queries, gallery = ({f"{person:02}/{name}{n}.jpg": directions[person] + noise * random.normal(size=8)
                         for person in range(PEOPLE) for n in range(3)} for name in names)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_embeddings(folder / "embeddings.npz", vectors_of(queries), vectors_of(gallery))
    (folder / "metrics.json").write_text(json.dumps({"backbone": backbone, "tuned": False}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return network(tmp_path / "a", 0.5, 0, "good"), network(tmp_path / "b", 30, 1, "noise")


@pytest.fixture
def labelled(tmp_path):
    return (network(tmp_path / "la", 0.5, 2, "good", ("v", "w")),
            network(tmp_path / "lb", 30, 3, "noise", ("v", "w")))  # fmt: skip


def fuse(*arguments, cwd):
    return run_here("-m", "retrieval.fusion", *arguments, cwd=cwd)


def results(cwd, folder="results/fused"):
    return (json.loads((cwd / folder / name).read_text()) for name in ("metrics.json", "submission.json"))


def test_weights_by_hand(runs, tmp_path):
    ended = fuse(*runs, "--mix", "3,1", "--group_name", "Team AAA", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "warning" not in ended.stderr
    metrics, submission = results(tmp_path)
    assert metrics["backbone"] == "0.75 good + 0.25 noise"
    assert list(metrics["weights"].values()) == [0.75, 0.25]
    assert submission["groupname"] == "Team AAA"
    assert all(len(set(names)) == 10 for names in submission["images"].values())
    low, high = metrics["score_interval"]
    assert low < metrics["score"] < high
    assert metrics["gain_over_best_run"] == pytest.approx(
        metrics["score"] - max(metrics["score_alone"].values())
    )
    assert (
        f"python -m retrieval.submission {tmp_path}/results/fused/submission.json --server_url"
        in ended.stdout
    )
    (line,) = (tmp_path / "results/fused/runs.jsonl").read_text().splitlines()
    assert len(json.loads(line)["first"]) == 3 * PEOPLE


def test_without_weights_all_are_equal_and_a_warning_says_that_nobody_checked(runs, tmp_path):
    ended = fuse(*runs, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "warning: all runs get the same weight, and nobody has checked it" in ended.stderr
    metrics, _ = results(tmp_path)
    assert list(metrics["weights"].values()) == [0.5, 0.5]
    assert metrics["gain_over_best_run_interval"][1] < 0
    assert metrics["gain_over_equal_weights"] == 0


def test_a_network_of_noise_gets_weight_0_by_labels(runs, labelled, tmp_path):
    ended = fuse(*runs, "--labelled", *labelled, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    metrics, _ = results(tmp_path)
    assert list(metrics["weights"].values()) == [1, 0]
    assert metrics["gain_over_best_run"] == 0
    assert metrics["gain_over_equal_weights_interval"][0] > 0
    assert [(tried["run"], tried["share"]) for tried in metrics["tried"]] == [(f"noise ({runs[1]})", 0)]
    assert metrics["labelled"]["equal_weights_difference"] < 0


def test_the_order_of_names_may_differ_but_a_missing_image_is_named(runs, tmp_path):
    before = fuse(*runs, "--mix", "1,1", cwd=tmp_path)
    _, submission = results(tmp_path)
    queries, gallery = read_embeddings(runs[1])
    turned = [Embeddings(part.names[::-1], part.vectors[::-1]) for part in (queries, gallery)]
    write_embeddings(runs[1] / "embeddings.npz", *turned)
    after = fuse(*runs, "--mix", "1,1", "--output_dir", "again", cwd=tmp_path)
    assert before.returncode == after.returncode == 0
    assert next(iter(list(results(tmp_path, "again"))[1:])) == submission

    other = Embeddings(["x/new.jpg", *gallery.names[3:]], gallery.vectors[2:])
    write_embeddings(runs[1] / "embeddings.npz", queries, other)
    ended = fuse(*runs, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: the gallery images of {runs[0]} and {runs[1]} differ: 3 are only in {runs[0]} (00/g0.jpg, "
        f"00/g1.jpg, 00/g2.jpg) and 1 are only in {runs[1]} (x/new.jpg): run both networks on the same "
        "folders\n"
    )


def test_wrong_commands_are_sentences(runs, labelled, tmp_path):
    for flags, sentence in (
        ((runs[0],), "give the folders of two runs or more"),
        ((*runs, "--mix", "1"), r"--mix has 1 entries for 2 runs"),
        ((*runs, "--mix", "0,0"), "all weights of --mix are 0"),
        ((*runs, "--mix", "1,-1"), "greater than or equal to 0"),
        ((*runs, "--labelled", labelled[0]), "--labelled has 1 entries for 2 runs"),
        ((*runs, "--mix", "1,1", "--labelled", *labelled), "give one of them"),
        ((*runs, "--labelled", *labelled[::-1]), "give runs of the same networks, in the same order"),
        ((*runs, "--labelled", *runs), "weights chosen on them would flatter their score"),
        ((*runs, "--output_dir", runs[0]), "is the folder of a run"),
        ((runs[0], tmp_path), r"holds no embeddings\.npz: run its command again"),
    ):
        ended = fuse(*flags, cwd=tmp_path)
        assert ended.returncode == 2, flags
        assert re.search(f"^error: .*{sentence}", ended.stderr, re.M), ended.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_two_real_runs_from_images_to_the_fused_submission(flat, few):
    folders = ("--query_dir", "query", "--gallery_dir", "gallery", "--no_report")
    for size in ("64", "96"):
        ended = run_here("model_not_tuned.py", *folders, "--engine", "torch", "--image_size", size,
                         "--save_embeddings", "--output_dir", size, cwd=flat)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        queries, gallery = read_embeddings(flat / size)
        assert (len(queries.names), len(gallery.names)) == (8, 24)
        assert np.allclose(np.linalg.norm(gallery.vectors, axis=1), 1, atol=1e-5)
    ended = run_here("-m", "retrieval.fusion", "64", "96", "--mix", "1,0", "--output_dir", "fused", cwd=flat)
    assert ended.returncode == 0, ended.stderr
    metrics, fused = results(flat, "fused")
    assert "score" not in metrics  # flat folders have no labels
    assert fused == json.loads((flat / "64" / "submission.json").read_text())
    ended = run_here("-m", "retrieval.report", ".", cwd=flat)
    assert "1 efficientnet_lite0" in ended.stdout, ended.stderr
    assert "skipped" not in ended.stderr

    ended = run_here("model_not_tuned.py", *folders, "--output_dir", "plain", cwd=flat)
    assert not (flat / "plain" / "embeddings.npz").exists()


def test_several_processes_are_refused(few, monkeypatch):
    import model_not_tuned
    from retrieval.errors import InputError
    from retrieval.pipeline import find
    from retrieval.run import Run

    monkeypatch.setattr("retrieval.pipeline.several", lambda: True)
    settings = model_not_tuned.Settings(query_dir=few, gallery_dir=few, save_embeddings=True)
    with pytest.raises(InputError, match="--save_embeddings needs all vectors in one process"):
        find(Run(settings))


# ---- --fuse: in one run


FOLDERS = ("--query_dir", "query", "--gallery_dir", "gallery")


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_a_run_with_fuse_gives_the_submission_of_the_saved_runs(few, tmp_path):
    flags = (*FOLDERS, "--flip", "--engine", "torch", "--custom_dataset")
    for number in "01":
        model = ("--model_type", f"efficientnet_lite{number}", "--output_dir", tmp_path / number)
        ended = run_here("model_not_tuned.py", *flags, *model, "--save_embeddings", "--no_report", cwd=few)
        assert ended.returncode == 0, ended.stderr
    saved = fuse(tmp_path / "0", tmp_path / "1", "--mix", "0.7,0.3", cwd=tmp_path)
    assert saved.returncode == 0, saved.stderr
    at_once = run_here("model_not_tuned.py", *flags, "--fuse", "efficientnet_lite1@none=0.3",
                       "--output_dir", tmp_path / "once", cwd=few)  # fmt: skip
    assert at_once.returncode == 0, at_once.stderr
    assert "by 0.7 efficientnet_lite0 with flip + 0.3 efficientnet_lite1@none with flip in" in at_once.stdout
    expected, submission = results(tmp_path)
    metrics, fused = results(tmp_path, "once")
    assert fused == submission
    assert metrics["score"] == expected["score"]
    assert metrics["backbone"] == "0.7 efficientnet_lite0 with flip + 0.3 efficientnet_lite1@none with flip"
    assert metrics["weights"] == {
        "efficientnet_lite0 with flip": 0.7, "efficientnet_lite1@none with flip": 0.3}  # fmt: skip
    page = (tmp_path / "once" / "report.html").read_text()
    assert "images by the first network. Near points are alike" in page
    assert "0.7 efficientnet_lite0 with flip" in page
    compared = run_here("-m", "retrieval.report", tmp_path, cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert metrics["backbone"] in compared.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_means_move_the_vectors_of_each_network_and_a_local_server_scores_them(few, tmp_path):
    shutil.copytree(few, tmp_path / "few")
    (tmp_path / "few" / "query" / "0" / "broken.png").write_bytes(b"")
    means = ("--projection", "lda", "--train_dir", few / "gallery", "--whiten")
    flags = ("--fuse", "efficientnet_lite1=0.4", *means, "--server_url", "local", "--no_report")
    out = ("--output_dir", tmp_path / "out")
    ended = run_here("model_not_tuned.py", *FOLDERS, *flags, *out, cwd=tmp_path / "few")
    assert ended.returncode == 0, ended.stderr
    metrics, _ = results(tmp_path, "out")
    assert metrics["means"] == {"projection": "lda", "whiten": True}
    assert metrics["unreadable_queries"] == ["0/broken.png"]
    assert metrics["server_score"] == pytest.approx(metrics["score"], abs=0.01)
    assert metrics["weights"] == {"efficientnet_lite0": 0.6, "efficientnet_lite1": 0.4}


def test_an_image_is_unreadable_if_no_network_could_read_it(tmp_path):
    import model_not_tuned
    from retrieval.pipeline import Vectors, rank_both
    from retrieval.records import ShardedEmbeddings
    from retrieval.run import Run

    class Network(NamedTuple):
        model_name: str
        device: str = "cpu"

    def of_a_network(*lost):
        queries = vectors_of({"q0": [0, 0] if "q0" in lost else [1, 0], "q1": [0, 0]})
        gallery = vectors_of({name: [0, 0] if name in lost else [1, 0] for name in ("g0", "g1", "g2")})
        shard = ShardedEmbeddings(gallery.names, gallery, 0, gallery.unreadable, None)
        return Vectors(queries, shard, None)

    settings = model_not_tuned.Settings(query_dir=tmp_path, gallery_dir=tmp_path, fuse=["other=0.5"])
    own = of_a_network("q0", "g0", "g1")._replace(others=[of_a_network("g1", "g2")])
    ranking, metrics = rank_both(Run(settings), None, own, Network("own"), [Network("other")])
    assert metrics["unreadable_queries"] == ["q1"]
    assert metrics["unreadable_gallery_images"] == ["g1"]
    assert ranking.rows[1].tolist() == [0, 2, 1]  # the order of the gallery, and g1 last


def test_what_cannot_be_fused_is_a_sentence_before_an_image_is_embedded(flat):
    for flags, sentence in (
        (("efficientnet_lite1=0.3", "--hubs", "5"), "--fuse ranks by the .*, which excludes --hubs: leave"),
        (("efficientnet_lit1=0.3",), "--fuse efficientnet_lit1=0.3: there is no such backbone; did you mean"),
        (("dlib@los=0.3",), "--fuse dlib@los=0.3: there is no crop los; did you mean loose"),
        (("efficientnet_lite0=0.3",), ".* a network twice, or the run's own, efficientnet_lite0: give other"),
    ):
        ended = run_here("model_not_tuned.py", *FOLDERS, "--fuse", *flags, cwd=flat)
        assert ended.returncode == 2, flags
        assert re.search(f"^error: {sentence}", ended.stderr, re.M), ended.stderr
        assert "embedded" not in ended.stdout


def test_a_network_without_its_weights_ends_the_run_before_an_image_is_embedded(flat, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    ended = run_here("model_not_tuned.py", *FOLDERS, "--fuse", "resnet50=0.3", cwd=flat)
    assert ended.returncode == 1
    said = r"^error: --fuse resnet50=0\.3: https://.*resnet50-11ad3fa6\.pth could not be downloaded"
    assert re.search(said, ended.stderr, re.M)
    assert "--weights" not in ended.stderr  # which are the run's own network's
    assert "embedded" not in ended.stdout

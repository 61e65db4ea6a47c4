"""Every script and every command of the README, run as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, Server, answer, run, run_here, small_weights
from PIL import Image

AFTER_A_FIRST_RUN = pytest.mark.usefixtures("exported")  # which takes seconds: the README's commands are ones
ROOMS = ("submission", "backbones", "report", "embedding", "fusion")  # that are scripts too
FOLDERS = ("--query_dir", "query", "--gallery_dir", "gallery")


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def ledger(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_the_forms_are_read_before_the_slow_imports():
    scripts = ("get_images", "model_not_tuned", "fine_tuning", "model_fine_tuned", "choose",
               "supcon.soup", *(f"retrieval.{room}" for room in ROOMS))  # fmt: skip
    slow = {"torch", "timm", "sklearn", "matplotlib", "jinja2", "accelerate"}
    program = f"import sys, importlib\nfor name in {scripts}:\n    importlib.import_module(name)\n    "
    program += f"assert not {slow} & set(sys.modules), name"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


COMMANDS = [["model_not_tuned.py"], ["fine_tuning.py"], ["model_fine_tuned.py"], ["choose.py"],
            ["-m", "supcon.soup"], ["-m", "retrieval.datasets"], ["-m", "retrieval.datasets", "sample"],
            *(["-m", f"retrieval.{room}"] for room in ROOMS)]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, tmp_path):
    start = run_here if command[0] == "-m" else run
    ended = start(*command, "--help", cwd=tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: ")


def test_batch_size_and_device_reach_the_network(few, monkeypatch, backbone, tmp_path):
    import model_not_tuned
    from retrieval.backbones import backbone as room

    asked, seen = [], []
    find = room.find_backbone
    network = backbone.network.__class__.forward
    monkeypatch.setattr(backbone.network.__class__, "forward",
                        lambda self, images: seen.append(len(images)) or network(self, images))  # fmt: skip

    def on_the_cpu(word, device, *more):
        asked.append((word, device))
        return find(word, "cpu", *more)

    monkeypatch.setattr(room, "find_backbone", on_the_cpu)
    folders = {"query_dir": few / "query", "gallery_dir": few / "gallery", "output_dir": tmp_path}
    model_not_tuned.main(
        model_not_tuned.Settings(**folders, custom_dataset=True, device="cuda", batch_size=3, no_cache=True)
    )
    assert asked == [("efficientnet_lite0", "cuda")]
    assert set(seen) == {1, 3}  # one to see its dimension


def test_without_the_packages_a_sentence_says_how_to_get_them():
    for script in (
        ["model_not_tuned.py"],
        ["-m", "retrieval.datasets", "sample"],
        ["-m", "retrieval.submission", "a.json"],
        ["-m", "retrieval.backbones"],
    ):
        command = [sys.executable, "-S", *script]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 1
        assert re.fullmatch(r"error: No module named '\w+': run `make demo` once and .*\n", ended.stderr)


# ---- model_not_tuned.py


@AFTER_A_FIRST_RUN
def test_a_competition_from_two_flat_folders_to_the_servers_score(flat):
    reply = b'{"groupname": "Team AAA", "accuracy": 698.0, "date": "2026-05-21 14:20:40", "scores": {}}'
    flags = (*FOLDERS, "--top_k", "10", "--group_name", "Team AAA")
    with Server(answer(body=reply)) as server:
        ended = run("model_not_tuned.py", *flags, "--server_url", server.url, cwd=flat)
    assert ended.returncode == 0, ended.stderr
    for line in (
        "found 8 query and 24 gallery images in",
        "sending 8 queries to",
        "as 'Team AAA'",
        "the server's score: 698 of 1000",
        "metrics.json",
    ):
        assert line in ended.stdout
    assert "queries: 100%" in ended.stderr  # the progress bar
    assert "warning" not in ended.stderr

    (request,) = server.received
    saved = (flat / "results" / "submission.json").read_bytes()
    assert request[3] == saved
    assert json.loads(saved)["groupname"] == "Team AAA"
    images = json.loads(saved)["images"]
    assert list(images) == sorted(os.listdir(flat / "query"))
    assert all(
        len(set(names)) == 10 and set(names) <= set(os.listdir(flat / "gallery")) for names in images.values()
    )
    assert (flat / "results" / "reply.txt").read_bytes() == reply

    found = metrics(flat / "results")
    assert (found["queries"], found["gallery_images"], found["server_score"]) == (8, 24, 698.0)
    assert "top_1" not in found
    assert set(found["seconds"]) == {"find", "backbone", "embed", "rank", "save", "send", "total"}
    assert re.search(r"\nseconds inside embedding: .*load .*, network .* on \d+ cores\n", ended.stdout)
    assert re.search(r"\nseconds: find 0\..*, report \d", ended.stdout)
    (line,) = ledger(flat / "results")
    assert line["outcome"]["accuracy"] == 698.0
    assert line["settings"]["group_name"] == "Team AAA"
    assert line["script"] == "model_not_tuned.py"
    assert "first" not in line  # nobody knows which matches are right
    assert Image.open(flat / "results" / "similar_images.png").size[0] > 1000
    page = (flat / "results" / "report.html").read_text()
    assert "the server&#39;s score: 698 of 1000" in page
    assert "<dd>698.0</dd>" in page
    assert "--group_name &#39;Team AAA&#39;" in page  # the exact command
    # the page is drawn when the score is there
    assert ended.stdout.index("the server's score") < ended.stdout.index("drew results/report.html")


@AFTER_A_FIRST_RUN
def test_practice_on_labelled_folders_sends_nothing_and_is_right_about_the_digits(few):
    flags = (*FOLDERS, "--top_k", "3", "--custom_dataset", "--output_dir", "out")
    with Server(answer()) as server:
        ended = run_here("model_not_tuned.py", *flags, cwd=few, SERVER_URL=server.url)
    assert ended.returncode == 0, ended.stderr
    assert not server.received
    assert "nothing was sent" in ended.stdout
    found = metrics(few / "out")
    # A chance ranking would be right first for a quarter of the queries, and swapped names would be chance.
    assert found["top_1"] >= 0.75
    assert found["top_k"] == found["top_3"] >= found["top_1"]
    assert set(found["per_class"]) == set("0123")
    assert f"score {found['score']:.1f} of 1000" in ended.stdout
    (line,) = ledger(few / "out")
    assert len(line["first"]) == 8
    assert line["first"].count(1) == 8 * found["top_1"]
    assert (few / "out" / f"names-{line['metrics']['names']}.json").exists()
    images = json.loads((few / "out" / "submission.json").read_bytes())["images"]
    assert {len(names) for names in images.values()} == {10}  # whatever --top_k is
    assert all("/" in name for name in images)


@AFTER_A_FIRST_RUN
def test_a_server_that_fails_loses_nothing(flat):
    (flat / ".env").write_text("QUERY_DIR=query\nGALLERY_DIR=gallery\nGROUP_NAME=Team AAA\n")
    with Server(answer(404, b"<html><h1>Not Found</h1></html>", "text/html")) as server:
        ended = run_here("model_not_tuned.py", cwd=flat, SERVER_URL=server.url)
    assert ended.returncode == 1
    assert "error: the server answered 404 Not Found (check the URL" in ended.stderr
    assert "Traceback" not in ended.stderr
    (again,) = re.findall(r"to send it to the right URL:\n    cd .* python (.*)$", ended.stderr, re.M)
    assert (flat / "results" / "report.html").exists()
    assert metrics(flat / "results")["queries"] == 8
    assert (flat / "results" / "reply.txt").read_bytes() == b"<html><h1>Not Found</h1></html>"
    assert ledger(flat / "results")[0]["outcome"]["word"] == "failed"
    with Server(answer()) as better:
        ended = run(*again.replace("http://HOST:3001/retrieval/", better.url).split(), cwd=flat)
    assert "the server's score: 698" in ended.stdout
    assert metrics(flat / "results")["server_score"] == 698
    assert "sent again as &#x27;Team AAA&#x27; on" in (flat / "results" / "report.html").read_text()
    runs = {line["script"]: line["outcome"]["word"] for line in ledger(flat / "results")}
    assert runs == {"model_not_tuned.py": "failed", "python -m retrieval.submission": "scored"}


def test_a_collapsed_network_is_not_submitted_without_a_word(few, tmp_path):
    """With a first convolution of zeros all images have one vector."""
    weights = torch.load(small_weights(tmp_path), weights_only=True)
    weights["conv_stem.weight"].zero_()
    weights["bn2.bias"] += 1  # what is left of the network
    torch.save(weights, few / "zero.pth")
    network = ("--model_type", SMALL, "--weights", "zero.pth", "--no_cache", "--engine", "torch")
    flags = (*FOLDERS, *network, "--no_report")
    with Server(answer()) as server:
        ended = run_here("model_not_tuned.py", *flags, "--server_url", server.url, cwd=few)
        assert (ended.returncode, server.received) == (1, []), ended.stderr
        assert "100 % of the queries get the same images" in ended.stderr
        assert (few / "results" / "submission.json").exists()
        assert metrics(few / "results")["collapsed"] is True
        ended = run_here("model_not_tuned.py", *flags, "--server_url", server.url, "--send_anyway", cwd=few)
        assert (ended.returncode, len(server.received)) == (0, 1)
    assert "warning: the network hardly tells these images apart" in ended.stderr


@AFTER_A_FIRST_RUN
def test_a_rehearsal_with_a_server_of_the_runs_own(few):
    proxy = "http://127.0.0.1:9"  # where nobody listens: this machine itself needs none
    flags = (*FOLDERS, "--server_url", "local", "--output_dir", "local", "--group_token", "secret-word")
    ended = run_here("model_not_tuned.py", *flags, cwd=few, http_proxy=proxy)
    assert ended.returncode == 0, ended.stderr
    found = metrics(few / "local")
    assert found["server_score"] == pytest.approx(found["score"])
    assert f"the server's score: {found['score']:g} of 1000" in ended.stdout
    reply = json.loads((few / "local" / "reply.txt").read_bytes())
    assert set(reply) == {"groupname", "accuracy", "date", "scores"}
    written = b"".join(path.read_bytes() for path in (few / "local").iterdir())
    assert b"secret-word" not in written + ended.stdout.encode() + ended.stderr.encode()


@AFTER_A_FIRST_RUN
def test_no_file_of_a_run_and_no_line_shows_a_password(few, tmp_path):
    with Server(answer(404)) as server:
        url = server.url.replace("://", "://team:secret-word@")
        ended = run_here(
            "model_not_tuned.py", *FOLDERS, "--server_url", url, "--output_dir", tmp_path, cwd=few
        )
    assert ended.returncode == 1
    assert "***@127.0.0.1" in ended.stdout
    assert server.received[0][2]["Authorization"] == "Basic dGVhbTpzZWNyZXQtd29yZA=="
    assert (tmp_path / "report.html").exists()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert b"secret-word" not in written + ended.stdout.encode() + ended.stderr.encode()


def test_a_rehearsal_without_labels_is_refused_before_the_work(flat):
    ended = run_here("model_not_tuned.py", *FOLDERS, "--server_url", "local", cwd=flat)
    assert ended.returncode == 2
    assert "a score needs class folders, but 32 images" in ended.stderr
    assert "embedded" not in ended.stdout


def test_a_second_run_embeds_nothing_and_ranks_the_same(few, exported_once, tmp_path):
    shutil.copytree(exported_once, tmp_path / "kept")
    flags = (*FOLDERS, "--custom_dataset", "--no_report", "--cache_dir", tmp_path / "kept")
    told = []
    for number, more in enumerate(((), (), ("--no_cache",), ("--verify_cache",))):
        ended = run_here("model_not_tuned.py", *flags, *more, "--output_dir", tmp_path / str(number), cwd=few)
        assert ended.returncode == 0, ended.stderr
        told.append("24 of 24 gallery images were embedded before" in ended.stdout)
    assert told == [False, True, False, True]
    assert len({(tmp_path / str(number) / "submission.json").read_bytes() for number in range(4)}) == 1
    ended = run_here("-m", "retrieval.embedding", "--cache_dir", tmp_path / "kept", cwd=tmp_path)
    assert "efficientnet_lite0 by ONNX Runtime: 32 images, 0.2 MB, used " in ended.stdout
    ended = run_here(
        "-m", "retrieval.embedding", "--cache_dir", tmp_path / "kept", "--older_than", "0", cwd=tmp_path
    )
    assert "removed what was kept of 32 images, and 1 exported networks" in ended.stdout


@AFTER_A_FIRST_RUN
def test_means_are_applied_and_recorded(few, tmp_path):
    flags = (*FOLDERS, "--custom_dataset", "--train_dir", few / "gallery")
    means = ("--projection", "lda", "--whiten", "--query_expansion", "2:3", "--hubs", "5")
    for name, more in (("plain", ["--no_report"]), ("refined", means)):
        ended = run_here("model_not_tuned.py", *flags, *more, "--output_dir", tmp_path / name, cwd=few)
        assert ended.returncode == 0, ended.stderr
    assert "queries with projection, whiten, query_expansion, hubs in" in ended.stdout
    plain, refined = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "refined")
    )
    assert "means" not in plain
    assert refined["means"] == {"projection": "lda", "whiten": True, "query_expansion": "2:3", "hubs": 5}
    submissions = [(tmp_path / name / "submission.json").read_bytes() for name in ("plain", "refined")]
    assert submissions[0] != submissions[1]
    assert (tmp_path / "refined" / "report.html").exists()


@AFTER_A_FIRST_RUN
def test_no_report_draws_nothing(flat):
    ended = run_here("model_not_tuned.py", *FOLDERS, "--no_report", cwd=flat)
    assert ended.returncode == 0, ended.stderr
    (names,) = (flat / "results").glob("names-*.json")
    assert {path.name for path in (flat / "results").iterdir()} == {
        ".lock", "submission.json", "metrics.json", "runs.jsonl", names.name,
    }  # fmt: skip
    assert ", report" not in ended.stdout


@AFTER_A_FIRST_RUN
def test_a_page_that_cannot_be_drawn_costs_only_itself(few, monkeypatch, tmp_path, caplog):
    import model_not_tuned
    from retrieval.report import run_report

    monkeypatch.setattr(
        run_report, "write_report", lambda *_: (tmp_path / "none" / "report.html").write_bytes(b"")
    )
    folders = {"query_dir": few / "query", "gallery_dir": few / "gallery", "output_dir": tmp_path}
    model_not_tuned.main(model_not_tuned.Settings(**folders, custom_dataset=True))  # and does not end with 1
    assert "the page could not be drawn" in caplog.text
    assert ledger(tmp_path)[0]["metrics"]["queries"] == 8


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (("--query_dir", "none", "--gallery_dir", "gallery"), 2, "--query_dir is 'none': there is no folder"),
        (("--query_dir", "empty", "--gallery_dir", "gallery"), 2, "empty holds no images, no files at all"),
        (("--query_dir", "texts", "--gallery_dir", "gallery"), 2, "holds no images, only 1 .txt (a.txt)"),
        ((*FOLDERS, "--custom_dataset"), 2, "nor --server_url local"),
        ((*FOLDERS, "--model_type", "efficientnet_lit0"), 2, "did you mean efficientnet_lite0?"),
        ((*FOLDERS, "--output_dir", "texts/a.txt"), 2, "is not a folder but a file"),
        ((*FOLDERS, "--output_dir", "/proc/results"), 1, "give another --output_dir"),
        ((*FOLDERS, "--projection", "lda"), 2, "give their folder by --train_dir"),
        ((*FOLDERS, "--projection", "lda", "--train_dir", "none"), 2, "none is not a folder"),
        ((*FOLDERS, "--projection", "lda", "--train_dir", "gallery"), 2, "lies in none: lay the images out"),
        ((*FOLDERS, "--hubs", "5", "--rerank", "k-reciprocal"), 2, "give one of them"),
        ((*FOLDERS, "--top", "3"), 2, "there is no flag --top"),
        ((*FOLDERS, "--image_size", "5"), 2, "--image_size is '5': it should be greater than or equal to 16"),
    ],
)  # fmt: skip
def test_wrong_input_is_a_sentence_before_anything_slow(flat, flags, status, sentence):
    for folder in ("empty", "texts"):
        (flat / folder).mkdir()
    (flat / "texts" / "a.txt").write_text("")
    ended = run_here("model_not_tuned.py", *flags, cwd=flat)
    assert ended.returncode == status
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "embedded" not in ended.stdout
    assert not (flat / "results" / "submission.json").exists()


def test_ctrl_c_leaves_no_half_written_file(flat):
    for number in range(300):
        shutil.copy(flat / "query" / os.listdir(flat / "query")[0], flat / "query" / f"copy{number}.png")
    command = [sys.executable, ROOT / "model_not_tuned.py", *FOLDERS]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=flat, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while b"found" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in errors
    assert "Traceback" not in errors
    assert os.listdir(flat / "results") == [".lock"]

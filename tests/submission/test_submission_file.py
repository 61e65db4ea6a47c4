import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import GALLERY, RANKING, Server, answer, ranking_of, run_here

from retrieval.errors import InputError
from retrieval.records import Ranking
from retrieval.submission.submission_file import (
    check_submission,
    make_submission,
    read_submission,
    write_submission,
)

# ---- make and check


def test_the_body_is_the_competitions(saved):
    body = json.loads(saved.read_bytes())
    assert body == {"groupname": "Team AAA", "images": {"q1.jpg": GALLERY[:10], "q2.jpg": GALLERY[:1:-1]}}


def test_a_small_gallery_is_warned_of_and_sent(caplog):
    submission = make_submission(ranking_of({"q.jpg": ["b.jpg", "a.jpg"]}), "team")
    assert submission["images"] == {"q.jpg": ["b.jpg", "a.jpg"]}
    assert "the gallery has 2 images, so each query gets fewer than 10 names" in caplog.text


@pytest.mark.parametrize(
    "names",
    [GALLERY[:9], [*GALLERY[:9], GALLERY[0]], [*GALLERY[:9], "unknown.jpg"], []],
    ids=["short", "repeated", "unknown", "empty"],
)
def test_a_ranking_that_the_server_would_refuse_is_never_saved(names, tmp_path):
    rows = np.array([[GALLERY.index(name) if name in GALLERY else len(GALLERY) for name in names]], np.int64)
    ranking = Ranking(["q2.jpg"], GALLERY, rows, np.ones(rows.shape))
    with pytest.raises(InputError, match=r"q2\.jpg"):
        write_submission(ranking, "team", tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        [{"query": "q.jpg", "gallery": ["a.jpg"]}],  # what a team sent
        {"groupname": "team"},
        {"groupname": "team", "images": {}},
        {"groupname": "team", "images": [["q.jpg", ["a.jpg"]]]},
        {"groupname": 7, "images": {"q.jpg": ["a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": "a.jpg"}},
        {"groupname": "team", "images": {"q.jpg": [1]}},
        {"groupname": "team", "images": {"q.jpg": []}},
        {"groupname": "team", "images": {"q.jpg": ["a.jpg", "a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": ["a.jpg", "b.jpg"], "r.jpg": ["a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": [f"{number}.jpg" for number in range(11)]}},
    ],
)
def test_what_is_no_submission(body, tmp_path):
    with pytest.raises(InputError):
        check_submission(body)
    (tmp_path / "submission.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"submission\.json: "):
        read_submission(tmp_path / "submission.json")


def test_files_that_hold_no_submission(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_submission(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        read_submission(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_submission(tmp_path / "b.json")


def earlier(folder):
    return sorted((folder / "earlier").glob("*"))


def test_the_same_submission_again_replaces_itself(saved):
    write_submission(ranking_of(RANKING, GALLERY), "Team AAA", saved.parent)
    assert not earlier(saved.parent)


def test_a_reply_is_never_dropped(saved):
    body = saved.read_bytes()
    saved.with_name("reply.txt").write_text("its reply")
    write_submission(ranking_of(RANKING, GALLERY), "Team AAA", saved.parent)
    (kept,) = earlier(saved.parent)
    assert (kept / "submission.json").read_bytes() == body
    assert (kept / "reply.txt").read_text() == "its reply"
    assert not saved.with_name("reply.txt").exists()


def test_another_submission_moves_the_earlier_one_away(saved):
    body = saved.read_bytes()
    write_submission(ranking_of(RANKING, GALLERY), "Team BBB", saved.parent)
    (kept,) = earlier(saved.parent)
    assert (kept / "submission.json").read_bytes() == body
    assert json.loads(saved.read_bytes())["groupname"] == "Team BBB"


def test_a_ranking_that_lost_a_query_is_never_saved():
    ranking = ranking_of({"q1.jpg": GALLERY}, GALLERY)
    for queries in (["q1.jpg", "q2.jpg"], ["q1.jpg", "q1.jpg"]):
        with pytest.raises(InputError, match="has 1 queries, and not the 2 that were given"):
            make_submission(replace(ranking, queries=queries), "team")


def test_the_folder_of_a_submission_is_made(tmp_path):
    path = write_submission(ranking_of(RANKING, GALLERY), "Team AAA", str(tmp_path / "new" / "results"))
    assert path == tmp_path / "new" / "results" / "submission.json"
    assert read_submission(path)["groupname"] == "Team AAA"


# ---- python -m retrieval.submission


def test_a_saved_submission_is_sent_again_from_the_command_line(saved):
    with Server(answer()) as server:
        url = f" {server.url}"
        ended = run_here("-m", "retrieval.submission", saved, "--server_url", url, cwd=saved.parent)
    assert ended.returncode == 0, ended.stderr
    assert "the server's score: 698 of 1000" in ended.stdout
    assert "removed the blanks around the server's URL" in ended.stderr
    assert server.received[0][3] == saved.read_bytes()
    (line,) = (saved.parent / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"]["accuracy"] == 698.0


def test_a_failure_on_the_command_line_is_a_sentence_a_status_and_a_line_in_the_ledger(saved):
    with Server(answer(404, b"<h1>gone</h1>")) as server:
        ended = run_here("-m", "retrieval.submission", saved, cwd=saved.parent, SERVER_URL=server.url)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 3)
    assert ended.stderr.startswith("error: the server answered 404 Not Found (check the URL")
    (line,) = (saved.parent / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"]["status"] == 404
    ended = run_here("-m", "retrieval.submission", saved, cwd=saved.parent)
    assert ended.returncode == 2
    assert "give --server_url, or set SERVER_URL in .env" in ended.stderr


def test_what_is_no_submission_is_not_sent(tmp_path):
    (tmp_path / "a.json").write_text('{"groupname": "team", "images": {}}')
    with Server(answer()) as server:
        ended = run_here("-m", "retrieval.submission", "a.json", "--server_url", server.url, cwd=tmp_path)
    assert (ended.returncode, server.received) == (2, [])
    assert "error: a.json: a submission looks like" in ended.stderr


def test_the_reply_to_the_time_before_is_kept(saved):
    saved.with_name("reply.txt").write_text("before")
    with Server(answer()) as server:
        run_here("-m", "retrieval.submission", saved, "--server_url", server.url, cwd=saved.parent)
    (kept,) = earlier(saved.parent)
    assert (kept / "reply.txt").read_text() == "before"
    assert saved.exists()


def test_a_saved_submission_has_no_images_to_start_a_server_with(saved, tmp_path):
    ended = run_here("-m", "retrieval.submission", saved, "--server_url", "local", cwd=tmp_path)
    assert ended.returncode == 2
    assert "is started by the scripts that have the images" in ended.stderr

"""The rules over real HTTP: who may submit, how often and how much, until when, what is seen."""

import json
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from conftest import ROOT
from hall import body_of, key_of, post, process, raw, table
from test_database import limit

from retrieval.errors import InputError
from retrieval.server import endpoint
from retrieval.server.rules import read_tokens
from retrieval.submission.client import send_submission

STRANGE = [
    "<script>hacked=1</script>",
    "雪山 队",
    "👩‍🚀 & co",
    "a/b",
    "..",
    ".",
    "a?b#c%20d",
    "=1+1",
    "/x/",
    "'\"",
    "ü",
]


def test_a_full_disk_is_said_and_the_submission_does_not_count(serve, monkeypatch):
    limit(monkeypatch, 12)
    with serve() as address:
        large = body_of("large") | {"more": os.urandom(25_000).hex()}
        refused = post(address, large)
        assert refused.status_code == 503
        assert refused.text.endswith("could not be kept, and does not count: send it again")
        assert post(address, body_of("small")).status_code == 200
        assert [row[1] for row in table(address)] == ["small"]


# ---- guarded


def test_a_body_that_is_too_large_is_refused(serve, folder):
    most = key_of(folder).most_bytes
    with serve() as address:
        blanks = most - len(json.dumps(body_of("whole")))
        assert post(address, json.dumps(body_of("whole")).encode() + b" " * blanks).status_code == 200
        for size in (most + 1, 2**22):
            assert post(address, b"x" * size).status_code == 413
            chunks = (b"x" * 1000 for _ in range(1 + size // 1000))
            assert requests.post(f"{address}retrieval/", data=chunks, timeout=30).status_code == 413


def test_a_slow_body_times_out_and_a_broken_one_is_logged(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "SECONDS_FOR_A_BODY", 0.3)
    head = b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with serve() as address:
        assert raw(address, head).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", urlsplit(address).port)) as gone:
            gone.sendall(head)
        assert post(address, body_of()).status_code == 200


def test_who_waits_when_the_server_ends_is_told(serve, monkeypatch):
    monkeypatch.setattr("retrieval.server.serve.LONGEST_END", 1)
    with serve() as address:
        slow = socket.create_connection(("127.0.0.1", urlsplit(address).port), timeout=20)
        slow.sendall(b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert requests.get(f"{address}healthz").status_code == 200  # it has seen that one
    assert slow.recv(2**16).startswith(b"HTTP/1.1 503 ")
    slow.close()


def test_a_group_may_submit_so_often_in_a_minute(serve, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with serve(per_minute=2) as address:
        assert [post(address, body_of("a", n)).status_code for n in range(3)] == [200, 200, 429]
        refused = post(address, {"groupname": "a", "images": {}})
        assert refused.status_code == 429  # what cannot be scored counts too
        assert int(refused.headers["Retry-After"]) == 60
        assert post(address, body_of("b")).status_code == 200
        clock[0] += 60
        assert post(address, body_of("a")).status_code == 200


def test_an_address_is_limited_where_that_is_asked_for(serve):
    with serve(per_address=2) as address:
        assert [post(address, body_of(group)).status_code for group in "abc"] == [200, 200, 429]


def test_a_group_with_a_token_is_only_who_has_it(serve):
    with serve(tokens={"a": "secret", "b": "other"}) as address:

        def status(group, **headers):
            return post(address, body_of(group), headers=headers).status_code

        assert status("a", **{"X-Group-Token": "secret"}) == 200
        assert status("a") == status("c") == 403
        for group, token in [("a", "other"), ("a", ""), ("c", ""), ("c", "secret")]:
            assert status(group, **{"X-Group-Token": token}) == 403
        wrong = post(address, {"groupname": "b", "images": {}})
        assert wrong.status_code == 403
        assert (
            requests.get(f"{address}submissions/b").status_code == 404
        )  # what others try is not on its page


def test_an_end_and_a_public_share(serve, folder):
    public, now = key_of(folder).public_queries(0.3, seed=0), [datetime(2026, 6, 1, 15, 59, tzinfo=UTC)]
    assert len(public) == 4
    rules = {"closes_at": now[0] + timedelta(minutes=1), "public": public, "now": lambda: now[0]}
    with serve(**rules) as address:
        told = post(address, body_of()).json()
        right = [name for name in public if name.endswith("0.jpg")]  # at rank 1
        partly = (600 * len(right) + 400 * 4) / 4
        assert told["accuracy"] == partly != 600
        assert len(told["scores"]["right10"]) == told["public_queries"] == 4
        assert post(address, body_of()).json() == told | {"repeat": True}
        assert table(address)[0][2] == str(partly)
        assert f"{partly:.1f}" in requests.get(f"{address}submissions/Team%20A").text
        assert "public share" in requests.get(address).text
        now[0] += timedelta(minutes=1)
        for late in (body_of("late"), body_of(), body_of(shift=1)):  # the second was answered before
            closed = post(address, late)
            assert closed.status_code == 403
            assert closed.text.startswith("the competition closed at 2026-06-01 ")
            assert closed.text.endswith(": the leaderboard has the final scores")
        assert table(address)[0][2] == "600.0"
        assert "600.0" in requests.get(f"{address}submissions/Team%20A").text
        page = requests.get(address).text
        assert "final scores" in page
        assert "public share" not in page


@pytest.mark.parametrize(("public", "share"), [
    (None, ""), (("a/qa0.jpg",), " on the public share, 600.0 over all queries"),
    (("b/qb0.jpg", "c/qc0.jpg"), " on the public share, 600.0 over all queries"),
])  # fmt: skip
def test_each_scored_submission_is_a_line_of_the_log(serve, caplog, public, share):
    """Every third query is right at rank 1, so all are worth 600; those that end in 0 are worth 1000."""
    caplog.set_level("INFO", "retrieval.server")
    with serve(public=public) as address:
        for group in ("Team A", "Team A", "b\x1b"):
            post(address, body_of(group))
    score = "1000.0" if public else "600.0"
    line = f"scored 'Team A': {score} of 1000{share}"
    assert caplog.messages[:2] == [line, f"{line}, again"]
    assert caplog.messages[2].startswith("refused with 422")


@pytest.mark.slow
def test_the_script_says_that_a_score_is_of_a_public_share(serve, tmp_path):
    (tmp_path / "submission.json").write_text(json.dumps(body_of()))
    with serve(public=("a/qa0.jpg", "b/qb0.jpg", "b/qb1.jpg")) as address:
        outcome = send_submission(tmp_path / "submission.json", f"{address}retrieval/")
    assert outcome.sentence.startswith("the server's score: 800 of 1000, on its 3 public queries only (")


def test_scores_can_be_hidden(serve):
    with serve(hide_scores=True) as address:
        assert set(post(address, body_of()).json()) == {"groupname", "accuracy", "date"}


TABLES = {
    "line 2: a has a token on an earlier line": b"a,1\na,2\n",
    "line 2: the token of b is not of ASCII": "a,1\nb,é\n".encode(),
    "line 1: 'a' is not of the form group,token": b"a\n",
    "is not a CSV table in UTF-8": b"\xff,1\n",
}


@pytest.mark.parametrize("sentence", TABLES)
def test_a_table_of_tokens_that_is_none_says_where(tmp_path, sentence):
    (tmp_path / "groups.csv").write_bytes(TABLES[sentence])
    with pytest.raises(InputError) as refused:
        read_tokens(tmp_path / "groups.csv")
    assert sentence in str(refused.value)


@pytest.mark.slow
def test_the_flags_reach_the_rules(folder, tmp_path):
    flat = {part: tmp_path / part for part in ("query", "gallery")}
    lines = ["name,identity"]
    for part, place in flat.items():
        place.mkdir()
        for path in (folder / part).glob("*/*"):
            (place / path.name).touch()
            lines.append(f"{path.name},{path.parent.name}")
    (tmp_path / "answers.csv").write_text("\n".join(lines))
    (tmp_path / "groups.csv").write_text("group,token\na,secret\n")
    flags = ["--answers", tmp_path / "answers.csv", "--tokens", tmp_path / "groups.csv", "--hide_scores",
             "--public_share", "0.5", "--seed", "3", "--per_minute", "2",
             "--closes_at", "2999-01-01 12:00"]  # fmt: skip
    with process(tmp_path, tmp_path / "c.sqlite", *map(str, flags)) as started:
        headers = {"X-Group-Token": "secret"}
        told = post(started.url, body_of("a"), headers=headers).json()
        public = key_of(folder).public_queries(0.5, 3)
        assert told["accuracy"] == 400 + 600 * sum(name.endswith("0.jpg") for name in public) / len(public)
        assert "scores" not in told
        assert post(started.url, body_of("b")).status_code == 403
        assert post(started.url, body_of("a", 1), headers=headers).status_code == 200
        assert post(started.url, body_of("a", 2), headers=headers).status_code == 429
        page = requests.get(started.url).text
        assert "6 queries of the public share" in page
        assert "Open until 2999-01-01 12:00:00." in page
        assert "X-Group-Token" in requests.get(f"{started.url}docs").text


# ---- seen


def test_groups_of_any_name_have_a_page_and_a_line(serve):
    with serve() as address:
        for group in STRANGE:
            assert post(address, body_of(group)).json()["groupname"] == group
        page = requests.get(address).text
        links = re.findall(r'href="(/submissions/[^"]*)"', page)
        assert len(links) == len(STRANGE)
        for link in links:
            there = requests.get(urljoin(address, link))
            assert (there.status_code, "600.0" in there.text) == (200, True)
        assert "<script>hacked" not in page
        assert "'=1+1" in requests.get(f"{address}leaderboard.csv").text


def test_a_browser_that_has_the_page_gets_no_second_one(serve):
    with serve() as address:
        first = requests.get(address)
        again = requests.get(address, headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        post(address, body_of())
        after = requests.get(address, headers={"If-None-Match": first.headers["ETag"]})
        assert after.status_code == 200
        assert "Team A" in after.text


def test_no_answer_holds_a_path_of_the_host(serve, folder, tmp_path):
    with serve() as address:
        answers = [
            post(address, content).text
            for content in (body_of(), [], {"groupname": "a", "images": {}}, b"\xff")
        ]
        paths = ("", "docs", "x", "openapi.json", "healthz", "leaderboard.csv", "submissions/a", "retrieval/")
        answers += [requests.get(address + path).text for path in paths]
    for answer in answers:
        for place in (str(folder), str(tmp_path), str(ROOT), "/tmp", ".py", ".sqlite"):
            assert place not in answer

"""The server over real HTTP: as a process of its own, and as a run starts it."""

import http.client
import json
import re
import signal
import socket
import sqlite3
import threading
from datetime import datetime
from urllib.parse import quote, urlsplit

import pytest
import requests
from conftest import ROOT, run
from hall import body_of, images, post, process, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

moderate = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server that many tests share."""
    place = tmp_path_factory.mktemp("database") / "competition.sqlite"
    with process(folder, place, "--per_minute", "100000") as started:
        yield started.url


# ---- protocol


def test_the_reply_is_that_of_the_competition(url):
    reply = post(url, body_of())
    assert reply.status_code == 200
    told = reply.json()
    # by hand: of four images, the first right one is at 1 for n = 0, at 2 for n = 1 and at 3 for n = 2
    people = [person for person in "abcd" for _ in range(3)]
    assert told.pop("accuracy") == (600 * 4 + 300 * 12 + 100 * 12) / 12 == 600
    assert datetime.strptime(told.pop("date"), "%Y-%m-%d %H:%M:%S")
    assert told == {
        "groupname": "Team A",
        "scores": {
            "right1": list("abcd"), "right5": people, "right10": people,
            "wrong1": [person for person in "abcd" for _ in range(2)], "wrong5": [], "wrong10": [],
            "results": [4 / 12, 1.0, 1.0],
        },
    }  # fmt: skip


def test_the_courses_own_client_works_unchanged(url, tmp_path):
    (tmp_path / "submission.json").write_text(json.dumps(body_of("client")))
    client = run(ROOT / "examples" / "client.py", f"{url}retrieval/", "submission.json", cwd=tmp_path)
    assert (client.stdout, client.stderr) == ("accuracy is 600.0\n", "")
    wrong = run(ROOT / "examples" / "client.py", f"{url}retrieval", "submission.json", cwd=tmp_path)
    assert wrong.stdout.startswith("ERROR: 404 ")


@pytest.mark.parametrize("kind", [None, "application/json", "text/plain", "multipart/form-data"])
def test_any_content_type_will_do(url, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert post(url, json.dumps(body_of(f"{kind}")).encode(), headers=headers).json()["accuracy"] == 600


def test_the_same_body_of_the_same_group_is_answered_from_the_table(folder, tmp_path):
    body = json.dumps(body_of("twice")).encode()
    with process(folder, tmp_path / "c.sqlite") as started:
        first = post(started.url, body).json()
        assert post(started.url, body).json() == first | {"repeat": True}
        assert post(started.url, body + b" ").json()["accuracy"] == 600  # another body
    with process(folder, tmp_path / "c.sqlite") as started:
        assert post(started.url, body).json() == first | {"repeat": True}
        assert requests.get(f"{started.url}healthz").json()["submissions"] == 2


def test_what_cannot_be_scored_is_refused_and_logged_on_the_groups_page(url):
    wrong = {"groupname": "careless", "images": images() | {"<b>": ["ga0.jpg"]}}
    refused = post(url, wrong)
    assert (refused.status_code, refused.text) == (422, "unknown queries: 1 (<b>)")
    page = requests.get(f"{url}submissions/careless")
    assert page.status_code == 200
    assert "unknown queries: 1 (&lt;b&gt;)" in page.text
    assert "careless" not in requests.get(url).text


def test_other_addresses_are_told_where_to_go(url):
    wrong = [("POST", "retrieval", 404), ("POST", "retrieval/%20", 404), ("GET", "x", 404)]
    for method, path, status in [*wrong, ("GET", "retrieval/", 405), ("POST", "", 405)]:
        reply = requests.request(method, url + path, json=body_of(), allow_redirects=False)
        assert reply.status_code == status
        assert "POSTed to /retrieval/" in reply.text


@pytest.mark.parametrize("path", ["", "docs", "leaderboard.csv", "healthz", "submissions/x", "openapi.json"])
def test_pages_have_heads_and_load_nothing_from_elsewhere(url, path):
    whole, head = requests.get(url + path), requests.head(url + path)
    if path != "openapi.json":  # FastAPI's own
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", whole.text)


# ---- any request at all


@moderate
@given(st.binary() | st.recursive(st.none() | st.integers() | st.floats() | st.text(),
                                  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
       .map(lambda content: json.dumps(content).encode()))  # fmt: skip
def test_any_body_is_refused_with_a_sentence(url, body):
    refused = post(url, body)
    assert refused.status_code == 422
    assert refused.text


@moderate
@given(st.text(), st.sampled_from(["", "submissions/", "submissions/?group="]))
def test_any_address_is_answered(url, text, start):
    path = start + quote(text.encode("utf-8", "replace"))
    assert requests.get(url + path, allow_redirects=False).status_code in (200, 404)


@pytest.mark.parametrize("head", [
    b"GET /submissions/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /submissions/%ED%A0%80%00%FF HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nX-Group-Token: \xff\r\nContent-Length: 0\r\n\r\n",
    b"GET /docs HTTP/1.1\r\nHost: <script>\r\n\r\n",
    b"GET /docs HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
])  # fmt: skip
def test_babble_is_no_error_of_the_servers(url, head):
    answer = raw(url, head)
    assert re.match(rb"HTTP/1.1 (200|400|404|413|422) ", answer)
    assert b"<script>" not in answer


# ---- kept


def test_kill_9_in_the_middle_loses_no_answered_submission(folder, tmp_path):
    place, answered, lock = tmp_path / "c.sqlite", set(), threading.Lock()
    enough = threading.Event()

    def group(number):
        for n in range(12):
            try:
                reply = post(started.url, {"groupname": f"group {number}", "images": images(), "n": n})
            except requests.ConnectionError:
                return
            with lock:
                answered.add((f"group {number}", reply.json()["date"], n))
            if len(answered) > 30:
                enough.set()

    with process(folder, place) as started:
        threads = [threading.Thread(target=group, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        assert enough.wait(60)
        started.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert 30 < len(answered) < 96  # in the middle
    with process(folder, place) as started:
        assert requests.get(f"{started.url}healthz").json()["submissions"] >= len(answered)
        for team, _, n in answered:
            assert post(started.url, {"groupname": team, "images": images(), "n": n}).json().get("repeat")
        with sqlite3.connect(place) as plain:
            assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# ---- the command


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_without_a_traceback(folder, tmp_path, sent, status):
    with process(folder, tmp_path / "c.sqlite") as started:
        held = http.client.HTTPConnection(urlsplit(started.url).netloc)
        held.request("GET", "/healthz")
        assert held.getresponse().status == 200  # and the connection stays
        started.send_signal(sent)
        _, errors = started.communicate(timeout=30)
        assert started.returncode == status
        assert "Traceback" not in errors
        assert not (tmp_path / "c.sqlite-wal").exists()


def test_the_first_lines_say_what_is_scored_until_when_and_for_whom(folder, tmp_path):
    (tmp_path / "tokens.csv").write_text("Team A,1234567890abcdef\n")
    flags = (
        "--closes_at",
        "2099-05-01 18:00",
        "--public_share",
        "0.5",
        "--tokens",
        str(tmp_path / "tokens.csv"),
    )
    with process(folder, tmp_path / "c.sqlite", *flags) as started:
        assert "12 queries of 4 identities, which 40 of the 40 gallery images show;" in started.said
        assert "closes at 2099-05-01 18:00" in started.said
        assert (
            f"scores are those of a public share of 6 queries; tokens are those of {tmp_path}" in started.said
        )
    with process(folder, tmp_path / "d.sqlite") as started:
        assert "open until Ctrl-C; scores are those of all queries; no tokens are asked for" in started.said


def test_what_cannot_be_served_is_a_sentence(folder, tmp_path):
    flags = ["--query_dir", folder / "query", "--gallery_dir", folder / "gallery", "--database", "c.sqlite"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = run("-m", "retrieval.server", *flags, "--port", port, cwd=tmp_path)
    assert busy.returncode == 1
    cause = f"error: the server cannot listen on 127.0.0.1:{port} (address already in use)"
    assert busy.stderr == f"{cause}: give another --port, or --host\n"
    (tmp_path / "c.sqlite").write_text("none")
    other = run("-m", "retrieval.server", *flags, "--port", 0, cwd=tmp_path)
    assert other.returncode == 2
    assert "cannot be used as a database" in other.stderr
    flat = ["--query_dir", folder / "query" / "a", "--gallery_dir", folder / "gallery" / "a"]
    unlabelled = run("-m", "retrieval.server", *flat, "--port", 0, cwd=tmp_path)
    assert unlabelled.returncode == 2
    assert "or give --answers CSV, a table with a line name,identity for each image" in unlabelled.stderr
    assert "--custom_dataset" not in unlabelled.stderr


def test_help_imports_no_server(tmp_path):
    program = "import sys, retrieval.server; print({'fastapi', 'uvicorn', 'torch'} & set(sys.modules))"
    assert run("-c", program, cwd=tmp_path).stdout == "set()\n"

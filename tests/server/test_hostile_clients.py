"""Clients that are slow, greedy or in disguise, and a database file that goes away under a running server."""

import json
import os
import random
import socket
import sqlite3
import time
from contextlib import closing, suppress
from urllib.parse import urlsplit

import pytest
import requests
from hall import body_of, images, key_of, post, process, raw, table

from retrieval.server import connections, endpoint, kept
from retrieval.server.database import Database
from retrieval.server.group_names import folded
from tests.torture.server import KINDS, attempt, patient_server

pytestmark = pytest.mark.slow
HEAD = b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\n"


def until_closed(url, start, part=b"", pause=0.02):
    """Send the start, and then a part now and then; return what came until the server closed."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20) as connection:
        connection.sendall(start)
        with suppress(ConnectionError):
            while part:
                connection.sendall(part)
                time.sleep(pause)
            return connection.recv(2**16)
        return b""


# ---- groups that look the same

LOOKALIKES = ["TEAM É", "team é", "Team E\u0301", "Ｔｅａｍ É", "Te\u200bam É", "Team\u3000É", "Team  É",
              "Te\u00adam É", "Team É\ufe0f", "\u2066Team É\u2069", "Team\u115f É",
              "Team E\u200d\u0301"]  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_lookalike_is_the_group_that_came_first(serve, name):
    assert folded(name) == "team é"
    with serve(per_minute=2) as address:
        assert post(address, body_of("Team É")).json()["groupname"] == "Team É"
        assert post(address, body_of(name)).json()["groupname"] == "Team É"
        assert [row[1] for row in table(address)] == ["Team É"]
        assert post(address, body_of(name)).status_code == 429
        page = requests.get(f"{address}submissions/", params={"group": name})
        assert "<bdi>Team É</bdi>" in page.text


def test_a_group_keeps_its_spelling_after_a_restart_and_others_stay_others(serve):
    with serve() as address:
        post(address, body_of("Team É"))
    with serve() as address:
        assert post(address, body_of("TEAM É", 1)).json()["groupname"] == "Team É"
        for other in ("Team E", "Team Ё", "TeamÉ"):
            assert post(address, body_of(other)).json()["groupname"] == other
        assert post(address, body_of("\u3164\u200b")).status_code == 422  # nothing of it can be seen


def test_a_token_is_that_of_all_lookalikes(serve):
    with serve(tokens={"Team": "secret"}) as address:
        status = [
            post(address, body_of(name), headers={"X-Group-Token": "secret"}).status_code
            for name in ("ＴＥＡＭ", "team", "Other")
        ]
    assert status == [200, 200, 403]


# ---- what costs least comes first


def test_a_wrong_token_is_refused_before_the_body_comes(serve):
    with serve(tokens={"a": "secret"}) as address:
        answer = raw(address, HEAD + b"X-Group-Token: wrong\r\nContent-Length: 1000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ")


def test_bodies_that_are_refused_are_limited_too(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_REFUSED", 2)
    with serve() as address:
        wrong = (b"{", [], b"x" * 10**6, b"{")
        assert [post(address, body).status_code for body in wrong] == [422, 422, 429, 429]
    with serve(tokens={"a": "secret"}, per_minute=2) as address:
        token = {"X-Group-Token": "secret"}
        assert [post(address, b"{", headers=token).status_code for _ in range(3)] == [422, 422, 429]


def test_too_many_queries_are_counted_and_not_looked_at(serve):
    queries = images() | {f"<{n}>": ["ga0.jpg"] for n in range(13)}
    with serve() as address:
        refused = post(address, {"groupname": "a", "images": queries})
    assert refused.text == "25 queries, and the competition has 12: send each of them once"


def test_the_limit_of_a_body_is_twice_the_longest_submission(folder):
    key = key_of(folder)  # by hand: 12 names of 9 characters, as in "a/qa0.jpg", each with 10 of 9 more
    assert key.most_bytes == 2 * 12 * (11 + 4 + 10 * (11 + 2)) + 2**16
    whole = {query: list(key.gallery)[:10] for query in key.queries}
    assert len(json.dumps({"images": whole})) < key.most_bytes - 2**16


# ---- connections


def test_a_head_that_does_not_end_ends_the_connection(serve, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_FOR_A_HEAD", 0.3)
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve() as address:
        assert until_closed(address, b"POST /retr") == b""
        for start in (HEAD, b"", whole, whole + HEAD):
            assert until_closed(address, start, b"X: y\r\n" if start.endswith(HEAD) else b"\r\n") == b""
        assert post(address, body_of()).status_code == 200


def test_a_head_that_grows_too_long_ends_the_connection(serve):
    with serve() as address:
        assert until_closed(address, HEAD, b"X" * 2**12, 0) == b""
        assert post(address, body_of()).status_code == 200


def test_a_client_that_does_not_read_its_answer_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_FOR_AN_ANSWER", 0.5)
    with serve() as address:
        assert until_closed(address, b"", b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 20, 0) == b""
        assert post(address, body_of()).status_code == 200


def test_connections_are_limited(serve, monkeypatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(connections, "SECONDS_FOR_A_HEAD", 2)
    with serve() as address:
        place = urlsplit(address).hostname, urlsplit(address).port
        held = [socket.create_connection(place, timeout=20) for _ in range(3)]
        time.sleep(0.2)
        assert until_closed(address, b"").startswith(b"HTTP/1.1 503 ")
        assert [connection.recv(1) for connection in held] == [b"", b"", b""]  # after SECONDS_FOR_A_HEAD
        assert post(address, body_of()).status_code == 200


@pytest.mark.parametrize(("proxy", "status"), [(None, 429), ("127.0.0.1", 200), ("192.0.2.1", 429)])
def test_x_forwarded_for_is_believed_behind_the_proxy_only(serve, monkeypatch, proxy, status):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with serve(per_address=1, behind_proxy=proxy) as address:
        found = [
            post(address, body_of(group), headers={"X-Forwarded-For": f"198.51.100.{n}"}).status_code
            for n, group in enumerate("ab")
        ]
    assert found == [200, status]


# ---- the database's file


@pytest.mark.parametrize("replaced", [False, True])
def test_a_database_that_goes_away_ends_the_server_and_loses_nothing(folder, tmp_path, replaced):
    place = tmp_path / "c.sqlite"
    with process(folder, place) as started:
        assert post(started.url, body_of()).status_code == 200
        if replaced:
            other = sqlite3.connect(tmp_path / "other")
            other.close()
            os.replace(tmp_path / "other", place)
        else:
            place.unlink()
        _, errors = started.communicate(timeout=30)
    assert started.returncode == 1
    assert errors.startswith(f"error: {place} was deleted or replaced while the server ran: ")
    (rescued,) = tmp_path.glob("c-*.sqlite")
    assert f"{rescued}; start again with that as --database" in errors
    with closing(sqlite3.connect(rescued)) as plain:
        assert plain.execute("SELECT team FROM submissions").fetchall() == [("Team A",)]


def test_no_row_counts_as_stored_that_is_not_in_the_file(tmp_path):
    with closing(Database(tmp_path / "c.sqlite", "key")) as database:
        (tmp_path / "c.sqlite").unlink()
        with pytest.raises(sqlite3.Error, match="was deleted or replaced"):  # which is answered with 503
            database.store("a", "2026", b"x", 1.0, 1.0, b"")
        with pytest.raises(sqlite3.Error, match="was deleted or replaced"):
            database.refuse("a", "2026", 422, "no")


# ---- the leaderboard


@pytest.mark.parametrize(("slow", "count"), [(1000, 3), (0, 1)])
def test_a_leaderboard_is_drawn_once_a_state_and_a_slow_one_seldom(serve, monkeypatch, slow, count):
    drawn, standings = [], Database.standings
    monkeypatch.setattr(Database, "standings", lambda *given: drawn.append(1) or standings(*given))
    monkeypatch.setattr(kept, "SLOW", slow)
    monkeypatch.setattr(kept, "AGES", 10**6)
    with serve() as address:
        for n in range(3):
            post(address, body_of("a", n))
            assert requests.get(address).content == requests.get(address).content
    assert len(drawn) == count


# ---- a sample of the campaign: python -m tests.torture.server


def test_no_hostile_client_disturbs_the_others():
    rng = random.Random(0)
    with patient_server() as url:
        tried = [(kind, attempt(url, kind, rng)) for kind in [*KINDS, *["lookalike"] * 20]]
    assert [(kind, broken) for kind, broken in tried if broken] == []

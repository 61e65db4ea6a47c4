"""The table on the disk: what is kept, what it says of itself, and what it survives."""

import os
import sqlite3
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from retrieval.errors import InputError
from retrieval.server.database import Database

WHEN = "2026-06-01T12:00:00.000+00:00"


def store(database, team="a", accuracy=500.0, when=WHEN, body=None):
    return database.store(
        team, when, body or f"{accuracy}{when}".encode(), accuracy, accuracy / 2, b"\x01\x00"
    )


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "competition.sqlite", "key")
    yield opened
    opened.close()


def test_what_is_kept_is_there_after_it_is_opened_again(tmp_path):
    first = Database(tmp_path / "c.sqlite", "key")
    assert store(first, body=b"the body") == (WHEN, 0)
    first.refuse("a", "2026-06-01T12:01:00.000+00:00", 422, "no")
    first.close()
    again = Database(tmp_path / "c.sqlite", "key")
    assert again.count() == 1
    assert again.submissions_of("a", public=False) == [(WHEN, 500.0, 0)]
    assert again.submissions_of("a", public=True) == [(WHEN, 250.0, 0)]
    assert again.refused_of("a") == [("2026-06-01T12:01:00.000+00:00", 422, "no")]
    again.close()
    assert not (tmp_path / "c.sqlite-wal").exists()  # all of it is in the one file
    with closing(sqlite3.connect(tmp_path / "c.sqlite")) as plain:
        (body,) = plain.execute("SELECT body FROM submissions").fetchone()
    assert zlib.decompress(body) == b"the body"


def test_it_is_written_ahead_and_waits_for_the_disk(database):
    assert database._run("PRAGMA journal_mode") == [("wal",)]
    assert database._run("PRAGMA synchronous") == [(2,)]  # FULL


def test_the_same_body_of_the_same_group_is_one_submission(database):
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda _: store(database, body=b"x"), range(8)))
    assert sorted(kept) == [(WHEN, repeats) for repeats in range(8)]
    assert store(database, when="2026-06-01T13:00:00.000+00:00", body=b"x") == (WHEN, 8)
    assert store(database, team="b", body=b"x") == (WHEN, 0)
    assert database.count() == 2


def test_the_best_of_each_group_ranks_and_of_equal_ones_the_earlier(database):
    rows = [
        ("late", 700.0, 5),
        ("early", 700.0, 2),
        ("early", 300.0, 3),
        ("early", 700.0, 4),
        ("low", 1.5, 1),
    ]
    for team, accuracy, minute in rows:
        store(database, team, accuracy, f"2026-06-01T12:0{minute}:00.000+00:00")
    found = [(s.team, s.best, s.when[11:16], s.count, s.history) for s in database.standings(public=False)]
    assert found == [
        ("early", 700.0, "12:02", 3, [700.0, 300.0, 700.0]),
        ("late", 700.0, "12:05", 1, [700.0]),
        ("low", 1.5, "12:01", 1, [1.5]),
    ]
    assert [s.best for s in database.standings(public=True)] == [350.0, 350.0, 0.75]


def limit(monkeypatch, pages):
    """From now on, databases can have so many pages: SQLite takes that for a full disk."""
    connect = Database._connect

    def limited(self):
        connection = connect(self)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(Database, "_connect", limited)


def test_a_full_disk_is_said_and_keeps_what_there_is_room_for(tmp_path, monkeypatch):
    limit(monkeypatch, 20)
    database = Database(tmp_path / "c.sqlite", "key")
    assert store(database, body=b"small") == (WHEN, 0)
    with pytest.raises(sqlite3.Error, match="full"):
        store(database, body=os.urandom(10**6))
    assert store(database, body=b"small too") == (WHEN, 0)
    assert database.count() == 2
    database.close()


def test_the_version_changes_with_each_write(database):
    before = database.version()
    assert database.version() == before
    database.refuse("a", "2026", 422, "no")
    assert database.version() != before


def test_a_history_is_the_last_lines_of_it(database, monkeypatch):
    monkeypatch.setattr("retrieval.server.database.MOST_SHOWN", 3)
    for n in range(5):
        database.refuse("a", str(n), 422, "no")
    assert [when for when, *_ in database.refused_of("a")] == ["4", "3", "2"]


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    Database(tmp_path / "ours", "key").close()
    with pytest.raises(InputError, match="other images, other answers or another public share"):
        Database(tmp_path / "ours", "another key")
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(InputError, match="cannot be used as a database"):
        Database(tmp_path / "text", "key")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE submissions (a)")
    other.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(InputError, match="another program's"):
        Database(tmp_path / "other", "key")
    with pytest.raises(InputError, match="cannot be used as a database"):
        Database(tmp_path / "nowhere" / "c.sqlite", "key")
    assert (tmp_path / "other").read_bytes() == before

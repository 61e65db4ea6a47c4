"""What the tests of the server share: folders of four people, a submission to them, and servers of them."""

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import requests
from conftest import ROOT

from get_images import find_images
from retrieval.server.answer_key import key_of_folders
from retrieval.server.rules import Rules
from retrieval.server.serve import local_server


def lay_out(folder):
    """Twelve queries and 40 gallery images of four people. No server reads more than their names."""
    for part, count in (("query", 3), ("gallery", 10)):
        for person in "abcd":
            (folder / part / person).mkdir(parents=True)
            for number in range(count):
                (folder / part / person / f"{part[0]}{person}{number}.jpg").touch()
    return folder


def images(shift=0):
    """One query of each person right at rank 1, one at 2, one at 3; or all later, by `shift`."""
    people = ["abcd", "bcda", "cdab", "dabc"]
    return {
        f"q{person}{n}.jpg": [f"g{people[(at + n + row + shift) % 4][0]}{row}.jpg" for row in (0, 3, 2, 1)]
        for at, person in enumerate("abcd")
        for n in range(3)
    }


def body_of(group="Team A", shift=0):
    return {"groupname": group, "images": images(shift)}


def key_of(folder):
    return key_of_folders(find_images(folder / "query"), find_images(folder / "gallery"))


@contextmanager
def process(folder, database, *flags):
    """The command as a host types it; its process, with its address as `url`."""
    command = [sys.executable, "-m", "retrieval.server", "--query_dir", str(folder / "query"), "--port", "0",
               "--gallery_dir", str(folder / "gallery"), "--database", str(database), *flags]  # fmt: skip
    started = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started.said = ""
        for line in started.stdout:
            started.said += line
            if found := re.search(r"see (http://\S+)", line):
                break
        else:
            pytest.fail(started.stderr.read())
        started.url = found[1]
        yield started
    finally:
        started.kill()
        started.communicate()


@contextmanager
def served(folder, database, **rules):
    """A server in this process, with rules of a test's own; its address."""
    with local_server(key_of(folder), database, Rules(**rules)) as url:
        yield url.removesuffix("retrieval/")


def post(url, content, **more):
    kind = {"data": content} if isinstance(content, bytes) else {"json": content}
    return requests.post(f"{url}retrieval/", **kind, **more, timeout=30)


def raw(url, *parts):
    """What comes for these bytes; the connection stays open for them."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        return connection.recv(2**16)


def table(url):
    """The rows of the leaderboard."""
    return [line.split(",") for line in requests.get(f"{url}leaderboard.csv").text.splitlines()[1:]]

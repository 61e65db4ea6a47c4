"""How a submission is sent again: the command that a failure prints, and what becomes of the new score."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GALLERY, RANKING, Server, answer, ranking_of
from test_client import send

from retrieval.submission.submission_file import write_submission

# ---- the printed command


def command_in(outcome):
    """The command that an outcome offers, the last line of its sentence."""
    return outcome.sentence.splitlines()[-1].strip()


@pytest.mark.parametrize(
    ("status", "place", "offered", "words"),
    [(404, "retrieval", "retrieval/", "to send it to the same URL with a slash at its end"),
     (404, "other/", None, "to send it to the right URL"),
     (405, "", None, "to send it to the right URL"),
     (301, "retrieval/", None, "to send it to the right URL"),
     (401, "retrieval/", "retrieval/ --group_token TOKEN", "if the token was wrong"),
     (403, "retrieval/", "retrieval/ --group_token TOKEN", "if the token was wrong"),
     (422, "retrieval/", "retrieval/", "to send it again"),
     (500, "retrieval/", "retrieval/", "to send it again")],
)  # fmt: skip
def test_what_was_just_refused_is_not_offered_as_the_cure(saved, status, place, offered, words):
    with Server(answer(status, b"no")) as server:
        root = server.url.removesuffix("retrieval/")
        outcome = send(saved, f"{root}{place}", token="secret", retries=0)
    assert f"is saved; {words}" in outcome.sentence
    url = "http://HOST:3001/retrieval/" if offered is None else f"{root}{offered}"
    assert command_in(outcome).endswith(f" {saved} --server_url {url}")
    assert "secret" not in outcome.sentence


@pytest.mark.parametrize("url", ["https://{}/retrieval/", "ftp://{}/", "htp://{}/"])
def test_a_url_that_leads_nowhere_is_not_offered_again(saved, url):
    with Server(answer()) as server:
        outcome = send(saved, url.format(f"127.0.0.1:{server.http.server_port}"))
    assert command_in(outcome).endswith("--server_url http://HOST:3001/retrieval/")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["plain", "two words", "it's; rm -rf $HOME", "-x"])
def test_the_printed_command_works_from_any_folder(tmp_path, monkeypatch, folder):
    """The run was started in `folder`, whose .env holds the token; the user now types in another folder."""
    here = tmp_path / folder
    here.mkdir()
    (here / ".env").write_text("GROUP_TOKEN=secret\n")
    monkeypatch.chdir(here)
    path = write_submission(ranking_of(RANKING, GALLERY), "Team AAA", "-results")
    with Server(answer(503, b"busy"), answer()) as server:
        command = command_in(send(path, server.url, retries=0))
        bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(command, shell=True, cwd="/", env=os.environ | {"PATH": bin_folder},
                               capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "the server's score: 698 of 1000" in ended.stdout
    assert server.received[1][2]["X-Group-Token"] == "secret"

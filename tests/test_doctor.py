"""retrieval/doctor.py: each thing that can be wrong on the day, beside the line that says what to do."""

import errno
import hashlib
import socket
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from conftest import Server, answer, run_here
from huggingface_hub import constants

from retrieval import doctor
from retrieval.doctor import OK, PROBLEM, WARNING
from retrieval.settings import Url

# `run_here` runs the module anew that this file has imported.
pytestmark = pytest.mark.filterwarnings("ignore:'retrieval.doctor' found in sys.modules:RuntimeWarning")
NOON = datetime(2026, 5, 21, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Empty caches of weights: torch's and the hub's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def packages(tmp_path, *lines):
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    return doctor.check_packages(tmp_path / "requirements.txt")


# ---- this machine


def test_the_packages_are_those_of_requirements_txt():
    line = doctor.check_packages(doctor.REQUIREMENTS)
    assert line.state == OK
    assert f"torch {torch.__version__.partition('+')[0]}" in line.text


@pytest.mark.parametrize(
    ("required", "state", "sentence"),
    [
        ("nowhere-to-be-found==1.0", PROBLEM, "nowhere-to-be-found not installed: run `pip install -r "),
        ("tqdm==0.0.1  # an old one", WARNING, "instead of ==0.0.1: run `pip install -r "),
        ("nowhere==1.0; sys_platform == 'another'", OK, "0 as required"),
        ("", OK, "0 as required"),
    ],
)
def test_a_package_that_is_missing_or_another(tmp_path, required, state, sentence):
    line = packages(tmp_path, "# a comment", required)
    assert line.state == state
    assert sentence in line.text


def test_a_torch_that_cannot_be_imported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = packages(tmp_path, "")
    assert line.state == PROBLEM
    assert line.text.startswith("torch cannot be imported")


@pytest.mark.parametrize("name", ["facenet", "simclr", "resnet50"])
def test_missing_weights_and_the_command_that_fetches_them(home, name):
    line = doctor.check_weights(name)
    assert line.state == PROBLEM
    assert line.text == f"{name}: missing, run `python -m retrieval.backbones --fetch {name}`"


def test_weights_show_their_digest_and_another_file_is_refused(home):
    folder = home / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet50-11ad3fa6.pth").write_bytes(b"half of it")  # its publisher's digest is in its name
    line = doctor.check_weights("resnet50")
    assert line.state == PROBLEM
    assert "is not its publisher's file: delete it, and run" in line.text
    (home / "torch" / "checkpoints").mkdir()
    (home / "torch" / "checkpoints" / "20180402-114759-vggface2.pt").write_bytes(b"abc")
    line = doctor.check_weights("facenet")
    assert line.state == OK
    assert f"SHA-256 {hashlib.sha256(b'abc').hexdigest()[:8]}" in line.text
    assert "facenet" in doctor.list_networks().text


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    assert doctor.check_device() == (OK, doctor.check_device().text)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert doctor.check_device().state == WARNING
    monkeypatch.setattr(doctor, "choose_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2_000_000_000, 16_000_000_000))
    line = doctor.check_device()  # another program has the rest
    assert (line.state, line.text) == (
        WARNING,
        "NVIDIA T4, 2.0 of 16.0 GB free: end the programs that `nvidia-smi` lists",
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15_000_000_000, 16_000_000_000))
    assert doctor.check_device().state == OK

    def busy():
        raise RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    line = doctor.check_device()
    assert line.state == PROBLEM
    assert line.text.startswith("torch cannot use it (CUDA error: all devices are busy): see `nvidia-smi`")


@pytest.mark.parametrize(("gigabytes", "state"), [(0.5, WARNING), (3.9, WARNING), (16, OK)])
def test_little_memory(monkeypatch, gigabytes, state):
    monkeypatch.setattr(doctor, "memory", lambda: gigabytes * 1e9)
    line = doctor.check_machine()
    assert line.state == state
    assert f"{gigabytes:.1f} GB of memory" in line.text


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "broken", "sentence"),
    [
        ("file", None, "it is a file"),
        ("file/below", None, "it is a file"),
        ("new", full, "no space left on device"),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, place, broken, sentence):
    (tmp_path / "file").write_bytes(b"")
    if broken:
        monkeypatch.setattr(tempfile, "TemporaryFile", broken)
    line = doctor.check_folder(tmp_path / place, "output_dir", PROBLEM)
    assert line.state == PROBLEM
    assert line.text.endswith(f"cannot be written ({sentence}): give another --output_dir")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_little_room(tmp_path, monkeypatch):
    assert doctor.check_folder(tmp_path / "a" / "b", "cache_dir", WARNING).state == OK
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5e8}))
    line = doctor.check_folder(tmp_path, "cache_dir", WARNING)
    assert line.state == WARNING
    assert "0.5 GB free: make room" in line.text


# ---- the server


@pytest.mark.parametrize(
    ("name", "token", "state", "text"),
    [
        ("my-team", "", WARNING, "'my-team' is the default: set GROUP_NAME in .env, or give --group_name"),
        ("Team AAA", "", OK, "'Team AAA', without a token"),
        ("Team AAA", "secret", OK, "'Team AAA', with a token"),
    ],
)
def test_the_group_and_its_token_which_is_not_shown(name, token, state, text):
    assert doctor.check_group(name, token) == (state, text)


@pytest.mark.parametrize(
    ("status", "headers", "state", "sentence"),
    [
        (200, (), OK, "with 200"),
        (405, (), OK, "with 405"),
        (501, (), OK, "with 501"),
        (404, (), WARNING, "with 404: compare it with the announced URL, down to its last slash"),
        (503, (), WARNING, "with 503: try again, then tell the organisers"),
        (301, (("Location", "https://a:b@other/"),), WARNING, "points to https://***@other/: set that URL"),
    ],
)
def test_what_the_server_answers(status, headers, state, sentence):
    with Server(answer(status, b"", headers=headers)) as server:
        line, reply, now = doctor.check_server(Url(server.url))
    assert line.state == state
    assert sentence in line.text
    assert doctor.check_clock(reply.headers["Date"], now).state == OK  # both are this machine's
    ((method, path, _, body),) = server.received
    assert (method, path, body) == ("HEAD", "/retrieval/", b"")


def silent(handler):
    """Take the request, and never answer."""
    handler.server_stopped.wait()


def broken_off(handler):
    """Answer with what is not HTTP."""
    handler.wfile.write(b"hello\r\n")


@pytest.mark.parametrize(("behaviour", "reason"), [(silent, ""), (broken_off, "hello")])
def test_a_server_without_an_answer(monkeypatch, behaviour, reason):
    monkeypatch.setattr(doctor, "SECONDS", 0.3)
    with Server(behaviour) as server:
        line, reply, _ = doctor.check_server(Url(server.url))
    assert (line.state, reply) == (PROBLEM, None)
    assert f"{server.url} does not answer (" in line.text
    assert reason in line.text


def test_a_server_that_cannot_be_reached(monkeypatch):
    with Server(answer()) as server:
        closed = server.url
    line, reply, _ = doctor.check_server(Url(closed))
    assert (line.state, reply) == (PROBLEM, None)
    assert "does not answer (connection refused): check host, port and network" in line.text

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for url in ("http://server-of-last-year/retrieval/", "http://10.0.0.7.8:3001/retrieval/"):
        line, _, _ = doctor.check_server(Url(url))
        assert line.state == PROBLEM
        assert "does not answer (name or service not known)" in line.text


@pytest.mark.parametrize(
    ("told", "state", "text"),
    [
        ("Thu, 21 May 2026 12:00:03 GMT", OK, "as the server's"),
        ("Thu, 21 May 2026 11:58:45 GMT", WARNING, "this machine's is 75 s ahead of the server's"),
        ("Thu, 21 May 2026 13:00:00 GMT", WARNING, "this machine's is 3600 s behind the server's"),
        ("Thu, 21 May 2026 14:00:00 +0200", OK, "as the server's"),
        ("", WARNING, "the server tells no time"),
        ("noon", WARNING, "the server tells no time"),
        ("Thu, 99 May 2026 12:00:00 GMT", WARNING, "the server tells no time"),
    ],
)
def test_the_clock_beside_the_server_s(told, state, text):
    line = doctor.check_clock(told, NOON)
    assert line.state == state
    assert text in line.text


# ---- the command


def test_all_is_well_in_about_ten_lines_and_nothing_is_sent(tmp_path):
    with Server(answer(405, b"")) as server:
        (tmp_path / ".env").write_text(
            f"SERVER_URL={server.url}\nGROUP_NAME='Team AAA'\nGROUP_TOKEN=hush\nMODEL_TYPE=dlib\n"
        )
        ended = run_here("-m", "retrieval.doctor", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert len(lines) <= 12
    assert [line for line in lines if line.startswith(PROBLEM)] == []
    assert "ok       group    'Team AAA', with a token" in lines
    assert any(line.startswith("ok       weights  dlib: ") for line in lines)
    assert "hush" not in ended.stdout
    assert [(method, body) for method, _, _, body in server.received] == [("HEAD", b"")]
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["facenet"], 1, "PROBLEM  weights  facenet: missing"),
        (["--server_url", "http://127.0.0.1:9/retrieval/"], 1, "PROBLEM  server"),
        (["--output_dir", "file"], 1, "PROBLEM  results"),
        (["--cache_dir", "file"], 0, "warning  cache"),
        (["--server_url", "local"], 0, "ok       packages"),
        (["--server_url", "http://HOST:3001/retrieval/"], 2, "HOST stands for the name"),
        (["facenett"], 2, "did you mean facenet"),
    ],
)
def test_the_exit_status_is_1_only_if_a_run_could_not_succeed(home, flags, status, sentence):
    (home / "file").write_bytes(b"")
    ended = run_here("-m", "retrieval.doctor", *flags, cwd=home)
    assert ended.returncode == status
    assert sentence in ended.stdout + ended.stderr
    assert Path(home / "file").is_file()

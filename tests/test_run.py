import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ranking_of

from get_images import ImageFile
from retrieval.errors import InputError, RunError, StopError
from retrieval.files import lock, write_whole
from retrieval.run import Outcome, Run, append_line, set_aside, stop_if_failed
from retrieval.settings import Form, NewFolder

SAVED = Outcome("saved", "saved, not sent")


class Settings(Form):
    query_dir: NewFolder = Path("query")
    gallery_dir: NewFolder = Path("gallery")
    output_dir: NewFolder = Path("results")
    save_crops: NewFolder | None = None


def images(count):
    return [ImageFile(f"{name:032x}.jpg", Path("x")) for name in range(count)]


@pytest.fixture
def no_more_than_1_mb():
    """The disk is full: no file may grow past 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


# ---- the folder


def test_a_full_disk_is_noticed_before_the_work(tmp_path, no_more_than_1_mb):
    with pytest.raises(RunError, match=r"MB cannot be written to .*results"):
        Run(Settings(output_dir=tmp_path / "results")).check_output_dir(images(10), images(10))
    assert os.listdir(tmp_path / "results") == []


def test_room_is_asked_for_as_much_as_the_submission_takes(tmp_path, monkeypatch):
    from retrieval import run
    from retrieval.submission.submission_file import write_submission

    written = []
    monkeypatch.setattr(run.os, "fsync", lambda descriptor: written.append(os.fstat(descriptor).st_size))
    queries, gallery = images(500), [ImageFile(f"gallery/ä/{name}.jpg", Path("x")) for name in range(30)]
    Run(Settings(output_dir=tmp_path)).check_output_dir(queries, gallery)
    names = [image.name for image in gallery]
    ranking = ranking_of({query.name: names[:10] for query in queries}, names)
    path = write_submission(ranking, "team", tmp_path)
    assert path.stat().st_size + 2**22 < written[0] < path.stat().st_size * 1.3 + 2**22
    assert sorted(os.listdir(tmp_path)) == [".lock", "submission.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="not a folder but a file"):
            Run(Settings(output_dir=folder)).check_output_dir(images(1), images(1))
    with pytest.raises(RunError, match="give another --output_dir"):
        Run(Settings(output_dir=Path("/proc/results"))).check_output_dir(images(1), images(1))


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, no_more_than_1_mb):
    path = tmp_path / "submission.json"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="File too large"):
        write_whole(path, bytes(2 * 10**6))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["submission.json"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_run_never_overwrites_the_files_of_another(tmp_path):
    set_aside(tmp_path)  # nothing there yet
    for content in ("first", "second", "third", "fourth"):
        set_aside(tmp_path)
        for name in ("submission.json", "reply.txt"):
            (tmp_path / name).write_text(content)
            os.utime(tmp_path / name, (10**9, 10**9))  # a file system that knows no time between them
    kept = sorted((tmp_path / "earlier").glob("*/submission.json"))
    assert sorted(path.read_text() for path in kept) == ["first", "second", "third"]
    assert all(path.with_name("reply.txt").read_text() == path.read_text() for path in kept)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_costs_a_warning(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path, "output_dir"):
        assert f"{tmp_path} cannot be locked" in caplog.text


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    settings = Settings(output_dir=tmp_path / "out")
    other = [sys.executable, "-c", "import sys; from pathlib import Path; from retrieval.files import lock; "
             "\nwith lock(Path(sys.argv[1]), 'output_dir'): print('held')", tmp_path / "out"]  # fmt: skip
    with Run(settings) as run:
        run.check_output_dir(images(1), images(2))
        second = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
        assert "InputError: another run writes into" in second.stderr
        assert "wait for its end, or give another --output_dir" in second.stderr
    assert subprocess.run(other, cwd=ROOT, capture_output=True, text=True).stdout == "held\n"


@pytest.mark.parametrize("folder", ["query", "query/results", "gallery/../query"])
def test_the_output_may_not_lie_among_the_images(folder):
    with pytest.raises(InputError, match="lies in the images' folder query"):
        Run(Settings(output_dir=folder)).check_output_dir(images(1), images(1))


def test_files_and_lines_are_on_the_disk_before_it_goes_on(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_mode) or fsync(descriptor)
    )
    write_whole(tmp_path / "submission.json", b"{}")
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]  # the file, and its name in the folder
    append_line(tmp_path, Settings(), SAVED)
    assert len(synced) == 3


# ---- the ledger


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines() if line]


def test_each_run_is_a_line(tmp_path):
    append_line(tmp_path, Settings(), SAVED, metrics={"top_1": 0.5})
    append_line(tmp_path, Settings(), Outcome("scored", "…", 698.0, 200))
    first, second = lines(tmp_path)
    assert first["metrics"] == {"top_1": 0.5}
    assert first["settings"]["output_dir"] == "results"
    assert (second["outcome"]["accuracy"], second["outcome"]["status"]) == (698.0, 200)
    assert first["time"] <= second["time"]


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    append_line(tmp_path, Settings(), SAVED)
    with open(tmp_path / "runs.jsonl", "a") as ledger:
        ledger.write('{"time": "2026-')
    append_line(tmp_path, Settings(), SAVED)
    text = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(text) == 3
    assert json.loads(text[2])["outcome"]["word"] == "saved"


@pytest.mark.slow
def test_two_processes_write_whole_lines(tmp_path):
    program = (
        "import sys; from pathlib import Path; from retrieval.forms import Form\n"
        "from retrieval.run import Outcome, append_line\n"
        "for _ in range(50): append_line(Path(sys.argv[1]), Form(), Outcome('saved', ''), padding='x' * 5000)"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(lines(tmp_path)) == 100


# ---- a run


def test_seconds_add_up_and_the_files_are_written_even_when_sending_failed(tmp_path, caplog):
    caplog.set_level("INFO")
    run = Run(Settings(output_dir=tmp_path))
    run.done("find", "found 3 images")
    run.done("send")
    assert [record.getMessage() for record in caplog.records] == ["found 3 images in 0.0 s"]
    figures = {"queries": 3, "per_class": {"a": 1}}
    run.conclude(figures, Outcome("scored", "the score", 698.0, 200), first=[1, 0, 4])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["server_score"] == 698.0
    assert metrics["per_class"] == {"a": 1}
    seconds = metrics["seconds"]
    assert seconds["total"] == pytest.approx(seconds["find"] + seconds["send"], abs=0.002)
    for number, (word, status) in enumerate((("failed", 1), ("interrupted", 130))):
        run.conclude({"queries": number}, Outcome(word, "no answer"))
        with pytest.raises(StopError) as end:
            stop_if_failed(Outcome(word, "no answer"))
        assert end.value.status == status
        assert (caplog.records[-1].levelname, caplog.records[-1].getMessage()) == ("ERROR", "no answer")
        assert json.loads((tmp_path / "metrics.json").read_text())["queries"] == number
    assert [line["outcome"]["word"] for line in lines(tmp_path)] == ["scored", "failed", "interrupted"]
    assert lines(tmp_path)[0]["metrics"] == {"queries": 3, "server_score": 698.0}
    assert lines(tmp_path)[0]["seconds"] == seconds
    assert lines(tmp_path)[0]["first"] == [1, 0, 4]


def test_runs_on_the_same_images_share_a_file_of_their_names(tmp_path):
    run = Run(Settings(output_dir=tmp_path))
    digest = run.write_names(["q 1.jpg", "雪.jpg"], ["g.jpg"])
    assert run.write_names(["q 1.jpg", "雪.jpg"], ["g.jpg"]) == digest
    (file,) = tmp_path.iterdir()
    assert file.name == f"names-{digest}.json"
    assert json.loads(file.read_text()) == {"queries": ["q 1.jpg", "雪.jpg"], "gallery_images": ["g.jpg"]}
    assert run.write_names(["q 1.jpg"], ["雪.jpg", "g.jpg"]) != digest


def test_the_score_is_said_before_a_full_disk_can_hide_it(tmp_path, caplog, no_more_than_1_mb):
    caplog.set_level("INFO")
    run = Run(Settings(output_dir=tmp_path))
    with pytest.raises(OSError, match="File too large"):
        run.conclude({"unreadable_queries": ["x" * 100] * 20_000}, Outcome("scored", "the score: 698", 698.0))
    assert "the score: 698" in caplog.text

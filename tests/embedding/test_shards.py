"""Several processes, as torchrun starts them: the ranking of one, and what is left when one of them dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, by_torch, run

import model_not_tuned
from get_images import ImageFile
from retrieval import distributed, machine
from retrieval.embedding.embed import Made
from retrieval.embedding.shards import (
    FOLDER,
    are_left,
    part_path,
    part_size,
    read_part,
    remove_shards,
    write_part,
)
from retrieval.errors import OthersEndedError
from retrieval.run import Run

# The script, with a share that is one image, so that a few images are enough for several processes; it counts
# the images that it embeds, and process 1 may be killed when its first part and those of process 0 are on the
# disk.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

import model_not_tuned
from retrieval.embedding import shards
from retrieval.console import run_script

made, write = shards.make, shards.write_part

def make(files, *more):
    with open(f"made-{os.environ.get('RANK', 0)}.txt", "a") as told:
        told.writelines(f"{file.name}\\n" for file in files)
    return made(files, *more)

def write_part(*part):
    write(*part)
    if Path("kill").exists() and os.environ.get("RANK") == "1":
        while len(list(part[0].parent.glob("gallery*.npz"))) < 4:  # the other's three are written
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

shards.make, shards.write_part, shards.part_size = make, write_part, lambda images, batch: 5
run_script(model_not_tuned.main, model_not_tuned.Settings)
"""


def together(count, few, cwd, *more):
    """The script by torchrun with so many processes; its status, output and errors."""
    (cwd / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "script.py",
               "--query_dir", few / "query", "--gallery_dir", few / "gallery", "--custom_dataset",
               "--no_report", "--no_cache", "--cache_dir", few / "networks", *more]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def embedded(cwd):
    """The images that were embedded, by whichever process."""
    return sorted(name for told in cwd.glob("made-*.txt") for name in told.read_text().split())


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """The submissions of one process, by engine."""
    out, bodies = tmp_path_factory.mktemp("alone"), {}
    for engine in ("onnx", "torch"):
        ended = run("model_not_tuned.py", "--query_dir", few / "query", "--gallery_dir", few / "gallery",
                    "--custom_dataset", "--no_report", "--no_cache", "--engine", engine,
                    "--output_dir", engine, "--cache_dir", few / "networks", cwd=out)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        bodies[engine] = (out / engine / "submission.json").read_bytes()
    return bodies


@pytest.mark.parametrize(("count", "engine"), [(2, "torch"), (6, "onnx")])
def test_the_ranking_is_byte_for_byte_that_of_one_process(few, alone, tmp_path, count, engine):
    ended = together(count, few, tmp_path, "--engine", engine)
    assert ended.returncode == 0, ended.stderr
    results = tmp_path / "results"
    assert (results / "submission.json").read_bytes() == alone[engine]
    assert len((results / "runs.jsonl").read_text().splitlines()) == 1
    assert ended.stdout.count("embedded 32 images") == 1
    assert len(embedded(tmp_path)) == 32  # each once
    assert not (results / FOLDER).exists()
    seconds = json.loads((results / "metrics.json").read_text())["embedding_seconds"]
    assert seconds["cores"] == max(1, machine.cores() // count)


def test_a_process_that_dies_ends_all_with_a_sentence_and_the_next_run_goes_on(few, alone, tmp_path):
    (tmp_path / "kill").touch()
    ended = together(2, few, tmp_path, "--engine", "onnx")
    assert ended.returncode != 0
    assert "error: another process of this run has ended" in ended.stderr
    assert 'script.py", line' not in ended.stderr  # a traceback of ours
    assert not (tmp_path / "results" / "submission.json").exists()
    before = embedded(tmp_path)
    assert 5 <= len(before) < 32
    (tmp_path / "kill").unlink()
    (tmp_path / "results" / FOLDER / "mine.tar").touch()
    ended = together(1, few, tmp_path, "--engine", "onnx")  # as any number of processes does
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"\d+ gallery images of this process's 24 were embedded by a run before", ended.stdout)
    assert (tmp_path / "results" / "submission.json").read_bytes() == alone["onnx"]
    assert len(embedded(tmp_path)) == 32  # none twice
    assert os.listdir(tmp_path / "results" / FOLDER) == ["mine.tar"]  # what is not of this run stays


def test_wrong_input_is_a_sentence_of_each_process(few, tmp_path):
    ended = together(2, few, tmp_path, "--batch_size", "0")
    assert "\nerror: --batch_size is '0'" in "\n" + ended.stderr
    assert "process 2: error: --batch_size is '0'" in ended.stderr
    assert ended.returncode != 0


def test_a_part_comes_back_as_it_was(tmp_path):
    files = [ImageFile(name, tmp_path / name) for name in ("a.jpg", "b.jpg", "ü.jpg", "d.jpg")]
    vectors = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    made = Made({"a.jpg": vectors[0], "ü.jpg": vectors[1]}, {"a.jpg": True, "ü.jpg": False},
                {"d.jpg": "an empty file"}, ["a crop"], 1)  # fmt: skip
    write_part(tmp_path / "part.npz", files, made)
    back = read_part(tmp_path / "part.npz", files)
    assert list(back.vectors) == ["a.jpg", "ü.jpg"]
    assert all(np.array_equal(back.vectors[name], made.vectors[name]) for name in made.vectors)
    assert back.faces == made.faces
    assert (back.unreadable, back.unsaved, back.kept) == (made.unreadable, made.unsaved, made.kept)
    write_part(tmp_path / "none.npz", files, Made(unreadable=dict.fromkeys("abcd", "gone")))
    assert read_part(tmp_path / "none.npz", files).vectors == {}


def test_parts_are_whole_batches():
    assert part_size(1, 4) == 16
    assert part_size(10**7, 48) % 48 == 0


def test_a_part_is_named_by_what_decides_its_vectors(tmp_path):
    files = [ImageFile(str(number), tmp_path / str(number)) for number in range(3)]
    for file in files[:2]:  # the third one is gone
        file.path.write_text(file.name)
    paths = [part_path(tmp_path, "gallery images", b"key", files)]
    assert part_path(tmp_path, "gallery images", b"key", files) == paths[0]
    paths += [part_path(tmp_path, "queries", b"key", files), part_path(tmp_path, "queries", b"other", files),
              part_path(tmp_path, "queries", b"key", files[1:])]  # fmt: skip
    files[1].path.write_text("another")
    paths.append(part_path(tmp_path, "queries", b"key", files))
    paths.append(part_path(tmp_path, "queries", b"key", files, verify=True))
    times = [getattr(files[1].path.stat(), time) for time in ("st_atime_ns", "st_mtime_ns")]
    files[1].path.write_text("ANOTHER")
    os.utime(files[1].path, ns=tuple(times))
    assert part_path(tmp_path, "queries", b"key", files) == paths[-2]
    paths.append(part_path(tmp_path, "queries", b"key", files, verify=True))
    assert len(set(paths)) == len(paths)


def test_parts_of_the_same_run_are_seen_and_removed_and_no_others(tmp_path, backbone):
    run = Run(model_not_tuned.Settings(query_dir=tmp_path, gallery_dir=tmp_path, output_dir=tmp_path))
    files, engine = [ImageFile("a.jpg", tmp_path / "a.jpg")], by_torch(backbone, 4, b"a network")
    other = by_torch(backbone, 4, b"another")
    assert not are_left(run, files, engine, "queries")
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / ".queries.npz.unfinished-1").touch()
    for each in (engine, other):
        part_path(tmp_path / FOLDER, "queries", each.key, files).touch()
    assert are_left(run, files, engine, "queries")
    assert not are_left(run, files, engine, "gallery images")
    run.parts = [part_path(tmp_path / FOLDER, "queries", engine.key, files)]
    remove_shards(run)
    assert not are_left(run, files, engine, "queries")
    assert are_left(run, files, other, "queries")
    assert len(os.listdir(tmp_path / FOLDER)) == 1


def test_an_environment_that_says_half_of_it_is_a_sentence(few, tmp_path):
    script = ("model_not_tuned.py", "--query_dir", few / "query", "--gallery_dir", few / "gallery")
    for told in ({"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many", "RANK": "x"}):
        ended = run(*script, cwd=tmp_path, **told)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith(f"error: WORLD_SIZE is {told['WORLD_SIZE']}, as of several processes")
        assert "MASTER_ADDR is not set as torchrun sets it: start the script with torchrun" in ended.stderr


def test_the_end_of_another_process_is_no_fault_of_what_is_going_on(monkeypatch):
    """What looks at a broken image, or a network that will not do, goes on; this must not."""
    handler = signal.getsignal(signal.SIGTERM)
    for word in distributed.NUMBERS:
        monkeypatch.setenv(word, "2")
    monkeypatch.setenv("MASTER_ADDR", "here")

    def tried():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        distributed.end_with_the_others()
        with pytest.raises(OthersEndedError, match="another process of this run has ended"):
            tried()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_another_launcher_left_in_the_environment_costs_no_submission(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert distributed.is_first()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.number() == 3


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert machine.cores() == 8  # another launcher's: this is the only process
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert machine.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "30")
    assert machine.cores() == 1


def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    for told, cores in (("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(told)
        assert machine.cores() == cores

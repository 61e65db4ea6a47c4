"""retrieval/distributed.py: torchrun's processes rank as one does; when one dies, all end with a sentence."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run, run_here

from retrieval import distributed, machine
from retrieval.errors import OthersEndedError, RunError
from retrieval.ranking.exact import merge

# The script, which notes the images that each process embeds; process 1 may be killed when it has written its
# first images into the cache.
SCRIPT = """
import os, signal
from pathlib import Path

import model_not_tuned
from retrieval.console import run_script
from retrieval.embedding import cache, embed

rank = os.environ.get("RANK", "0")
embedded, keep_vectors = embed._unit_vectors, cache.Cache.keep_vectors

def unit_vectors(batch, features, notes):
    with open(f"embedded-{rank}.txt", "a") as noted:
        noted.writelines(f"{name}\\n" for name in batch.names)
    return embedded(batch, features, notes)

def keep(self, maker, vectors):
    keep_vectors(self, maker, vectors)
    if vectors and rank == "1" and Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)

embed._unit_vectors, cache.Cache.keep_vectors = unit_vectors, keep
run_script(model_not_tuned.main, model_not_tuned.Settings)
"""


def together(count, folder, cwd, *more):
    """Run the script in so many processes of torchrun; return its status, output and errors."""
    (cwd / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
               "script.py", *flags_of(folder), *more]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def flags_of(folder):
    return ("--query_dir", folder / "query", "--gallery_dir", folder / "gallery", "--custom_dataset")


def embedded(cwd):
    """The images that any process has embedded."""
    return sorted(name for noted in cwd.glob("embedded-*.txt") for name in noted.read_text().split())


@pytest.fixture(scope="module")
def images(few, tmp_path_factory):
    """The digits 0 to 3, two of which are unreadable, one of them a query."""
    folder = shutil.copytree(few, tmp_path_factory.mktemp("images") / "few")
    for part in ("query", "gallery"):
        sorted((folder / part / "2").iterdir())[0].write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def alone(images, exported_once, tmp_path_factory):
    """The output folders of one process, by engine."""
    out = tmp_path_factory.mktemp("alone")
    shutil.copytree(exported_once, out / "cache")
    for engine in ("onnx", "torch"):
        ended = run_here("model_not_tuned.py", *flags_of(images), "--engine", engine, "--output_dir", engine,
                         "--no_cache", "--cache_dir", out / "cache", cwd=out)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    return {engine: out / engine for engine in ("onnx", "torch")}


def without_times(folder):
    """The metrics of a run without its time and seconds."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if "seconds" not in name and name != "time"}


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(("count", "engine"), [(2, "torch"), (3, "onnx")])
def test_the_results_are_byte_for_byte_those_of_one_process(images, alone, tmp_path, count, engine):
    ended = together(count, images, tmp_path, "--engine", engine, "--no_cache")
    assert ended.returncode == 0, ended.stderr
    results = tmp_path / "results"
    assert (results / "submission.json").read_bytes() == (alone[engine] / "submission.json").read_bytes()
    assert without_times(results) == without_times(alone[engine])
    assert set(os.listdir(results)) == set(os.listdir(alone[engine]))
    assert (results / "tsne.png").read_bytes() == (alone[engine] / "tsne.png").read_bytes()
    # Rank 0 alone logs and writes the ledger, also of the images of others.
    assert len((results / "runs.jsonl").read_text().splitlines()) == 1
    assert ended.stdout.count("embedded 32 images") == 1
    assert ended.stderr.count("could not be embedded") == 2
    assert len(embedded(tmp_path)) == 30  # each readable image once
    assert len(list(tmp_path.glob("embedded-*.txt"))) == count
    assert f" on {max(1, machine.cores() // count)} cores\n" in ended.stdout


def test_a_process_that_dies_ends_all_with_a_sentence_and_the_next_run_goes_on(
    images, alone, exported_once, tmp_path
):
    shutil.copytree(exported_once, tmp_path / "cache")
    (tmp_path / "kill").touch()
    flags = ("--engine", "onnx", "--cache_dir", tmp_path / "cache")
    ended = together(2, images, tmp_path, *flags)
    assert ended.returncode != 0
    assert "error: another process of this run has ended" in ended.stderr
    assert 'script.py", line' not in ended.stderr  # a traceback of ours
    assert not (tmp_path / "results" / "submission.json").exists()
    before = embedded(tmp_path)
    assert 0 < len(before) < 30  # those of process 1; process 0 may have embedded none by then
    (tmp_path / "kill").unlink()
    ended = together(1, images, tmp_path, *flags)  # as any number of processes does
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"\d+ of 24 gallery images were embedded before", ended.stdout)
    submission = (tmp_path / "results" / "submission.json").read_bytes()
    assert submission == (alone["onnx"] / "submission.json").read_bytes()
    assert len(embedded(tmp_path)) - 30 <= 4  # only batches that were on their way when the process died


def test_wrong_input_is_a_sentence_of_each_process(images, tmp_path):
    ended = together(2, images, tmp_path, "--batch_size", "0")
    assert "\nerror: --batch_size is '0'" in "\n" + ended.stderr
    assert "process 2: error: --batch_size is '0'" in ended.stderr
    assert ended.returncode != 0


def test_an_environment_that_says_half_of_it_is_a_sentence(images, tmp_path):
    for told in ({"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many", "RANK": "x"}):
        ended = run("model_not_tuned.py", *flags_of(images), cwd=tmp_path, **told)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith(f"error: WORLD_SIZE is {told['WORLD_SIZE']}, but ")
        assert "MASTER_ADDR is not set as torchrun sets it: start the script with torchrun" in ended.stderr


def test_the_end_of_another_process_is_no_fault_of_what_is_going_on(monkeypatch):
    """A handler of a broken image or a failing network continues; the end of another process must not."""
    handler = signal.getsignal(signal.SIGTERM)
    for name in distributed.NUMBERS:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "here")

    def tried():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        distributed.set_up()
        with pytest.raises(OthersEndedError, match="another process of this run has ended"):
            tried()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_lost_connection_is_a_sentence():
    with (
        pytest.raises(
            RunError, match=r"another process of this run has ended.*\(Connection closed by peer\)"
        ),
        distributed.explain_lost_process(),
    ):
        raise RuntimeError("Connection closed by peer\n and a stack")


def test_what_another_launcher_left_in_the_environment_costs_no_submission(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert distributed.rank() == 0
    assert distributed.rank_zero_only(len)("abc") == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.rank() == 3
    assert distributed.rank_zero_only(len)("abc") is None


@pytest.mark.parametrize(("count", "sizes"), [(8, [3, 3, 2]), (2, [1, 1, 0]), (0, [0, 0, 0])])
def test_shares_are_contiguous_and_as_large_as_each_other_but_for_one(count, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(range(count))[distributed.shard(count)])
    assert [len(share) for share in shares] == sizes
    assert [row for share in shares for row in share] == list(range(count))


def test_the_best_of_the_shares_are_the_best_of_all():
    random = np.random.default_rng(0)
    cosines = random.integers(0, 5, (20, 30)) / 4  # many ties
    rows = np.tile(np.arange(30), (20, 1))
    parts = [merge(cosines[:, part], rows[:, part], 10) for part in (slice(10), slice(10, 11), slice(11, 30))]
    merged = merge(*(np.concatenate(side, axis=1) for side in zip(*parts, strict=True)), 10)
    for found, wanted in zip(merged, merge(cosines, rows, 10), strict=True):
        assert np.array_equal(found, wanted)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "none")
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
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    for told, cores in (("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(told)
        assert machine.cores() == cores

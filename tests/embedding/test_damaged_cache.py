"""What was damaged in the cache, or changed while it was read, is made again; a run needs no cache."""

import os
import re
import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run, run_here
from corner import corner, embedded, paint, painted, runtime_of

from retrieval.backbones.zoo import PRETRAINED
from retrieval.embedding import cache as caches
from retrieval.embedding.cache import FILE, Cache
from retrieval.embedding.embed import embed
from retrieval.embedding.onnx_runtime import EXPORTED, NetworkFiles


@pytest.fixture
def backbone():
    return corner()


@pytest.fixture
def files(tmp_path):
    return painted(tmp_path / "images")


@pytest.mark.parametrize("verify", [False, True])
def test_a_file_that_changes_after_it_was_looked_up_does_not_poison_the_cache(
    files, backbone, tmp_path, monkeypatch, verify
):
    right = embed(files, runtime_of(backbone)).vectors
    content = files[0].path.read_bytes()

    def digests(cache, files, digests=Cache.digests):
        found = digests(cache, files)
        paint(files[0].path, 99)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "digests", digests)
        changed, _ = embedded(files, backbone, tmp_path / "cache", verify=verify)
    assert not np.array_equal(changed[0], right[0])  # the picture that was read
    files[0].path.write_bytes(content)
    os.utime(files[0].path, (1e9, 1e9))
    after, seen = embedded(files, backbone, tmp_path / "cache", verify=verify)
    assert np.array_equal(after, right)
    assert seen == 1  # this one had never been embedded


# Each of these values in the place of a right one; the vectors of Corner have 12 bytes.
WRONG = {
    "5 bytes": "vector = x'0102030405'",
    "4 numbers": "vector = zeroblob(16)",
    "no number": "vector = x'0000c07f0000c07f0000c07f'",
    "NULL": "vector = NULL",
    "text": "vector = 'a text'",
    "text not UTF-8": "vector = CAST(x'fffefdfcfbfafffefdfcfbfa' AS TEXT)",
    "integer": "vector = 3",
    "another's": "vector = (SELECT vector FROM vectors ORDER BY vector LIMIT 1)",
    "face": "face = 'no'",
    "checksum": "checksum = NULL",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_is_deleted_and_its_image_embedded_again(files, backbone, tmp_path, caplog, wrong):
    before, _ = embedded(files, backbone, tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute(f"UPDATE vectors SET {WRONG[wrong]} WHERE rowid IN (3, 5)")
    connection.close()
    after, seen = embedded(files, backbone, tmp_path / "cache")
    assert np.array_equal(after, before)
    assert seen in (1, 2)  # `another's` may be its own
    assert caplog.text.count("are damaged") == 1
    assert embedded(files, backbone, tmp_path / "cache")[1] == 0
    assert caplog.text.count("are damaged") == 1


@pytest.mark.parametrize("value", ["NULL", "x'01'", "'text'", "(SELECT digest FROM files LIMIT 1)"])
def test_a_wrong_digest_of_a_file_gives_no_image_the_vector_of_another(
    files, backbone, tmp_path, value, caplog, monkeypatch
):
    monkeypatch.setattr(caches, "JUST_WRITTEN", -1e9)
    before, _ = embedded(files, backbone, tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute(f"UPDATE files SET digest = {value}")
    connection.close()
    after, seen = embedded(files, backbone, tmp_path / "cache")
    assert np.array_equal(after, before)
    assert seen == 0
    assert "are damaged" in caplog.text


@pytest.mark.parametrize("seconds", [-(2**40), 2**33, 2**33 + 2**31])
def test_a_file_of_another_age_is_embedded(files, backbone, tmp_path, seconds):
    try:
        os.utime(files[0].path, (seconds, seconds))
    except (OSError, OverflowError):
        pytest.skip("the file system has no such time")
    embedded(files, backbone, tmp_path / "cache")
    assert embedded(files, backbone, tmp_path / "cache")[1] == 0


def test_the_command_lists_a_cache_of_wrong_values(files, backbone, tmp_path):
    embedded(files, backbone, tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute("UPDATE makers SET what = NULL, used = 'never'")
        connection.execute("UPDATE vectors SET vector = NULL")
    connection.close()
    ended = run_here("-m", "retrieval.embedding", "--cache_dir", "cache", cwd=tmp_path)
    assert ended.returncode == 0
    assert ": 7 images, 0.0 MB, used 1970" in ended.stdout


def replaced(first, second):
    paint(first.with_name("new.png"), 50)
    os.replace(first.with_name("new.png"), first)


def exchanged(first, second):
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)


def linked(first, second):
    first.unlink()
    os.link(second, first)


@pytest.mark.parametrize("act", [replaced, exchanged, linked])
@pytest.mark.parametrize("disk", ["dates a renaming", "does not"])
def test_another_file_of_the_same_size_and_time_is_noticed(act, disk, files, tmp_path, monkeypatch):
    def stat(path, stat=os.stat):
        found = stat(path)
        changed = found.st_ctime_ns if disk == "dates a renaming" else 0
        return SimpleNamespace(st_mode=found.st_mode, st_size=found.st_size, st_mtime_ns=found.st_mtime_ns,
                               st_ctime_ns=changed, st_ino=found.st_ino)  # fmt: skip

    monkeypatch.setattr(caches, "JUST_WRITTEN", -1e9)
    first, second = files[0].path, files[1].path
    size, time = first.stat().st_size, first.stat().st_mtime
    with monkeypatch.context() as patch:
        patch.setattr(caches, "os", SimpleNamespace(**vars(os) | {"stat": stat}))
        before = Cache(tmp_path / "cache").digests(files)
        act(first, second)
        after = Cache(tmp_path / "cache").digests(files)
    assert (first.stat().st_size, first.stat().st_mtime) == (size, time)
    assert after["0.png"] != before["0.png"]
    assert after == Cache(tmp_path / "cache", verify=True).digests(files)


@pytest.fixture
def closed(tmp_path):
    """A folder that its user may not enter, such as /root for a user id that Docker was given."""
    (tmp_path / "closed").mkdir(mode=0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(12345)
    yield tmp_path / "closed"
    if is_root:
        os.seteuid(0)
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="no modes")
@pytest.mark.parametrize("below", [".cache", ".cache/image-retrieval", "a/b/c"])
def test_a_home_that_may_not_be_entered_is_warned_of_once(closed, below, caplog, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(closed / below))
    cache, networks = Cache(closed / below), NetworkFiles(closed / below, b"key")
    networks.write(EXPORTED, b"a network")
    assert networks.read(EXPORTED) == b""
    assert cache.digests([]) == {}
    assert PRETRAINED["resnet50"].weights.find() is None
    (warning,) = caplog.messages
    assert f"the cache {cache.folder / FILE} cannot be used" in warning


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fuse", "efficientnet_lite1=0.3"], ["--no_cache"]])
def test_a_run_without_a_usable_home_warns_once_of_its_cache(flags, few, tmp_path, monkeypatch):
    monkeypatch.delenv("CACHE_DIR")
    script = ("model_not_tuned.py", "--query_dir", few / "query", "--gallery_dir", few / "gallery")
    ended = run(*script, "--engine", "onnx", *flags, cwd=tmp_path, HOME="/dev/null")
    assert ended.returncode == 0, ended.stderr
    assert "drew results/report.html" in ended.stdout
    without = "warning: the cache /dev/null/.cache/image-retrieval/embeddings-3.sqlite cannot be used"
    warned = re.findall(r"^.*(?:warning|denied|failed|temporary).*$", ended.stderr, re.M | re.I)
    assert [line.startswith(without) for line in warned] == ([] if "--no_cache" in flags else [True])

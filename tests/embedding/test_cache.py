import os
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from corner import corner, embedded, paint, painted, runtime_of
from PIL import Image

import get_images
from get_images import find_images
from retrieval.backbones import backbone as backbones
from retrieval.backbones import filling
from retrieval.backbones.backbone import LazyBackbone, find_backbone, load_backbone
from retrieval.backbones.detectors import DETECTORS
from retrieval.backbones.transform import Transform
from retrieval.backbones.zoo import PRETRAINED
from retrieval.embedding import cache as caches
from retrieval.embedding import loader, onnx_runtime, torch_runtime
from retrieval.embedding.cache import FILE, Cache, CachedVector, CacheKey, contents, prune
from retrieval.embedding.embed import embed
from retrieval.embedding.runtime import choose_runtime
from retrieval.errors import InputError


@pytest.fixture
def backbone():
    return corner()


@pytest.fixture
def files(tmp_path):
    return painted(tmp_path / "images")


def test_a_second_run_embeds_nothing_and_gives_the_same_bits(files, backbone, tmp_path, caplog):
    caplog.set_level("INFO")
    first, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 7
    second, seen = embedded(files[::-1], backbone, tmp_path / "cache")
    assert seen == 0
    assert np.array_equal(first, second[::-1])
    assert np.array_equal(first, embed(files, runtime_of(backbone, 3)).vectors)
    assert "7 of 7 images were embedded before" in caplog.text


def test_an_added_image_costs_one_and_a_copy_under_another_name_none(files, backbone, tmp_path):
    embedded(files, backbone, tmp_path / "cache")
    folder = files[0].path.parent
    paint(folder / "new.png", 99)
    (folder / "copy.png").write_bytes(files[2].path.read_bytes())
    vectors, seen = embedded(find_images(folder), backbone, tmp_path / "cache")
    assert seen == 1
    names = [file.name for file in find_images(folder)]
    assert np.array_equal(vectors[names.index("copy.png")], vectors[names.index("2.png")])


def test_a_replaced_file_is_noticed_though_it_has_the_old_size_and_time(
    files, backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr(caches, "JUST_WRITTEN", -1e9)
    before, _ = embedded(files, backbone, tmp_path / "cache")
    path = files[0].path
    size = path.stat().st_size
    paint(path, 50)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 1e9)
    changed, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 1
    assert not np.array_equal(changed[0], before[0])


def test_a_file_of_one_look_is_noticed_by_its_bytes_if_asked(files, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "look", lambda path: caches.Look(os.fsencode(path), "the same", 0))
    before, _ = embedded(files, backbone, tmp_path / "cache")
    paint(files[0].path, 50)
    assert np.array_equal(embedded(files, backbone, tmp_path / "cache")[0], before)
    verified, seen = embedded(files, backbone, tmp_path / "cache", verify=True)
    assert seen == 1
    assert not np.array_equal(verified[0], before[0])


def test_a_wrong_crop_is_made_again(files, backbone, tmp_path, read, caplog):
    first = embed(files, seeing(backbone, read), cache=Cache(tmp_path / "cache"))
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute("UPDATE crops SET pixels = zeroblob(12) WHERE rowid = 2")
        connection.execute("DELETE FROM vectors")
    connection.close()
    read.clear()
    again = embed(files, seeing(backbone, read), cache=Cache(tmp_path / "cache"))
    assert np.array_equal(again.vectors, first.vectors)
    assert len(read) == 1
    assert "are damaged" in caplog.text


def test_a_file_that_was_just_written_is_read_again(files, backbone, tmp_path):
    paint(files[0].path, 70)
    now = time.time()
    os.utime(files[0].path, (now, now))
    before, _ = embedded(files, backbone, tmp_path / "cache")
    paint(files[0].path, 80)
    os.utime(files[0].path, (now, now))  # within one tick of the clock
    after, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 1
    assert not np.array_equal(after[0], before[0])


def test_whatever_decides_a_vector_makes_another_digest(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save(load_backbone("dlib", "cpu").network.state_dict(), weights)

    def digest(*name, **how):
        return find_backbone(*(name or ("dlib", "cpu")), **how).key

    assert digest() == digest()
    found = [digest(), digest("efficientnet_lite0", "cpu"), digest(crop="none"), digest(weights=weights),
             digest(image_size=120), digest(face_margin=0.5), digest(min_face_size=0.1), digest(crop="align"),
             digest(crop="loose"), digest(detector="mtcnn")]  # fmt: skip
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found.append(digest(weights=weights))
    monkeypatch.setattr(filling, "VERSION", 99)
    found.append(digest(weights=weights))
    monkeypatch.setattr(backbones, "version_of", lambda package: "another")
    found.append(digest())
    monkeypatch.setattr(get_images, "VERSION", 99)
    found.append(digest())
    monkeypatch.setattr(backbones, "choose_device", lambda name: "cuda")
    found.append(digest())
    assert len(set(found)) == len(found)


def test_a_new_version_of_a_part_changes_the_keys_of_the_backbones_that_use_it(monkeypatch, tmp_path):
    def keys():
        names = ("efficientnet_lite0", "dlib")
        whole, faces = (find_backbone(name, "cpu") for name in names)
        runtimes = [choose_runtime(backbone, "torch", 1, 1, tmp_path) for backbone in (whole, faces)]
        return [runtime.key for runtime in runtimes] + [runtimes[1].crops_key]

    def changed(act):
        before = keys()
        with monkeypatch.context() as patch:
            act(patch)
            return [one != other for one, other in zip(before, keys(), strict=True)]

    detector = DETECTORS["dlib"]._replace(version=99)
    assert changed(lambda patch: patch.setattr(get_images, "VERSION", 99)) == [True, True, True]
    assert changed(lambda patch: patch.setitem(DETECTORS, "dlib", detector)) == [False, True, True]
    assert changed(lambda patch: patch.setitem(Transform.versions, "transform", 99)) == [True, False, False]
    row = replace(PRETRAINED["dlib"], version=99)
    assert changed(lambda patch: patch.setitem(PRETRAINED, "dlib", row)) == [False, True, False]
    assert changed(lambda patch: patch.setattr(torch_runtime, "VERSION", 99)) == [True, True, False]
    assert changed(lambda patch: patch.setattr(onnx_runtime, "VERSION", 99)) == [False, False, False]


class Half:
    """Transforms to two pixels, and says that every image below a level has no face."""

    size, enough, detects_faces, module, versions = 2, None, True, "", {}

    def __call__(self, image):
        return Transform(2, "bicubic")(image)._replace(face=bool(image[0, 0, 0] > 3))

    def __repr__(self):
        return "half"


def seeing(backbone, read):
    """A runtime for faces, whose crops are made by threads; `read` are the files that were read."""
    runtime = runtime_of(backbone)
    runtime.backbone = LazyBackbone("seeing", Half(), "cpu", b"seeing", lambda: backbone)
    return runtime


@pytest.fixture
def read(monkeypatch):
    """The files that were read, by threads, whoever asks for processes."""
    files = []

    def reading(reader, path, read=loader.Reader.read):
        files.append(path)
        return read(reader, path)

    monkeypatch.setattr(loader, "_reader_processes", lambda module: loader._reader_threads())
    monkeypatch.setattr(loader.Reader, "read", reading)
    return files


def test_faces_are_remembered_with_their_vectors(files, backbone, tmp_path, read):
    for _ in range(2):
        embeddings = embed(files, seeing(backbone, read), cache=Cache(tmp_path / "cache"))
        assert embeddings.without_face == ["0.png", "1.png", "2.png"]
    assert len(read) == 7


def test_another_network_that_sees_the_same_crops_reads_no_image(
    files, backbone, tmp_path, read, monkeypatch
):
    first = embed(files, seeing(backbone, read), cache=Cache(tmp_path / "cache"))
    with torch.no_grad():
        backbone.network.weight[1] = 2
    runtime = seeing(backbone, read)
    runtime.backbone = replace(runtime.backbone, key=b"another")
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_reader_processes", None)  # nor is a process started
        second = embed(files, runtime, cache=Cache(tmp_path / "cache"))
    assert len(read) == 7
    assert second.without_face == first.without_face
    assert np.array_equal(second.vectors, embed(files, runtime).vectors)
    assert not np.array_equal(second.vectors, first.vectors)
    assert len(read) == 14  # without the cache, all anew


def test_unreadable_images_are_tried_again(files, backbone, tmp_path, caplog):
    content = files[3].path.read_bytes()
    files[3].path.write_bytes(b"")
    vectors, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 6
    assert not vectors[3].any()
    files[3].path.write_bytes(content)
    vectors, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 1
    assert vectors[3].any()


def test_damaged_images_are_read_and_named_by_every_run(files, backbone, tmp_path, caplog):
    whole = Image.effect_noise((60, 40), 50)
    for row, kind in ((2, "JPEG"), (3, "PNG"), (5, "JPEG")):
        whole.save(files[row].path, kind)
        content = files[row].path.read_bytes()
        files[row].path.write_bytes(content[: len(content) * 2 // 3])
    first, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 7
    second, seen = embedded(files, backbone, tmp_path / "cache")
    assert seen == 3
    assert np.array_equal(first, second)
    assert first.any(axis=1).all()
    assert caplog.text.count("3 of the images are damaged (image file is truncated") == 2
    assert caplog.text.count(", ".join(files[row].name for row in (2, 3, 5))) == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_torn_or_foreign_file_is_set_aside_and_made_again(files, backbone, tmp_path, caplog, content):
    folder = tmp_path / "cache"
    before, _ = embedded(files, backbone, folder)
    (folder / FILE).write_bytes(content)
    for name in (f"{FILE}-wal", f"{FILE}-shm"):
        (folder / name).unlink(missing_ok=True)
    after, seen = embedded(files, backbone, folder)
    assert np.array_equal(after, before)
    assert seen == 7
    assert "is broken" in caplog.text
    (aside,) = folder.glob("*.broken-*")
    assert aside.read_bytes() == content
    assert embedded(files, backbone, folder)[1] == 0


def test_the_tables_of_another_version_are_set_aside(files, backbone, tmp_path):
    embedded(files, backbone, tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert embedded(files, backbone, tmp_path / "cache")[1] == 7


def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(files, backbone, tmp_path, caplog):
    vectors, seen = embedded(files, backbone, "/proc/cache" and tmp_path / "cache")
    assert seen == 7
    from pathlib import Path

    again, seen = embedded(files, backbone, Path("/proc/no-cache"))
    assert seen == 7
    assert np.array_equal(again, vectors)
    assert "this run goes on without it" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder but a file"):
        Cache(tmp_path / "file")


@pytest.mark.slow
def test_two_runs_at_once(files, tmp_path):
    program = (
        "import sys; from pathlib import Path; from test_cache import *\n"
        "network = corner()\n"
        "files = find_images(sys.argv[1])\n"
        "for number in range(20):\n"
        "    with torch.no_grad(): network.network.weight[0] = 1 + number\n"
        "    embed(files, runtime_of(network), cache=Cache(Path(sys.argv[2])))"
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "embedding")))
    }
    command = [sys.executable, "-c", program, files[0].path.parent, tmp_path / "cache"]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(2)]
    told = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "without it" not in told[0] + told[1]
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        assert connection.execute("SELECT COUNT(*) FROM vectors").fetchone() == (140,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_it_holds_and_what_nobody_used(files, backbone, tmp_path):
    cache = Cache(tmp_path / "cache")
    embed(files, runtime_of(backbone), cache=cache)
    ((what, count, size, used),) = contents(cache)
    assert (what, count, size) == ("corner by torch", 7, 7 * 12)
    assert used == pytest.approx(time.time(), abs=60)
    assert prune(cache, 1) == 0
    assert prune(cache, 0) == 7
    assert contents(cache) == []
    assert cache.rows("SELECT * FROM files") == []
    assert embedded(files, backbone, tmp_path / "cache")[1] == 7


def test_what_is_kept_while_somebody_removes_all_is_still_seen(tmp_path):
    cache, other = Cache(tmp_path / "cache"), Cache(tmp_path / "cache")
    key, vectors = (
        CacheKey(b"a network", "a network"),
        {b"an image": CachedVector(np.zeros(3, np.float32), None)},
    )
    assert cache.vectors(key, []) == {}
    assert prune(other, 0) == 0
    cache.keep_vectors(key, vectors)
    cache.flush()
    assert prune(other, 0) == 1


@pytest.mark.slow
def test_the_command_says_what_there_is_and_removes_what_is_old(few, tmp_path):
    script = ("model_not_tuned.py", "--query_dir", few / "query", "--gallery_dir", few / "gallery")
    ended = run_here(*script, "--no_report", "--engine", "onnx", "--cache_dir", "cache", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    command = ("-m", "retrieval.embedding", "--cache_dir", "cache")
    told = run_here(*command, cwd=tmp_path).stdout
    assert "efficientnet_lite0 by ONNX Runtime: 32 images, 0.2 MB, used 20" in told
    assert "exported networks: 1, 13.5 MB" in told
    assert (
        "removed what was kept of 0 images, and 0 exported"
        in run_here(*command, "--older_than", "1", cwd=tmp_path).stdout
    )
    (tmp_path / "cache" / f"{FILE}.broken-20260101-000000").touch()
    told = run_here(*command, "--older_than", "0", cwd=tmp_path).stdout
    assert f"removed 1 files of broken or earlier caches, such as {FILE}.broken-2026" in told
    assert "removed what was kept of 32 images, and 1 exported networks: unused for 0 days" in told
    assert "exported networks: 0, 0.0 MB" in told
    assert re.search(r"cache holds 0\.[01] MB", told)  # the disk has its room back
    (tmp_path / "odd" / FILE).mkdir(parents=True)
    unusable = run_here("-m", "retrieval.embedding", "--cache_dir", "odd", cwd=tmp_path)
    assert unusable.returncode == 1
    assert "error: odd cannot be read: give another --cache_dir" in unusable.stderr
    mistyped = run_here("-m", "retrieval.embedding", "--cache_dir", "cash", cwd=tmp_path)
    assert mistyped.returncode == 2
    assert "error: there is no cache in cash: give the --cache_dir of runs" in mistyped.stderr
    assert not (tmp_path / "cash").exists()


def test_a_cache_that_the_command_cannot_use_is_a_sentence(files, backbone, tmp_path):
    embedded(files, backbone, tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / FILE) as connection:
        connection.execute("DROP TABLE makers")
    connection.close()
    ended = run_here("-m", "retrieval.embedding", "--cache_dir", "cache", cwd=tmp_path)
    assert ended.returncode == 1
    assert "cannot be used now (no such table: makers): try again when no run uses it" in ended.stderr

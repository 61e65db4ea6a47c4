"""retrieval/datasets/archives.py: what is in an archive comes out, and nothing goes where it should not."""

import io
import os
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from retrieval.datasets import archives
from retrieval.datasets.archives import unpacked
from retrieval.errors import InputError, RunError


@pytest.fixture
def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def zip_of(path, **contents):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def tar_of(path, mode="w:gz", **contents):
    with tarfile.open(path, mode) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def refused(source, tmp_path, words, error=InputError):
    with pytest.raises(error, match=words), unpacked(source, tmp_path / "out"):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path != source] == []


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_images_come_out_of_an_archive_and_go_when_it_is_done(make, png, tmp_path):
    contents = {
        "a/x.png": png,
        "ü/雪.JPG": png,
        "notes.txt": b"",
        "__MACOSX/a/._x.png": b"",
        ".git/y.png": b"",
    }
    with unpacked(make(tmp_path / "archive", **contents), tmp_path / "out") as folder:
        there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert there == ["a/x.png", "ü/雪.JPG"]
        assert (folder / "a/x.png").read_bytes() == png
    assert os.listdir(tmp_path) == ["archive"]


def test_a_folder_is_itself(tmp_path):
    with unpacked(tmp_path, tmp_path / "out") as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "a\\..\\..\\x.png", "C:/x.png"])
def test_what_would_be_written_elsewhere_is_refused(make, name, png, tmp_path):
    refused(make(tmp_path / "archive", **{name: png}), tmp_path, "would be written outside its folder")


def test_links_are_refused(png, tmp_path):
    link = zipfile.ZipInfo("x.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "a.zip", tmp_path, "'x.png', which is a link")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        (tmp_path / "a.zip").unlink(missing_ok=True)
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.addfile(info)
        refused(tmp_path / "a.tar", tmp_path, "'x.png', which is a link")


def test_a_bomb_is_refused_before_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 10**6)
    bomb = zip_of(tmp_path / "a.zip", **{"x.png": bytes(10**7)})
    refused(bomb, tmp_path, "would grow from 0.0 MB to 10 MB, more than archives of images do")


def test_a_zip_that_says_less_than_it_holds_is_refused(tmp_path, png):
    archive = zip_of(tmp_path / "a.zip", **{"x.png": os.urandom(10**5)})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the size, in both headers
        struct.pack_into("<I", content, content.index(signature) + offset, 10)
    archive.write_bytes(content)
    refused(archive, tmp_path, "cannot be unpacked .*Bad CRC-32")


def test_an_archive_that_the_disk_cannot_hold_is_refused(tmp_path, png, monkeypatch):
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(9, 9, 9))
    refused(
        zip_of(tmp_path / "a.zip", **{"x.png": png}), tmp_path, "GB when unpacked, and the disk", RunError
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Rar!\x1a\x07\x01\x00", "neither a zip nor a tar archive"),
        (b"", "neither a zip nor a tar archive"),
    ],
)
def test_what_is_no_archive_is_refused(content, words, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip", tmp_path, words)


def test_half_an_archive_and_one_without_images_are_refused(tmp_path, png):
    whole = tar_of(tmp_path / "a.tar", "w:gz", **{f"{n}.png": os.urandom(5000) for n in range(20)})
    whole.write_bytes(whole.read_bytes()[:50_000])
    refused(whole, tmp_path, "cannot be unpacked")
    whole.unlink()


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"a.txt": b"x"}, r"holds no images, only 1 \.txt \(a\.txt\)"),
        (
            {"train.zip": b"PK", "query.zip": b"PK"},
            r"only 2 \.zip \(query\.zip, train\.zip\).*inside it are yours",
        ),
        ({"__MACOSX/._x.png": b"", ".DS_Store": b""}, "only hidden files"),
    ],
)
def test_an_archive_without_images_is_refused_with_what_it_holds(make, contents, words, tmp_path):
    refused(make(tmp_path / "archive", **contents), tmp_path, words)


def test_a_tar_of_zips_is_no_zip(png, tmp_path):
    inner = zip_of(tmp_path / "inner.zip", **{"x.png": png})
    content = inner.read_bytes()
    inner.unlink()
    outer = tar_of(tmp_path / "a.tar", "w", **{"train.zip": content, "query.zip": content})
    refused(outer, tmp_path, r"holds no images, only 2 \.zip")


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_members_are_known_by_their_bytes_and_the_others_are_named(make, png, tmp_path, caplog):
    names = ["a/1", "a/2.jfif", "a/3.png ", "a/4.dat", "a/.5.png"]
    others = {"a/notes.txt": b"x", "a/Thumbs.db": b"x", "__MACOSX/6": png}
    with unpacked(
        make(tmp_path / "archive", **dict.fromkeys(names, png), **others), tmp_path / "out"
    ) as there:
        assert sorted(path.name for path in there.glob("a/*")) == sorted(name[2:] for name in names)
        assert not (there / "__MACOSX").exists()
    assert caplog.messages == [
        f"files in {tmp_path / 'archive'} that are no images are left out: 1 .txt (a/notes.txt)"
    ]


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_backslashes_of_windows_are_folders(make, png, tmp_path, caplog):
    names = ["train\\ann\\1.png", "test\\query\\q.png", "test/gallery\\g.png", "__MACOSX\\train\\._1.png"]
    folders = {"train\\": b"", "test\\query\\": b""} if make is zip_of else {}
    with unpacked(
        make(tmp_path / "archive", **folders, **dict.fromkeys(names, png)), tmp_path / "out"
    ) as there:
        found = sorted(path.relative_to(there).as_posix() for path in there.rglob("*.png"))
    assert found == ["test/gallery/g.png", "test/query/q.png", "train/ann/1.png"]
    assert not caplog.messages
    twice = make(tmp_path / "archive", **dict.fromkeys(["a/1.png", "a\\1.png"], png))
    refused(twice, tmp_path, "holds a/1.png twice")


def test_a_zip_with_a_password_is_said_to_be_locked(tmp_path, png):
    archive = zip_of(tmp_path / "a.zip", **{"x.png": png})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags, in both headers
        content[content.index(signature) + offset] |= 1
    archive.write_bytes(content)
    refused(archive, tmp_path, "locked by a password")


@pytest.mark.parametrize("method", ["zip", "lzma zip", "gz", "bz2", "xz"])
def test_a_damaged_archive_is_unpacked_or_refused(method, tmp_path, png):
    """Seeded flips of a byte, and cuts, in each compression."""
    contents = {f"{n}.png": png + os.urandom(300) for n in range(5)}
    path, random = tmp_path / "a", np.random.default_rng(0)
    if method.endswith("zip"):
        kind = zipfile.ZIP_LZMA if "lzma" in method else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    else:
        tar_of(path, f"w:{method}", **contents)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged[: random.integers(1, len(whole))] if random.random() < 0.3 else damaged)
        try:
            with unpacked(path, tmp_path / "out"):
                pass
        except (InputError, RunError) as error:
            assert str(path) in str(error)  # noqa: PT017

import os

import pytest
from folders import names, touch
from PIL import Image

from get_images import find_images, find_query_and_gallery, may_begin_image
from retrieval.datasets.readable import warn_of_unreadable

PHOTO = Image.effect_noise((60, 40), 50)


def test_images_are_found_in_every_folder_by_any_of_the_suffixes_sorted_by_name(tmp_path):
    touch(tmp_path, "b.jpg", "a/z.JPEG", "a/b/c.Png", "a.webp", "B.bmp", "c.GIF", "d.tif", "e.TIFF")
    touch(tmp_path, "notes.txt", "Thumbs.db", "jpg", "x.jpg.part")
    expected = ["B.bmp", "a.webp", "a/b/c.Png", "a/z.JPEG", "b.jpg", "c.GIF", "d.tif", "e.TIFF"]
    assert names(tmp_path) == expected
    assert [image.path for image in find_images(tmp_path)] == [tmp_path / name for name in expected]


def test_other_files_are_said_but_not_what_systems_leave(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "Thumbs.db", "desktop.ini", ".DS_Store")
    find_images(tmp_path)
    assert not caplog.records
    touch(tmp_path, "notes.txt", "x/notes.txt", "query.jpg.part", "README", *(f"{n}.csv" for n in range(6)))
    find_images(tmp_path)
    assert (
        f"files in {tmp_path} that are no images are left out: 6 .csv (0.csv, 1.csv, 2.csv, 3.csv, 4.csv, …)"
        ", 2 .txt (notes.txt, x/notes.txt), 1 without a suffix (README), 1 .part (query.jpg.part)"
    ) in caplog.text


def test_hidden_folders_and_what_systems_hide_are_no_images(tmp_path, caplog):
    touch(tmp_path, "._a.jpg", ".a.jpg", ".cache/b.jpg", "__MACOSX/a.jpg", "a.jpg")
    PHOTO.save(tmp_path / ".cache" / "c.jpg")
    assert names(tmp_path) == ["a.jpg"]
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.jpg ", "a", "a.JFIF", "a.jpe", ".a.jpg", "a.jpg.txt", "a.avif", "a.jp2"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF"])
def test_an_image_is_known_by_its_bytes_whatever_its_name(tmp_path, caplog, name, kind):
    PHOTO.save(tmp_path / name, kind)
    assert names(tmp_path) == [name]
    assert bool(caplog.records) == (name == ".a.jpg")
    assert may_begin_image((tmp_path / name).read_bytes()[:16])


def test_queries_that_no_decoder_opens_are_counted_by_kind(tmp_path, caplog, monkeypatch):
    touch(tmp_path, "query/empty.jpg", "gallery/empty.jpg")
    for name in ("a.jpg", "b.png"):
        PHOTO.save(tmp_path / "query" / name)
    for name in ("c.jpg", "d.heic", "e.heic"):
        (tmp_path / "query" / name).write_text("<html>404")
    queries, _ = find_query_and_gallery(tmp_path / "query", tmp_path / "gallery")
    assert len(queries) == 6
    warn_of_unreadable(queries)
    assert "get the gallery in its order: 2 .jpg (c.jpg, empty.jpg), 2 .heic (d.heic, e.heic)" in caplog.text
    assert "pillow-heif" not in caplog.text
    monkeypatch.delitem(Image.OPEN, "HEIF")  # as if it were not installed
    warn_of_unreadable(queries)
    assert "2 .heic (d.heic, e.heic) (`pip install pillow-heif` reads .heic)" in caplog.text


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path, "album.jpg/a.jpg")
    assert names(tmp_path) == ["album.jpg/a.jpg"]


def test_links_are_followed_once_and_a_loop_ends(tmp_path):
    touch(tmp_path, "top/real/a.jpg", "elsewhere/b.jpg")
    top = tmp_path / "top"
    (top / "again").symlink_to(top / "real")  # "again" sorts first, but the real folder gives the name
    (top / "other").symlink_to(tmp_path / "elsewhere")
    (top / "other2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(top)
    (top / "self").symlink_to(top / "self")
    (top / "photo.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    assert names(top) == ["other/b.jpg", "photo.jpg", "real/a.jpg"]


def test_a_dangling_link_is_still_a_query(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    assert names(tmp_path) == ["a.jpg", "b.jpg"]


def test_no_images_is_an_error_that_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no files at all"):
        find_images(tmp_path)
    touch(tmp_path, "a.txt", "b.txt")
    with pytest.raises(FileNotFoundError, match=r"only 2 .txt \(a.txt, b.txt\)"):
        find_images(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"a.txt is not a folder"):
        find_images(tmp_path / "a.txt")


@pytest.mark.parametrize(("query", "gallery"), [("x", "x"), ("x/y", "x"), ("x", "x/y")])
def test_folders_that_share_images_are_allowed_and_said(tmp_path, caplog, query, gallery):
    touch(tmp_path, "x/a.jpg", "x/y/b.jpg", "xy/c.jpg")
    find_query_and_gallery(tmp_path / query, tmp_path / gallery)
    assert "can find itself" in caplog.text
    caplog.clear()
    find_query_and_gallery(tmp_path / "x", tmp_path / "xy")
    assert "can find itself" not in caplog.text


def test_an_unreadable_folder_is_named_and_passed_over(tmp_path, caplog, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")

    def scandir(folder, scandir=os.scandir):
        if folder == str(tmp_path / "b"):  # as root no folder is unreadable
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(tmp_path) == ["a/1.jpg", "c/3.jpg"]
    assert f"the folder {tmp_path / 'b'} cannot be read, and its images are left out: permission denied" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("query", "gallery", "queries", "answers", "why"),
    [
        ("test/gallery", "test/query", ["a.jpg"], ["b.jpg"], "so their names say"),
        ("day/Gallery_images", "day/x", ["a.jpg"], ["b.jpg"], "so their names say"),
        ("a", "b", [f"{n}.jpg" for n in range(7)], [f"{n}.jpg" for n in range(3)], "7 queries, but only 3"),
        ("a", "b", [f"{n}/x.jpg" for n in range(5)], [f"{n % 2}/{n}.jpg" for n in range(9)], "5 labels"),
        ("query", "gallery", ["a.jpg", "b.jpg"], ["c.jpg"], ""),
        ("a", "b", ["0/x.jpg", "1/x.jpg"], [f"{n}/{n}.jpg" for n in range(9)], ""),
    ],
)  # fmt: skip
def test_folders_that_look_swapped_are_said(tmp_path, caplog, query, gallery, queries, answers, why):
    touch(tmp_path / query, *queries)
    touch(tmp_path / gallery, *answers)
    find_query_and_gallery(tmp_path / query, tmp_path / gallery)
    assert ("swapped?" in caplog.text) == bool(why)
    assert why in caplog.text

"""retrieval/datasets/readable.py: files that cannot be read are named, and cost no others."""

import json
import os
import socket

import pytest

from get_images import find_images
from retrieval.datasets.layouts import lay_out_competition, lay_out_split
from retrieval.datasets.readable import readable_images
from retrieval.errors import InputError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"P6 1 1 255 rgb")  # an image of one pixel


@pytest.mark.parametrize("name", ["train\\ann\\1.jpg", "ann\\1.jpg", "a/b\\1.jpg"])
@pytest.mark.skipif(os.sep != "/", reason="Windows has no such names")
def test_backslashes_that_an_unpacker_left_in_names_are_folders(name, tmp_path):
    write(tmp_path, name)
    (image,) = readable_images(tmp_path, tmp_path)[0]
    assert image.name == name.replace("\\", "/")
    assert image.path == tmp_path / name
    write(tmp_path, image.name)
    with pytest.raises(InputError, match=f"holds {image.name} 2 times, with / and with"):
        readable_images(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["..\\..\\1.jpg", "a\\..\\..\\..\\1.jpg", "a/..\\1.jpg"])
@pytest.mark.skipif(os.sep != "/", reason="Windows has no such names")
def test_no_name_leads_out_of_its_folder(name, tmp_path):
    write(tmp_path, name)
    (image,) = readable_images(tmp_path, tmp_path)[0]
    assert image.name == name


def test_a_file_that_this_user_may_not_read_is_left_out(tmp_path, monkeypatch, caplog):
    def closed(path, *how, opened=open):
        if str(path).endswith("closed.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how)

    monkeypatch.setattr("builtins.open", closed)
    write(tmp_path, "a/closed.jpg", "a/open.jpg", "closed.jpg")
    images, notes = readable_images(tmp_path, tmp_path)
    assert [image.name for image in images] == ["a/open.jpg"]
    assert notes == {"unreadable": dict.fromkeys(["a/closed.jpg", "closed.jpg"], "permission denied")}
    assert "2 files of" in caplog.text
    (tmp_path / "a/open.jpg").unlink()
    with pytest.raises(InputError, match=r"no image of .* can be read"):
        readable_images(tmp_path, tmp_path)


@pytest.mark.parametrize(("lay_out", "first"), [(lay_out_split, "a"), (lay_out_competition, "query")])
def test_links_to_nothing_pipes_sockets_and_loops_are_left_out_and_named(lay_out, first, tmp_path, caplog):
    source = tmp_path / "source"
    write(source, *(f"{folder}/{number}.jpg" for folder in (first, "gallery") for number in range(6)))
    os.symlink("nowhere", source / "gallery" / "link.png")
    os.symlink("loop.png", source / "gallery" / "loop.png")
    os.mkfifo(source / "gallery" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(source / "gallery")  # the name of a socket may not be long
        listening.bind("socket.png")
    lay_out(tmp_path / "out", source, keep_duplicates=True)
    left_out = {
        "gallery/link.png": "a link to nothing",
        "gallery/loop.png": "too many levels of symbolic links",
        "gallery/pipe.png": "not a regular file",
        "gallery/socket.png": "not a regular file",
    }
    told = ", ".join(f"{name} ({why})" for name, why in left_out.items())
    assert f"4 files of {source} cannot be read and are left out: {told}" in caplog.text
    plan = json.loads((tmp_path / "out" / "split.json").read_bytes())
    assert plan["unreadable"] == left_out
    assert len(find_images(tmp_path / "out")) == 12

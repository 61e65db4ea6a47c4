"""retrieval/datasets/readable.py: files that cannot be read are named, and cost no others."""

import os

import pytest

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

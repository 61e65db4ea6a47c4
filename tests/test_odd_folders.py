"""A script on folders with broken, damaged and repeated images."""

import json
import os

import pytest
from conftest import run_here
from PIL import Image
from sklearn.datasets import load_sample_image

pytestmark = pytest.mark.usefixtures("exported")  # an export takes seconds
FOLDERS = ("--query_dir", "query", "--gallery_dir", "gallery")


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_broken_images_cost_nothing_but_themselves(flat):
    for name, content in (("0.jpg", b""), ("a.JPG", b"text"), ("z.png", b"\x89PNG\r\n\x1a\n")):
        (flat / "query" / name).write_bytes(content)
        (flat / "gallery" / name).write_bytes(content)
    Image.new("1", (30_000, 30_000)).save(flat / "query" / "huge.png")
    ended = run_here("model_not_tuned.py", *FOLDERS, "--no_report", cwd=flat)
    assert ended.returncode == 0, ended.stderr
    assert "0.jpg in the queries could not be embedded: an empty file" in ended.stderr
    assert "4 queries without an embedding get the gallery in its order" in ended.stderr
    assert "set SERVER_URL or --server_url" in ended.stdout
    images = json.loads((flat / "results" / "submission.json").read_bytes())["images"]
    assert set(images) == set(os.listdir(flat / "query"))
    assert {len(names) for names in images.values()} == {10}
    found = metrics(flat / "results")
    assert found["unreadable_queries"] == ["0.jpg", "a.JPG", "huge.png", "z.png"]
    assert found["unreadable_gallery_images"] == ["0.jpg", "a.JPG", "z.png"]
    readable = [names for query, names in images.items() if query not in found["unreadable_queries"]]
    assert not any({"0.jpg", "a.JPG", "z.png"} & set(names) for names in readable)


def test_damaged_images_are_ranked_by_what_is_left_of_them_and_named(flat):
    """A whole photograph finds its cut copies in the gallery; they are named at the end and on the page."""
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    photograph.save(flat / "query" / "whole.jpg")
    photograph.save(flat / "gallery" / "whole.jpg")
    content = (flat / "gallery" / "whole.jpg").read_bytes()
    cut = {"end.jpg": content[:-2], "tenth.jpg": content[: -len(content) // 10], "half.jpg": content[:15000]}
    for name, rest in cut.items():
        (flat / "gallery" / name).write_bytes(rest)
        (flat / "query" / name).write_bytes(rest)
    ended = run_here("model_not_tuned.py", *FOLDERS, cwd=flat)
    assert ended.returncode == 0, ended.stderr
    damaged = ["end.jpg", "half.jpg", "tenth.jpg"]
    assert "3 of the gallery images are damaged (image file is truncated" in ended.stderr
    assert "the pixels that decode are used: end.jpg, half.jpg, tenth.jpg" in ended.stderr
    found = metrics(flat / "results")
    assert found["damaged_queries"] == found["damaged_gallery_images"] == damaged
    assert found["unreadable_queries"] == found["unreadable_gallery_images"] == []
    images = json.loads((flat / "results" / "submission.json").read_bytes())["images"]
    for name in ("whole.jpg", *damaged):
        assert set(images[name][:4]) == {"whole.jpg", *damaged}
    assert "damaged queries, of which a part was embedded" in (flat / "results" / "report.html").read_text()


def test_one_folder_is_ranked_against_itself(flat):
    one = ("--query_dir=gallery", "--gallery_dir=gallery", "--no_report")
    ended = run_here("model_not_tuned.py", *one, cwd=flat)
    assert "a query can find itself (--exclude_self leaves its file out)" in ended.stderr
    first = json.loads((flat / "results" / "submission.json").read_bytes())["images"]
    assert all(names[0] == query for query, names in first.items())
    ended = run_here("model_not_tuned.py", *one, "--exclude_self", "--output_dir=others", cwd=flat)
    assert f"without the copies of {len(first)} queries" in ended.stdout
    images = json.loads((flat / "others" / "submission.json").read_bytes())["images"]
    assert all(query not in names and names[:9] == first[query][1:] for query, names in images.items())
    assert metrics(flat / "others")["queries_with_copies"] == len(first)

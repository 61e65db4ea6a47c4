import base64
import io

import numpy as np
import pytest
from conftest import ranking_of
from PIL import Image, ImageColor

from get_images import find_images
from retrieval.report.thumbnails import GAP, RIGHT, SIDE, UNKNOWN, WRONG, draw_matches, encoded_thumbnails


def frame(sheet, row, column):
    """The colour of the frame around the match in this column."""
    x, y = GAP + (SIDE + GAP) * (column + 1) + GAP, GAP + (SIDE + GAP) * row
    return sheet.getpixel((x - 2, y + SIDE // 2))


def paint(folder, **colours):
    for name, colour in colours.items():
        path = folder / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), colour).save(path.with_suffix(".png"))
    return find_images(folder)


def test_right_and_wrong_matches_stand_in_their_order_with_their_frames(tmp_path):
    queries = paint(tmp_path / "q", a_1="red", b_1="blue")
    gallery = paint(tmp_path / "g", a_x="orange", b_x="navy")
    ranking = ranking_of({"a/1.png": ["a/x.png", "b/x.png"], "b/1.png": ["a/x.png", "b/x.png"]})
    draw_matches(ranking, queries, gallery, top_k=2, path=tmp_path / "matches.png")
    sheet = Image.open(tmp_path / "matches.png")
    right, wrong = (ImageColor.getrgb(colour) for colour in (RIGHT, WRONG))
    assert [[frame(sheet, row, column) for column in (0, 1)] for row in (0, 1)] == [
        [right, wrong],
        [wrong, right],
    ]
    middle = SIDE // 2 + GAP
    assert sheet.getpixel((middle, middle)) == ImageColor.getrgb("red")
    assert sheet.getpixel((middle + SIDE + 2 * GAP, middle)) == ImageColor.getrgb("orange")


def test_unlabelled_and_unreadable_images_are_drawn_too(tmp_path):
    queries = paint(tmp_path / "q", x="red")
    gallery = paint(tmp_path / "g", y="blue", z="green")
    gallery[1].path.write_bytes(b"")
    ranking = ranking_of({"x.png": ["z.png", "y.png"]})
    draw_matches(ranking, queries, gallery, top_k=10, path=tmp_path / "matches.png")
    sheet = Image.open(tmp_path / "matches.png")
    assert frame(sheet, 0, 0) == frame(sheet, 0, 1) == ImageColor.getrgb(UNKNOWN)


def test_top_k_and_the_number_of_queries_set_the_size_of_the_picture(tmp_path):
    queries = paint(tmp_path / "q", **{f"{n:02}": "red" for n in range(20)})
    gallery = paint(tmp_path / "g", **{f"{n:02}": "blue" for n in range(12)})
    ranking = ranking_of({query.name: [image.name for image in gallery] for query in queries})
    sizes = []
    for top_k, count in ((3, 20), (12, 20), (3, 4)):
        draw_matches(ranking, queries[:count], gallery, top_k, tmp_path / "matches.png")
        sizes.append((np.array(Image.open(tmp_path / "matches.png").size) - GAP) // (SIDE + GAP))
    assert [size.tolist() for size in sizes] == [[4, 8], [11, 8], [4, 4]]


@pytest.mark.parametrize(
    ("size", "wanted"), [((8, 8), (8, 8)), ((96, 20), (48, 10)), ((10, 400), (1, 48)), ((48, 30), (48, 30))]
)
def test_large_images_shrink_and_small_ones_stay_as_they_are(tmp_path, size, wanted):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    (encoded,) = encoded_thumbnails(find_images(tmp_path), side=48)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == wanted

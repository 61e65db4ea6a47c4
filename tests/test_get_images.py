import io
import os
import zlib
from contextlib import suppress

import numpy as np
import pytest
from conftest import ROOT, run_here
from PIL import EpsImagePlugin, Image, ImageOps

from get_images import (
    FORMATS,
    MOST_BYTES,
    TooManyPixelsError,
    UnreadableImageError,
    decode_image,
    read_bytes,
    read_image,
)

# ---- read


@pytest.fixture(scope="module")
def photo():
    """A smooth colour picture, 60 × 40, with no symmetry."""
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], axis=2).astype(np.uint8))


def saved(image, kind, path, **options):
    image.save(path, kind, **options)
    return path


def pixels(path):
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    return image.astype(int)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_gives_the_pixels_that_pillow_gives(photo, tmp_path, mode, options):
    path = saved(photo.convert(mode), "JPEG", tmp_path / "a.jpg", **options)
    assert abs(pixels(path) - np.asarray(Image.open(path).convert("RGB"), int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(photo, tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(photo, kind, tmp_path / "a", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert upright.size == ((40, 60) if orientation > 4 else (60, 40))
    assert abs(pixels(path) - np.asarray(upright, int)).max() <= 1


def test_exif_orientation_behind_other_metadata_is_applied(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(photo, "JPEG", tmp_path / "a.jpg", exif=exif, xmp=b"<x:xmpmeta/>")
    jpeg = path.read_bytes()
    first = jpeg.index(b"\xff\xe1")
    second = jpeg.index(b"\xff\xe1", first + 2)
    end = second + 2 + int.from_bytes(jpeg[second + 2 : second + 4], "big")
    path.write_bytes(jpeg[:first] + jpeg[second:end] + jpeg[first:second] + jpeg[end:])  # XMP before Exif
    assert pixels(path).shape == (60, 40, 3)


def test_odd_metadata_beside_the_orientation_cost_no_pixels(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0100] = 5  # the image's width, a number, which becomes a text below
    path = saved(photo, "JPEG", tmp_path / "a.jpg", exif=exif)
    number, text = (b"\x01\x00" + kind + b"\x00\x00\x00\x01" for kind in (b"\x00\x04", b"\x00\x02"))
    assert number in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(number, text))
    assert pixels(path).shape == (60, 40, 3)


def test_broken_metadata_cost_no_pixels(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        path = saved(photo, kind, tmp_path / f"a.{kind}", exif=exif)
        content = path.read_bytes()
        at = content.index(b"MM\x00*") if b"MM\x00*" in content else content.index(b"II*\x00")
        broken = content[:at] + b"XXXX" + content[at + 4 :]
        if kind == "PNG":  # the chunk's checksum covers its type and its content
            start, length = (
                content.index(b"eXIf"),
                int.from_bytes(content[content.index(b"eXIf") - 4 :][:4], "big"),
            )
            checksum = zlib.crc32(broken[start : start + 4 + length]).to_bytes(4, "big")
            broken = broken[: start + 4 + length] + checksum + broken[start + 8 + length :]
        path.write_bytes(broken)
        assert pixels(path).shape == (40, 60, 3)


def test_a_cmyk_jpeg_has_the_colours_of_the_picture_it_was_made_from(photo, tmp_path):
    path = saved(photo.convert("CMYK"), "JPEG", tmp_path / "a.jpg", quality=95)
    assert abs(pixels(path) - np.asarray(photo, int)).mean() < 4


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    expected = [[[200, 0, 0], [255, 255, 255]]]
    assert pixels(saved(image, "PNG", tmp_path / "a.png")).tolist() == expected
    assert pixels(saved(image.quantize(4), "PNG", tmp_path / "b.png")).tolist() == expected
    half = Image.new("LA", (1, 1), (0, 128))
    assert pixels(saved(half, "PNG", tmp_path / "c.png")).tolist() == [[[127, 127, 127]]]
    keyed = Image.new("P", (2, 1), 0)
    keyed.putpalette([9, 9, 9, 200, 0, 0])
    keyed.putpixel((0, 0), 1)
    assert pixels(saved(keyed, "GIF", tmp_path / "d.gif", transparency=0)).tolist() == expected


def test_sixteen_bits_and_floats_are_scaled_not_cut_off(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]])
    expected = [[[v, v, v] for v in (0, 1, 128, 255)]]
    assert (
        pixels(saved(Image.fromarray(levels.astype(np.uint16)), "PNG", tmp_path / "a.png")).tolist()
        == expected
    )
    assert (
        pixels(saved(Image.fromarray(levels.astype(np.uint16)), "TIFF", tmp_path / "a.tif")).tolist()
        == expected
    )
    assert (
        pixels(saved(Image.fromarray(levels.astype(np.int32)), "TIFF", tmp_path / "b.tif")).tolist()
        == expected
    )
    floats = Image.fromarray((levels / 65535).astype(np.float32))
    assert pixels(saved(floats, "TIFF", tmp_path / "c.tif")).tolist() == expected


def test_palette_one_bit_and_animation(photo, tmp_path):
    palette = photo.convert("P")
    assert (pixels(saved(palette, "PNG", tmp_path / "a.png")) == np.asarray(palette.convert("RGB"))).all()
    bits = Image.new("1", (1, 1), 1)
    assert pixels(saved(bits, "PNG", tmp_path / "b.png")).tolist() == [[[255, 255, 255]]]
    frames = [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]
    path = saved(frames[0], "GIF", tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    assert pixels(path).tolist() == [[[255, 0, 0]]]


def test_the_content_decides_and_not_the_suffix(photo, tmp_path):
    assert (pixels(saved(photo, "PNG", tmp_path / "a.jpg")) == np.asarray(photo)).all()


def broken_files(folder, photo):
    """Path → a part of the reason that a user should read."""
    jpeg = io.BytesIO()
    photo.save(jpeg, "JPEG")
    png = io.BytesIO()
    photo.save(png, "PNG")
    webp = io.BytesIO()
    photo.save(webp, "WEBP")
    contents = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"no picture\n" * 50, "not an image"),
        "without_pixels.jpg": (jpeg.getvalue().partition(b"\xff\xda")[0], "cannot load this image"),
        "without_pixels.png": (png.getvalue().partition(b"IDAT")[0] + b"IDAT", "truncated"),
        "cut.webp": (webp.getvalue()[:-60], ""),
        "headless.png": (png.getvalue()[:20], "(?i)truncated"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    (folder / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return reasons | {
        "huge.png": "900000000 pixels",
        "gone.jpg": "no such file",
        "pipe.jpg": "not a regular file",
    }


def test_unreadable_files_say_why(photo, tmp_path):
    for name, reason in broken_files(tmp_path, photo).items():
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="a script stands in for Ghostscript")
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.tif"])
def test_no_image_runs_a_program(tmp_path, monkeypatch, name):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # found anew in PATH
    (tmp_path / name).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UnreadableImageError, match="not an image in one of the formats JPEG"):
        read_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with suppress(Exception), Image.open(tmp_path / name) as image:  # which runs the stand-in
        image.load()
    assert (tmp_path / "ran").exists()


def test_every_image_of_the_project_is_opened_by_open_image():
    """The one place with the list of formats."""
    sources = [ROOT / "get_images.py", *ROOT.glob("retrieval/**/*.py"), *ROOT.glob("supcon/**/*.py")]
    opened = {path.name: path.read_text(encoding="utf-8").count("Image.open(") for path in sources}
    assert {name: count for name, count in opened.items() if count} == {"get_images.py": 1}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_is_read_whatever_the_suffix(photo, tmp_path, kind):
    found = pixels(saved(photo, kind, tmp_path / "a.jpg"))
    assert found.shape == (40, 60, 3)
    assert abs(found - np.asarray(photo, int)).mean() < 16  # GIF has 256 colours


def test_heic_is_read_where_pillow_heif_is_installed(photo, tmp_path, monkeypatch):
    for name in ("a.heic", "a.jpg", "a"):
        found = pixels(saved(photo, "HEIF", tmp_path / name, quality=100))
        assert abs(found - np.asarray(photo, int)).mean() < 4
    monkeypatch.delitem(Image.OPEN, "HEIF")  # as if it were not
    with pytest.raises(UnreadableImageError, match="not an image in one of the formats"):
        read_image(tmp_path / "a.heic")


def test_an_image_with_more_pixels_than_the_memory_holds_is_a_sentence(tmp_path):
    Image.new("L", (300, 100)).save(tmp_path / "a.png")
    content = read_bytes(tmp_path / "a.png")
    assert decode_image(content, most_pixels=30_000).pixels.shape == (100, 300, 3)
    with pytest.raises(TooManyPixelsError, match="30000 pixels: more than the 29999 that fit into memory"):
        decode_image(content, most_pixels=29_999)


def test_a_jpeg_counts_by_the_pixels_that_are_decoded(tmp_path):
    """But a progressive one is in memory as a whole."""
    image = Image.effect_noise((1000, 800), 50)
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    plain, progressive = (read_bytes(tmp_path / name) for name in ("plain.jpg", "progressive.jpg"))
    assert decode_image(plain, enough=100, most_pixels=12_500).pixels.shape == (100, 125, 3)
    for content, enough in ((plain, None), (progressive, 100)):
        with pytest.raises(TooManyPixelsError, match="800000 pixels"):
            decode_image(content, enough, most_pixels=12_500)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(MOST_BYTES + 1)  # without a byte on the disk
    with pytest.raises(UnreadableImageError, match="1073741825 bytes: more than the limit of 1073741824"):
        read_image(tmp_path / "a.png")


# ---- a part of the size


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photograph_is_decoded_at_a_part_of_its_size_where_that_is_enough(tmp_path, orientation):
    from sklearn.datasets import load_sample_image

    from retrieval.backbones.transform import Transform

    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((2560, 1708))
    photo.save(tmp_path / "photo.jpg", quality=92, exif=exif)
    transform = Transform(96, "bicubic")
    plain, small = read_image(tmp_path / "photo.jpg"), read_image(tmp_path / "photo.jpg", transform.enough)
    assert sorted(plain.shape) == [3, 1708, 2560]
    assert sorted(small.shape) == [3, 427, 640]
    assert (small.shape[0] > small.shape[1]) == (orientation == 6)
    difference = abs(transform(plain).pixels.astype(float) - transform(small).pixels)
    assert difference.mean() < 1
    assert np.array_equal(read_image(tmp_path / "photo.jpg", 1000), plain)  # a half would have 854 rows
    photo.convert("L").save(tmp_path / "grey.jpg")
    assert read_image(tmp_path / "grey.jpg", 384).shape == (427, 640, 3)


# ---- the command line


def test_a_command_is_refused_with_status_2_and_the_command_that_lays_out_data_sets(tmp_path):
    ended = run_here("get_images.py", "sample", "--out", "data", cwd=tmp_path)
    assert ended.returncode == 2
    assert "error: get_images.py has no commands" in ended.stderr
    assert "run `python -m retrieval.datasets sample --out data/sample`" in ended.stderr

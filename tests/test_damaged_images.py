"""Files that are cut or broken in part: the pixels that decode are used."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from get_images import TooManyPixelsError, UnreadableImageError, decode_image


def packed(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def squares(mode="RGB"):
    """An image of 40 x 30 squares of 4 pixels, in random colours."""
    levels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(levels).resize((160, 120), Image.Resampling.NEAREST).convert(mode)


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive JPEG", "grey JPEG", "1", "L", "P", "RGB", "RGBA", "LA"]
)
@pytest.mark.parametrize("kept", [-2, 0.9, 0.5])
def test_a_cut_file_gives_the_pixels_that_decode(kind, kept):
    """The first lines, or, of a progressive JPEG, all of them less sharply."""
    if "JPEG" in kind:
        content = packed(squares("L" if "grey" in kind else "RGB"), "JPEG", progressive="prog" in kind)
    else:
        content = packed(squares(kind), "PNG")
    whole = decode_image(content)
    assert whole.damage is None
    cut = decode_image(content[: kept if kept < 0 else int(kept * len(content))])
    assert cut.pixels.shape == whole.pixels.shape
    right = np.abs(cut.pixels.astype(int) - whole.pixels).max(axis=(1, 2)) < 3
    if kept < 0:
        assert right.all()
    else:
        assert "truncated" in cut.damage
        assert not right.all()
        if "progressive" in kind:
            assert np.corrcoef(cut.pixels.ravel(), whole.pixels.ravel())[0, 1] > 0.5
        else:
            assert right[: int(len(right) * (kept - 0.15))].all()


def test_broken_text_and_profiles_of_a_png_cost_no_pixel():
    """They are left out; also in a PNG with lines in another order, and in one with a transparent colour."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "hello")
    long = PngImagePlugin.PngInfo()
    long.add_text("Comment", "x" * 2_000_000, zip=True)
    picture = squares("P")
    with_text = bytearray(packed(picture, "PNG", pnginfo=text, transparency=3))
    with_text[with_text.index(b"hello")] ^= 1  # so that its checksum is wrong
    broken = {
        "a wrong checksum": (bytes(with_text), packed(picture, "PNG", transparency=3)),
        "a long text": (packed(squares(), "PNG", pnginfo=long), packed(squares(), "PNG")),
        "a long profile": (packed(squares(), "PNG", icc_profile=b"x" * 3_000_000), packed(squares(), "PNG")),
    }
    for content, sound in broken.values():
        found = decode_image(content)
        assert np.array_equal(found.pixels, decode_image(sound).pixels)
        assert found.damage
    assert "too large" in decode_image(broken["a long text"][0]).damage
    assert decode_image(bytes(with_text)).damage == "broken, but not its pixels"


def test_a_broken_png_of_few_bytes_takes_little_memory_and_time(monkeypatch):
    """One line of many pixels, and megabytes behind the end of the compressed lines."""

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = struct.pack(">IIBBBBB", 10_000_000, 1, 16, 6, 0, 0, 0)
    wide = packed(squares(), "PNG")[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")
    tracemalloc.start()
    with pytest.raises(UnreadableImageError):
        decode_image(wide)
    assert tracemalloc.get_traced_memory()[1] < 8 * 8 * 10_000_000  # 8 bytes a pixel
    tracemalloc.stop()
    png = packed(squares(), "PNG")
    start = png.index(b"IHDR")
    header = png[start + 4 : start + 17]
    lines = zlib.compress(b"\1" * 100) + b"z" * 3_000_000
    behind = png[:8] + chunk(b"tEXt", b"broken")[:-1] + b"x" + chunk(b"IHDR", header) + chunk(b"IDAT", lines)
    parts = []

    class Counting:
        """A decompressor that notes each part it is given."""

        def __init__(self, real=zlib.decompressobj):
            self.real = real()

        def decompress(self, part, most):
            parts.append(part)
            return self.real.decompress(part, most)

        def __getattr__(self, name):
            return getattr(self.real, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    assert decode_image(behind).damage
    assert len(parts) == 1  # of 11 000


def test_a_broken_png_may_not_have_more_pixels_than_the_memory_holds_either():
    content = packed(Image.new("L", (300, 100)), "PNG")
    content = content[:20] + bytes([content[20] ^ 1]) + content[21:]  # another height, and a wrong checksum
    with pytest.raises(TooManyPixelsError):
        decode_image(content, most_pixels=29_999)


def test_a_cut_large_photograph_is_damaged_in_a_part_of_its_size_too():
    content = packed(Image.effect_noise((1200, 1200), 50), "JPEG")
    content = content[: len(content) // 2]
    for enough, side in ((None, 1200), (300, 300)):
        found = decode_image(content, enough)
        assert found.pixels.shape == (side, side, 3)
        assert "truncated" in found.damage

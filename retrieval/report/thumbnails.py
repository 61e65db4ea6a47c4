"""Image files in; thumbnails for the page, and a sheet of queries beside their matches, out."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw

from get_images import ImageFile, UnreadableImageError, label_of, read_image
from retrieval.files import write_whole
from retrieval.records import Ranking

SIDE, GAP, FRAME = 96, 12, 4  # pixels: of a thumbnail's side, between thumbnails, of a frame
RIGHT, WRONG, UNKNOWN = "#1a7f37", "#cf222e", "#8c959f"


def draw_matches(
    ranking: Ranking,
    queries: list[ImageFile],
    gallery: list[ImageFile],
    top_k: int,
    path: Path,
    rows: int = 8,
) -> None:
    """Write a PNG: in each row a query, then its `top_k` best matches (ten at most), best first.

    The sheet shows `rows` queries, evenly spaced in their order. A right match has a green frame, a wrong
    match a red frame and a stroke across the corner, an unlabelled match a grey frame.
    """
    shown = range(0, len(queries), max(1, len(queries) // rows))[:rows]
    columns = min(top_k, ranking.rows.shape[1], 10)
    width = GAP + (SIDE + GAP) * (columns + 1) + GAP
    sheet = Image.new("RGB", (width, GAP + (SIDE + GAP) * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, query in enumerate(shown):
        y = GAP + (SIDE + GAP) * row
        sheet.paste(_thumbnail(queries[query].path), (GAP, y))
        for column, match in enumerate(ranking.rows[query, :columns]):
            x = GAP + (SIDE + GAP) * (column + 1) + GAP
            sheet.paste(_thumbnail(gallery[match].path), (x, y))
            _frame(draw, x, y, label_of(queries[query].name), label_of(gallery[match].name))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_whole(path, png.getvalue())


def encoded_thumbnails(images: list[ImageFile], side: int) -> list[str]:
    """Shrink each image into `side` × `side` pixels, as WebP in base64; empty if it cannot be read."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda image: _encoded_thumbnail(image.path, side), images))


def _encoded_thumbnail(path: Path, side: int) -> str:
    try:
        image = _within(Image.fromarray(read_image(path)), side)
    except UnreadableImageError:
        return ""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=60, method=2)
    return base64.b64encode(file.getvalue()).decode()


def _within(image: Image.Image, side: int) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels."""
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _thumbnail(path: Path) -> Image.Image:
    """Return the whole image in a grey square, or a cross if it cannot be read."""
    square = Image.new("RGB", (SIDE, SIDE), "#eaeef2")
    try:
        image = _within(Image.fromarray(read_image(path)), SIDE)
    except UnreadableImageError:
        ImageDraw.Draw(square).line([(0, 0), (SIDE, SIDE), (SIDE, 0), (0, SIDE)], fill=UNKNOWN, width=2)
        return square
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return square


def _frame(draw: ImageDraw.ImageDraw, x: int, y: int, query: str | None, match: str | None) -> None:
    colour = UNKNOWN if query is None else RIGHT if query == match else WRONG
    outer = (x - FRAME, y - FRAME, x + SIDE + FRAME - 1, y + SIDE + FRAME - 1)
    draw.rectangle(outer, outline=colour, width=FRAME)
    if colour == WRONG:  # to be told apart without colours
        draw.line([(x, y + SIDE // 3), (x + SIDE // 3, y)], fill=colour, width=FRAME)

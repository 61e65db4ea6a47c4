"""Image files in; thumbnails for the page, and a sheet of queries beside their matches, out."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from get_images import ImageFile, UnreadableImageError, label_of, read_image
from retrieval.files import write_whole
from retrieval.machine import cores
from retrieval.records import Ranking

SIDE, GAP, FRAME = 96, 12, 4  # pixels: of a thumbnail's side, between thumbnails, of a frame
ROWS, MOST_COLUMNS = 8, 10  # of the sheet: queries, and matches of each
RIGHT, WRONG, UNKNOWN = "#1a7f37", "#cf222e", "#8c959f"


def draw_matches(
    ranking: Ranking, queries: list[ImageFile], gallery: list[ImageFile], top_k: int, path: Path
) -> None:
    """Write a PNG: in each row a query, then its `top_k` best matches (MOST_COLUMNS at most), best first.

    The sheet shows ROWS queries, evenly spaced in their order. A right match has a green frame, a wrong
    match a red frame and a stroke across the corner, an unlabelled match a grey frame.
    """
    shown = range(0, len(queries), max(1, len(queries) // ROWS))[:ROWS]
    columns = min(top_k, ranking.rows.shape[1], MOST_COLUMNS)
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
    """Shrink each image to fit `side` × `side` pixels, as WebP in base64; empty if it cannot be read."""
    with ThreadPoolExecutor(cores()) as pool:
        encoded = pool.map(lambda image: _encoded_thumbnail(image.path, side), images)
        return list(tqdm(encoded, "pictures", len(images), leave=False, unit="image", delay=3))  # seconds


def _encoded_thumbnail(path: Path, side: int) -> str:
    try:
        image = Image.fromarray(read_image(path))
    except UnreadableImageError:
        return ""
    scale = min(1, side / max(image.size))
    size = [max(1, round(length * scale)) for length in image.size]  # a strip keeps a pixel
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0).save(file, "WEBP", quality=60, method=2)
    return base64.b64encode(file.getvalue()).decode()


def _thumbnail(path: Path) -> Image.Image:
    """Return the whole image in a grey square, or a cross if it cannot be read."""
    try:
        return ImageOps.pad(Image.fromarray(read_image(path)), (SIDE, SIDE), color="#eaeef2")
    except UnreadableImageError:
        square = Image.new("RGB", (SIDE, SIDE), "#eaeef2")
        ImageDraw.Draw(square).line([(0, 0), (SIDE, SIDE), (SIDE, 0), (0, SIDE)], fill=UNKNOWN, width=2)
        return square


def _frame(draw: ImageDraw.ImageDraw, x: int, y: int, query: str | None, match: str | None) -> None:
    colour = UNKNOWN if query is None else RIGHT if query == match else WRONG
    outer = (x - FRAME, y - FRAME, x + SIDE + FRAME - 1, y + SIDE + FRAME - 1)
    draw.rectangle(outer, outline=colour, width=FRAME)
    if colour == WRONG:  # to be told apart without colours
        draw.line([(x, y + SIDE // 3), (x + SIDE // 3, y)], fill=colour, width=FRAME)

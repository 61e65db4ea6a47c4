"""Two folders of labelled images in; how long the page takes to be drawn and to open, and its size, out.

    python benchmarks/report.py data/sample/test/query data/sample/test/gallery --queries 860 --gallery 1298

The images are repeated under new names until there are as many as the flags ask for. Their embeddings are
their pixels, at 16 × 16, since any vectors will do for the page. With Debian's chromium the page is opened
as well, and timed until its script has drawn the first queries.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from get_images import ImageFile, find_images  # noqa: E402
from retrieval.metrics import measure  # noqa: E402
from retrieval.ranking.exact import rank  # noqa: E402
from retrieval.records import Embeddings  # noqa: E402
from retrieval.report.results import Results, Sample, sample_rows  # noqa: E402
from retrieval.report.run_report import write_report  # noqa: E402
from retrieval.run import Outcome, Run  # noqa: E402


def repeated(folder: Path, count: int) -> tuple[list[ImageFile], Embeddings]:
    """Return `count` images of a folder, and their slightly changed pixels as embeddings."""
    files = find_images(folder)
    small = [Image.open(file.path).convert("L").resize((16, 16)) for file in files]
    pixels = np.stack([np.asarray(image, dtype=np.float32).ravel() for image in small])
    vectors = np.stack(list(islice(cycle(pixels), count)))
    vectors += np.random.default_rng(0).normal(scale=10, size=vectors.shape).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [
        ImageFile(f"{file.name}.{number}.jpg", file.path)
        for number, file in enumerate(islice(cycle(files), count))
    ]
    return names, Embeddings([file.name for file in names], vectors)


def seconds_to_draw(arguments: argparse.Namespace, folder: Path) -> float:
    """Draw the page into a folder, as a run does."""
    from model_not_tuned import Settings

    queries, query_vectors = repeated(arguments.query_dir, arguments.queries)
    gallery, gallery_vectors = repeated(arguments.gallery_dir, arguments.gallery)
    ranking = rank(query_vectors, gallery_vectors, 10)
    metrics = {"backbone": "pixels"} | measure(ranking, query_vectors, gallery_vectors)
    rows = sample_rows(query_vectors, gallery_vectors)
    sample = Sample(rows, np.concatenate([query_vectors.vectors, gallery_vectors.vectors])[rows])
    folders = {"query_dir": arguments.query_dir, "gallery_dir": arguments.gallery_dir, "output_dir": folder}
    run, found = (
        Run(Settings(**folders)),
        Results(queries, gallery, query_vectors, gallery_vectors, ranking, metrics, sample=sample),
    )
    start = time.perf_counter()
    write_report(run, found, Outcome("saved", "a benchmark"))
    return time.perf_counter() - start


def seconds_to_open(page: Path) -> float:
    """From the navigation until the script has drawn the first queries, as the browser says."""
    sys.path.insert(0, str(ROOT / "tests"))
    from page_checks import Browser

    browser = Browser()
    try:
        browser.open(page.as_uri())
        assert browser.run("return document.querySelectorAll('#queries .picture').length")
        timing = "performance.getEntriesByType('navigation')[0]"
        return browser.run(f"return {timing}.domComplete") / 1000
    finally:
        browser.driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("query_dir", type=Path)
    parser.add_argument("gallery_dir", type=Path)
    parser.add_argument("--queries", type=int, default=860)
    parser.add_argument("--gallery", type=int, default=1298)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--drawn", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drawn:
        print(seconds_to_draw(arguments, arguments.drawn))
        return
    drawn, opened = [], []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *sys.argv[1:], "--drawn", folder]  # with its imports
            drawn.append(float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))
            page = Path(folder) / "report.html"
            opened.append(seconds_to_open(page) if shutil.which("chromium") else float("nan"))
            size = page.stat().st_size / 1e6
            print(f"drawn in {drawn[-1]:.1f} s, opened in {opened[-1]:.2f} s, {size:.1f} MB")
    for what, seconds in (("drawn", drawn), ("opened", opened)):
        print(f"n = {len(seconds)}: {what} in {statistics.median(seconds):.2f} s, "
              f"{min(seconds):.2f} to {max(seconds):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

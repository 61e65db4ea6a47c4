"""A folder of images in; from how many images on the export to ONNX Runtime pays within one run, out.

    python benchmarks/break_even.py IMAGE_DIR --images 100,200,400 --pairs 5

model_not_tuned.py with `--engine torch` and with `--engine onnx`, alternately and each with an empty cache,
on that many images, a fifth of them queries: whole processes on the CPU. Above 1, torch takes longer. A
network that was exported before runs in ONNX Runtime for any number of images. ResNet-50 has random weights.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from first_run import ROWS, Folders, run_ours, spread, write_weights


def some(paths: Sequence[Path], count: int, out: Path) -> Folders:
    """Copy `count` images, evenly spread over a folder, as queries and gallery."""
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    for number, path in enumerate(chosen):
        part = out / ("query" if number % 5 == 0 else "gallery") / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / f"{number}{path.suffix}")
    return Folders(out / "query", out / "gallery", out.parent)


def compare(row: str, folders: Folders, pairs: int) -> list[tuple[float, float]]:
    """The seconds by torch and by ONNX Runtime, of each pair."""
    taken = []
    for _ in range(pairs):
        seconds = []
        for engine in ("torch", "onnx"):
            with tempfile.TemporaryDirectory() as place:
                ended = run_ours(ROWS[row], folders, Path(place), "--engine", engine)
            seconds.append(ended.seconds)
        taken.append(tuple(seconds))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("image_dir", type=Path)
    parser.add_argument("--images", default="100,200,400")
    parser.add_argument("--rows", default="timm,course_1", help="of first_run.py: those whose network it is")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.image_dir.resolve().rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as name:
        rows = arguments.rows.split(",")
        write_weights(Path(name), {ROWS[row].weights for row in rows})
        for row in rows:
            for count in map(int, arguments.images.split(",")):
                folders = some(paths, count, Path(name) / f"{row}-{count}")
                taken = compare(row, folders, arguments.pairs)
                torch, onnx = (spread(list(seconds)) for seconds in zip(*taken, strict=True))
                ratio = spread([by_torch / by_onnx for by_torch, by_onnx in taken])
                print(f"{ROWS[row].model_name}, {count} images: n = {len(taken)}: torch / onnx {ratio}; "
                      f"{torch} s and {onnx} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""A folder of photographs in; how long our runs take on a GPU beside the loop that most people write, out.

    python benchmarks/gpu.py PHOTOGRAPHS --faces PORTRAITS

It makes 19 200 JPEGs of 500 x 375 pixels from the photographs, each with other bytes, and weights by a seed.
Programs run as whole processes, alternately: model_not_tuned.py without its report and with an empty cache,
and peers/dataloader_loop.py. Rows:

`job`        ResNet-50, 7200 queries and 12 000 gallery images
`two_cores`  the same on two cores of the machine
`vit`        ViT-L/14 at 224 pixels: images/s of 12 000 in one process; 2400 and 4000 as whole processes
`faces`      FaceNet with MTCNN, 1000 and 2000 portraits of 250 x 250 pixels, ours alone
`reading`    in one process: images/s of the readers and the decoder, and with ResNet-50
`rank`       in one process: 7200 x 12 000 x 2048 vectors, also with ten copies of each, and 4096-d

A ratio below 1 means that ours is faster. The share in which the GPU is busy is nvidia-smi's, while the
program embeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
QUERIES, GALLERY = 7200, 12_000
VIT = "vit_large_patch14_clip_224.openai"


# ---- what both read


def make_photographs(source: Path, out: Path, counts: tuple[int, int], size: tuple[int, int]) -> None:
    """Write folders `query` and `gallery` of JPEGs of this (width, height): copies with a comment each."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())[:64]
    jpegs = []
    for path in paths:
        with tempfile.TemporaryFile() as file, Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
            file.seek(0)
            jpegs.append(file.read())
    for folder, count in zip(("query", "gallery"), counts, strict=True):
        (out / folder).mkdir(parents=True)
        for number in range(count):
            jpeg = jpegs[number % len(jpegs)]
            comment = b"\xff\xfe\x00\x12" + f"{folder:>7}{number:09d}".encode()
            (out / folder / f"{number:05d}.jpg").write_bytes(jpeg[:2] + comment + jpeg[2:])


def make_weights(folder: Path, rows: set[str]) -> None:
    """Write ResNet-50, ViT-L and FaceNet with random weights."""
    import timm
    import torch
    from facenet_pytorch import InceptionResnetV1
    from torchvision.models import resnet50

    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), folder / "resnet50.pth")
    if "vit" in rows:
        torch.save(timm.create_model(VIT).state_dict(), folder / "vit.pth")
    if "faces" in rows:
        torch.save(InceptionResnetV1(classify=False).state_dict(), folder / "facenet.pth")


# ---- whole processes


class GpuWatch:
    """The shares in which the GPU is busy, in per cent."""

    def __enter__(self) -> "GpuWatch":
        self.seen: list[float] = []
        self.ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def _look(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self.ended.wait(0.2):
            self.seen.append(float(subprocess.check_output(command, text=True).split()[0]))

    def __exit__(self, *_: object) -> None:
        self.ended.set()


def run(command: list, cores: int | None = None) -> tuple[float, str]:
    """Return the seconds of a program, and what it printed."""
    if cores:
        command = ["taskset", "-c", f"0-{cores - 1}", *command]
    start = time.perf_counter()
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if ended.returncode:
        raise SystemExit(f"{command} failed:\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}")
    return time.perf_counter() - start, ended.stdout


def run_ours(model: str, photographs: Path, weights: Path, cores: int | None = None) -> tuple[float, dict]:
    """Return the seconds of model_not_tuned.py, and those of its steps."""
    with tempfile.TemporaryDirectory() as place:
        seconds, said = run(
            [sys.executable, "model_not_tuned.py", "--model_type", model, "--weights", weights, "--no_report",
             "--query_dir", photographs / "query", "--gallery_dir", photographs / "gallery",
             "--output_dir", f"{place}/results", "--cache_dir", f"{place}/cache"], cores)  # fmt: skip
        steps = json.loads(Path(place, "results", "metrics.json").read_text())["seconds"]
    print(*(line for line in said.splitlines() if "seconds" in line), sep="\n")
    return seconds, steps


def run_loop(model: str, photographs: Path, weights: Path, cores: int | None = None) -> float:
    """Return the seconds of the usual loop."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "benchmarks/peers/dataloader_loop.py", photographs / "query",
                   photographs / "gallery", "--model", model, "--weights", weights,
                   "--out", f"{place}/ranking.json", "--workers", cores or os.cpu_count()]  # fmt: skip
        return run(command, cores)[0]


def compare(
    row: str, model: tuple[str, str], photographs: Path, weights: Path, pairs: int, cores: int | None = None
) -> None:
    """Print our seconds, the loop's, and the ratio."""
    ours, theirs = [], []
    for _ in range(pairs):
        theirs.append(run_loop(model[1], photographs, weights, cores))
        seconds, steps = run_ours(model[0], photographs, weights, cores)
        ours.append(seconds)
        print(f"{row}: ours {seconds:.1f} s {steps}, the loop {theirs[-1]:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{row}: n = {pairs}, ours / the loop {statistics.median(ratios):.2f}, "
          f"{min(ratios):.2f} to {max(ratios):.2f}", flush=True)  # fmt: skip


# ---- in this process


def read_and_embed(photographs: Path, weights: Path) -> None:
    """Print the images/s that the readers and the decoder reach alone, and with ResNet-50."""
    from get_images import find_images
    from retrieval.backbones.backbone import find_backbone
    from retrieval.embedding.embed import embed
    from retrieval.embedding.runtime import choose_runtime

    files = find_images(photographs / "gallery")
    for name in ("reading alone", "with ResNet-50"):
        runtime = choose_runtime(find_backbone("resnet50", "auto", weights), "auto", len(files), None, None)
        runtime.settle(files)
        if name == "reading alone":
            nothing = np.ones((runtime.batch_size, 1), np.float32)
            runtime._start = lambda pixels, nothing=nothing: lambda: nothing[: len(pixels)]
        with GpuWatch() as watch:
            start = time.perf_counter()
            embed(files, runtime)
            seconds = time.perf_counter() - start
        parts = {part: round(spent, 2) for part, spent in runtime.seconds.items()}
        print(f"{name}: {len(files) / seconds:.0f} images/s, GPU busy {np.mean(watch.seen or [0]):.0f} %, "
              f"decoded by the GPU: {runtime.gpu_decodes}, {parts}", flush=True)  # fmt: skip


def busy_with_vit(photographs: Path, weights: Path) -> None:
    """Print ViT-L's images/s and how busy the GPU is, from the first batch on."""
    from get_images import find_images
    from retrieval.backbones.backbone import find_backbone
    from retrieval.embedding.embed import embed
    from retrieval.embedding.runtime import choose_runtime

    files = find_images(photographs / "gallery")
    runtime = choose_runtime(find_backbone(f"timm:{VIT}", "auto", weights), "auto", len(files), None, None)
    runtime.settle(files)
    with GpuWatch() as watch:
        start = time.perf_counter()
        embed(files, runtime)
        seconds = time.perf_counter() - start
    print(
        f"vit: {len(files) / seconds:.0f} images/s, GPU busy {np.mean(watch.seen or [0]):.0f} %", flush=True
    )


def rank_random() -> None:
    """Print the seconds of rank on the GPU, and of torch's product and topk."""
    import torch

    from retrieval.ranking.exact import rank
    from retrieval.records import Embeddings

    def unit(count: int, dimension: int) -> np.ndarray:
        vectors = np.random.default_rng(count).standard_normal((count, dimension), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def timed(act: Callable, *given: object) -> float:
        start = time.perf_counter()
        act(*given)
        return time.perf_counter() - start

    def topk(queries: np.ndarray, gallery: np.ndarray) -> None:
        on_gpu = torch.from_numpy(queries).to("cuda"), torch.from_numpy(gallery).to("cuda")
        (on_gpu[0] @ on_gpu[1].T).topk(10).indices.cpu()

    for dimension, copies in ((2048, 1), (2048, 10), (4096, 10)):
        queries, gallery = unit(QUERIES, dimension), np.repeat(unit(GALLERY // copies, dimension), copies, 0)
        sides = [Embeddings(list(map(str, range(len(side)))), side) for side in (queries, gallery)]
        for act, given in ((rank, (*sides, 10, "cuda")), (topk, (queries, gallery))):
            act(*given)
            seconds = [timed(act, *given) for _ in range(5)]
            print(f"{act.__name__} {QUERIES} x {GALLERY} x {dimension}, {copies} copies of each: "
                  f"{statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}, n = 5",
                  flush=True)  # fmt: skip


def faces(place: Path, portraits: Path, pairs: int) -> None:
    make_photographs(portraits, place / "faces", (1000, 2000), (250, 250))
    for _ in range(pairs):
        seconds, steps = run_ours("facenet", place / "faces", place / "facenet.pth")
        print(f"faces: {seconds:.1f} s, {steps}", flush=True)


def vit(place: Path, photographs: Path, pairs: int) -> None:
    busy_with_vit(place / "all", place / "vit.pth")
    make_photographs(photographs, place / "some", (2400, 4000), (500, 375))
    compare("vit", (f"timm:{VIT}", VIT), place / "some", place / "vit.pth", pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--faces", type=Path, help="photographs of faces, for the row `faces`")
    parser.add_argument("--rows", default="reading,rank,job,two_cores,vit,faces")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    rows, pairs = arguments.rows.split(","), arguments.pairs
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        photographs, weights = place / "all", place / "resnet50.pth"
        make_photographs(arguments.photographs, photographs, (QUERIES, GALLERY), (500, 375))
        make_weights(place, set(rows))
        acts = {
            "reading": lambda: read_and_embed(photographs, weights),
            "rank": rank_random,
            "job": lambda: compare("job", ("resnet50", "resnet50"), photographs, weights, pairs),
            "two_cores": lambda: compare(
                "two_cores", ("resnet50", "resnet50"), photographs, weights, pairs, 2
            ),
            "vit": lambda: vit(place, arguments.photographs, pairs),
            "faces": lambda: faces(place, arguments.faces, pairs),
        }
        for row in rows:
            acts[row]()


if __name__ == "__main__":
    main()

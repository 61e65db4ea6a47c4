"""Two folders of labelled images in; how long a first run takes beside what a user would write instead, out.

    python benchmarks/first_run.py QUERY_DIR GALLERY_DIR --peers .peers/bin/python --rows timm,oml --pairs 5

A row is one of the programs in benchmarks/peers, in an environment of its own (see requirements.txt there),
beside model_not_tuned.py with the same network and weights on the CPU. Each run is a whole process, from
the first import to the ranking on the disk; the two alternate, ours with an empty cache, and once more with
what that left. Before it counts, all images have been read once, and both have run on a dozen of each
folder, three times: what that takes is their start. ResNet-50 and FaceNet have random weights, the same on
both sides, which are as fast as trained ones. Memory is the peak of a program and its worker processes,
where shared pages count once (Pss, on Linux); that and the seconds of a processor are looked at once a
second.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from server import processor_seconds

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


class Row(NamedTuple):
    """A comparison: our model name, the other program and its flags, and the file of weights of both."""

    model_name: str
    program: str
    flags: tuple[str, ...] = ()
    weights: str = ""


ROWS = {
    "timm": Row("efficientnet_lite0", "timm_loop.py", weights="lite0.pth"),
    "oml": Row("efficientnet_lite0", "oml_pipeline.py", weights="lite0.pth"),
    "pml": Row("efficientnet_lite0", "pml_inference.py", weights="lite0.pth"),
    "course_1": Row("resnet50", "course.py", ("--batch_size", "1"), "resnet50.pth"),
    "course_64": Row("resnet50", "course.py", ("--batch_size", "64"), "resnet50.pth"),
    "facenet": Row("facenet", "mtcnn_loop.py", weights="facenet.pth"),
    "dlib": Row("dlib", "dlib_script.py"),
}


class Folders(NamedTuple):
    """Where a run reads."""

    query: Path
    gallery: Path
    weights: Path


class Ended(NamedTuple):
    """What a run took, and what it found."""

    seconds: float
    processor: float  # seconds of all cores together
    megabytes: float
    ranking: dict[str, list[str]]


# ---- what both read


def write_weights(folder: Path, names: set[str]) -> None:
    """The files of weights, under the names that the other programs' networks have for them."""
    import torch
    from facenet_pytorch import InceptionResnetV1
    from torchvision.models import resnet50

    networks = {"lite0.pth": lite0, "resnet50.pth": resnet50, "facenet.pth": InceptionResnetV1}
    for name in names & set(networks):
        torch.manual_seed(0)
        torch.save(networks[name]().state_dict(), folder / name)


def lite0() -> Callable:
    """timm's network with the weights of the package, and with its classifier."""
    import timm

    from retrieval.backbones.filling import load_weights
    from retrieval.backbones.networks import lite_name_in_timm
    from retrieval.backbones.zoo import PRETRAINED

    network = timm.create_model("tf_efficientnet_lite0")
    blocks = [(stage, i) for stage, depth in enumerate(network.blocks) for i in range(len(depth))]
    file = PRETRAINED["efficientnet_lite0"].weights.fetch()
    load_weights(network, file, "EfficientNet-Lite0", lambda name: lite_name_in_timm(name, blocks))
    return network


def a_dozen(folder: Path, out: Path) -> Path:
    """Copy twelve images, evenly spread over a folder; read all its files, so that they are in memory."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        path.read_bytes()
    for path in paths[:: max(1, len(paths) // 12)][:12]:
        copy = out / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return out


# ---- a run


def processes(root: int) -> Iterator[int]:
    """A process and all below it."""
    yield root
    for file in Path(f"/proc/{root}/task").glob("*/children"):
        for child in file.read_text().split():
            yield from processes(int(child))


def megabytes(root: int) -> float:
    """What a process and all below it hold now; nothing where one of them ends meanwhile."""
    try:
        rollups = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes(root)]
    except OSError:
        return 0
    lines = [line for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
    return sum(int(line.split()[1]) for line in lines) / 1024


def run(command: list[str | Path], ranking: Path) -> Ended:
    """Run a program to its end."""
    peaks, used = [0.0], {}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1):
                with suppress(OSError):  # one of them has ended meanwhile: the next second says
                    peaks.append(megabytes(process.pid))
                    for one in processes(process.pid):
                        used[one] = processor_seconds(one)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{said.read()[-3000:]}")
    found = json.loads(ranking.read_text())
    return Ended(seconds, sum(used.values()), max(peaks), found.get("images", found))


def run_ours(row: Row, folders: Folders, place: Path, *more: str) -> Ended:
    """model_not_tuned.py, with the cache that lies in `place`."""
    model = row.model_name
    weights = ["--weights", folders.weights / row.weights] if model in ("resnet50", "facenet") else []
    command = [sys.executable, "model_not_tuned.py", "--model_type", model, *weights, "--device", "cpu",
               "--query_dir", folders.query, "--gallery_dir", folders.gallery, "--custom_dataset",
               "--no_report", "--output_dir", place / "results", "--cache_dir", place / "cache",
               *more]  # fmt: skip
    return run(command, place / "results" / "submission.json")


def run_peer(row: Row, folders: Folders, place: Path, python: Path) -> Ended:
    """The other program."""
    weights = ["--weights", folders.weights / row.weights] if row.weights else []
    program = ROOT / "benchmarks" / "peers" / row.program
    out = place / "ranking.json"
    command = [python, program, folders.query, folders.gallery, *weights, *row.flags, "--out", out]
    return run(command, out)


# ---- the comparison


def share_right(ranking: dict[str, list[str]], k: int) -> float:
    """Of the queries with an image of their class folder among the first k."""
    hits = [any(name.split("/")[0] == query.split("/")[0] for name in names[:k])
            for query, names in ranking.items()]  # fmt: skip
    return sum(hits) / len(hits)


def compare(
    title: str, folders: Folders, python: Path, start: tuple[float, float]
) -> tuple[float, float, float, float]:
    """One pair: theirs / ours in seconds, less the start of each, and in memory; our second run / first."""
    row = ROWS[title]
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_peer(row, folders, Path(folder), python)
        ours, again = (run_ours(row, folders, Path(folder)) for _ in range(2))
    alike = [theirs.ranking[query][0] == names[0] for query, names in ours.ranking.items()]
    right = [f"{share_right(found.ranking, k):.3f}" for k in (1, 10) for found in (theirs, ours)]
    ratios = (theirs.seconds / ours.seconds, (theirs.seconds - start[0]) / (ours.seconds - start[1]),
              theirs.megabytes / ours.megabytes, again.seconds / ours.seconds)  # fmt: skip
    print(
        f"{title}: theirs {timed(theirs)}; ours {timed(ours)}, again {again.seconds:.1f} s; "
        f"ratio {ratios[0]:.2f}; top-1 {right[0]} and {right[1]}, top-10 {right[2]} and {right[3]}, "
        f"{sum(alike) / len(alike):.1%} the same first name",
        flush=True,
    )
    return ratios


def start_of(row: Row, few: Folders, python: Path) -> tuple[float, float]:
    """The seconds that theirs and ours take on a dozen images."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return (
            run_peer(row, few, place, python).seconds,
            run_ours(row, few, place, "--engine", "onnx").seconds,
        )


def timed(run: Ended) -> str:
    return f"{run.seconds:.1f} s ({run.processor:.0f} of processor), {run.megabytes:.0f} MB"


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f}, {min(numbers):.2f} to {max(numbers):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("query_dir", type=Path)
    parser.add_argument("gallery_dir", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="the python of their environment")
    parser.add_argument("--rows", default="timm,oml,pml", help=f"some of {','.join(ROWS)}")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}: they are {', '.join(ROWS)}")
    python = arguments.peers.absolute()  # not resolved: that would lead out of its environment
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folders = Folders(arguments.query_dir.resolve(), arguments.gallery_dir.resolve(), place)
        write_weights(place, {ROWS[row].weights for row in rows})
        few = Folders(a_dozen(folders.query, place / "q"), a_dozen(folders.gallery, place / "g"), place)
        for row in rows:
            starts = [start_of(ROWS[row], few, python) for _ in range(min(3, arguments.pairs))]
            start = tuple(statistics.median(each) for each in zip(*starts, strict=True))
            ratios = [compare(row, folders, python, start) for _ in range(arguments.pairs)]
            seconds, rest, memory, second = (spread(list(each)) for each in zip(*ratios, strict=True))
            print(f"{row}: n = {len(ratios)}: theirs / ours {seconds} times the seconds, {rest} less their "
                  f"start of {start[0]:.1f} and {start[1]:.1f} s; {memory} times the memory; our second "
                  f"run / our first {second}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

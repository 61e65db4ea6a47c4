"""Random unit vectors in; the time of our exact ranking divided by that of other programs, out.

    python benchmarks/ranking.py              # three problems, 1415 × 5000 × 2048 the first
    python benchmarks/ranking.py --million    # 10 000 × 1 000 000 × 128, from a mapped file of 512 MB

In the second problem, 720 × 1200 × 4096, the gallery holds ten copies of each image. Each program finds the
ten nearest gallery images of every query. `ours` is rank() with torch imported; `by_numpy` is rank() before
torch is imported; `topk` is torch's float32 product and topk, which decides neither near-ties nor ties;
`bare` is numpy's float32 product alone, which finds nothing; `flat` is FAISS's IndexFlatIP, its index
included; `usual` sorts all similarities of one query after another, as most scripts do. The programs take
turns, each in a process of its own that first ranks a few queries. Imports and making the vectors are not
timed. A ratio above 1 means that ours takes longer. The memory is the maximum of what our process holds
beyond what it held before, without the pages of mapped files, which the system takes back when it needs
them. It is sampled twenty times a second, on Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
COPIES = {(1415, 5000, 2048): 1, (720, 1200, 4096): 10, (2000, 100_000, 512): 1}  # of each gallery image
MILLION = (10_000, 1_000_000, 128)
PEERS = ("by_numpy", "topk", "bare", "flat", "usual")


def unit_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bare(queries: np.ndarray, gallery: np.ndarray) -> None:
    rows = max(1, 2**28 // len(gallery))  # 1 GiB of similarities at a time
    for start in range(0, len(queries), rows):
        queries[start : start + rows] @ gallery.T


def flat(queries: np.ndarray, gallery: np.ndarray) -> list:
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, 10)[1].tolist()


def usual(queries: np.ndarray, gallery: np.ndarray) -> list:
    return [np.argsort(gallery @ query)[::-1][:10].tolist() for query in queries]


def topk(queries: np.ndarray, gallery: np.ndarray) -> list:
    import torch

    product = torch.from_numpy(queries) @ torch.from_numpy(np.asarray(gallery)).T
    return product.topk(10).indices.tolist()


def by_numpy(queries: np.ndarray, gallery: np.ndarray) -> list:
    from retrieval.ranking.exact import rank
    from retrieval.records import Embeddings

    sides = [Embeddings(list(map(str, range(len(vectors)))), vectors) for vectors in (queries, gallery)]
    return rank(*sides, 10).rows.tolist()


def ours(queries: np.ndarray, gallery: np.ndarray) -> list:
    import torch  # noqa: F401

    return by_numpy(queries, gallery)


def own_memory() -> int:
    """Bytes of this process that are no pages of files."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return 4096 * (int(resident) - int(shared))


def watch(seen: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        seen.append(own_memory())


def measure(program: str, size: tuple[int, int, int], file: str) -> None:
    """Print the seconds, the MiB and the first answers of one program, as JSON."""
    act, (asked, images, dimension) = globals()[program], size
    queries = unit_vectors(asked, dimension, 0)
    gallery = np.memmap(file, np.float32, "r", shape=(images, dimension))
    if size != MILLION or program == "usual":
        gallery = np.array(gallery)
    act(queries[:10], gallery[:1000])
    before = own_memory()
    seen, ended = [before], threading.Event()
    threading.Thread(target=watch, args=(seen, ended), daemon=True).start()
    start = time.perf_counter()
    found = act(queries, gallery)
    seconds = time.perf_counter() - start
    ended.set()
    print(json.dumps({"seconds": seconds, "mib": (max(seen) - before) / 2**20, "found": (found or [])[:100]}))


def run(program: str, size: tuple[int, int, int], file: str) -> dict:
    """Measure one program in a process of its own."""
    command = [sys.executable, __file__, "--run", program, "--file", file, "--size", *map(str, size)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def compare(size: tuple[int, int, int], pairs: int, peers: tuple[str, ...]) -> None:
    print("{} queries × {} gallery images × {}".format(*size))
    with tempfile.NamedTemporaryFile(suffix=".vectors") as file:
        copies = COPIES.get(size, 1)
        for start in range(0, size[1], 50_000):
            different = unit_vectors(min(50_000, size[1] - start) // copies, size[2], start + 1)
            np.repeat(different, copies, axis=0).tofile(file)
        file.flush()
        took = {program: [] for program in ("ours", *peers)}
        for _ in range(pairs):
            results = {program: run(program, size, file.name) for program in took}
            for program, result in results.items():
                took[program].append(result)
    print_table(took, peers)


def print_table(took: dict[str, list[dict]], peers: tuple[str, ...]) -> None:
    def seconds(program: str) -> list[float]:
        return [result["seconds"] for result in took[program]]

    mine, memory = seconds("ours"), max(result["mib"] for result in took["ours"])
    print(f"  ours: median {statistics.median(mine):.2f} s, at most {memory:.0f} MiB")
    for peer in peers:
        ratios = [a / b for a, b in zip(mine, seconds(peer), strict=True)]
        pairs = [(a, b) for a, b in zip(took["ours"][0]["found"], took[peer][0]["found"], strict=False)]
        same = f", {sum(a == b for a, b in pairs)} of {len(pairs)} answers the same" if pairs else ""
        print(f"  ours / {peer}: n = {len(ratios)}, median {statistics.median(ratios):.2f}, "
              f"{min(ratios):.2f} to {max(ratios):.2f}{same}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--million", action="store_true")
    for hidden in ("--run", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        measure(arguments.run, tuple(arguments.size), arguments.file)
    elif arguments.million:
        compare(MILLION, arguments.pairs, ("bare", "flat"))
    else:
        for size in COPIES:
            compare(size, arguments.pairs, PEERS)


if __name__ == "__main__":
    main()

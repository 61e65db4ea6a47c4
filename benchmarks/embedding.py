"""A folder of images in; the time of our embedding beside the usual script's, as ratios, out.

    python benchmarks/embedding.py data/sample/test/gallery --pairs 5

Both embed the same images with the same weights on the CPU. The usual script opens each image with Pillow,
resizes it, applies ToTensor and Normalize, and runs the network on batches of 32. Each run is a process of
its own, and the two alternate. Reading and embedding are timed, loading the network is not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def usual(folder: Path) -> tuple[float, list]:
    """What is usually written: the seconds, and the unit vectors."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from get_images import find_images
    from retrieval.backbones import find_word

    row = find_word("efficientnet_lite0")
    network = row.network(row.weights.fetch()).eval()
    resize = transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    transform = transforms.Compose([resize, transforms.ToTensor(), normalise])
    paths = [image.path for image in find_images(folder)]
    start = time.perf_counter()
    vectors = []
    with torch.no_grad():
        for i in range(0, len(paths), 32):
            batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[i : i + 32]])
            vectors.append(torch.nn.functional.normalize(network(batch)))
    return time.perf_counter() - start, torch.cat(vectors).tolist()


def ours(folder: Path) -> tuple[float, list]:
    """The seconds, and the unit vectors."""
    from get_images import find_images
    from retrieval.backbones import load_backbone
    from retrieval.embedding import embed

    backbone = load_backbone("efficientnet_lite0", "cpu")
    files = find_images(folder)
    start = time.perf_counter()
    vectors = embed(files, backbone, 32).vectors
    return time.perf_counter() - start, vectors.tolist()


def timed(program: str, folder: Path) -> tuple[float, list]:
    """Run one program in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--run", program]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--run", choices=["usual", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps({"usual": usual, "ours": ours}[arguments.run](arguments.folder)))
        return
    ratios = []
    for _ in range(arguments.pairs):
        (theirs, vectors), (mine, others) = timed("usual", arguments.folder), timed("ours", arguments.folder)
        ratios.append(theirs / mine)
        pairs = zip(vectors, others, strict=True)
        cosine = min(sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs)
        print(f"usual {theirs:.1f} s, ours {mine:.1f} s, ratio {ratios[-1]:.2f}, least cosine {cosine:.5f}")
    print(
        f"n = {len(ratios)}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()

"""A folder of photographs in; the time of our face embedding beside the usual script's, as ratios, out.

    python benchmarks/faces.py data/lfw/test/query --pairs 5
    python benchmarks/faces.py data/lfw/test/query --stages

The usual script asks dlib for each photograph: the face (again at twice the size where it finds none), five
landmarks, the descriptor. Ours is the word `dlib`. Both run whole, start-up included, in processes that
alternate. `--stages` gives our seconds for detection alone and for the network alone, for `dlib` and
`facenet` in turn; FaceNet has random weights there, which are as fast as trained ones.
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


def usual(folder: Path) -> dict:
    """What is usually written: name → descriptor; without a face none."""
    import dlib
    import numpy as np
    from PIL import Image

    from get_images import find_images
    from retrieval.model_zoo import PRETRAINED

    network_file = PRETRAINED["dlib"].weights.fetch()
    detect = dlib.get_frontal_face_detector()
    landmarks = dlib.shape_predictor(str(network_file.with_name("shape_predictor_5_face_landmarks.dat")))
    network = dlib.face_recognition_model_v1(str(network_file))
    vectors = {}
    for image in find_images(folder):
        photo = np.array(Image.open(image.path).convert("RGB"))
        faces = detect(photo, 0) or detect(photo, 1)
        if faces:
            face = max(faces, key=lambda face: face.area())
            vectors[image.name] = list(network.compute_face_descriptor(photo, landmarks(photo, face)))
    return vectors


def ours(folder: Path) -> dict:
    """Name → unit vector."""
    from get_images import find_images
    from retrieval.backbones import load_backbone
    from retrieval.embedding import embed

    embeddings = embed(find_images(folder), load_backbone("dlib", "cpu"), 32)
    return dict(zip(embeddings.names, embeddings.vectors.tolist(), strict=True))


def timed(program: str, folder: Path) -> tuple[float, dict]:
    """Run one program in a process of its own: its seconds, from its start to its end, and its vectors."""
    command = [sys.executable, __file__, str(folder), "--run", program]
    start = time.perf_counter()
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return time.perf_counter() - start, json.loads(ended.stdout)


def cosine(a: list, b: list) -> float:
    lengths = sum(x * x for x in a) ** 0.5 * sum(x * x for x in b) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def pairs(folder: Path, count: int) -> None:
    ratios = []
    for _ in range(count):
        (theirs, vectors), (mine, others) = timed("usual", folder), timed("ours", folder)
        ratios.append(theirs / mine)
        # Where several faces are in a photograph, the two may choose another one.
        same = sum(cosine(vectors[name], others[name]) > 0.999 for name in vectors)
        print(
            f"usual {theirs:.1f} s, ours {mine:.1f} s, ratio {ratios[-1]:.2f}; "
            f"{len(others) / mine:.0f} images/s; {same} of {len(vectors)} vectors alike"
        )
    print(f"n = {count}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def stages(folder: Path, count: int) -> None:
    import torch
    from facenet_pytorch import InceptionResnetV1

    from get_images import find_images
    from retrieval.backbones import Backbone, load_backbone
    from retrieval.model_zoo import PRETRAINED
    from retrieval.readers import read_batches

    dlib, row = load_backbone("dlib", "cpu"), PRETRAINED["facenet"]
    network = InceptionResnetV1().eval().to(memory_format=torch.channels_last)
    facenet = Backbone(network, 512, row.face, row.mean, row.std, "facenet")
    files = find_images(folder)
    for backbone in (dlib, facenet):
        list(read_batches(files[:8], backbone.prepare, 8, processes=True))  # what starts once
        size = backbone.prepare.size
        backbone.embed(torch.zeros(32, 3, size, size, dtype=torch.uint8))
    for backbone in count * (dlib, facenet):
        start = time.perf_counter()
        batches = list(read_batches(files, backbone.prepare, 32, processes=True))
        found = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                backbone.embed(torch.stack([image.pixels for image in batch.images]))
        detection, embedding = found - start, time.perf_counter() - found
        each = [seconds / len(files) * 1e3 for seconds in (detection, embedding)]
        print(f"{backbone.word}: detection {each[0]:.1f} ms an image, network {each[1]:.1f} ms, "
              f"ratio {detection / embedding:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--run", choices=["usual", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps({"usual": usual, "ours": ours}[arguments.run](arguments.folder)))
    elif arguments.stages:
        stages(arguments.folder, arguments.pairs)
    else:
        pairs(arguments.folder, arguments.pairs)


if __name__ == "__main__":
    main()

"""Two folders of images in; each query's ten nearest by ResNet-50, as JSON, out.

    .peers/bin/python benchmarks/peers/course.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

The baseline that a course hands out: Pillow, torchvision's transforms, a network of torchvision's as it is.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms

parser = argparse.ArgumentParser()
parser.add_argument("query_dir", type=Path)
parser.add_argument("gallery_dir", type=Path)
parser.add_argument("--weights", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=1)
arguments = parser.parse_args()

model = models.resnet50(weights=None)
model.load_state_dict(torch.load(arguments.weights))
model.fc = torch.nn.Identity()
model.eval()

transform = transforms.Compose(
    [
        transforms.Resize(232),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def embed(folder: Path) -> tuple[list[str], np.ndarray]:
    """Names, and unit vectors (images, 2048)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    vectors = []
    with torch.no_grad():
        for i in range(0, len(paths), arguments.batch_size):
            files = paths[i : i + arguments.batch_size]
            batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
            vectors.append(model(batch).numpy())
    vectors = np.concatenate(vectors)
    names = [path.relative_to(folder).as_posix() for path in paths]
    return names, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


queries, query_vectors = embed(arguments.query_dir)
gallery, gallery_vectors = embed(arguments.gallery_dir)
ranking = {}
for query, vector in zip(queries, query_vectors, strict=True):
    order = np.argsort(-(gallery_vectors @ vector))
    ranking[query] = [gallery[i] for i in order[:10]]
arguments.out.write_text(json.dumps(ranking))

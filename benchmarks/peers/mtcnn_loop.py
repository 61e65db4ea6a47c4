"""Two folders of photographs in; each query's ten nearest by FaceNet, as JSON, out.

    .peers/bin/python benchmarks/peers/mtcnn_loop.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

facenet-pytorch's examples/lfw_evaluate.ipynb: MTCNN finds the faces in a batch of photographs of one size,
InceptionResnetV1 describes them. A photograph without a face counts by its centre.
"""

import argparse
import json
from pathlib import Path

import torch
from facenet_pytorch import MTCNN, InceptionResnetV1, extract_face, fixed_image_standardization, training
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

parser = argparse.ArgumentParser()
parser.add_argument("query_dir")
parser.add_argument("gallery_dir")
parser.add_argument("--weights", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=16)
parser.add_argument("--workers", type=int, default=2)
arguments = parser.parse_args()

mtcnn = MTCNN(image_size=160, margin=14, selection_method="center_weighted_size")
resnet = InceptionResnetV1(pretrained=None)
resnet.load_state_dict(torch.load(arguments.weights))
resnet.eval()


def centre(photo: Image.Image) -> torch.Tensor:
    """The middle half of a photograph, as MTCNN would have given it."""
    left, top = photo.width // 4, photo.height // 4
    box = [left, top, photo.width - left, photo.height - top]
    return fixed_image_standardization(extract_face(photo, box, image_size=160, margin=14))


def embed(folder: str) -> tuple[list[str], torch.Tensor]:
    """Names, and unit vectors (images, 512)."""
    dataset = datasets.ImageFolder(folder)
    dataset.samples = [(path, path) for path, _ in dataset.samples]
    loader = DataLoader(
        dataset,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        collate_fn=training.collate_pil,
    )
    names, vectors = [], []
    with torch.no_grad():
        for photos, paths in loader:
            faces = mtcnn(photos)
            pairs = zip(faces, photos, strict=True)
            faces = [centre(photo) if face is None else face for face, photo in pairs]
            vectors.append(resnet(torch.stack(faces)))
            names += [Path(path).relative_to(folder).as_posix() for path in paths]
    return names, torch.cat(vectors)


queries, query_vectors = embed(arguments.query_dir)
gallery, gallery_vectors = embed(arguments.gallery_dir)
nearest = torch.cdist(query_vectors, gallery_vectors).topk(10, largest=False).indices.tolist()
ranking = {query: [gallery[i] for i in row] for query, row in zip(queries, nearest, strict=True)}
arguments.out.write_text(json.dumps(ranking))

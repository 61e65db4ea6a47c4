"""Two folders of images in; each query's ten nearest by a timm model, as JSON, out.

    .peers/bin/python benchmarks/peers/timm_loop.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

The loop of timm's own inference.py: its dataset, its loader with two workers, channels_last. As with that
script's --crop-pct 1 --crop-mode squash, the network sees the whole image.
"""

import argparse
import json
from pathlib import Path

import torch
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config

parser = argparse.ArgumentParser()
parser.add_argument("query_dir")
parser.add_argument("gallery_dir")
parser.add_argument("--model", default="tf_efficientnet_lite0")
parser.add_argument("--weights", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--workers", type=int, default=2)
arguments = parser.parse_args()

device = torch.device("cpu")
model = create_model(arguments.model, checkpoint_path=arguments.weights)
model.reset_classifier(0)
config = resolve_data_config({"crop_pct": 1.0, "crop_mode": "squash"}, model=model)
model = model.to(device=device, memory_format=torch.channels_last).eval()


def embed(folder: str) -> tuple[list[str], torch.Tensor]:
    """Names, and unit vectors (images, dimension)."""
    dataset = create_dataset("", root=folder)
    loader = create_loader(
        dataset,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        device=device,
        **config,
    )
    with torch.inference_mode():
        vectors = [model(images.contiguous(memory_format=torch.channels_last)) for images, _ in loader]
    return dataset.filenames(), torch.nn.functional.normalize(torch.cat(vectors))


queries, query_vectors = embed(arguments.query_dir)
gallery, gallery_vectors = embed(arguments.gallery_dir)
nearest = (query_vectors @ gallery_vectors.T).topk(10).indices.tolist()
ranking = {query: [gallery[i] for i in row] for query, row in zip(queries, nearest, strict=True)}
arguments.out.write_text(json.dumps(ranking))

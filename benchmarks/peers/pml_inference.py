"""Two folders of images in; each query's ten nearest by pytorch-metric-learning, as JSON, out.

    .peers/bin/python benchmarks/peers/pml_inference.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

Its notebook "Inference": InferenceModel finds the nearest by faiss, AccuracyCalculator rates them.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel
from torchvision import datasets, transforms

parser = argparse.ArgumentParser()
parser.add_argument("query_dir")
parser.add_argument("gallery_dir")
parser.add_argument("--model", default="tf_efficientnet_lite0")
parser.add_argument("--weights", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=64)
arguments = parser.parse_args()

transform = transforms.Compose(
    [
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)
queries = datasets.ImageFolder(arguments.query_dir, transform)
gallery = datasets.ImageFolder(arguments.gallery_dir, transform)
trunk = timm.create_model(arguments.model, checkpoint_path=arguments.weights)
trunk.reset_classifier(0)

model = InferenceModel(trunk)
reference = model.get_embeddings_from_tensor_or_dataset(gallery, arguments.batch_size)
model.knn_func.train(reference)
query = model.get_embeddings_from_tensor_or_dataset(queries, arguments.batch_size)
_, nearest = model.knn_func(query, 10)

classes = [gallery.class_to_idx.get(name, -1) for name in queries.classes]
labels = torch.tensor([classes[label] for label in queries.targets])
calculator = AccuracyCalculator(include=("precision_at_1",), k=1)
print(calculator.get_accuracy(query, labels, reference, torch.tensor(gallery.targets)))


def name(root: str, path: str) -> str:
    return Path(path).relative_to(root).as_posix()


names = [name(arguments.gallery_dir, path) for path, _ in gallery.samples]
ranking = {
    name(arguments.query_dir, path): [names[i] for i in row]
    for (path, _), row in zip(queries.samples, nearest.tolist(), strict=True)
}
arguments.out.write_text(json.dumps(ranking))

"""Two folders of images in; each query's ten nearest by open-metric-learning, as JSON, out.

    .peers/bin/python benchmarks/peers/oml_pipeline.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

Its README's "Using a trained model for retrieval", with a timm model as the extractor.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import timm
import torch
from oml.datasets import ImageQueryGalleryDataset
from oml.inference import inference
from oml.interfaces.models import IExtractor
from oml.retrieval import RetrievalResults
from torchvision import transforms

parser = argparse.ArgumentParser()
parser.add_argument("query_dir", type=Path)
parser.add_argument("gallery_dir", type=Path)
parser.add_argument("--model", default="tf_efficientnet_lite0")
parser.add_argument("--weights", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--workers", type=int, default=2)
arguments = parser.parse_args()


class TimmExtractor(IExtractor):
    """A timm model in open-metric-learning's form."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(arguments.model, checkpoint_path=arguments.weights)
        self.model.reset_classifier(0)

    @property
    def feat_dim(self) -> int:
        return self.model.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.model(images))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


queries, gallery = files(arguments.query_dir), files(arguments.gallery_dir)
rows = pd.DataFrame(
    {
        "path": [str(path) for path in [*queries, *gallery]],
        "is_query": [True] * len(queries) + [False] * len(gallery),
        "is_gallery": [False] * len(queries) + [True] * len(gallery),
    }
)
transform = transforms.Compose(
    [
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)
dataset = ImageQueryGalleryDataset(rows, transform=transform)
extractor = TimmExtractor().eval()
embeddings = inference(extractor, dataset, arguments.batch_size, arguments.workers)
results = RetrievalResults.from_embeddings(embeddings, dataset, n_items=10)

ranking = {
    query.relative_to(arguments.query_dir).as_posix(): [
        gallery[i].relative_to(arguments.gallery_dir).as_posix() for i in ids.tolist()
    ]
    for query, ids in zip(queries, results.retrieved_ids, strict=True)
}
arguments.out.write_text(json.dumps(ranking))

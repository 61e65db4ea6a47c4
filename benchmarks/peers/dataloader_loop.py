"""Two folders of images in; each query's ten nearest by a network on the GPU, as JSON, out.

    python benchmarks/peers/dataloader_loop.py QUERY_DIR GALLERY_DIR --weights FILE --out FILE

The loop that most people write: a DataLoader with a worker for each core, torchvision's transforms, bfloat16,
channels_last. `--model` is ResNet-50 of torchvision, or any model of timm; without `--weights` it is random.
"""

import argparse
import json
import os
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet50

parser = argparse.ArgumentParser()
parser.add_argument("query_dir", type=Path)
parser.add_argument("gallery_dir", type=Path)
parser.add_argument("--model", default="resnet50")
parser.add_argument("--weights")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--batch_size", type=int, default=256)
parser.add_argument("--workers", type=int, default=os.cpu_count())
arguments = parser.parse_args()

transform = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class Images(Dataset):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return transform(Image.open(self.paths[index]).convert("RGB"))


if arguments.model == "resnet50":
    model = resnet50()
    if arguments.weights:
        model.load_state_dict(torch.load(arguments.weights))
    model.fc = torch.nn.Identity()
else:
    model = timm.create_model(arguments.model)
    if arguments.weights:
        model.load_state_dict(torch.load(arguments.weights))
    model.reset_classifier(0)
model = model.eval().to("cuda", memory_format=torch.channels_last)


def embed(images: Images) -> torch.Tensor:
    """Return unit vectors (images, dimension), on the GPU."""
    loader = DataLoader(
        images, batch_size=arguments.batch_size, num_workers=arguments.workers, pin_memory=True
    )
    vectors = []
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for batch in loader:
            batch = batch.to("cuda", non_blocking=True, memory_format=torch.channels_last)
            vectors.append(model(batch).float())
    return torch.nn.functional.normalize(torch.cat(vectors))


queries, gallery = Images(arguments.query_dir), Images(arguments.gallery_dir)
nearest = (embed(queries) @ embed(gallery).T).topk(10).indices.tolist()
ranking = {name: [gallery.names[i] for i in row] for name, row in zip(queries.names, nearest, strict=True)}
arguments.out.write_text(json.dumps(ranking))

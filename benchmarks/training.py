"""A folder with a folder a class in; images a second of our training beside the usual loop's, as ratios, out.

    python benchmarks/training.py data/intel_dataset/train --loss supcon --pairs 5
    python benchmarks/training.py --loss_only --pairs 5      # the contrastive loss alone, of 2 × 4096 views

Both train EfficientNet-Lite0 from the same weights with the same part of it frozen, with inputs of one size
and batches of 48. The usual loop is a Dataset of Pillow and torchvision's transforms, a DataLoader with two
workers, the network as timm builds it, AdamW, and cross-entropy or pytorch-metric-learning's SupConLoss. Each
run is a process of its own, and the two alternate. The first two steps are not timed. The time to read images
before the first step (ours reads all of them) is printed beside the ratio.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MODEL, BATCH, WARM_UP = "efficientnet_lite0", 48, 2
VIEWS, DIMENSION, OF_A_CLASS = 4096, 128, 4


# ---- ours -----------------------------------------------------------------------------------------


def ours(form: argparse.Namespace) -> dict[str, float]:
    """Images a second, and the seconds before the first step."""
    import fine_tuning
    from supcon.batches import find_and_split
    from supcon.start import load_start
    from supcon.state import begin
    from supcon.steps import planned_steps, step, with_views
    from supcon.variants import choices_of

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = fine_tuning.Settings(
            train_dir=form.folder, save_dir=Path(folder), loss=form.loss, model=MODEL, device=form.device,
            batch_size=BATCH, image_size=form.image_size,
        )  # fmt: skip
        split = find_and_split(settings)
        training = begin(settings, choices_of(settings), split, load_start(settings, split.train))
        before = time.perf_counter() - start
        with closing(with_views(training, planned_steps(training))) as coming:
            for done, inputs in zip(range(WARM_UP + form.steps), coming, strict=False):
                if done == WARM_UP:
                    start = time.perf_counter()
                step(training, *inputs)
            return {"rate": BATCH * form.steps / (time.perf_counter() - start), "before": before}


# ---- the usual loop -------------------------------------------------------------------------------


class Images:
    """A Dataset: each image as one view or two, and its class."""

    def __init__(self, folder: Path, views: int, size: int, mean: tuple, std: tuple) -> None:
        from torchvision import transforms

        from get_images import find_images, label_of

        files = find_images(folder)
        self.paths, labels = [file.path for file in files], [label_of(file.name) for file in files]
        self.classes = sorted(set(labels))
        self.labels, self.views = [self.classes.index(label) for label in labels], views
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2), transforms.ToTensor(), transforms.Normalize(mean, std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple:
        import torch
        from PIL import Image

        image = Image.open(self.paths[row]).convert("RGB")
        return torch.stack([self.transform(image) for _ in range(self.views)]), self.labels[row]


def usual(form: argparse.Namespace) -> dict[str, float]:
    """Images a second, and the seconds before the first step."""
    import torch
    from pytorch_metric_learning.losses import SupConLoss
    from torch import nn

    from retrieval.backbones.backbone import choose_device, find_pretrained
    from supcon.layers import freeze

    start, device, row = time.perf_counter(), choose_device(form.device), find_pretrained(MODEL)
    data = Images(form.folder, 2 if form.loss == "supcon" else 1, form.image_size, row.mean, row.std)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=2)
    network = row.network(row.weights.fetch())
    freeze(network, "stem", MODEL)
    if form.loss == "supcon":
        head = nn.Sequential(nn.Linear(row.dimension, 512), nn.ReLU(), nn.Linear(512, 128))
        loss_of = SupConLoss(temperature=0.1)
    else:
        head = nn.Sequential(nn.Dropout(0.2), nn.Linear(row.dimension, len(data.classes)))
        loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = nn.Sequential(network, head).train().to(device)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.02)
    before = time.perf_counter() - start
    for done, (views, labels) in enumerate(loader):
        pixels = views.transpose(0, 1).flatten(0, 1).to(device)
        loss = loss_of(model(pixels), labels.repeat(data.views).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
        loss.item()
        if done + 1 == WARM_UP:
            start = time.perf_counter()
        if done + 1 == WARM_UP + form.steps:
            break
    return {"rate": BATCH * form.steps / (time.perf_counter() - start), "before": before}


# ---- the loss alone -------------------------------------------------------------------------------


def loss_alone(form: argparse.Namespace) -> dict[str, float]:
    """How often a second it goes forward and backward, and the most megabytes of the process."""
    import torch
    from pytorch_metric_learning.losses import SupConLoss

    from supcon.losses import supcon_loss

    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2 * VIEWS, DIMENSION, generator=random).to(form.device)
    labels = torch.arange(VIEWS // OF_A_CLASS).repeat(2 * OF_A_CLASS).to(form.device)
    loss_of = supcon_loss if form.run == "ours" else SupConLoss(temperature=0.1)
    seconds = []
    for _ in range(4):  # the first finds its memory
        leaf = embeddings.clone().requires_grad_()
        start = time.perf_counter()
        loss_of(leaf, labels).backward()
        leaf.grad.sum().item()
        seconds.append(time.perf_counter() - start)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"rate": 1 / statistics.median(seconds[1:]), "before": most}


# ---- both, in turn --------------------------------------------------------------------------------


def timed(program: str) -> dict[str, float]:
    """Run one program in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", program]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--loss", choices=["ce", "supcon"], default="ce")
    parser.add_argument("--loss_only", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", choices=["usual", "ours"], help=argparse.SUPPRESS)
    form = parser.parse_args()
    if not (form.loss_only or form.folder):
        parser.error("give a folder with a folder a class, or --loss_only")
    if form.folder:
        from get_images import find_images

        images = len(find_images(form.folder))
        there = int(0.8 * images) // BATCH - WARM_UP  # a fifth is set aside, and an epoch is what is timed
        if there < form.steps:
            parser.error(f"{form.folder} holds {images} images, which is enough for {max(0, there)} steps: "
                         "give one with more, or a smaller --steps")  # fmt: skip
    if form.run:
        program = loss_alone if form.loss_only else {"usual": usual, "ours": ours}[form.run]
        print(json.dumps(program(form)))
        return
    what, beside = ("times/s", "MB at most") if form.loss_only else ("images/s", "s before the first step")
    ratios = []
    for _ in range(form.pairs):
        theirs, mine = timed("usual"), timed("ours")
        ratios.append(mine["rate"] / theirs["rate"])
        print(f"usual {theirs['rate']:.2f} {what} ({theirs['before']:.1f} {beside}), ours {mine['rate']:.2f} "
              f"({mine['before']:.1f}), ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
    middle = statistics.median(ratios)
    print(f"n = {len(ratios)}: median {middle:.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()

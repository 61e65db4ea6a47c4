"""The settings of choose.py, each with its default and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from retrieval.backbones.zoo import known_model_name
from retrieval.choosing.recipes import Source
from retrieval.command_line import Metavar
from retrieval.errors import InputError
from retrieval.forms import Form
from retrieval.settings import (
    CACHE_DIR,
    LOCAL,
    Device,
    Folder,
    GroupName,
    GroupToken,
    NewFolder,
    PositiveAmount,
    PositiveInt,
    ServerUrl,
)

CROPS = ("none", "face", "align", "loose")


def source_of(text: str) -> Source:
    """Read MODEL or MODEL@CROP. Raises ValueError for a crop that there is not, InputError for a model.

    >>> source_of("clip@loose")
    Source(model='clip', crop='loose', views='none', checkpoint='')
    """
    model, at, crop = text.partition("@")
    if at and crop not in CROPS:
        raise ValueError(f"write MODEL, or MODEL@CROP with one of the crops {', '.join(CROPS)}")
    return Source(known_model_name(model), crop or "auto")


def _model(text: str) -> str:
    source_of(text)
    return text


Models = Annotated[list[Annotated[str, AfterValidator(_model)]], Metavar("A,B")]


class ChoosingSettings(Form):
    """Settings of the choice."""

    train_dir: Folder = Path("data/train")
    """folder of labelled images, with a folder per class, on which everything is tried"""
    query_dir: Folder = Path("data/test/query")
    """folder of the query images"""
    gallery_dir: Folder = Path("data/test/gallery")
    """folder of the gallery images"""
    minutes: PositiveAmount = 40
    """minutes after which the search has ended, with the report and the submission"""
    models: Models = ["efficientnet_lite0", "dlib", "facenet", "clip:base", "clip"]  # noqa: RUF012
    """networks to try, in this order; the first is the plain choice

    A network that looks for faces is MODEL; MODEL@CROP cuts them out for another one, as in `clip@loose`. One
    that fails, finds no faces, or would take too long is passed over, and the report says why.
    """
    matches: PositiveInt | None = None
    """right images of a query in the gallery (default: by the look of the gallery)"""
    fine_tune: bool = False
    """also fine-tune the best network, in half of the time that is left then"""
    rehearse: bool = False
    """hide a day in --train_dir, choose without it, and say what it would have scored; write no submission

    Of the folders of queries and gallery only the share of queries counts.
    """
    send_first: bool = False
    """also send the first valid submission; the last one is sent at the end"""
    seed: int = 0
    """seed of the days that are drawn from the labelled images"""
    server_url: ServerUrl = ""
    """URL to submit to at the end, such as http://10.0.0.7:3001/retrieval/, or local (default: only save)"""
    group_name: GroupName = "my-team"
    """name of your group on the server"""
    group_token: GroupToken = GroupToken("")
    """token of your group, if the server asks for one"""
    custom_dataset: bool = False
    """score by the folder labels of queries and gallery, and send nothing"""
    output_dir: NewFolder = Path("results")
    """folder for submission.json, recipe.json and the files of the last run"""
    device: Device = "auto"
    """device of the networks: cuda, mps, cpu, or auto, the first that is available"""
    cache_dir: NewFolder = CACHE_DIR
    """cache of embeddings, faces and exported networks: a search that was stopped goes on from it"""


def check_send_first(settings: ChoosingSettings) -> None:
    """Raise InputError if the first submission is to be sent in a run that sends nothing to a server."""
    for flag, given in {
        "--rehearse": settings.rehearse,
        "--custom_dataset": settings.custom_dataset,
        "--server_url local": settings.server_url == LOCAL,
        "no --server_url": not settings.server_url,
    }.items():
        if settings.send_first and given:
            raise InputError(f"--send_first sends to a server, and with {flag} nothing is sent: leave it out")

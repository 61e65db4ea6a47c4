"""List the model names, or download their weights ahead of the day.

python -m retrieval.backbones                           # the names, and whose weights are on this machine
python -m retrieval.backbones --fetch simclr facenet    # download theirs
"""

from __future__ import annotations

import logging

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from pydantic_settings import CliPositionalArg

from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.detectors import DETECTORS
from retrieval.backbones.weights import Download, InPackage, OnHub
from retrieval.backbones.zoo import PRETRAINED, ModelType, Pretrained
from retrieval.errors import InputError, RunError
from retrieval.forms import Form
from retrieval.settings import Detector

MORE = """timm:NAME and timm:hf-hub:OWNER/NAME are any of timm's networks, with its own transform.
--fetch NAME downloads weights. GMACs are the multiply-adds for an image, in 10^9, and decide the speed:
docs/backbones.md has images per second, and says which network suits which images."""

log = logging.getLogger("retrieval.backbones")


class Settings(Form):
    """List the model names and what they are, or download their weights ahead of the day."""

    names: CliPositionalArg[list[ModelType]] = []  # noqa: RUF012 (pydantic copies it)
    """model names to list; by default all"""
    fetch: bool = False
    """download the weights of these models"""
    detector: Detector = "auto"
    """face detector to download with them, such as scrfd (--crop align --detector scrfd needs it)"""


def main(form: Settings) -> None:
    names = form.names or list(PRETRAINED)
    if form.fetch and not form.names:
        raise InputError("--fetch needs the names to download, such as --fetch facenet clip")
    if form.fetch:
        fetch({name: find_pretrained(name).weights for name in names} | detector_file(form.detector))
    else:
        log.info("%s", table({name: find_pretrained(name) for name in names}))
        log.info("%s", MORE)


def detector_file(detector: str) -> dict[str, OnHub]:
    """Return the file of weights of a face detector by the detector's name; most need none."""
    file = DETECTORS[detector].file if detector in DETECTORS else None
    return {detector: file} if file else {}


def fetch(weights: dict[str, InPackage | Download | OnHub]) -> None:
    """Download the missing files. Raises RunError at the end if some failed."""
    failed = []
    for name, source in weights.items():
        try:
            log.info("%s: %s", name, source.fetch())
        except RunError as error:
            failed.append(str(error))
    if failed:
        raise RunError("\nerror: ".join(failed))


COLUMNS = ("name", "sees", "embedding", "params (M)", "GMACs", "weights", "for", "licence")


def table(rows: dict[str, Pretrained]) -> str:
    """Return the rows as a table of text: what a network sees, what it costs, and where its weights are."""
    cells = [COLUMNS, *(_cells(name, row) for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


def _cells(name: str, row: Pretrained) -> tuple[str, ...]:
    file = row.weights.find()
    where = f"here, {file.stat().st_size / 1e6:.0f} MB" if file else "to fetch"
    numbers = (f"{number:g}" if number else "?" for number in (row.millions, row.gmacs))
    dimension = f"{row.dimension}-d" if row.dimension else "?"
    return name, _sees(row), dimension, *numbers, where, row.good_for, row.licence


def _sees(row: Pretrained) -> str:
    """Describe the input of a network: a part of the image, and its size."""
    what = {"squash": "whole image", "center": "centre", "border": "whole image"}[row.transform.crop_mode]
    if row.face:
        upright = row.face.method == "align" or row.face.detector == "dlib"
        what = "aligned face" if upright else "face"
    return f"{what}, {row.transform.size} px"


if __name__ == "__main__":
    run_script(main, Settings)

"""Lay out a data set as train, test/query and test/gallery.

python -m retrieval.datasets sample --out data/sample
python -m retrieval.datasets intel --out data/intel_dataset --archive intel.zip
python -m retrieval.datasets split --source FOLDER --out DIR
python -m retrieval.datasets competition --archive handed_out.zip
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retrieval.console import run_command  # first, since it checks that the packages are installed

# isort: split
from retrieval.datasets import layouts
from retrieval.forms import Form
from retrieval.settings import FileOrFolder, NewFolder, Share


class Sample(Form):
    """Lay out scikit-learn's handwritten digits as train, test/query and test/gallery."""

    out: NewFolder = Path("data/sample")
    """folder to lay the data set out in"""


class Intel(Form):
    """Lay out the Intel scenes, from the zip of Kaggle or the folder it was unpacked to."""

    out: NewFolder = Path("data/intel_dataset")
    """folder to lay the data set out in"""
    archive: FileOrFolder | None = None
    """zip of Kaggle, or the folder it was unpacked to (default: kagglehub downloads it)"""
    keep_duplicates: bool = False
    """keep images that occur in two of train, query and gallery"""
    seed: int = 0
    """seed of the random split"""


class Split(Form):
    """Lay out any images that lie in a folder per class."""

    source: FileOrFolder
    """folder or archive with one folder per class"""
    out: NewFolder
    """folder to lay the data set out in"""
    train: Share = 0.7
    """share of each class to train on; of the rest 40 % are queries and 60 % gallery"""
    keep_duplicates: bool = False
    """keep images that occur in two of train, query and gallery"""
    seed: int = 0
    """seed of the random split"""


class Competition(Form):
    """Lay out the organisers' archive: train, test/query and test/gallery."""

    archive: FileOrFolder
    """zip or tar archive, or the folder it was unpacked to"""
    out: NewFolder = Path("data")
    """folder to lay the data set out in"""
    keep_duplicates: bool = False
    """keep images that occur in two of train, query and gallery"""


def _with_all(lay_out: Callable[..., None]) -> Callable[[Form], None]:
    return lambda form: lay_out(**dict(form))


COMMANDS = {
    "sample": (Sample, _with_all(layouts.lay_out_sample)),
    "intel": (Intel, _with_all(layouts.lay_out_intel)),
    "split": (Split, _with_all(layouts.lay_out_split)),
    "competition": (Competition, _with_all(layouts.lay_out_competition)),
}


if __name__ == "__main__":
    run_command(COMMANDS)

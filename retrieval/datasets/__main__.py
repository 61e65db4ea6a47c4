"""Lay out a data set as train, test/query and test/gallery.

python -m retrieval.datasets sample --out data/sample
python -m retrieval.datasets intel --out data/intel_dataset --archive intel.zip
python -m retrieval.datasets split --source FOLDER --out DIR
python -m retrieval.datasets competition --archive handed_out.zip
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retrieval import settings
from retrieval.console import run_command
from retrieval.datasets import layouts


class Sample(settings.Form):
    """Lay out scikit-learn's handwritten digits as train, test/query and test/gallery."""

    out: settings.NewFolder = Path("data/sample")


class Intel(settings.Form):
    """Lay out the Intel scenes, from the zip of Kaggle or the folder it was unpacked to."""

    out: settings.NewFolder = Path("data/intel_dataset")
    archive: settings.FileOrFolder | None = None  # None: download it by kagglehub
    keep_duplicates: bool = False
    seed: int = 0


class Split(settings.Form):
    """Lay out any images that lie in a folder a class."""

    source: settings.FileOrFolder
    out: settings.NewFolder
    train: settings.Share = 0.7  # of each class; of the rest 40 % are queries and 60 % gallery
    keep_duplicates: bool = False
    seed: int = 0


class Competition(settings.Form):
    """Lay out what the organisers hand out: train, test/query and test/gallery."""

    archive: settings.FileOrFolder
    out: settings.NewFolder = Path("data")
    keep_duplicates: bool = False


def _with_all(lay_out: Callable[..., None]) -> Callable[[settings.Form], None]:
    return lambda form: lay_out(**dict(form))


COMMANDS = {
    "sample": (Sample, _with_all(layouts.lay_out_sample)),
    "intel": (Intel, _with_all(layouts.lay_out_intel)),
    "split": (Split, _with_all(layouts.lay_out_split)),
    "competition": (Competition, _with_all(layouts.lay_out_competition)),
}


if __name__ == "__main__":
    run_command(COMMANDS)

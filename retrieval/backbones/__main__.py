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
from retrieval.backbones.zoo import PRETRAINED, ModelType, Pretrained
from retrieval.errors import RunError
from retrieval.forms import Form

log = logging.getLogger("retrieval.backbones")


class Settings(Form):
    """List the model names and what they are, or download their weights ahead of the day."""

    names: CliPositionalArg[list[ModelType]] = []  # noqa: RUF012 (pydantic copies it)
    """model names to list; by default all"""
    fetch: bool = False
    """download the weights of these models"""


def main(form: Settings) -> None:
    names = form.names or list(PRETRAINED)
    if form.fetch:
        fetch(names)
    else:
        log.info("%s", "\n".join(_described(name, find_pretrained(name)) for name in names))
        log.info("timm:NAME and timm:hf-hub:OWNER/NAME are any of timm's, with its own transform")


def fetch(names: list[str]) -> None:
    """Download the missing weights of each model. Raises RunError at the end if some failed."""
    failed = []
    for name in names:
        try:
            log.info("%s: %s", name, find_pretrained(name).weights.fetch())
        except RunError as error:
            failed.append(str(error))
    if failed:
        raise RunError("\nerror: ".join(failed))


def _described(name: str, row: Pretrained) -> str:
    size = row.transform.size
    sees = f"a face of {size} px ({row.face.detector})" if row.face else f"{size} px"
    numbers = f"{row.dimension}-d, {row.millions} million parameters" if row.dimension else "embedding"
    numbers += f", {row.gmacs:g} GMACs" if row.gmacs else ""
    file = row.weights.find()
    where = f"here, {file.stat().st_size / 1e6:.0f} MB" if file else f"not here: --fetch {name}"
    return f"{name}\n    {sees} → {numbers}; for {row.good_for}\n    weights: {where}; {row.licence}"


if __name__ == "__main__":
    run_script(main, Settings)

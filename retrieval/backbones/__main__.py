"""List the model names, or download their weights ahead of the day.

python -m retrieval.backbones                           # the names, and whose weights are on this machine
python -m retrieval.backbones --fetch simclr facenet    # download theirs
"""

from __future__ import annotations

import logging

from pydantic_settings import CliPositionalArg

from retrieval import settings
from retrieval.backbones.backbone import find_word
from retrieval.backbones.zoo import PRETRAINED, ModelType, Pretrained
from retrieval.console import run_script
from retrieval.errors import RunError

log = logging.getLogger("retrieval.backbones")


class Settings(settings.Form):
    """List the words and what they are, or download their weights ahead of the day."""

    words: CliPositionalArg[list[ModelType]] = []  # noqa: RUF012 (pydantic copies it)
    fetch: bool = False


def main(form: Settings) -> None:
    words = form.words or list(PRETRAINED)
    if form.fetch:
        fetch(words)
    else:
        log.info("%s", "\n".join(_described(word, find_word(word)) for word in words))
        log.info("timm:NAME and timm:hf-hub:OWNER/NAME are any of timm's, with its own transform")


def fetch(words: list[str]) -> None:
    """Download the weights of each word that are not here. Raises RunError at the end if some failed."""
    failed = []
    for word in words:
        try:
            log.info("%s: %s", word, find_word(word).weights.fetch())
        except RunError as error:
            failed.append(str(error))
    if failed:
        raise RunError("\nerror: ".join(failed))


def _described(word: str, row: Pretrained) -> str:
    size = row.transform.size
    sees = f"a face of {size} px ({row.face.detector})" if row.face else f"{size} px"
    numbers = f"{row.dimension}-d, {row.millions} million parameters" if row.dimension else "embedding"
    file = row.weights.find()
    where = f"here, {file.stat().st_size / 1e6:.0f} MB" if file else f"not here: --fetch {word}"
    return f"{word}\n    {sees} → {numbers}; for {row.good_for}\n    weights: {where}; {row.licence}"


if __name__ == "__main__":
    run_script(main, Settings)

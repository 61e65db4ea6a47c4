"""List what the cache of embeddings holds, or delete what no run has used lately.

python -m retrieval.embedding --cache_dir DIR                     # what the cache holds
python -m retrieval.embedding --cache_dir DIR --older_than 30     # delete what no run used for thirty days
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from retrieval.embedding.cache import BROKEN, FILES, Cache, contents, left_over, prune
from retrieval.embedding.onnx_runtime import NETWORKS, exported_networks
from retrieval.errors import InputError, RunError
from retrieval.forms import Form
from retrieval.settings import CACHE_DIR, Amount, NewFolder

log = logging.getLogger("retrieval.embedding")


class Settings(Form):
    """List what the cache of embeddings holds, or delete what no run has used lately."""

    cache_dir: NewFolder = CACHE_DIR
    """folder of the cache"""
    older_than: Amount | None = None
    """delete what no run has used for this many days"""


def main(form: Settings) -> None:
    if not [*form.cache_dir.glob(FILES), *form.cache_dir.glob(NETWORKS)]:
        raise InputError(f"there is no cache in {form.cache_dir}: give the --cache_dir of runs")
    cache = Cache(form.cache_dir)
    if cache.connection is None:
        raise RunError(f"{form.cache_dir} cannot be read: give another --cache_dir")
    try:
        if form.older_than is not None:
            _remove(cache, form.older_than)
        _tell(cache)
    except BROKEN as error:
        raise RunError(
            f"the cache in {cache.folder} cannot be used now ({error}): try again when no run uses it"
        ) from None


def _remove(cache: Cache, days: float) -> None:
    networks, others = exported_networks(cache.folder, days), left_over(cache.folder, days)
    for file in [*networks, *others]:
        file.unlink(missing_ok=True)
    log.info("removed what was kept of %d images, and %d exported networks: unused for %g days",
             prune(cache, days), _count(networks), days)  # fmt: skip
    if others:
        log.info("removed %d files of broken or earlier caches, such as %s", len(others), others[0].name)


def _tell(cache: Cache) -> None:
    for what, count, size, used in contents(cache):
        when = datetime.fromtimestamp(used).strftime("%Y-%m-%d %H:%M")
        log.info("%s: %d images, %.1f MB, used %s", what, count, size / 1e6, when)
    networks = exported_networks(cache.folder)
    log.info("exported networks: %d, %.1f MB", _count(networks), _megabytes(networks))
    log.info("%s holds %.1f MB", cache.folder, _megabytes([*networks, *cache.folder.glob("*.sqlite*")]))


def _count(networks: list[Path]) -> int:
    return sum(file.suffix == ".onnx" for file in networks)


def _megabytes(files: list[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    run_script(main, Settings)

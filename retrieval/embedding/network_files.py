"""The cache key of a backbone in; the files that earlier runs kept of its network out.

They lie in the folder `networks` of the cache: the exported network (.onnx), or why ONNX Runtime cannot run
it (.refused).
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from retrieval.files import write_whole

NETWORKS = "networks"

log = logging.getLogger("retrieval.networks")


@dataclass(frozen=True)
class NetworkFiles:
    """The files of one network. Without a folder there are none, and none is written."""

    folder: Path | None  # of the cache
    key: bytes  # the backbone's

    def path(self, kind: str) -> Path:
        """Return the path of a kind of file, such as 1.onnx."""
        return self.folder / NETWORKS / f"{self.key.hex()[:32]}-{kind}"

    def exists(self, kind: str) -> bool:
        """Return whether an earlier run has written this kind of file."""
        return self.folder is not None and self.path(kind).is_file()

    def read(self, kind: str) -> bytes:
        """Return what an earlier run has written, b"" if none has. The file then counts as used."""
        if not self.exists(kind):
            return b""
        with suppress(OSError):  # the folder may be read-only
            os.utime(self.path(kind))
        return self.path(kind).read_bytes()

    def write(self, kind: str, content: bytes) -> None:
        """Write a file for the next run; warn if that fails."""
        if self.folder is None:
            return
        file = self.path(kind)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
        except OSError as error:
            log.warning("%s cannot be kept (%s): the next run makes it again", file, error.strerror)


def exported_networks(folder: Path, unused_for: float = 0.0) -> list[Path]:
    """Return the files of all networks in a cache that no run has used for `unused_for` days."""
    ages = {file: time.time() - file.stat().st_mtime for file in sorted((folder / NETWORKS).glob("*.*"))}
    least = 86400 * unused_for
    # A hidden file is being written, unless it is an hour old.
    return [file for file, age in ages.items() if age >= max(least, 3600 * file.name.startswith("."))]

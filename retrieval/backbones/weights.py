"""The source of a file of weights in: a package, a URL or a repository; the file on this machine out."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from retrieval.errors import SOCKS, InputError, NotDownloadedError
from retrieval.files import write_whole
from retrieval.machine import require

NO_NETWORK = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)
TIMEOUT = (10, 60)  # seconds: to connect, and without a byte

log = logging.getLogger("retrieval.weights")


@dataclass(frozen=True)
class InPackage:
    """Weights that an installed package carries."""

    package: str  # as pip calls it
    module: str
    path: str  # below the module's folder

    def find(self) -> Path | None:
        """Return the file if it is on this machine. Does not import the package, which may need others."""
        spec = find_spec(self.module)
        file = Path(spec.submodule_search_locations[0]) / self.path if spec else None
        return file if file and file.is_file() else None

    def fetch(self) -> Path:
        """Return the file. Raises InputError if the package is not installed."""
        require(self.package, self.module)
        file = self.find()
        if not file:
            raise InputError(f"the package {self.package} lacks {self.path}: install it again")
        return file


@dataclass(frozen=True)
class Download:
    """Weights at a URL, kept in the folder of the library that publishes them."""

    url: str
    folder: Callable[[], Path]  # a function, since it depends on the environment
    sha256: str = ""  # the first digits of the file's digest, if its publisher gives them

    def place(self) -> Path:
        """Return the path of the file, downloaded or not."""
        return self.folder() / self.url.rpartition("/")[2]

    def find(self) -> Path | None:
        """Return the file if it is on this machine."""
        return self.place() if os.path.isfile(self.place()) else None  # False, too, in a closed folder

    def fetch(self) -> Path:
        """Return the file; download it first if need be, whole or not at all.

        Raises NotDownloadedError if that fails.
        """
        file = self.place()
        if not os.path.isfile(file):
            log.info("downloading %s to %s", self.url, file.parent)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, self._download())
            except OSError as error:  # of the network (requests' errors are OSErrors) or the disk
                raise _no_download(
                    self.url, error, f"put it at {file}, or give it with --weights FILE"
                ) from None
        return file

    def _download(self) -> bytearray:
        import requests  # slow, and the readers import this module

        content = bytearray()
        with requests.get(self.url, stream=True, timeout=TIMEOUT) as reply:
            reply.raise_for_status()
            size = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=self.url.rpartition("/")[2]) as bar:
                for chunk in reply.iter_content(2**20):  # a body that ends too early raises
                    content += chunk
                    bar.update(len(chunk))
        _check(hashlib.sha256(content).hexdigest(), self.sha256)
        return content


@dataclass(frozen=True)
class OnHub:
    """Weights in a repository of the Hugging Face hub, kept in the hub's cache."""

    repository: str
    names: tuple[str, ...]  # possible names of the file, also below folders: the first that exists is used
    by_hand: str = "give it with --weights FILE"
    sha256: str = ""  # the first digits of the file's digest, if its publisher gives them

    def place(self, name: str) -> Path:
        """Return the path of a file in the hub's cache, downloaded or put there by hand.

        Without a download the cache knows no commit, and looks for the branch's name instead of one.
        """
        from huggingface_hub import constants

        cached = Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"
        branch = cached / "refs" / "main"
        return cached / "snapshots" / (branch.read_text() if os.path.isfile(branch) else "main") / name

    def find(self) -> Path | None:
        """Return the file if it is on this machine."""
        return next((file for file in map(self.place, self.names) if os.path.isfile(file)), None)

    def fetch(self) -> Path:
        """Return the file; download it first if need be, whole or not at all.

        Raises NotDownloadedError if that fails.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        file = self.find()
        if file:
            return file
        for name in self.names:
            url = hf_hub_url(self.repository, name)
            log.info("downloading %s", url)
            try:
                return self._download(name, url)
            except RemoteEntryNotFoundError as error:
                failed = error  # try the next name
            except LocalEntryNotFoundError as error:
                failed = error.__cause__ or error
                break
            except Exception as error:  # the hub's HTTP client raises errors of its own
                failed = error
                break
        raise _no_download(url, failed, f"put it at {self.place(name)}, or {self.by_hand}") from None

    def _download(self, name: str, url: str) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download

        get_hf_file_metadata(url)  # offline this fails at once; the download tries again for 20 seconds
        file = Path(hf_hub_download(self.repository, name))
        try:
            with open(file, "rb") as opened:
                _check(hashlib.file_digest(opened, "sha256").hexdigest(), self.sha256)
        except OSError:
            file.resolve().unlink()  # the content, which the cache keeps apart from the name
            file.unlink(missing_ok=True)
            raise
        return file


def _check(digest: str, published: str) -> None:
    if not digest.startswith(published):
        raise OSError("it is not the file that its publisher describes: its SHA-256 is another one")


def _no_download(url: str, error: BaseException, by_hand: str) -> NotDownloadedError:
    reason = _reason(error)
    return NotDownloadedError(
        f"{url} could not be downloaded ({reason}): fetch it on a machine with a network, and {by_hand}"
    )


def _reason(error: BaseException) -> str:
    """Return the reason of a failed download. Its root cause is the same with each HTTP client."""
    if "SOCKS" in str(error):  # of requests, and of the hub's client
        return SOCKS
    root = error
    while cause := root.__cause__ or root.__context__:
        root = cause
    if isinstance(root, (socket.gaierror, TimeoutError)) or getattr(root, "errno", None) in NO_NETWORK:
        return f"no connection, this machine may be offline: {root.strerror or 'timed out'}"
    return str(error).partition("\n")[0].strip() or type(error).__name__

"""A backbone in; its network in ONNX Runtime, exported and checked against the network itself, out.

An exported network is kept in the cache. One thread runs each batch, and several batches run at once.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.backbones.backbone import Backbone, LazyBackbone
from retrieval.backbones.onnx_session import filled_up, open_session
from retrieval.embedding.torch_runtime import embed_plainly, least_cosine
from retrieval.errors import RunError
from retrieval.files import write_whole
from retrieval.machine import out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the cache key: raise it when this moves vectors by more than rounding
EXPORTED, REFUSED = f"{VERSION}.onnx", f"{VERSION}.refused"  # kinds of files
ONNX_BATCH = 4  # images of a batch: more leave the processor's caches and are slower
NETWORKS = "networks"  # a folder in the cache
LEAST_COSINE = 0.9999  # between a vector by ONNX Runtime and the network's own

log = logging.getLogger("retrieval.runtime")


def load_onnx(
    lazy: LazyBackbone, files: NetworkFiles, pixels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a function that embeds uint8 (images, 3, size, size) by ONNX Runtime.

    It runs the backbone's own ONNX file, or the export of an earlier run, or a new export. A new export is
    kept if its vectors of the images `pixels` agree with those of torch. If the export or this check fails,
    warns, keeps the reason for the next runs, and returns None. Raises as the backbone's `load`.
    """
    if lazy.onnx:
        return partial(embed_plainly, lazy.load())
    kept = files.read(EXPORTED)
    if kept:
        try:
            return partial(run_onnx, open_exported(kept))
        except Exception as error:  # ONNX Runtime's errors have no common class
            log.warning("%s is broken (%s): the network is exported again",
                        files.path(EXPORTED), _first_line(error))  # fmt: skip
    log.info("loading %s and exporting it for ONNX Runtime, once: some seconds", lazy.model_name)
    backbone = lazy.load()
    try:
        exported = export(backbone)
        session = open_exported(exported)
        cosine = least_cosine(run_onnx(session, pixels), embed_plainly(backbone, pixels))
        if not cosine >= LEAST_COSINE:  # also if it is NaN
            raise ValueError(f"its vectors are others, cosine {cosine:.5f}")
    except Exception as error:  # the exporter raises anything on an operation that it does not know
        if isinstance(error, MemoryError | OSError | RunError) or out_of_memory(error):
            _warn(lazy, f"{_first_line(error)}; the next run tries again")
        else:
            _warn(lazy, _first_line(error))
            files.write(REFUSED, _first_line(error).encode())
        return None
    files.write(EXPORTED, exported)
    return partial(run_onnx, session)


def run_onnx(session: Any, images: np.ndarray) -> np.ndarray:
    """Map uint8 (images, 3, size, size) to (images, dimension), ONNX_BATCH images at once."""
    parts = [images[start : start + ONNX_BATCH] for start in range(0, len(images), ONNX_BATCH)]
    return np.concatenate([
        session.run(None, {"images": filled_up(part, ONNX_BATCH)})[0][: len(part)] for part in parts
    ])  # fmt: skip


def is_refused(lazy: LazyBackbone, files: NetworkFiles) -> bool:
    """Return, with a warning, whether an earlier run with the same versions could not use ONNX Runtime."""
    reason = files.read(REFUSED).decode("utf-8")
    if reason:
        kept = f"that was kept in {files.path(REFUSED)}, and without it the next run tries again"
        _warn(lazy, f"{reason}; {kept}")
    return bool(reason)


def _warn(lazy: LazyBackbone, reason: str) -> None:
    log.warning("%s is run by torch, not by ONNX Runtime: %s", lazy.model_name, reason)


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def open_exported(exported: bytes) -> Any:
    """Return an onnxruntime.InferenceSession that runs an exported network in one thread.

    Raises one of ONNX Runtime's errors if the bytes are broken or of an unknown version.
    """
    return open_session(exported, batch=("n", ONNX_BATCH))


def export(backbone: Backbone) -> bytes:
    """Export Backbone.embed, from uint8 images to vectors, to ONNX.

    Uses the tracing exporter: it takes a second, and torch's newer one eighteen. Raises any error on an
    operation that it does not know.
    """
    import torch

    class _Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = backbone.network

        def forward(self, images: Tensor) -> Tensor:
            return backbone.features(images.float(), white=255)

    size = backbone.transform.size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    buffer = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of constants: the check in load_onnx decides
        torch.onnx.export(_Whole().eval(), (images,), buffer, dynamo=False, opset_version=17,
                          input_names=["images"], output_names=["vectors"],
                          dynamic_axes={"images": {0: "n"}, "vectors": {0: "n"}})  # fmt: skip
    return buffer.getvalue()


# ---- what is kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkFiles:
    """What earlier runs kept of one network, in the cache's folder; without a folder there is nothing.

    A file holds the exported network (EXPORTED), or the reason why ONNX Runtime cannot run it (REFUSED). Its
    first line is a digest of what follows, of the kind and of the key: only what has it is used.
    """

    folder: Path | None  # of the cache
    key: bytes  # the backbone's

    def path(self, kind: str) -> Path:
        """Return the path of a kind of file, such as 1.onnx."""
        return self.folder / NETWORKS / f"{self.key.hex()[:32]}-{kind}"

    def exists(self, kind: str) -> bool:
        """Return whether an earlier run has written this kind of file."""
        return self.folder is not None and os.path.isfile(self.path(kind))  # False, too, where it is closed

    def read(self, kind: str) -> bytes:
        """Return what an earlier run has written, and mark the file as used.

        Returns b"" if no run has, or, with a warning, if the file is not as it was written.
        """
        if not self.exists(kind):
            return b""
        file = self.path(kind)
        with suppress(OSError):  # the folder may be read-only
            os.utime(file)
        try:
            digest, _, content = file.read_bytes().partition(b"\n")
            if digest == self._digest(kind, content):
                return content
            reason = "it is not as it was written"
        except OSError as error:
            reason = error.strerror
        log.warning("%s is not used, but made again: %s", file, reason)
        return b""

    def write(self, kind: str, content: bytes) -> None:
        """Write a file for the next run; warn if that fails."""
        if self.folder is None:
            return
        file = self.path(kind)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, self._digest(kind, content) + b"\n" + content)
        except OSError as error:
            if not os.path.exists(self.folder):  # the cache has warned of it, if the run wants one
                return
            log.warning("%s cannot be kept (%s): the next run makes it again, or give another --cache_dir",
                        file, error.strerror)  # fmt: skip

    def _digest(self, kind: str, content: bytes) -> bytes:
        return hashlib.sha256(self.key + kind.encode() + content).hexdigest().encode()


def exported_networks(folder: Path, unused_for: float = 0.0) -> list[Path]:
    """Return the files of all networks in a cache that no run has used for `unused_for` days."""
    ages = {file: time.time() - file.stat().st_mtime for file in sorted((folder / NETWORKS).glob("*.*"))}
    least = 86400 * unused_for
    # A hidden file is being written, unless it is an hour old.
    return [file for file, age in ages.items() if age >= max(least, 3600 * file.name.startswith("."))]

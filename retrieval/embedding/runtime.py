"""A backbone in; what runs its network fastest on this machine, checked against the network itself, out.

On a CPU that is ONNX Runtime, from BREAK_EVEN images on: the network is exported once, and kept in the folder
of the cache under the digest of all that decides a vector. One thread runs each batch, several at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval import distributed
from retrieval.backbones.backbone import Backbone, Unloaded, digest_of
from retrieval.embedding.onnx_runtime import ONNX_BATCH, OnnxNetwork, export, filled_up, open_exported
from retrieval.errors import InputError, RunError
from retrieval.files import write_whole
from retrieval.machine import cores, out_of_memory, require

if TYPE_CHECKING:
    from torch import Tensor

TORCH, ONNX = "torch", "onnx"
FULL = "torch.float32"
BREAK_EVEN = 200  # images: from there on the export saves more than it takes, of the smallest network too
LEAST_COSINE = 0.9999  # of a vector by ONNX Runtime with the network's own
LEAST_COSINE_HALF = 0.999  # of one in half precision
PACKAGES = ("onnxruntime", "onnx")
NETWORKS = "networks"  # the folder of exported networks, in the cache's

log = logging.getLogger("retrieval.engines")


@dataclass
class Engine:
    """A backbone and what runs it, which is loaded when the first images are read."""

    backbone: Unloaded
    word: str  # TORCH or ONNX; TORCH from `settle` on, where ONNX Runtime does not give the same
    batch: int  # images that go through the network at once, by torch
    folder: Path  # of exported networks
    precision: str = ""  # that a GPU computes in, as this run or one before settled it
    loaded: OnnxNetwork | Backbone | None = field(default=None, init=False)  # from `load` on
    run: Callable[[np.ndarray], np.ndarray] | None = field(default=None, init=False)  # from `settle` on
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "decode": 0.0, "network": 0.0})
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def key(self) -> bytes:
        """What decides its vectors; but by torch the size of a batch moves them by some 5e-6, too.

        On a GPU it is whole when the engine is settled, or was by an earlier run.
        """
        return self.backbone.digest + (self.word + self.precision).encode()

    @cached_property
    def crops_key(self) -> bytes:
        """What decides its crops, where it looks for faces."""
        return digest_of(None, self.backbone.prepare)

    @property
    def what(self) -> str:
        """In words."""
        return f"{self.backbone.word} by {'ONNX Runtime' if self.word == ONNX else 'torch'}"

    @property
    def size(self) -> int:
        """How many images a batch has."""
        return ONNX_BATCH if self.word == ONNX else self.batch

    @property
    def threads(self) -> int:
        """How many batches may be run at once."""
        return cores() if self.word == ONNX else 1

    def load(self) -> None:
        """Load what runs the network, if it is not loaded. Raises as the backbone's `load`."""
        if self.loaded:
            return
        start = time.perf_counter()
        session = _session(self.backbone, self.folder) if self.word == ONNX else None
        self.loaded = session or self.backbone.load()
        self.seconds["load"] += time.perf_counter() - start

    def settle(self, pixels: np.ndarray) -> None:
        """Load, and check on the first images, as embed takes them, that it gives what the network gives.

        Of several processes all use torch where one has to. Raises as the backbone's `load`, and RunError
        where not one image fits into a GPU's memory, or another process has ended.
        """
        if self.run:
            return
        self.load()
        start = time.perf_counter()
        session = self.loaded if isinstance(self.loaded, OnnxNetwork) else None
        fine = session is not None and _checked(session, self.backbone, self.folder, pixels)
        if distributed.all_say(fine):  # each is asked, whatever it found on its own disk
            self.run = session.run
        else:
            self.word = TORCH
            if session:
                self.loaded = session.backbone or self.backbone.load()
            known, self.precision = self.precision, _precision(self.loaded, self.precision, pixels)
            if self.precision != known:
                _keep(_settled(self.backbone, self.folder), self.precision.encode())
            self.run = _by_torch(self.loaded, self.batch, self.precision not in ("", FULL))
        self.seconds["load"] += time.perf_counter() - start

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 RGB (images, 3, size, size) → float32 (images, dimension), not of unit length. After settle.

        An image gets the same vector, to the last bit, in whatever batch and place it comes. Raises RunError
        where not one fits into a GPU's memory.
        """
        start = time.thread_time() if self.word == ONNX else time.perf_counter()
        features = self.run(pixels)
        spent = (time.thread_time() if self.word == ONNX else time.perf_counter()) - start
        with self.lock:
            self.seconds["network"] += spent
        return features


def choose_engine(backbone: Unloaded, asked: str, images: int, batch_size: int, folder: Path) -> Engine:
    """The engine for a backbone and so many images in all; `asked` is auto, torch or onnx.

    `folder` is the cache's. Raises InputError where ONNX Runtime is asked for and cannot be had.
    """
    folder = folder / NETWORKS
    if asked == ONNX:
        for package in PACKAGES:
            require(package, package)
        if backbone.device != "cpu":
            raise InputError("--engine onnx runs on the CPU: give --device cpu with it, or --engine torch")
    elif asked == "auto":
        asked = ONNX if _worth_it(backbone, images, folder) else TORCH
    refused = _refused(backbone, folder)
    if asked == ONNX and (why := _noted(refused)):  # by a run with the same versions of all
        _warn_of(backbone, f"{why}; that was kept in {refused}, and without it the next run tries again")
        asked = TORCH
    precision = _noted(_settled(backbone, folder)) if backbone.device == "cuda" else ""
    return Engine(backbone, asked, min(batch_size, images), folder, precision)


def _worth_it(backbone: Unloaded, images: int, folder: Path) -> bool:
    if backbone.device != "cpu" or not all(map(find_spec, PACKAGES)):
        return False
    return images >= BREAK_EVEN or _exported(backbone, folder).is_file()


# ---- ONNX Runtime ---------------------------------------------------------------------------------


def _exported(backbone: Unloaded, folder: Path) -> Path:
    return folder / f"{backbone.digest.hex()[:32]}.onnx"


def _refused(backbone: Unloaded, folder: Path) -> Path:
    """A file that says why a network is not run by ONNX Runtime."""
    return _exported(backbone, folder).with_suffix(".refused")


def _noted(file: Path) -> str:
    """What a run before noted there; nothing where none did."""
    if not file.is_file():
        return ""
    _was_used(file)
    return file.read_text(encoding="utf-8")


def _was_used(file: Path) -> None:
    with suppress(OSError):  # of a folder that cannot be written
        os.utime(file)


def _settled(backbone: Unloaded, folder: Path) -> Path:
    """A file that says in which precision a GPU runs a network."""
    return _exported(backbone, folder).with_suffix(".precision")


def _session(unloaded: Unloaded, folder: Path) -> OnnxNetwork | None:
    """The network in ONNX Runtime; None, and it is said, where it cannot be there."""
    file = _exported(unloaded, folder)
    if file.is_file():
        try:
            session = OnnxNetwork(open_exported(file.read_bytes()))
            _was_used(file)
            return session
        except Exception as error:  # ONNX Runtime has a class of errors for each kind, and no common one
            log.warning("%s is broken (%s): the network is exported again", file, _first_line(error))

    def _exported_now() -> OnnxNetwork:
        backbone = unloaded.load()
        exported = export(backbone)
        return OnnxNetwork(open_exported(exported), exported, backbone)

    return _unless_refused(unloaded, folder, _exported_now)


def _checked(session: OnnxNetwork, unloaded: Unloaded, folder: Path, pixels: np.ndarray) -> bool:
    """Whether it gives the network's own vectors: then it is kept; else that is said."""
    if session.backbone is None:  # it was checked before it was kept
        return True

    def _check() -> bool:
        cosine = _least_cosine(session.run(pixels), _embedded(session.backbone, pixels))
        if not cosine >= LEAST_COSINE:
            raise ValueError(f"its vectors are others, cosine {cosine:.5f}")
        return True

    if not _unless_refused(unloaded, folder, _check):
        return False
    _keep(_exported(unloaded, folder), session.exported)
    session.exported, session.backbone = b"", None  # whose memory is free again
    return True


def _unless_refused(unloaded: Unloaded, folder: Path, act: Callable[[], Any]) -> Any:
    """What `act` gives; None, and it is said and noted for the next run, where ONNX Runtime will not do."""
    try:
        return act()
    except (InputError, RunError):
        raise
    except Exception as error:  # the exporter raises anything for what it does not know
        if isinstance(error, MemoryError | OSError) or out_of_memory(error):
            _warn_of(unloaded, f"{_first_line(error)}; the next run tries again")
            return None
        why = _first_line(error)
    _warn_of(unloaded, why)
    _keep(_refused(unloaded, folder), why.encode())
    return None


def _warn_of(backbone: Unloaded, why: str) -> None:
    log.warning("%s is run by torch, not by ONNX Runtime: %s", backbone.word, why)


def _keep(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        log.warning("%s cannot be kept (%s): the next run makes it again", file, error.strerror)


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def exported_networks(folder: Path, unused_for: float = 0.0) -> list[Path]:
    """The exported networks in the cache's folder, and what is noted of others; unused for so many days."""
    ages = {file: time.time() - file.stat().st_mtime for file in sorted((folder / NETWORKS).glob("*.*"))}
    least = 86400 * unused_for
    # What is hidden is being written, unless that began long ago.
    return [file for file, age in ages.items() if age >= max(least, 3600 * file.name.startswith("."))]


# ---- torch ----------------------------------------------------------------------------------------


def _precision(backbone: Backbone, settled: str, pixels: np.ndarray) -> str:
    """What a GPU computes in, the same in all processes: half precision where that gives the same vectors.

    Once that is `settled` for a network it stays, or the cache would mix the vectors of both.
    """
    fine = False
    if backbone.device == "cuda":
        fine = settled == str(_half()) or (settled != FULL and _half_is_enough(backbone, pixels))
    half = distributed.all_say(fine)
    if backbone.device != "cuda":
        return ""
    return str(_half()) if half else FULL


def _by_torch(backbone: Backbone, batch: int, half: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What runs the network by torch, in half precision if that is wanted.

    Batches are filled up to one size: the size of a batch, and nothing else of it, moves a vector.
    """
    import torch

    if backbone.device == "cpu":
        torch.set_num_threads(cores())  # torchrun says one, and a reader's one is for all to come
    fits = batch

    def _run(seen: np.ndarray) -> np.ndarray:
        nonlocal fits
        images = torch.from_numpy(filled_up(seen, batch))
        if backbone.device == "cuda":
            images = images.pin_memory()  # travels at twice the speed
        with torch.inference_mode(), torch.autocast(backbone.device, dtype=_half(), enabled=half):
            features, fits = embed_what_fits(backbone, images, fits)
        return features[: len(seen)].numpy()

    return _run


def _half() -> Any:
    import torch

    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float16


def _half_is_enough(backbone: Backbone, pixels: np.ndarray) -> bool:
    import torch

    plain = _embedded(backbone, pixels)
    with torch.autocast(backbone.device, dtype=_half()):
        cosine = _least_cosine(_embedded(backbone, pixels), plain)
    enough = cosine >= LEAST_COSINE_HALF  # not where it is NaN
    if not enough:
        log.info("%s needs full precision: in half, cosines fall to %.4f", backbone.word, cosine)
    return enough


def _embedded(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return embed_what_fits(backbone, torch.from_numpy(pixels), len(pixels))[0].numpy()


def _least_cosine(vectors: np.ndarray, others: np.ndarray) -> float:
    """Of each row with the other's; NaN where one has no direction, unless neither has."""
    vectors, others = vectors.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    both = (vectors**2).sum(1) + (others**2).sum(1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (vectors * others).sum(1) / lengths
    return float(cosines[both].min()) if both.any() else 1.0


def embed_what_fits(backbone: Backbone, images: Tensor, fits: int) -> tuple[Tensor, int]:
    """(images, 3, size, size) → (images, dimension) on the CPU, in parts that fit; and their size."""
    import torch

    while True:
        try:
            return torch.cat([backbone.embed(part) for part in images.split(fits)]).cpu(), fits
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if fits == 1:
                raise RunError(
                    f"not one image fits into the memory of {backbone.device}: use --device cpu"
                ) from None
        fits = max(1, min(fits, len(images)) // 2)
        log.warning("the batch does not fit into the memory of %s: trying %d at once", backbone.device, fits)
        torch.accelerator.empty_cache()

"""A file in; its tensors and plain values out, or a sentence that says what kind of file it is instead.

Nothing in a file is executed: torch's unpickler builds tensors and plain values alone. The objects that often
lie beside the weights are not built either, but replaced by a stand-in that does nothing. What a file holds
is a finite tree, whose tensors fit into the memory.
"""

from __future__ import annotations

import errno
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from retrieval.errors import InputError, printable
from retrieval.machine import memory, out_of_memory

# ---- objects beside the weights -------------------------------------------------------------------


class UnreadObject:
    """Stand for an object beside the weights: it takes any arguments and any state, and keeps none."""

    def __new__(cls, *_: Any) -> UnreadObject:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


class UnreadDict:
    """Stand for a kind of dict: it makes a plain one, since the unpickler adds items to no other."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:
        return OrderedDict()


# The names, as a pickle has them, of what training scripts save beside the weights. None is ever imported.
_PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
OBJECTS = {
    **{f"numpy.{core}.multiarray": ("scalar", "_reconstruct") for core in ("core", "_core")},  # numpy 1 and 2
    "numpy": ("dtype", "ndarray"),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "torch.torch_version": ("TorchVersion",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": ("AnyNode",),
    "typing": ("Any",),
    "builtins": ("bool", "int", "float", "str", "list", "tuple", "dict", "frozenset", "range", "slice"),
}
DICTS = {
    "collections": ("defaultdict",),
    "easydict": ("EasyDict",),
    "yacs.config": ("CfgNode",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
}
STAND_INS = [
    (stand_in, f"{module}.{name}")
    for stand_in, modules in ((UnreadObject, OBJECTS), (UnreadDict, DICTS))
    for module, names in modules.items()
    for name in names
]

# ---- reading --------------------------------------------------------------------------------------


SHARE = 0.5  # of the memory, for the content of a file: the network that it fills takes as much again
MOST_VALUES, DEEPEST = 10**6, 100  # of a content: a dict that holds itself would be endless


def unpickle(file: Path) -> Any:
    """Read a file of torch.save or safetensors, whatever its name, without executing code in it.

    The objects of OBJECTS and DICTS are replaced by stand-ins. Raises InputError if the file holds any other
    object, is of another kind, takes more than SHARE of the memory, or is no finite tree of values.
    """
    most = int(SHARE * memory())
    size = max(file.stat().st_size, _unzipped_size(file))
    if size <= most:
        content = _read(file)
        size = _size_as_tree(content, file)
    if size > most:
        raise InputError(
            f"{file}, of {file.stat().st_size / 1e6:.1f} MB, takes {size / 1e9:.1f} GB of memory or more to "
            f"read, and a file of weights may take {most / 1e9:.1f} GB on this machine: save the network's "
            "state_dict() alone, or do not trust it"
        )
    return _plain(content)


def _read(file: Path) -> Any:
    import torch

    if _is_safetensors(file):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError:
            raise InputError(f"{file} is only a part of a safetensors file: download it again") from None
    try:
        with (
            open(file, "rb") as opened,  # since torch goes by the ending of a path
            torch.serialization.safe_globals(STAND_INS),
            warnings.catch_warnings(action="ignore"),  # on files that it then refuses
        ):
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on a file that is no checkpoint
        of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL  # which a wrong offset gives
        if of_disk:
            raise
        if out_of_memory(error):
            raise MemoryError from error
        refused = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        if refused:
            raise InputError(
                f"{file} holds a Python object ({printable(refused[1])}), which is not loaded, since that "
                "could run any code: save the network's state_dict() alone"
            ) from None
        what = kind_of(file) or "is not a file of weights, or only a part of one"
        raise InputError(f"{file} {what}") from None


def _unzipped_size(file: Path) -> int:
    return sum(member.file_size for member in _zip_members(file) or [])


def _size_as_tree(content: Any, file: Path) -> int:
    """Return the bytes of all tensors in a content, if none shared its memory with another.

    Raises InputError unless it is a tree of at most MOST_VALUES values on DEEPEST levels.
    """
    level, count, size = [content], 1, 0
    for _ in range(DEEPEST):
        size += sum(math.prod(value.shape) * value.dtype.itemsize for value in level if is_weights(value))
        level = list(islice(chain.from_iterable(map(_inside, level)), MOST_VALUES))
        count += len(level)
        if not level:
            return size
        if count > MOST_VALUES:
            break
    raise InputError(
        f"{file} holds a dict or list that holds itself, more than {DEEPEST} of them inside one another, or "
        f"more than {MOST_VALUES} values: save the network's state_dict() alone"
    )


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return dict.values(value)
    return value if isinstance(value, (list, tuple)) else ()


def _plain(value: Any) -> Any:
    """Copy a tree without what a pickle can attach to its dicts and tensors, such as another `items`.

    The keys, which name tensors, are made printable. A tensor that is no weights becomes a stand-in.
    """
    import torch

    if isinstance(value, dict):
        return {
            printable(key) if isinstance(key, str) else key: _plain(inner) for key, inner in dict.items(value)
        }
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if torch.is_tensor(value):
        return torch.detach(value) if is_weights(value) else UnreadObject()
    return value


def is_weights(value: Any) -> bool:
    """Return whether a value is a tensor of plain numbers: not sparse, quantized, nested or meta."""
    import torch

    return (
        torch.is_tensor(value)
        and not (value.is_nested or value.is_quantized or value.is_meta)
        and value.layout == torch.strided
    )


def is_fine_tuned(content: Any) -> bool:
    """Return whether a file's content is a checkpoint of fine_tuning.py: a recipe and a network."""
    return isinstance(content, dict) and {"recipe", "network"} <= set(content)


def _is_safetensors(file: Path) -> bool:
    """Tell by the first bytes: the length of the header in 8 bytes, at most 100 MB, then the header's {."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


# ---- what else a file may be ----------------------------------------------------------------------

UNPACK = "is an archive, not a file of weights: unpack it, and give the file in it"
KERAS = "is a file of Keras or TensorFlow, which is not loaded: convert it to a state dict of torch"
NUMPY = "is a NumPy file, which is not loaded: save its arrays as a state dict of torch"
UNREADABLE = (
    "cannot be read by torch.load(FILE, weights_only=True): save the network's state_dict() alone, "
    "without pickle_protocol"
)
PART = "is only a part of a file of torch.save: download it again"
ONNX = "looks like an ONNX network: give it a name that ends in .onnx"
SIGNATURES = {  # the first bytes of a file, as a pattern → what the file is
    rb"version https://git-lfs": "is only a pointer of Git LFS: run `git lfs pull` in its repository",
    rb"(?i)\s*<(!doctype )?html": "is a web page, such as a login or an error: download the weights again",
    rb"\x89HDF\r\n|.{4}TFL3|\x08\x01\x12": KERAS,  # HDF5, TensorFlow Lite, SavedModel
    rb"\x08[\x03-\x1f][\x12\x3a]": ONNX,  # the format's version, then its producer or the graph
    rb"\x93NUMPY": NUMPY,
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|.{257}ustar": UNPACK,
    rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": PART,  # torch.save before torch 1.6
    rb"\x80[\x02-\x05]": "is a pickle that torch.save did not write: save the state_dict() by torch.save",
    rb"\s*[{\[]": "is a JSON file, not one of weights",
}


def kind_of(file: Path) -> str:
    """Return the end of a sentence: the kind of a file that cannot be read, "" if it is unknown."""
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        return "is empty"
    if start.startswith(b"PK"):
        return _kind_of_zip(file)
    for pattern, kind in SIGNATURES.items():
        if re.match(pattern, start, re.DOTALL):
            return kind
    return "is a text file, not one of weights" if _is_text(start) else ""


def _kind_of_zip(file: Path) -> str:
    """Return what a zip file is that cannot be read; a file of torch.save is a zip file, too."""
    members = _zip_members(file)
    if members is None:
        return PART
    ends = {Path(member.filename).name for member in members}
    if "constants.pkl" in ends:
        return "is a TorchScript archive: save torch.jit.load(FILE).state_dict() by torch.save, and give that"
    if "model.weights.h5" in ends:
        return KERAS
    if any(name.endswith(".npy") for name in ends):
        return NUMPY
    return UNREADABLE if "data.pkl" in ends else UNPACK


def _zip_members(file: Path) -> list[zipfile.ZipInfo] | None:
    """Return what a zip file says that it holds; None if it is no whole zip file."""
    try:
        with zipfile.ZipFile(file) as opened:
            return opened.infolist()
    except OSError:
        raise
    except Exception:  # zipfile raises anything on damaged bytes
        return None


def _is_text(start: bytes) -> bool:
    return start.decode("utf-8", "ignore").replace("\n", "").replace("\r", "").replace("\t", "").isprintable()

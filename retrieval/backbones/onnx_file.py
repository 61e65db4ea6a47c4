"""A network's ONNX file in; the input that it takes out. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.weights_file import ONNX, kind_of
from retrieval.errors import InputError
from retrieval.machine import require

if TYPE_CHECKING:
    from retrieval.backbones.zoo import Pretrained

VERSION = 1  # part of the cache key: raise it when an ONNX file is run so that it gives other vectors
SUFFIX = ".onnx"
FACE_SIZE = 112  # pixels: the input of nearly all networks for aligned faces, and of hardly any other

log = logging.getLogger("retrieval.backbones")


@dataclass(frozen=True)
class OnnxFile:
    """A network's ONNX file and its input, float32 or float16 RGB or BGR (images, 3, size, size)."""

    path: Path
    images: int | str | None  # that it takes at once; any number, if it is the dimension's name or None
    size: int | None  # pixels; None: any
    beside: tuple[Path, ...]  # files in the same folder that hold tensors of the network
    normalises: bool  # whether it takes pixels from 0 to 255, and normalises them by itself


def find_onnx(file: Path, model_name: str, row: Pretrained, image_size: int | None) -> OnnxFile | None:
    """Read a network's ONNX file; None if the file is of another kind.

    Raises InputError unless it suits the row of the model name and the image size, if one is given.
    """
    if file.suffix != SUFFIX:
        if row.network is None:
            raise InputError(f"--weights {file}: {model_name} is a network in an ONNX file, named {SUFFIX}")
        return None
    onnx = read_onnx(file)
    if image_size and onnx.size not in (image_size, None):
        raise InputError(
            f"{file} takes images of {onnx.size} pixels only: leave --image_size {image_size} out"
        )
    if file != row.weights.find():
        log.info("%s replaces the network of %s, and gets its images as %s would: %s pixels",
                 file, model_name, model_name, onnx.size or "any number of")  # fmt: skip
    if onnx.size == FACE_SIZE and not (row.face and row.face.method == "align"):
        log.warning("%s takes %d pixels, as face networks do: --model_type arcface (adaface, sface) aligns "
                    "faces for it", file, FACE_SIZE)  # fmt: skip
    return onnx


def read_onnx(path: Path) -> OnnxFile:
    """Read the input of an ONNX file. Raises InputError if it is no network of square colour images."""
    require("onnx", "onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        what = kind_of(path) or "is not an ONNX file"
        part = "is only a part of an ONNX file: download it again"
        raise InputError(f"{path} {part if what == ONNX else what}") from None
    tensors = {tensor.name for tensor in graph.initializer}  # old files list them as inputs, too
    inputs = [each for each in graph.input if each.name not in tensors]
    shape = [_side(side) for side in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    fixed = {side for side in shape[2:] if isinstance(side, int)}
    if len(shape) != 4 or shape[1] in {1, *range(4, 10**6)} or len(fixed) > 1:
        found = ", ".join(f"{each.name} {_shown(each)}" for each in inputs)
        raise InputError(
            f"{path} takes {found or 'nothing'}: a network for embeddings takes square colour images, "
            "(n, 3, size, size)"
        )
    images = None if shape[0] in shape[2:] else shape[0]  # one name may stand for several dimensions
    size = next(iter(fixed), None)
    return OnnxFile(path, images, size, _files_beside(path, graph), _normalises(graph))


def _side(dimension: Any) -> int | str | None:
    """Return a dimension's number, its name, or None."""
    return dimension.dim_value or dimension.dim_param or None


def _shown(tensor: Any) -> str:
    return "(" + ", ".join(str(_side(each) or "?") for each in tensor.type.tensor_type.shape.dim) + ")"


def _normalises(graph: Any) -> bool:
    """Return whether a face network subtracts the mean and scales by itself, by InsightFace's rule.

    InsightFace looks for such names among the first eight operations (model_zoo/arcface_onnx.py): networks
    that were exported by MXNet have them.
    """
    names = [node.name for node in graph.node[:8]]
    return all(
        any(name.startswith(starts) for name in names) for starts in (("Sub", "_minus"), ("Mul", "_mul"))
    )


def _files_beside(path: Path, graph: Any) -> tuple[Path, ...]:
    """Return the files that hold tensors. Raises InputError for one that lies elsewhere, or is missing."""
    locations = {
        entry.value for tensor in _tensors(graph) for entry in tensor.external_data if entry.key == "location"
    }
    for name in sorted(locations):
        if not name or Path(name).name != name:
            raise InputError(f"{path} wants to read {name!r}: its tensors are read only from beside it")
        if not path.with_name(name).is_file():
            raise InputError(f"{path} lacks {name}, which holds its tensors: put it beside that file")
    return tuple(path.with_name(name) for name in sorted(locations))


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the tensors of a graph, and of the graphs inside it: loops and branches."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer:
                yield from _tensors(inner)

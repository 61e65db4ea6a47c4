"""A backbone in; its network exported to ONNX, and ONNX Runtime that runs it, out."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.backbones.backbone import Backbone

if TYPE_CHECKING:
    from torch import Tensor

ONNX_BATCH = 4  # images that a thread takes at once: more leave the processor's caches and are slower


@dataclass
class OnnxNetwork:
    """A network in ONNX Runtime."""

    session: Any  # onnxruntime.InferenceSession
    exported: bytes = b""  # this and the next: of one that is not checked yet
    backbone: Backbone | None = None

    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (images, 3, size, size) → (images, dimension), ONNX_BATCH at once."""
        parts = [images[start : start + ONNX_BATCH] for start in range(0, len(images), ONNX_BATCH)]
        return np.concatenate([
            self.session.run(None, {"images": filled_up(part, ONNX_BATCH)})[0][: len(part)] for part in parts
        ])  # fmt: skip


def open_exported(exported: bytes) -> Any:
    """An onnxruntime.InferenceSession of what `export` gave, one thread for each run of it.

    Raises whatever ONNX Runtime does where the bytes are broken or its version does not know them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the batches are what runs at once
    options.log_severity_level = 3  # errors
    # With a batch of one size all shapes are known, and padding becomes a part of the convolutions: ×1.2.
    options.add_free_dimension_override_by_name("n", ONNX_BATCH)
    return onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])


def filled_up(images: np.ndarray, batch: int) -> np.ndarray:
    """uint8 (images, 3, size, size) → (batch, 3, size, size), black at the end; more stay as they are."""
    if len(images) >= batch:
        return images
    filled = np.zeros((batch, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return filled


def export(backbone: Backbone) -> bytes:
    """The network, from uint8 images to what Backbone.embed gives.

    By the exporter that traces: it takes a second where the newer one takes eighteen. Raises whatever that
    does where it does not know a part of the network.
    """
    import torch

    class _Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = backbone.network

        def forward(self, images: Tensor) -> Tensor:
            return backbone.features(images.float(), white=255)

    size = backbone.prepare.size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    buffer = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about what is constant: it is checked on real images
        torch.onnx.export(_Whole().eval(), (images,), buffer, dynamo=False, opset_version=17,
                          input_names=["images"], output_names=["vectors"],
                          dynamic_axes={"images": {0: "n"}, "vectors": {0: "n"}})  # fmt: skip
    return buffer.getvalue()

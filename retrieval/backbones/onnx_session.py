"""An ONNX file and a device in; an onnxruntime.InferenceSession that runs it out. Needs no torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.errors import InputError
from retrieval.machine import require

HOW_TO_USE_A_GPU = (
    "`pip uninstall onnxruntime` and `pip install onnxruntime-gpu` make it run on an NVIDIA GPU"
)

log = logging.getLogger("retrieval.backbones")
# Its import would write an id of this machine into the home, and warn of a home that it cannot write to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def choose_onnx_device(device: str, asked: str) -> str:
    """Return `device` if the installed ONNX Runtime can use it, else cpu.

    Raises InputError if the user has `asked` for just this device.
    """
    if device == "cpu":
        return device
    require("onnxruntime", "onnxruntime")
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return device
    hint = f" ({HOW_TO_USE_A_GPU})" if device == "cuda" else ""
    if asked == device:
        raise InputError(
            f"--device {asked}: the installed ONNX Runtime cannot use it{hint}; or use --device cpu"
        )
    log.warning("the network runs on the CPU: the installed ONNX Runtime cannot use %s%s", device, hint)
    return "cpu"


def open_session(model: Path | bytes, batch: tuple[str, int] | None = None, gpu: int | None = None) -> Any:
    """Return an onnxruntime.InferenceSession with one thread, on the CPU, or on the GPU of this number.

    `batch` fixes the dimension of this name: with all shapes known, padding is fused into the convolutions,
    which is up to 1.2 times as fast. Raises one of ONNX Runtime's errors, which have no common class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # several batches run at once instead
    options.log_severity_level = 3  # errors
    if batch:
        options.add_free_dimension_override_by_name(*batch)
    cuda = ("CUDAExecutionProvider", {"device_id": str(gpu), "use_tf32": "0"})
    provider = "CPUExecutionProvider" if gpu is None else cuda
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def filled_up(images: np.ndarray, batch: int) -> np.ndarray:
    """Append zeros to images (images, 3, size, size) until there are `batch`."""
    return np.pad(images, [(0, batch - len(images))] + [(0, 0)] * 3)

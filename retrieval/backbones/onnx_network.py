"""An ONNX file in; a torch module that ONNX Runtime runs, on the CPU or an NVIDIA GPU, out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrieval.backbones.onnx_file import OnnxFile
from retrieval.backbones.onnx_session import filled_up, open_session
from retrieval.errors import InputError

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
AT_ONCE = {"cpu": 4, "cuda": 32}  # images, where the file takes any number: more leave a processor's caches


class OnnxNetwork(nn.Module):
    """Run an ONNX file. It is loaded for the device of the first images.

    On a CPU it uses one thread: several batches are run at once instead, each by a thread of its own.
    """

    def __init__(self, file: OnnxFile, bgr: bool = False) -> None:
        super().__init__()
        self.file, self.bgr = file, bgr
        self.session: Any = None  # an onnxruntime.InferenceSession

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised RGB (images, 3, size, size) to float32 (images, dimension), on the same device."""
        if self.session is None:
            self._load(pixels)
        images = (pixels.flip(1) if self.bgr else pixels).contiguous().cpu().numpy()
        parts = (images[start : start + self.at_once] for start in range(0, len(images), self.at_once))
        vectors = np.concatenate([self._run(part)[: len(part)] for part in parts])
        return torch.from_numpy(vectors).to(pixels.device, torch.float32)

    def _run(self, images: np.ndarray) -> np.ndarray:
        """Run at most `at_once` images, filled up with zeros, so that all runs have the same size."""
        filled = filled_up(images, self.at_once).astype(self.dtype)
        return self.session.run([self.output], {self.input: filled})[0]

    def _load(self, pixels: Tensor) -> None:
        """Load the file for the device of `pixels`, and run it once. Raises InputError if that fails."""
        device, images = pixels.device.type, self.file.images
        self.at_once = images if isinstance(images, int) else AT_ONCE[device]
        batch = (images, self.at_once) if isinstance(images, str) else None
        gpu = (pixels.device.index or 0) if device == "cuda" else None
        try:
            self.session = open_session(self.file.path, batch, gpu)
            self._choose_tensors(self.session)
            self._run(np.zeros((1, *pixels.shape[1:])))
        except InputError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = str(error).partition("\n")[0][:200]
            raise InputError(f"{self.file.path} cannot be run by ONNX Runtime: {reason}") from None
        provider = self.session.get_providers()[0]  # the CPU's, if it cannot load CUDA's libraries
        if device == "cuda" and provider == "CPUExecutionProvider":
            raise InputError(
                "ONNX Runtime finds no CUDA libraries that suit it: install another version of "
                "onnxruntime-gpu, or use --device cpu"
            )

    def _choose_tensors(self, session: Any) -> None:
        """Choose the input and the output: the first that has a row of more than one number an image."""
        given, *_ = session.get_inputs()
        rows = [each for each in session.get_outputs() if len(each.shape) == 2 and each.shape[1] != 1]
        if given.type not in TYPES or not rows:
            outputs = ", ".join(f"{each.name} {each.shape}" for each in session.get_outputs())
            raise InputError(
                f"{self.file.path} maps {given.type} to {outputs}: a network for embeddings maps floats "
                "to (n, dimension)"
            )
        self.input, self.dtype, self.output = given.name, TYPES[given.type], rows[0].name

"""A loaded backbone in; one whose network averages the unit vectors of several views of each image out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from retrieval.backbones.backbone import Backbone
from retrieval.backbones.fine_tuned import Shrunk
from retrieval.errors import InputError

SCALES = (1, 0.5**0.5, 2**0.5)  # of the input's side, as Radenović, Tolias and Chum (2018) embed


class MeanOfViews(nn.Module):
    """Average the unit vectors of an image's views: each scale of it and, with `flip`, of its mirror image.

    F. Radenović, G. Tolias, O. Chum: Fine-tuning CNN image retrieval with no human annotation, 2018
    (arXiv 1711.02512), average over scales; the mirror image is the usual test-time augmentation.
    """

    def __init__(self, network: nn.Module, flip: bool, sides: list[int]) -> None:
        super().__init__()
        self.flip = flip
        self.scaled = nn.ModuleList([Shrunk(network, side) for side in sides])

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (images, 3, size, size) to (images, dimension): Σ f(view) / ‖f(view)‖ / number of views."""
        images = [pixels, pixels.flip(3)] if self.flip else [pixels]
        vectors = [normalize(scaled(image).float()) for scaled in self.scaled for image in images]
        return torch.stack(vectors).mean(0)


def with_mean_of_views(backbone: Backbone, flip: bool, scales: bool) -> Backbone:
    """Return the backbone with a mean over views. Raises InputError if scales are refused."""
    size = backbone.transform.size
    sides = [round(size * scale) for scale in SCALES] if scales else [size]
    viewed = replace(backbone, network=MeanOfViews(backbone.network, flip, sides).eval())
    if scales and (reason := _why_one_size(viewed, backbone.network)):
        raise InputError(
            f"--views scales: {backbone.model_name} cannot take images of {sides[1]} and {sides[2]} pixels "
            f"beside its {size} ({reason}): leave scales out"
        )
    return viewed


def _why_one_size(viewed: Backbone, network: nn.Module) -> str:
    """Return why the network cannot be run on all scales, or "" if it can; tries it on a black image."""
    size = viewed.transform.size
    if tuned := [part.size for part in network.modules() if isinstance(part, Shrunk)]:
        return f"its tuned half sees every image at {tuned[0]}"
    try:
        with torch.inference_mode():
            viewed.embed(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except Exception as error:  # networks and ONNX Runtime fail in many ways
        return str(error).strip().partition("\n")[0][:200]
    return ""

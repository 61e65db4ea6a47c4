"""Validation images and networks in; the metrics of each network, and the best way to embed, out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retrieval.backbones.backbone import Backbone
from retrieval.backbones.fine_tuned import ALONE, JOINED, MIXED, Shrunk, how, join, load_fine_tuned
from retrieval.backbones.timm_zoo import with_input_size
from retrieval.embedding.torch_runtime import embed_what_fits
from retrieval.errors import RunError
from retrieval.metrics import compare, metrics_of
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings, Ranking
from supcon.batches import Split, load_images
from supcon.views import AUGMENTATIONS, augment, draw

LAMBDAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # weights of the tuned embedding beside the untuned one
USUAL, CAREFUL, NEAREST = 2.0, 0.5, 0.25  # λ that best_of chooses from
ALPHAS = (0.25, 0.5, 0.75)  # shares of the tuned weights in a mix: WiSE-FT (Wortsman et al. 2022)
COLLAPSED = 0.98  # mean cosine of two images' embeddings
SAMPLE = 64  # validation images
SAME = 0.999  # cosine of an image's embeddings: a GPU need not give the same bits twice
KEEP = 10  # ranked images of each query: the score needs ten


@dataclass(frozen=True)
class Validation:
    """The validation images in each size that a network sees, as uint8 (images, 3, size, size)."""

    names: list[str]
    images: dict[int, Tensor]
    views: dict[int, Tensor]  # the query of each image; empty: each image is a query among the others


def load_validation(
    split: Split, backbone: Backbone, sizes: set[int], augmentation: str, seed: int
) -> Validation:
    """Load the validation images. If each image is its own only match, also make a view of it, the query."""
    names, images, views = [], {}, {}
    random = torch.Generator().manual_seed(seed)
    drawn = draw(AUGMENTATIONS[augmentation], len(split.validation), random)
    for size in sorted(sizes):
        loaded = load_images(split.validation, backbone.transform.of_size(size), "validation images")
        names, images[size] = loaded.names, loaded.pixels
        if split.by == "view":
            starts = range(0, len(names), 64)  # images at once
            rows = [slice(start, min(start + 64, len(names))) for start in starts]
            parts = [augment(loaded.pixels[some], size, drawn.of(some)) for some in rows]
            views[size] = (torch.cat(parts) * 255).round().byte()
    if views:  # each image gets a folder, and thus a label, of its own
        names = [f"{row}/image" for row in range(len(names))]
    return Validation(names, images, views)


# ---- how well a network retrieves -----------------------------------------------------------------


def vectors_of(images: Tensor, backbone: Backbone) -> Tensor:
    """Embed uint8 (images, 3, size, size) as unit vectors (images, dimension) on the CPU, 64 at once."""
    with torch.inference_mode():
        parts, fits = [], 64
        for part in images.split(64):
            features, fits = embed_what_fits(backbone, part, fits)
            parts.append(features.cpu())
        return functional.normalize(torch.cat(parts))


def validate(validation: Validation, backbone: Backbone) -> dict[str, Any]:
    """Return the metrics of a network, and the mean cosine of two images."""
    return metrics_of_vectors(validation, *embed(validation, backbone))


def embed(validation: Validation, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """Embed the validation images, and their views if there are any, as unit vectors on the CPU."""
    size = backbone.transform.size
    views = vectors_of(validation.views[size], backbone) if validation.views else None
    return vectors_of(validation.images[size], backbone), views


def metrics_of_vectors(validation: Validation, images: Tensor, views: Tensor | None) -> dict[str, Any]:
    """Return the metrics of embeddings (images, dimension), and of those of their views if there are any.

    They are top_1, top_3, … and the score, each with its interval, the points of each query, and
    `mean_cosine`, of two different images.
    """
    gallery = Embeddings(validation.names, functional.normalize(images).numpy())
    if views is None:  # each image is a query among the others
        ranking = without_self(rank(gallery, gallery, KEEP + 1))
    else:
        names = [name.replace("/image", "/view") for name in validation.names]
        queries = Embeddings(names, functional.normalize(views).numpy())
        ranking = rank(queries, gallery, KEEP)
    n = len(gallery.names)
    mean = float((gallery.vectors.sum(axis=0, dtype="float64") ** 2).sum())
    return metrics_of(ranking, itself=int(views is None)) | {"mean_cosine": (mean - n) / max(1, n * (n - 1))}


def without_self(ranking: Ranking) -> Ranking:
    """Remove each image from its own matches; where it is not among them, remove the last match instead."""
    itself = ranking.rows == np.arange(len(ranking.rows))[:, None]
    others = np.argsort(itself, axis=1, kind="stable")[:, :-1]
    rows, cosines = (np.take_along_axis(x, others, 1) for x in (ranking.rows, ranking.cosines))
    return replace(ranking, rows=rows, cosines=cosines)


# ---- the best way to embed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A way to embed with an untuned and a tuned network, and its metrics."""

    embedding: str  # as in Recipe
    weight: float
    metrics: dict[str, Any]
    first: Tensor  # the embeddings of the first SAMPLE validation images

    def __str__(self) -> str:
        """Return the way to embed, in words."""
        return how(self.embedding, self.weight)


def candidates(validation: Validation, untuned: Backbone, tuned: Backbone) -> list[Candidate]:
    """Validate every way to embed: the tuned network alone, joined or mixed with the untuned one."""
    found = []

    def _add(embedding: str, weight: float, images: Tensor, views: Tensor | None = None) -> None:
        metrics = metrics_of_vectors(validation, images, views)
        found.append(Candidate(embedding, weight, metrics, images[:SAMPLE]))

    _add(ALONE, 1.0, *embed(validation, tuned))
    for weight in ALPHAS:
        _add(MIXED, weight, *embed(validation, mixed(untuned, tuned, weight)))
    size = untuned.transform.size
    beside = replace(untuned, network=Shrunk(tuned.network, tuned.transform.size))
    of_both = []
    for pixels in filter(None, (validation.images, validation.views)):
        of_both.append([vectors_of(pixels[size], backbone) for backbone in (untuned, beside)])
    for weight in LAMBDAS:
        _add(JOINED, weight, *[join(*both, weight) for both in of_both])
    return found


def mixed(untuned: Backbone, tuned: Backbone, share: float) -> Backbone:
    """Mix the weights as share · tuned + (1 − share) · untuned: WiSE-FT, Wortsman et al. 2022.

    Position embeddings of the untuned network are resampled for the tuned network's input size first.
    """
    network = copy.deepcopy(tuned.network)
    resized = with_input_size(copy.deepcopy(untuned.network), tuned.transform.size)
    start, end = dict(resized.named_parameters()), dict(tuned.network.named_parameters())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in start:
                parameter.copy_(torch.lerp(start[name], end[name], share))
    return replace(tuned, network=network)


def check_written(file: Path, chosen: Candidate, validation: Validation, device: str) -> None:
    """Raise RunError if a written checkpoint does not embed as the candidate that was chosen."""
    backbone = load_fine_tuned(file, device)
    vectors = vectors_of(validation.images[backbone.transform.size][:SAMPLE], backbone)
    cosine = functional.cosine_similarity(vectors, chosen.first).min()
    if not cosine > SAME:
        raise RunError(f"{file} does not embed as {chosen} did on the validation images (a cosine of "
                       f"{cosine:.3f}): do not use it, and report this")  # fmt: skip


def best_of(found: list[Candidate], untuned: dict[str, Any], by_view: bool = False) -> tuple[Candidate, str]:
    """Choose both networks joined with λ = USUAL, unless validation shows another way to be better.

    Return the choice and, in words, why it is chosen.

    Shown means that the 95 % interval of the difference lies above 0: several hundred images cannot tell most
    of the ways apart, and the highest of nine scores is high by chance too. If the choice is not shown to be
    better than the untuned network either, λ = CAREFUL is chosen instead. It is λ = NEAREST if CAREFUL scores
    below the untuned network, as when nearly every query is right and the test images are harder; and if
    validation is `by_view`, as finding an image from a view of itself says little of other photographs.
    """
    joined = {candidate.weight: candidate for candidate in found if candidate.embedding == JOINED}
    usual = joined[USUAL]
    best = max(found, key=lambda candidate: candidate.metrics["score"])
    gain, (low, high) = compare(best.metrics["points"], usual.metrics["points"])
    if low > 0:
        reason = f"it is shown to be better than the default, {usual} (score {usual.metrics['score']:.0f})"
    elif gain > 0:
        shown = f"{gain:+.0f} [{low:+.0f}, {high:+.0f}] on {len(untuned['points'])} images"
        reason = (f"it is the default, and {best} (score {best.metrics['score']:.0f}) may be higher by "
                  f"chance: {shown}")  # fmt: skip
        best = usual
    else:
        best, reason = usual, "it is the default, and no other way scores higher"
    if is_better(best.metrics, untuned):
        return best, reason
    lower = joined[CAREFUL].metrics["score"] < untuned["score"]
    reason = (f"it stays near the untuned network (score {untuned['score']:.0f}): {best} (score "
              f"{best.metrics['score']:.0f}) is not shown to be better than that")  # fmt: skip
    return joined[NEAREST if lower or by_view else CAREFUL], reason


def enough(gain: float, low: float, images: int) -> int:
    """Return about how many images would show a gain, of which `images` show the interval from `low` <= 0 on.

    Its half-width falls with the root of their number: this is the number at which it equals the gain.

    >>> enough(gain=12, low=-12, images=100)
    400
    """
    return round(float(f"{images * ((gain - low) / gain) ** 2:.2g}"))


def is_better(metrics: dict[str, Any], others: dict[str, Any]) -> bool:
    """Return whether the first score is shown to be higher than the second, on the same queries."""
    _, (low, _) = compare(metrics["points"], others["points"])
    return low > 0

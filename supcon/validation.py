"""Images set aside and networks in; how well each retrieves them, and the best way to embed, out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from retrieval.backbones.backbone import Backbone
from retrieval.backbones.fine_tuned import ALONE, JOINED, MIXED, Shrunk, how, join
from retrieval.embedding.torch_runtime import embed_what_fits
from retrieval.metrics import compare, metrics_of
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings, Ranking
from supcon.batches import Split, Squares, read_squares
from supcon.views import AUGMENTATIONS, Draw, augment, draw

if TYPE_CHECKING:
    from torch import Tensor, nn

LAMBDAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the tuned embedding beside the untuned one
USUAL, CAREFUL, NEAREST = 2.0, 0.5, 0.25
ALPHAS = (0.25, 0.5, 0.75)  # of the tuned weights in the mix: WiSE-FT (Wortsman et al. 2022)
COLLAPSED = 0.98  # mean cosine of two images' embeddings
KEEP = 10


@dataclass(frozen=True)
class Validation:
    """The images set aside, as squares of each size that a network sees."""

    images: dict[int, Squares]
    views: dict[int, Squares] | None  # what looks for the images; None: each image looks for the others


def read_validation(
    split: Split, backbone: Backbone, sizes: set[int], augmentation: str, seed: int
) -> Validation:
    """The squares of the images set aside; where each looks for itself, also those of a view of it."""
    images, views = {}, {}
    random = torch.Generator().manual_seed(seed)
    drawn = draw(AUGMENTATIONS[augmentation], len(split.validation), random)
    for size in sorted(sizes):
        squares = read_squares(split.validation, backbone.transform.of_size(size), "validation images")
        images[size] = squares
        if split.by == "view":
            # numbered, so that a label of its own is the first folder of each name
            images[size] = Squares([f"{row}/image" for row in range(len(squares.names))], squares.pixels)
            parts = [augment(part, size, some) for part, some in _in_parts(squares.pixels, drawn)]
            pixels = (torch.cat(parts) * 255).round().byte()
            views[size] = Squares([f"{row}/view" for row in range(len(squares.names))], pixels)
    return Validation(images, views or None)


def _in_parts(pixels: Tensor, drawn: Draw, most: int = 64) -> Iterator[tuple[Tensor, Draw]]:
    """The squares and their random numbers, some at a time."""
    for start in range(0, len(pixels), most):
        rows = slice(start, min(start + most, len(pixels)))
        yield pixels[rows], drawn.of(rows)


# ---- how well a network retrieves -----------------------------------------------------------------


def vectors_of(squares: Squares, backbone: Backbone, fits: int = 64) -> Tensor:
    """Unit vectors (images, dimension) on the CPU; `fits` images at once, or as many as do."""
    with torch.inference_mode():
        parts = []
        for part in squares.pixels.split(64):
            features, fits = embed_what_fits(backbone, part, fits)
            parts.append(features)
        return functional.normalize(torch.cat(parts))


def validate(validation: Validation, backbone: Backbone) -> dict[str, Any]:
    """The figures of a network, and the mean cosine of two images."""
    size = backbone.transform.size
    images = vectors_of(validation.images[size], backbone)
    views = vectors_of(validation.views[size], backbone) if validation.views else None
    return figures(validation, images, views)


def figures(validation: Validation, images: Tensor, views: Tensor | None) -> dict[str, Any]:
    """The figures of embeddings (images, dimension), and of those of their views if there are any.

    top_1, top_3, … and the score, each with its interval, and `mean_cosine`, of two different images.
    """
    names = next(iter(validation.images.values())).names
    gallery = Embeddings(names, functional.normalize(images).numpy())
    if views is None:  # each image looks for the others
        found = rank(gallery, gallery, KEEP + 1)
        ranking = without_self(found)
    else:
        queries = Embeddings(
            [name.replace("/image", "/view") for name in names], functional.normalize(views).numpy()
        )
        ranking = rank(queries, gallery, KEEP)
    n = len(names)
    mean = float((gallery.vectors.sum(axis=0, dtype="float64") ** 2).sum())
    return metrics_of(ranking) | {"mean_cosine": (mean - n) / max(1, n * (n - 1))}


def without_self(ranking: Ranking) -> Ranking:
    """Remove each image from the matches of itself, or the last match where an image is not among its own."""
    itself = ranking.rows == np.arange(len(ranking.rows))[:, None]
    others = np.argsort(itself, axis=1, kind="stable")[:, :-1]
    rows, cosines = (np.take_along_axis(x, others, 1) for x in (ranking.rows, ranking.cosines))
    return replace(ranking, rows=rows, cosines=cosines)


# ---- the best way to embed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A way to embed with an untuned and a tuned network, and how well it retrieves."""

    embedding: str  # as a Recipe has it
    weight: float
    metrics: dict[str, Any]

    def __str__(self) -> str:
        """In words."""
        return how(self.embedding, self.weight)


def candidates(validation: Validation, untuned: Backbone, tuned: Backbone) -> list[Candidate]:
    """The ways to embed: the tuned network alone, joined with the untuned one, and their weights mixed."""
    found = [Candidate(ALONE, 1.0, validate(validation, tuned))]
    size = untuned.transform.size
    beside = replace(untuned, network=Shrunk(tuned.network, tuned.transform.size))
    of_both = []
    for squares in [validation.images] + ([validation.views] if validation.views else []):
        of_both.append([vectors_of(squares[size], backbone) for backbone in (untuned, beside)])
    for weight in ALPHAS:
        network = mixed(untuned.network, tuned.network, weight)
        found.append(Candidate(MIXED, weight, validate(validation, replace(tuned, network=network))))
    for weight in LAMBDAS:
        joined = [join(*both, weight) for both in of_both]
        found.append(
            Candidate(JOINED, weight, figures(validation, joined[0], joined[1] if validation.views else None))
        )
    return found


def mixed(untuned: nn.Module, tuned: nn.Module, share: float) -> nn.Module:
    """A network of the weights `share` · tuned + (1 − share) · untuned: WiSE-FT, Wortsman et al. 2022."""
    network = copy.deepcopy(tuned)
    start, end = dict(untuned.named_parameters()), dict(tuned.named_parameters())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in start:
                parameter.copy_(torch.lerp(start[name], end[name], share))
    return network


def best_of(found: list[Candidate], untuned: dict[str, Any], by_view: bool = False) -> Candidate:
    """Both networks joined with λ = USUAL, unless validation shows another way to be better.

    What is shown is a difference whose 95 % interval is above 0. Several hundred images cannot tell most of
    the ways apart, and the highest of nine scores is high by chance too. Where the result is not shown to be
    better than the untuned network either, which had these figures, it is λ = CAREFUL; and NEAREST where that
    one scores lower than the untuned network, as where nearly every query is right and the test images are
    harder, or where validation is `by_view`: that an image is found from a view of itself says little of
    another photograph of the same person.
    """
    joined = {candidate.weight: candidate for candidate in found if candidate.embedding == JOINED}
    best = max(found, key=lambda candidate: candidate.metrics["score"])
    if not is_better(best.metrics, joined[USUAL].metrics):
        best = joined[USUAL]
    if is_better(best.metrics, untuned):
        return best
    lower = joined[CAREFUL].metrics["score"] < untuned["score"]
    return joined[NEAREST if lower or by_view else CAREFUL]


def is_better(figures: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether the score of the first is shown to be higher than that of the second, of the same queries."""
    _, (low, _) = compare(figures["points"], others["points"])
    return low > 0

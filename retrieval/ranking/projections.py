"""Embeddings in; the same embeddings in another space, of unit length again, out.

A row of zeros, an unreadable image, stays so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from get_images import label_of
from retrieval.errors import InputError
from retrieval.machine import zeros
from retrieval.records import Embeddings, chunks, readable_rows, rows_of_chunk, zero_rows_of

Projection = Callable[[np.ndarray], np.ndarray]  # (images, dimension), float64 → (images, another dimension)


def project(embeddings: Embeddings, projection: Projection) -> Embeddings:
    """Apply a projection to each vector x: projection(x) / ‖projection(x)‖, computed in chunks."""
    vectors = embeddings.vectors
    dimension = projection(vectors[:1].astype(np.float64)).shape[1]
    projected = zeros((len(vectors), dimension), np.float32, "projected vectors")
    for start, chunk in chunks(vectors, rows_of_chunk(vectors)):
        part = unit(projection(chunk.astype(np.float64)))
        part[zero_rows_of(chunk)] = 0
        projected[start : start + len(chunk)] = part
    return Embeddings(embeddings.names, projected, embeddings.without_face)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors divided by their lengths; a vector of length 0 stays so.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths, lengths, 1)


# ---- fitted on the gallery ------------------------------------------------------------------------


def centre(gallery: Embeddings) -> Projection:
    """Return x ↦ x − μ, the mean of the gallery's readable images."""
    mean, _ = _moments(gallery)
    return lambda x: x - mean


def whiten(gallery: Embeddings) -> Projection:
    """Return PCA whitening with shrinkage, x ↦ (x − μ) W: W of the gallery's covariance, μ its mean.

    Jégou and Chum, Negative evidences and co-occurrences in image retrieval: the benefit of PCA and
    whitening, ECCV 2012.
    """
    mean, covariance = _moments(gallery)
    axes = whitening(covariance)
    return lambda x: (x - mean) @ axes


def whitening(covariance: np.ndarray) -> np.ndarray:
    """Return W with W Wᵀ = (C + l̄ I)⁻¹, C the covariance and l̄ the mean of its eigenvalues.

    So vectors x W and y W have the inner product of Mahalanobis, xᵀ (C + l̄ I)⁻¹ y. The shrinkage l̄ is needed:
    without it, directions in which the images hardly vary, mostly noise, would count as much as all others.

    >>> whitening(np.diag([2.0, 6.0])).round(3).tolist()
    [[0.408, 0.0], [0.0, 0.316]]
    """
    shrunk = covariance + np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.inv(np.linalg.cholesky(shrunk)).T


def _moments(embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of the readable images."""
    vectors = embeddings.vectors
    images = len(readable_rows(vectors))
    total, products = np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1],) * 2)
    for _, chunk in chunks(vectors, rows_of_chunk(vectors)):
        chunk = chunk.astype(np.float64)
        total += chunk.sum(axis=0)
        products += chunk.T @ chunk
    mean = total / images
    return mean, products / images - np.outer(mean, mean)


# ---- fitted on labelled images --------------------------------------------------------------------


def within_class(train: Embeddings) -> Projection:
    """Return whitening by the within-class covariance, x ↦ (x − μ) W: W of S_w, μ the mean of all.

        S_w = Σ (x − μ_c)(x − μ_c)ᵀ / n      over the n images x and the means μ_c of their classes c

    So directions in which images of one class differ count less. Raises as check_classes. Hatch, Kajarekar
    and Stolcke, Within-class covariance normalization for SVM-based speaker recognition, Interspeech 2006.
    """
    mean, axes, _, _ = _within_classes(train)
    return lambda x: (x - mean) @ axes


def lda(train: Embeddings) -> Projection:
    """Return the vector beside its linear discriminants, x ↦ (x, z / ‖z‖): z = (x − μ) W B.

    W and μ are those of within_class. B (dimension, classes − 1) are the directions in which the class means
    differ most after W: Fisher, The use of multiple measurements in taxonomic problems, 1936. Both parts
    count equally: z sees what tells the training's classes apart, and x also all else. Raises as
    check_classes.
    """
    mean, axes, means, sizes = _within_classes(train)
    between = np.sqrt(sizes)[:, None] * (means - mean) @ axes  # a class counts as often as it has images
    _, _, directions = np.linalg.svd(between, full_matrices=False)  # by falling singular value
    axes = axes @ directions[: len(means) - 1].T
    return lambda x: np.concatenate([x, unit((x - mean) @ axes)], axis=1)


def check_classes(names: list[str]) -> None:
    """Raise InputError unless these training images are labelled, with two classes, and two images of one."""
    labels = [label_of(name) for name in names]
    if None in labels:
        raise InputError(
            f"a fit needs class folders, but {names[labels.index(None)]} of --train_dir lies in none: "
            "lay the images out as TRAIN_DIR/<class>/x.jpg"
        )
    if not 1 < len(set(labels)) < len(labels):
        raise InputError(
            "a fit needs two classes or more, and two images of a class, but --train_dir holds "
            f"{len(labels)} images of {len(set(labels))} classes: give the folder above the class folders"
        )


def _within_classes(train: Embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return μ and W of within_class, and the mean and the number of images of each class."""
    train = train.some(readable_rows(train.vectors))
    check_classes(train.names)
    vectors = train.vectors.astype(np.float64)
    _, classes = np.unique([label_of(name) for name in train.names], return_inverse=True)
    means = np.zeros((classes.max() + 1, vectors.shape[1]))
    np.add.at(means, classes, vectors)
    sizes = np.bincount(classes)
    means /= sizes[:, None]
    residuals = vectors - means[classes]
    return vectors.mean(axis=0), whitening(residuals.T @ residuals / len(residuals)), means, sizes

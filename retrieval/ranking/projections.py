"""Embeddings in; the same embeddings in another space, of unit length again, out.

A row of zeros, an unreadable image, stays so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from get_images import label_of
from retrieval.errors import InputError
from retrieval.machine import zeros
from retrieval.records import Embeddings, chunks, rows_of_chunk, zero_rows, zero_rows_of

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
    """Return PCA whitening with shrinkage: x ↦ (x − μ) U diag(l + l̄)^(−1/2).

    μ is the mean of the gallery's readable images, U and l are the eigenvectors and eigenvalues of their
    covariance, and l̄ is the mean of l: without it, directions in which the gallery hardly varies, mostly
    noise, would count as much as all others. Jégou and Chum, Negative evidences and co-occurrences in image
    retrieval: the benefit of PCA and whitening, ECCV 2012.
    """
    mean, covariance = _moments(gallery)
    values, axes = np.linalg.eigh(covariance)
    axes /= np.sqrt(values + values.mean())
    return lambda x: (x - mean) @ axes


def _moments(embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of the readable images."""
    vectors = embeddings.vectors
    images = len(vectors) - len(zero_rows(vectors))
    total, products = np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1],) * 2)
    for _, chunk in chunks(vectors, rows_of_chunk(vectors)):
        chunk = chunk.astype(np.float64)
        total += chunk.sum(axis=0)
        products += chunk.T @ chunk
    mean = total / images
    return mean, products / images - np.outer(mean, mean)


# ---- fitted on labelled images --------------------------------------------------------------------


def within_class(train: Embeddings) -> Projection:
    """Return whitening by the within-class covariance: x ↦ (x − μ) S_w^(−1/2).

    Directions in which images of one class differ count less. S_w is shrunk as Ledoit and Wolf (A
    well-conditioned estimator for large-dimensional covariance matrices, 2004) say. Raises InputError if no
    class has two images. Hatch, Kajarekar and Stolcke, Within-class covariance normalization for SVM-based
    speaker recognition, Interspeech 2006.
    """
    vectors, labels = _labelled(train)
    mean, axes = vectors.mean(axis=0), _within_class_whitening(vectors, labels)
    return lambda x: (x - mean) @ axes


def lda(train: Embeddings) -> Projection:
    """Return the unit vector beside its linear discriminants: x ↦ (x, z / ‖z‖), z = (x − μ) S_w^(−1/2) B.

    B are the directions, one fewer than classes, in which the class means differ after the within-class
    whitening: Fisher, The use of multiple measurements in taxonomic problems, 1936. The two parts count
    equally: z sees what tells the training's classes apart, and x all else. Raises as within_class.
    """
    vectors, labels = _labelled(train)
    mean, axes = vectors.mean(axis=0), _within_class_whitening(vectors, labels)
    classes, counts = np.unique(labels, return_counts=True)
    means = np.stack([vectors[labels == label].mean(axis=0) for label in classes]) - mean
    _, _, directions = np.linalg.svd(np.sqrt(counts)[:, None] * means @ axes, full_matrices=False)
    axes = axes @ directions[: len(classes) - 1].T
    return lambda x: np.concatenate([x, unit((x - mean) @ axes)], axis=1)


def _labelled(train: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors (images, dimension) of the readable images, float64, and their labels."""
    rows = np.delete(np.arange(len(train.names)), zero_rows(train.vectors))
    return train.vectors[rows].astype(np.float64), np.array([label_of(train.names[row]) for row in rows])


def _within_class_whitening(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return S_w^(−1/2) (dimension, dimension). Raises InputError if no class has two images."""
    from sklearn.covariance import ledoit_wolf

    _, of_class, counts = np.unique(labels, return_inverse=True, return_counts=True)
    several = counts[of_class] > 1
    if len(counts) < 2 or not several.any():
        raise InputError("--projection needs a --train_dir with two classes or more, and two images in one")
    residuals = np.concatenate([own - own.mean(axis=0) for label in np.flatnonzero(counts > 1)
                                for own in [vectors[of_class == label]]])  # fmt: skip
    covariance, _ = ledoit_wolf(residuals, assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    return axes / np.sqrt(values)

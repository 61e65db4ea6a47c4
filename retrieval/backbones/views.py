"""A backbone in; one that embeds each image as the mean over its views, mirrored or resized, out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from retrieval.backbones.backbone import Backbone, LazyBackbone

VERSION = 1  # part of the cache key: raise it when the views of an image give another vector


def with_views(lazy: LazyBackbone, flip: bool = False, views: str = "none") -> LazyBackbone:
    """Return a backbone whose embedding of an image is the mean of its views' unit vectors.

    `views` is none, flip, scales or flip,scales. The views are made of the network's input, after a face is
    cut out: its mirror image (flip), and its side times 1, 1/√2 and √2 (scales). `load` raises InputError if
    the network takes no other sizes. Without views the backbone is returned as it is.
    """
    names = [name for name in ("flip", "scales") if name in views.split(",") or (name == "flip" and flip)]
    if not names:
        return lazy

    def load() -> Backbone:
        from retrieval.backbones.mean_of_views import with_mean_of_views  # imports torch

        return with_mean_of_views(lazy.load(), "flip" in names, "scales" in names)

    key = hashlib.sha256(lazy.key + f"views {VERSION} {names}".encode()).digest()
    return replace(lazy, model_name=f"{lazy.model_name} with {' and '.join(names)}", key=key, load=load)

"""Networks and the minutes that are left in; the vectors of images, if the time is enough for them, out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from get_images import ImageFile
from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.views import with_views
from retrieval.choosing.recipes import Source
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed, embed_with_notes
from retrieval.embedding.runtime import Runtime, choose_runtime
from retrieval.errors import InputError, RunError
from retrieval.records import Embeddings

PROBE = 64  # images by which a network's speed is first measured
SLACK = 1.3  # of a time that is foretold
LAST, PER_IMAGE = 25.0, 0.004  # seconds kept for the last run, and for each image of the day


def reserve(images: int) -> float:
    """Return the seconds to keep for the last run on so many queries and gallery images, and for its report.

    On one core, ranking and the report took 8 s for 300 x 1000 images, 22 s for 4000 x 8000 and 37 s for
    7200 x 12 000. The rest is for slower machines, for reading the cache and for sending.

    >>> round(reserve(1300)), round(reserve(19_200))
    (30, 102)
    """
    return LAST + PER_IMAGE * images


class Clock:
    """The minutes of a search that began at `started`; `reserve` seconds of them are kept for its end."""

    def __init__(self, minutes: float, reserve: float = 0, started: float | None = None) -> None:
        self.started, self.reserve = started or time.perf_counter(), reserve
        self.end = self.started + 60 * minutes - reserve

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started

    def require_time(self) -> None:
        """Raise RunError if the time is over."""
        if self.left <= 0:
            raise RunError(f"no time is left for it, with {self.reserve:.0f} s kept for the last run: give "
                           "more --minutes")  # fmt: skip


@dataclass
class Networks:
    """The networks of a search, each found once; the cache keeps every vector that they make."""

    cache: Cache
    clock: Clock
    device: str  # as --device
    images: int  # in all, for each network
    _runtimes: dict[Source, Runtime] = field(default_factory=dict, init=False)

    def runtime(self, source: Source) -> Runtime:
        """Return what runs a network. Raises as find_backbone and find_fine_tuned."""
        if source not in self._runtimes:
            if source.checkpoint:
                from retrieval.backbones.fine_tuned import find_fine_tuned  # imports torch

                backbone = find_fine_tuned(Path(source.checkpoint), self.device)
            else:
                backbone = find_backbone(source.model, self.device, crop=source.crop)
            backbone = with_views(backbone, views=source.views)
            self._runtimes[source] = choose_runtime(backbone, "auto", self.images, None, self.cache.folder)
        return self._runtimes[source]

    def embed(self, source: Source, images: list[ImageFile], kind: str) -> Embeddings:
        """Embed images, or take their vectors from the cache. Raises as `runtime` and `embed`."""
        return embed(images, self.runtime(source), kind, cache=self.cache)

    def look_for_faces(self, source: Source, gallery: list[ImageFile]) -> None:
        """Raise InputError if a network looks for faces and finds none in most of the first images."""
        runtime, some = self.runtime(source), gallery[:PROBE]
        if runtime.backbone.transform.detects_faces:
            notes = embed_with_notes(some, runtime, "gallery images", None, self.cache)[1]
            if len(notes.without_face) > len(some) / 2:
                raise InputError(f"it looks for faces, and found none in {len(notes.without_face)} of the "
                                 f"first {len(some)} gallery images")  # fmt: skip

    def fill_cache(self, source: Source, labelled: list[ImageFile], others: int, share: float = 1) -> None:
        """Embed labelled images in parts, each as large as all before it.

        Raises RunError if the rest of them, and `others` after them, would take longer than a `share` of the
        time that is left, by the speed of a part after the first, which warms up. Neither loading the network
        nor images in the cache count.
        """
        runtime, done, size = self.runtime(source), 0, PROBE
        while done < len(labelled):
            part, loaded, start = labelled[done : done + size], runtime.seconds["load"], time.perf_counter()
            notes = embed_with_notes(part, runtime, "labelled images", None, self.cache)[1]
            spent = time.perf_counter() - start - (runtime.seconds["load"] - loaded)
            size = done = done + len(part)
            made = len(part) - notes.cached
            seconds = SLACK * spent / max(1, made) * (len(labelled) - done + others)
            warm = done > PROBE or done == len(labelled)
            if warm and 2 * made >= len(part) and seconds > share * self.clock.left:
                most = f", of which a network may take {share:.0%}" if share < 1 else ""
                raise RunError(f"the rest of its images would take about {seconds:.0f} s, and "
                               f"{max(0, self.clock.left):.0f} s are left{most}")  # fmt: skip

"""Two folders of images in; their embeddings, ranking, score and submission out.

    from retrieval import embed, find_images, load_backbone, rank, score, submit, write_submission

docs/library.md shows how to use them. Importing this package costs nothing: each name is imported when it is
first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from get_images import find_images
    from retrieval.backbones.backbone import load_backbone
    from retrieval.embedding.embed import embed
    from retrieval.metrics import score
    from retrieval.ranking.exact import rank
    from retrieval.records import Embeddings, Ranking
    from retrieval.submission.client import send_submission as submit
    from retrieval.submission.submission_file import write_submission

__all__ = ["Embeddings", "Ranking", "embed", "find_images", "load_backbone", "rank", "score", "submit",
           "write_submission"]  # fmt: skip

_PLACES = {
    "Embeddings": "retrieval.records",
    "Ranking": "retrieval.records",
    "embed": "retrieval.embedding.embed",
    "find_images": "get_images",
    "load_backbone": "retrieval.backbones.backbone",
    "rank": "retrieval.ranking.exact",
    "score": "retrieval.metrics",
    "submit": "retrieval.submission.client",
    "write_submission": "retrieval.submission.submission_file",
}


def __getattr__(name: str) -> Any:
    """Import a name of the library when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), {"submit": "send_submission"}.get(name, name))


def __dir__() -> list[str]:
    """Return the names of the library and the modules that are imported."""
    return sorted({*globals(), *__all__})

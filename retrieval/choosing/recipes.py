"""Networks and their vectors in; the ways to rank with them, and the next ones to try, out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from retrieval.ranking.means import Means

HUBS = 10  # neighbours of the hub correction
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of a second network, beside the better one
OFF = Means()
ORDERS = {name: getattr(OFF, name) for name in ("hubs", "cover", "rerank")}  # all off


class Source(NamedTuple):
    """What makes the vector of an image: a network, its crop and its views; as the flags of the scripts."""

    model: str
    crop: str = "auto"
    views: str = "none"
    checkpoint: str = ""  # of fine_tuning.py, which knows its network and its crop

    def __str__(self) -> str:
        """Return the model name, with what is not as usual."""
        crop = "" if self.crop == "auto" else f"@{self.crop}"
        tuned = " fine-tuned" if self.checkpoint else ""
        views = "" if self.views == "none" else f" + {self.views}"
        return f"{self.model}{crop}{tuned}{views}"


@dataclass(frozen=True)
class Recipe:
    """A way to rank: a network, the means that refine its ranking, and perhaps a second network's share."""

    source: Source
    means: Means = OFF
    second: Source | None = None
    share: float = 0.0  # of the second network in the fused similarity

    @property
    def sources(self) -> list[Source]:
        return [self.source, self.second] if self.second else [self.source]

    def flipped(self) -> Recipe:
        """Return this recipe with the mirror images' vectors in the mean, by each of its networks."""
        own, *second = [source._replace(views="flip") for source in self.sources]
        return replace(self, source=own, second=second[0] if second else None)

    def __str__(self) -> str:
        """Return the recipe in words, such as 0.7 dlib + 0.3 facenet + whiten."""
        means = [
            f"{name} {value}" if value is not True else name for name, value in self.means.applied().items()
        ]
        networks = [str(self.source)]
        if self.second:
            networks = [f"{1 - self.share:g} {self.source}", f"{self.share:g} {self.second}"]
        return " + ".join(networks + means)

    def settings(self, train_dir: Path) -> dict[str, Any]:
        """Return the settings of model_not_tuned.py, or of model_fine_tuned.py, that rank so."""
        settings = {"model_type": self.source.model, "crop": self.source.crop}
        if self.source.checkpoint:
            settings = {"weights": self.source.checkpoint}
        settings["views"] = self.source.views
        if self.second:
            same = self.second.model == self.source.model  # then only the crop tells them apart
            crop = f"@{self.second.crop}" if same or self.second.crop != "auto" else ""
            settings["fuse"] = [f"{self.second.model}{crop}={self.share:g}"]
        if self.means.learns:
            settings["train_dir"] = str(train_dir.absolute())
        return settings | self.means.applied()


def neighbours(recipe: Recipe, matches: int) -> list[Recipe]:
    """Return the recipes that are one step from this one: with one means more, less, or in another's place.

    Those that need another fit come last. `matches` is the number of right gallery images of a query: an
    expansion looks at as many neighbours, and at ten at most.
    """
    around = f"{min(10, matches)}:3"
    steps = {"hubs": [HUBS], "centre": [True], "whiten": [True], "cover": [True], "query_expansion": [around],
             "gallery_augmentation": [around], "rerank": ["k-reciprocal"],
             "projection": ["lda", "within_class"]}  # fmt: skip
    barred = set(ORDERS) if recipe.second else set()  # they would replace the order of the fused similarity
    barred |= {"projection", "cover"} if recipe.source.checkpoint else set()  # it has learnt from the labels
    found = []
    for name, values in steps.items():
        for value in values if name not in barred else ():
            others = ORDERS if name in ORDERS else {}  # each excludes the others
            new = getattr(OFF, name) if getattr(recipe.means, name) == value else value
            found.append(replace(recipe, means=replace(recipe.means, **others | {name: new})))
    return found


def fusions(recipe: Recipe, sources: list[Source]) -> dict[Source, list[Recipe]]:
    """Return the recipes that fuse each other network with this one, without the means that would reorder."""
    means = replace(recipe.means, **ORDERS)
    return {
        source: [Recipe(recipe.source, means, source, share) for share in SHARES]
        for source in sources
        if source not in recipe.sources
    }

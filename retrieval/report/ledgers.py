"""Folders of runs in; the lines of their ledgers runs.jsonl, checked, as records out."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, AliasPath, BaseModel, Field, field_validator, model_validator

from retrieval.errors import InputError
from retrieval.metrics import CUTS, MORE
from retrieval.run import EARLIER, LEDGER

log = logging.getLogger("retrieval.comparison")


class Estimate(NamedTuple):
    """A metric with its 95 % interval."""

    value: float
    interval: tuple[float, float]


class Settings(BaseModel):
    """The settings that tell two runs of a network on the same images apart."""

    image_size: int | str | None = None
    crop: str | None = None
    detector: str = "auto"
    face_margin: float | str | None = None
    min_face_size: float | str | None = None
    weights: str | None = None
    search: str | None = None
    exclude_self: bool = False


# Values of settings that stand for "not given".
PLAIN = (None, False, "", "auto", "none", "exact")


def _within(part: str, name: str) -> Any:
    """Return a field that stands within a part of the line."""
    return Field(validation_alias=AliasPath(part, name))


class Names(BaseModel):
    """A file names-DIGEST.json, as far as it is needed."""

    queries: list[str]


class ResentLine(BaseModel):
    """A line of a ledger that tells of a submission that was sent again, after its run."""

    run: int | None = None  # the line of its run, from 1, if the ledger has it
    accuracy: float | None = _within("outcome", "accuracy")  # the server's score


class Beside(BaseModel):
    """A file metrics.json, as far as it tells whose page lies beside it."""

    time: Annotated[datetime, AfterValidator(datetime.astimezone)]


class RunLine(BaseModel):
    """A line of a ledger. What the comparison does not need is ignored."""

    time: Annotated[datetime, AfterValidator(datetime.astimezone)]
    settings: Settings
    query_dir: str = Field("saved runs", validation_alias=AliasPath("settings", "query_dir"))  # of a fusion
    queries: int = _within("metrics", "queries")
    gallery_images: int = _within("metrics", "gallery_images")
    k: int = _within("metrics", "k")  # of the metrics at k
    backbone: str = _within("metrics", "backbone")  # the model name
    tuned: bool = _within("metrics", "tuned")
    names: str = _within("metrics", "names")  # the digest in names-DIGEST.json: the same for the same images
    estimates: dict[str, Estimate] = Field(validation_alias="metrics")  # empty without labels
    means: dict[str, Any] = Field({}, validation_alias=AliasPath("metrics", "means"))  # such as {"hubs": 10}
    cached: int = Field(0, validation_alias=AliasPath("metrics", "cached_gallery_images"))
    accuracy: float | None = _within("outcome", "accuracy")  # the server's score
    seconds: float = _within("seconds", "total")
    first: tuple[int, ...] | None = None  # the rank of each query's first right image, or 0; None: no labels
    ledger: Path = Path()
    count: int = 1  # of runs that gave the same

    @model_validator(mode="after")
    def _one_rank_a_query(self) -> Self:
        if self.first is not None and len(self.first) != self.queries:
            raise ValueError("first has not one rank a query")
        return self

    @field_validator("estimates", mode="before")
    @classmethod
    def _with_intervals(cls, metrics: Any) -> dict[str, Any]:
        """Return the score, the top-k accuracies and the metrics of MORE with their intervals."""
        if not isinstance(metrics, dict):
            raise ValueError("metrics is not an object")
        names = ("score", *(f"top_{cut}" for cut in CUTS), *MORE)
        shown = [name for name in names if name in metrics]
        return {name: (metrics[name], metrics.get(f"{name}_interval")) for name in shown}

    @property
    def name(self) -> str:
        """The model name, the settings and the means that were given; of a weights file the path's end."""
        given = self.settings.model_dump() | self.means
        if given["weights"]:
            given["weights"] = "/".join(Path(given["weights"]).parts[-2:])
        given = {name: value for name, value in given.items() if value not in PLAIN}
        words = [name if value is True else f"{name} {value}" for name, value in given.items()]
        return ", ".join([self.backbone, *words])

    @property
    def identity(self) -> tuple:
        """What a repeated run has in common with the first: network, settings, means, and results."""
        results = self.accuracy if self.first is None else self.first  # sending changes no ranking
        return self.backbone, self.settings.model_dump_json(), json.dumps(self.means, sort_keys=True), results

    @property
    def sort_score(self) -> float:
        """The score by the labels, or else the server's score, or else -1."""
        if "score" in self.estimates:
            return self.estimates["score"].value
        return -1.0 if self.accuracy is None else self.accuracy

    @property
    def page(self) -> Path | None:
        """The run's report.html, which the next run moves to earlier/; None if it was not drawn or is gone.

        The metrics.json beside a run's page has the same time as the run's line in the ledger.
        """
        folder = self.ledger.parent
        for path in [folder / "metrics.json", *folder.glob(f"{EARLIER}/*/metrics.json")]:
            try:
                beside = Beside.model_validate_json(path.read_bytes())
            except (OSError, ValueError):
                continue
            page = path.with_name("report.html")
            if beside.time == self.time and page.is_file():
                return page
        return None

    def query_names(self) -> list[str]:
        """Read the names of the queries; return their row numbers if the file of names is lost."""
        path = self.ledger.with_name(f"names-{self.names}.json")
        try:
            names = Names.model_validate_json(path.read_bytes()).queries
        except (OSError, ValueError):  # it is lost, or was changed
            names = []
        return names if len(names) == self.queries else [f"query {row}" for row in range(1, self.queries + 1)]


def read_ledgers(folders: list[Path]) -> list[RunLine]:
    """Read every ledger in and below the folders, each once. Raises InputError if there are none."""
    ledgers = {ledger.resolve(): ledger for folder in folders for ledger in _ledgers_in(folder)}
    where = ", ".join(map(str, folders))
    if not ledgers:
        raise InputError(f"there is no {LEDGER} in or below {where}: give the --output_dir of runs")
    runs = [run for ledger in ledgers.values() for run in _read_ledger(ledger)]
    if not runs:
        raise InputError(f"no {LEDGER} in or below {where} holds a run that embedded and ranked images")
    return runs


def _ledgers_in(folder: Path) -> list[Path]:
    if folder.is_file():
        if folder.suffix != Path(LEDGER).suffix:
            raise InputError(f"{folder} is no ledger: give the folder of the runs, or a {LEDGER}")
        return [folder]
    return [
        ledger for ledger in sorted(folder.rglob(LEDGER)) if EARLIER not in ledger.relative_to(folder).parts
    ]


def _read_ledger(ledger: Path) -> list[RunLine]:
    """Read the runs in a ledger, each with its latest score by the server. Warn of and skip a broken line."""
    runs: dict[int, RunLine] = {}
    for number, line in enumerate(ledger.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if isinstance(content, dict) and "metrics" not in content:
                resent = ResentLine.model_validate(content)
                if resent.run in runs and resent.accuracy is not None:
                    scored = {"accuracy": resent.accuracy}
                    runs[resent.run] = runs[resent.run].model_copy(update=scored)
                continue
            runs[number] = RunLine.model_validate(content).model_copy(update={"ledger": ledger})
        except ValueError:  # no JSON, or pydantic's ValidationError
            log.warning("%s, line %d is not a line of a ledger and is skipped", ledger, number)
    return list(runs.values())

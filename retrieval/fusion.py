"""Fuse saved runs: rank by a weighted sum of their similarities.

python -m retrieval.fusion results/dlib results/clip --mix 0.7,0.3 --output_dir results/fused
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
import numpy as np
from pydantic_settings import CliPositionalArg, CliVariadicArg

from retrieval.command_line import Metavar
from retrieval.embedding.embeddings_file import read_embeddings
from retrieval.errors import InputError
from retrieval.forms import Form
from retrieval.metrics import are_labelled, compare, first_hits, points_of, score
from retrieval.ranking.fusion import (
    Normalisation,
    RunVectors,
    first_right,
    fuse,
    in_words,
    names_unreadable_by_all,
)
from retrieval.ranking.mixing import choose_mix
from retrieval.records import Embeddings, Ranking
from retrieval.run import Outcome, Run
from retrieval.settings import Amount, Folder, GroupName, NewFolder
from retrieval.submission.client import command_to_send
from retrieval.submission.protocol import NAMES_PER_QUERY
from retrieval.submission.submission_file import write_submission

NAMED = 5  # images that an error names
NEEDED = 2**22  # bytes on the disk, besides those of the names

log = logging.getLogger("retrieval.fusion")


class Settings(Form):
    """Fuse saved runs: rank by a weighted sum of their similarities."""

    runs: CliPositionalArg[list[Folder]]
    """output folders of runs with --save_embeddings on the same images"""
    mix: Annotated[list[Amount], Metavar("A,B")] = []  # noqa: RUF012 (pydantic copies it)
    """weights of the runs, such as 0.7,0.3"""
    labelled: Annotated[CliVariadicArg[list[Folder]], Metavar("FOLDER")] = []  # noqa: RUF012
    """choose the weights on these: runs of the same networks, in the same order, on other, labelled images"""
    normalisation: Normalisation = "min-max"
    """normalisation of each query's similarities"""
    group_name: GroupName = "my-team"
    """name of your group on the server"""
    output_dir: NewFolder = Path("results/fused")
    """folder for the files of the fusion"""
    seed: int = 0
    """seed of the splits of the labelled images"""


class SavedRun(NamedTuple):
    """The files of a run, as far as the fusion needs them."""

    folder: Path
    backbone: str
    tuned: bool
    vectors: RunVectors

    def __str__(self) -> str:
        """Name the network and the folder."""
        return f"{self.backbone} ({self.folder})"


def main(settings: Settings) -> None:
    with Run(settings) as run:
        runs = read_runs(settings.runs)
        check(settings, runs)
        labelled = read_runs(settings.labelled)
        check_labelled(labelled, runs)
        names = [name for part in runs[0].vectors for name in part.names]
        run.open_output_dir(NEEDED + 11 * len(json.dumps(names)))
        run.done("read", f"read the embeddings of {len(runs)} runs")
        weights, evidence = weights_of(settings, runs, labelled)
        run.done("weigh")
        vectors = [saved.vectors for saved in runs]
        ranking = fuse(vectors, weights, NAMES_PER_QUERY, settings.normalisation)
        words = in_words([saved.backbone for saved in runs], weights)
        run.done("rank", f"fused {words} for {len(ranking.queries)} queries")
        path = write_submission(ranking, settings.group_name, run.folder)
        metrics = counts_of(runs, weights, ranking) | evidence
        metrics |= {"names": run.write_names(ranking.queries, ranking.gallery)}
        metrics |= metrics_of(settings, runs, ranking)
        sentence = f"{path} is saved; to send it:\n    {command_to_send(path)}"
        hits = {"first": first_hits(ranking)} if "score" in metrics else {}
        run.conclude(metrics, Outcome("saved", sentence), **hits)


# ---- read -------------------------------------------------------------------------------------------


def read_runs(folders: list[Path]) -> list[SavedRun]:
    """Read runs on the same images, all in the order of the first. Raises InputError as _aligned."""
    runs = []
    for folder in folders:
        path = folder / "metrics.json"  # a user's own vectors may come without it
        metrics = json.loads(path.read_bytes()) if path.is_file() else {}
        vectors = RunVectors(*read_embeddings(folder))
        if runs:
            pairs = zip(runs[0].vectors, vectors, ("queries", "gallery images"), strict=True)
            vectors = RunVectors(*(_aligned(*pair, runs[0].folder, folder) for pair in pairs))
        backbone = metrics.get("backbone", folder.name)
        runs.append(SavedRun(folder, backbone, metrics.get("tuned", False), vectors))
    return runs


def _aligned(first: Embeddings, other: Embeddings, kind: str, place: Path, other_place: Path) -> Embeddings:
    """Return the other embeddings in the order of the first. Raises InputError if any name differs."""
    row_of = {name: row for row, name in enumerate(other.names)}
    missing = [name for name in first.names if name not in row_of]
    extra = sorted(row_of.keys() - set(first.names))
    differ = [f"{len(names)} are only in {folder} ({', '.join(names[:NAMED])}{' …' * (len(names) > NAMED)})"
              for names, folder in ((missing, place), (extra, other_place)) if names]  # fmt: skip
    if differ:
        raise InputError(
            f"the {kind} of {place} and {other_place} differ: {' and '.join(differ)}: run both "
            "networks on the same folders"
        )
    return Embeddings(first.names, other.vectors[[row_of[name] for name in first.names]])


def check(settings: Settings, runs: list[SavedRun]) -> None:
    """Raise InputError where the settings do not fit each other or the runs."""
    if len(runs) < 2:
        raise InputError("give the folders of two runs or more: one run is its own fusion")
    if settings.output_dir.resolve() in [folder.resolve() for folder in settings.runs]:
        raise InputError(f"--output_dir {settings.output_dir} is the folder of a run: give another one")
    if settings.mix and settings.labelled:
        raise InputError("--mix gives the weights and --labelled chooses them: give one of them")
    for flag, given in (("mix", settings.mix), ("labelled", settings.labelled)):
        if given and len(given) != len(runs):
            raise InputError(
                f"--{flag} has {len(given)} entries for {len(runs)} runs: give one for each, in order"
            )
    if settings.mix and not any(settings.mix):
        raise InputError("all weights of --mix are 0: give one above 0")


# ---- weights ----------------------------------------------------------------------------------------


def weights_of(
    settings: Settings, runs: list[SavedRun], labelled: list[SavedRun]
) -> tuple[list[float], dict[str, Any]]:
    """Return the weights of the runs, which add up to 1, and the evidence for them."""
    if labelled:
        names = [str(saved) for saved in runs]
        mix = choose_mix([saved.vectors for saved in labelled], names, settings.normalisation, settings.seed)
        return mix.weights, {"tried": mix.tried, "labelled": mix.labelled}
    if not settings.mix:
        log.warning("all runs get the same weight, and nobody has checked it: a weak network may cost more "
                    "than it gives. --labelled chooses the weights on labelled images")  # fmt: skip
    mix = settings.mix or [1.0] * len(runs)
    return [weight / sum(mix) for weight in mix], {}


def check_labelled(labelled: list[SavedRun], runs: list[SavedRun]) -> None:
    """Raise InputError unless the labelled runs, if any, are of the same networks and on other images."""
    if not labelled:
        return
    first = labelled[0]
    if not are_labelled(*(part.names for part in first.vectors)):
        raise InputError(
            f"the images of {first.folder} have no labels: --labelled needs runs on class folders"
        )
    if set(first.vectors.queries.names) == set(runs[0].vectors.queries.names):
        raise InputError(
            f"{first.folder} has the queries that are to be ranked, and weights chosen on them would flatter "
            "their score: give --labelled runs on other images, such as a part of the training folder"
        )
    for saved, run in zip(labelled, runs, strict=True):
        same = saved.backbone, saved.vectors.queries.vectors.shape[1]
        if same != (run.backbone, run.vectors.queries.vectors.shape[1]):
            raise InputError(
                f"--labelled has {saved} for the run {run}: give runs of the same networks, in the same order"
            )


# ---- what is known of the fusion --------------------------------------------------------------------


def counts_of(runs: list[SavedRun], weights: list[float], ranking: Ranking) -> dict[str, Any]:
    """Return what was fused, as metrics.json has it of any run, and the weight of each run's folder."""
    used = [saved for saved, weight in zip(runs, weights, strict=True) if weight]
    queries, gallery = zip(*(saved.vectors for saved in used), strict=True)
    return {
        "backbone": in_words([saved.backbone for saved in runs], weights),
        "tuned": any(saved.tuned for saved in used),
        "weights": {str(saved.folder): weight for saved, weight in zip(runs, weights, strict=True)},
        "queries": len(ranking.queries),
        "gallery_images": len(ranking.gallery),
        "k": NAMES_PER_QUERY,
        "unreadable_queries": names_unreadable_by_all(queries),
        "unreadable_gallery_images": names_unreadable_by_all(gallery),
    }


def metrics_of(settings: Settings, runs: list[SavedRun], ranking: Ranking) -> dict[str, Any]:
    """Return the metrics of a labelled ranking, and its gains over the best run alone and over equal weights.

    The best run is the one that scores highest on these very queries, so the gain over it is not overstated.
    """
    if not are_labelled(ranking.queries, ranking.gallery):
        return {}
    metrics, fused = score(ranking), points_of(np.array(first_hits(ranking)))
    mixes = [*np.eye(len(runs)).tolist(), [1 / len(runs)] * len(runs)]
    vectors = [saved.vectors for saved in runs]
    *alone, equally = points_of(first_right(vectors, mixes, settings.normalisation))  # each (queries,)
    best = int(np.argmax([points.mean() for points in alone]))
    scores = {str(saved.folder): float(points.mean()) for saved, points in zip(runs, alone, strict=True)}
    beside = {
        "best_run": (f"the best run, {runs[best]}", alone[best]),
        "equal_weights": ("equal weights", equally),
    }
    for name, (words, points) in beside.items():
        gain, interval = compare(fused, points)
        metrics |= {f"gain_over_{name}": gain, f"gain_over_{name}_interval": interval}
        log.info("beside %s (%.1f): %+.1f [%+.1f, %+.1f] of 1000", words, points.mean(), gain, *interval)
    return metrics | {"score_alone": scores}


if __name__ == "__main__":
    run_script(main, Settings)

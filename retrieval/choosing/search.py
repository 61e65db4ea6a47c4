"""Images, networks and minutes in; a valid submission all along, and the best recipe by evidence, out."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from get_images import ImageFile, find_images, find_query_and_gallery, label_of
from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.views import with_views
from retrieval.choosing.days import (
    Images,
    by_identity,
    draw_days,
    hide_a_day,
    matches_in,
    rows_to_learn_from,
)
from retrieval.choosing.evidence import Evidence, Step, quiet, rank_recipe
from retrieval.choosing.recipes import Recipe, Source, fusions, neighbours
from retrieval.choosing.settings import source_of
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed, embed_with_notes
from retrieval.embedding.runtime import Runtime, choose_runtime
from retrieval.errors import InputError, RunError
from retrieval.files import as_json, write_whole
from retrieval.forms import Form
from retrieval.metrics import require_labels
from retrieval.ranking.projections import check_classes
from retrieval.records import Embeddings, Ranking
from retrieval.run import SUBMISSION, Run, log_outcome
from retrieval.settings import LOCAL
from retrieval.submission.client import send_submission
from retrieval.submission.submission_file import make_submission, write_submission

RECIPE = "recipe.json"
DAYS = 10  # that are drawn from the labelled images, by class: each has many queries
DAYS_OF_PEOPLE = 100  # by identity: each has one query a person
EVERY = 5  # each fifth of these days serves where many means are tried
STEPS = 4  # that the search may take beside those to other networks
PROBE = 64  # images by which a network's speed is measured
SLACK = 1.3  # of a time that is foretold
NEEDED = 2**22  # bytes on the disk, besides those of the names
LAST = 25.0  # seconds kept for the last ranking, the report and the sending, and of those that pass until now

log = logging.getLogger("retrieval.choosing")


def begin_search(run: Run) -> Search:
    """Find the images of a run of choose.py, and write the first submission; return the search.

    Raises InputError where the folders cannot be used, or the first networks cannot run.
    """
    settings = run.settings
    clock = Clock(settings.minutes)
    queries, gallery = find_query_and_gallery(settings.query_dir, settings.gallery_dir)
    images = Images(queries, gallery, find_images(settings.train_dir))
    check_classes([file.name for file in images.train])
    if settings.rehearse:
        images = hide_a_day(images, settings.matches, settings.seed)
        queries, gallery = images.queries, images.gallery
        log.info("a rehearsal: a day of the labelled images is hidden from the search")
    if settings.custom_dataset or settings.server_url == LOCAL:
        require_labels(queries, gallery)
    names = [file.name for file in (*queries, *gallery)]
    run.open_output_dir(NEEDED + 11 * len(json.dumps(names)))
    log.info("found %d query, %d gallery and %d labelled images", *map(len, (queries, gallery, images.train)))
    search = Search(images, list(map(source_of, settings.models)), clock, settings.output_dir,
                    settings.train_dir, settings.group_name, Cache(settings.cache_dir), settings.device,
                    settings.matches, settings.seed)  # fmt: skip
    path = search.begin()
    if settings.send_first and not settings.rehearse:
        outcome = send_submission(path, settings.server_url, settings.group_token.get_secret_value())
        log_outcome(outcome)
        if (reply := path.with_name("reply.txt")).exists():  # of a submission that will be replaced
            reply.replace(path.with_name("first_reply.txt"))
    return search


class Clock:
    """The minutes of a search; `reserve` seconds of them are kept for its end."""

    def __init__(self, minutes: float, reserve: float = LAST) -> None:
        self.started = time.perf_counter()
        self.end = self.started + 60 * minutes - reserve

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started


@dataclass
class Search:
    """A search for the best recipe. Call its methods in their order, and stop whenever you like.

    From `begin` on, submission.json in `folder` is valid: each better recipe replaces it in one piece, and
    recipe.json beside it.
    """

    images: Images
    models: list[Source]  # the first one is the plain way, which stays unless another is shown to be better
    clock: Clock
    folder: Path
    train_dir: Path
    group_name: str
    cache: Cache
    device: str = "auto"
    matches: int | None = None  # gallery images of an identity; None: by the look of the gallery
    seed: int = 0
    plain: Recipe = field(init=False)
    best: Recipe = field(init=False)
    evidence: Evidence | None = field(default=None, init=False)
    steps: list[Step] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)  # networks, and why
    _of_day: dict[Source, tuple[Embeddings, Embeddings]] = field(default_factory=dict)
    _runtimes: dict[Source, Runtime] = field(default_factory=dict)

    @property
    def tests(self) -> int:
        """Return how many steps the search may ask about; the interval of each is corrected for them."""
        return 3 * len(self.models) + STEPS

    # ---- the stages

    def begin(self) -> Path:
        """Rank with the first network that runs, and write the first submission; return its path.

        Raises InputError or RunError, as the last network did, if none runs.
        """
        for source in self.models:
            try:
                self.best = self.plain = Recipe(source)
                queries, gallery = self._embed_day(source)
                break
            except (InputError, RunError) as error:
                self._pass_over(source, error)
                last = error
        else:
            raise last
        ranking = rank_recipe(self.best, [(queries, gallery, None)], self._device(source))
        path = write_submission(ranking, self.group_name, self.folder)
        self._write_recipe()
        log.info("%.0f s: %s holds a valid submission by %s", self.clock.passed, path, self.best)
        return path

    def try_networks(self) -> None:
        """Embed the labelled images with each network, and take the steps that pay."""
        for source in self.models:
            if str(source) in self.passed_over:
                continue
            if self._add(source) and (source == self.best.source or self._step_to(source)):
                self._climb()

    def try_tuned(self, tune: Callable[[str, Path, Path, float], Path]) -> None:
        """Fine-tune the best network on a part of the labelled images, and try it on days of the others.

        `tune(model, folder, save_dir, minutes)` returns the checkpoint. If the tuned network is taken, all
        days from here on show images that it has not learnt from.
        """
        source, train = self.best.source, self.images.train
        learn = rows_to_learn_from([file.name for file in train], seed=self.seed)
        rest = np.setdiff1d(np.arange(len(train)), learn)
        folder = self.folder / "tuning"
        try:
            link([train[row] for row in learn], folder / "train")
            checkpoint = tune(source.model, folder / "train", folder / "checkpoint", self.clock.left / 120)
        except (InputError, RunError) as error:
            self._pass_over(source._replace(checkpoint="tuned"), error)
            return
        before = self.images, self.evidence
        vectors = {other: of_other.some(rest) for other, of_other in self.evidence.vectors.items()}
        self.images = replace(self.images, train=[train[row] for row in rest])
        self._draw_days(vectors[source])
        self.evidence.vectors |= vectors
        tuned = Source(source.model, checkpoint=str(checkpoint.absolute()))
        if self._add(tuned) and self._step_to(tuned):
            self._climb()
        else:
            self.images, self.evidence = before

    def try_views(self) -> None:
        """Try the mean of each image's vector and its mirror image's."""
        flipped = self.best.source._replace(views="flip")
        if self._add(flipped) and self._step([Recipe(flipped, self.best.means)]):
            self._climb()

    def try_fusions(self) -> None:
        """Try to fuse each other network with the best."""
        for others in fusions(self.best, list(self.evidence.vectors)).values():
            self._step(others)

    # ---- steps

    def _step_to(self, source: Source) -> bool:
        """Take another network if it pays: without means, which have to pay again, or else with the same."""
        return self._step([Recipe(source)]) or self._step([Recipe(source, self.best.means)])

    def _climb(self) -> None:
        while self._step(neighbours(self.best, self.matches), EVERY if len(self.evidence.days) > DAYS else 1):
            pass

    def _step(self, others: list[Recipe], every: int = 1) -> bool:
        """Compare recipes with the best one so far, on each `every`-th day; take the best if that pays."""
        others = [other for other in dict.fromkeys(others) if other != self.best]
        if len(self.steps) == self.tests or self.clock.left < 0:
            return False
        step = self.evidence.step(self.best, others, self.tests, self.clock.end, every, self.seed)
        if not step.tries:
            return False
        self.steps.append(step)
        self._show(step)
        if step.pays and not self._adopt(step.best):
            return False
        self._write_recipe()
        return step.pays

    def _show(self, step: Step) -> None:
        log.info("%.0f s: beside %s (%.1f [%.0f, %.0f] on the drawn days):",
                 self.clock.passed, step.before, step.score, *step.score_interval)  # fmt: skip
        for tried in sorted(step.tries, key=lambda tried: -tried.score):
            log.info("  %-60s %6.1f  %+6.1f [%+.1f, %+.1f]", tried.recipe, tried.score, tried.gain,
                     *tried.interval)  # fmt: skip
        verdict = "taken" if step.pays else "not shown to pay, so the plainer way stays"
        log.info("  the best of them gains %+.1f [%+.1f, %+.1f] on images that did not choose it: %s",
                 step.gain, *step.interval, verdict)  # fmt: skip

    def _adopt(self, recipe: Recipe) -> bool:
        """Rank the day's queries by a recipe, and replace the submission in one piece."""
        try:
            ranking = self.rank(recipe)
        except (InputError, RunError) as error:
            self._pass_over(recipe.source, error)
            return False
        write_whole(self.folder / SUBMISSION, as_json(make_submission(ranking, self.group_name)))
        self.best = recipe
        log.info("%.0f s: the submission is now by %s", self.clock.passed, recipe)
        return True

    def rank(self, recipe: Recipe) -> Ranking:
        """Rank the day's queries by a recipe. Raises as the embedding of its networks."""
        of_day = [self._embed_day(source) for source in recipe.sources]
        train = [self.evidence.vectors[source] for source in recipe.sources]
        members = [(*pair, of_train) for pair, of_train in zip(of_day, train, strict=True)]
        return rank_recipe(recipe, members, self._device(recipe.source))

    # ---- vectors

    def _add(self, source: Source) -> bool:
        """Embed the labelled images, unless the network fails or the time is too short for it."""
        try:
            seconds = self._foretell(source)
            if seconds > self.clock.left:
                raise RunError(
                    f"it would take about {seconds:.0f} s, and {max(0, self.clock.left):.0f} are left"
                )
            with quiet("retrieval.embedding"):  # which has told of the same images before
                vectors = embed(self.images.train, self._runtime(source), "labelled images", cache=self.cache)
        except (InputError, RunError) as error:
            self._pass_over(source, error)
            return False
        if not self.evidence:
            self._draw_days(vectors)
        self.evidence.vectors[source] = vectors
        return True

    def _draw_days(self, vectors: Embeddings) -> None:
        queries, gallery = self._of_day[self.best.source]
        identities = by_identity(vectors.names)
        if self.matches is None and identities:
            self.matches = matches_in(gallery, vectors)
            log.info("the gallery looks as if an identity had %d images in it (--matches says otherwise)",
                     self.matches)  # fmt: skip
        elif self.matches is None:
            self.matches = len(gallery.names) // len(set(map(label_of, vectors.names)))
        share = len(queries.names) / (len(queries.names) + len(gallery.names))
        count = DAYS_OF_PEOPLE if identities else DAYS
        days = draw_days(vectors.names, self.matches, share, count, self.seed)
        self.evidence = Evidence(vectors.names, days, self._device(self.best.source))
        kind = "other people than those that a fit sees" if identities else "the classes that a fit sees"
        log.info("drew %d days with %d queries and %d gallery images, of %s", count, len(days[0].queries),
                 len(days[0].gallery), kind)  # fmt: skip

    def _foretell(self, source: Source) -> float:
        """Return about how many seconds a network needs for all images, by the speed of a few of them."""
        runtime, train = self._runtime(source), self.images.train
        notes = embed_with_notes(train[:PROBE], runtime, "labelled images", None, self.cache)[1]  # loads it
        if len(notes.without_face) > min(PROBE, len(train)) / 2:
            raise InputError(f"it looks for faces, and found none in {len(notes.without_face)} of the first "
                             f"{min(PROBE, len(train))} images")  # fmt: skip
        start = time.perf_counter()
        embed_with_notes(train[PROBE : 2 * PROBE], runtime, "labelled images", None, self.cache)
        each = (time.perf_counter() - start) / PROBE
        left = len(self.images.train) - 2 * PROBE
        left += 0 if source in self._of_day else len(self.images.queries) + len(self.images.gallery)
        return SLACK * each * max(0, left)

    def _embed_day(self, source: Source) -> tuple[Embeddings, Embeddings]:
        if source not in self._of_day:
            runtime = self._runtime(source)
            gallery = embed(self.images.gallery, runtime, "gallery images", cache=self.cache)
            self._of_day[source] = embed(self.images.queries, runtime, "queries", cache=self.cache), gallery
        return self._of_day[source]

    def _runtime(self, source: Source) -> Runtime:
        if source not in self._runtimes:
            if source.checkpoint:
                from retrieval.backbones.fine_tuned import find_fine_tuned  # imports torch

                backbone = find_fine_tuned(Path(source.checkpoint), self.device)
            else:
                backbone = find_backbone(source.model, self.device, crop=source.crop)
            backbone = with_views(backbone, views=source.views)
            count = len(self.images)
            self._runtimes[source] = choose_runtime(backbone, "auto", count, None, self.cache.folder)
        return self._runtimes[source]

    def _device(self, source: Source) -> str:
        return self._runtimes[source].backbone.device

    def _pass_over(self, source: Source, error: Exception) -> None:
        self.passed_over[str(source)] = str(error)
        log.warning("%s is passed over: %s", source, error)

    # ---- what is kept

    def arguments(self, settings: Form) -> list[str]:
        """Return the arguments of the script that runs the best recipe, saves, sends and shows."""
        given = {"recipe": self.folder / RECIPE, "group_token": settings.group_token.get_secret_value(),
                 "server_url": settings.server_url.full}  # fmt: skip
        for name in (
            "query_dir",
            "gallery_dir",
            "output_dir",
            "group_name",
            "device",
            "cache_dir",
        ):
            given[name] = getattr(settings, name)
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return [*arguments, *(["--custom_dataset"] if settings.custom_dataset else [])]

    def _write_recipe(self) -> None:
        """Write the best recipe so far, for --recipe, and what was tried on the way to it."""
        kept = {"recipe": str(self.best), "settings": self.best.settings(self.train_dir)}
        kept |= {"passed_over": self.passed_over, "steps": [_step_as_dict(step) for step in self.steps]}
        if self.steps:
            score, interval = self.evidence.score(self.best)
            kept |= {"score_on_drawn_days": score, "score_interval": interval}
            kept |= {
                "days": len(self.evidence.days),
                "matches": self.matches,
                "seed": self.seed,
                "tests": self.tests,
            }
        write_whole(self.folder / RECIPE, as_json(kept, indent=2))


def link(files: list[ImageFile], folder: Path) -> None:
    """Lay images out in a folder as links, under their names."""
    if folder.exists():
        shutil.rmtree(folder)
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.symlink_to(file.path.absolute())
        except OSError:  # as on Windows, where links need a privilege
            shutil.copyfile(file.path, path)


def _step_as_dict(step: Step) -> dict[str, Any]:
    return {
        "before": str(step.before),
        "score": step.score,
        "score_interval": step.score_interval,
        "best": str(step.best),
        "taken": step.pays,
        "gain_held_out": step.gain,
        "gain_held_out_interval": step.interval,
        "tries": [tried._asdict() | {"recipe": str(tried.recipe)} for tried in step.tries],
    }

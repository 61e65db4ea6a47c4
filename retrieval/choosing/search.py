"""Images, networks and minutes in; a valid submission all along, and the best recipe by evidence, out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from get_images import ImageFile, label_of
from retrieval.choosing.days import (
    DAYS,
    Images,
    by_identity,
    check_days,
    draw_days,
    find_all,
    matches_in,
    rows_to_learn_from,
)
from retrieval.choosing.evidence import Evidence, Step, quiet, rank_recipe
from retrieval.choosing.networks import Clock, Networks, reserve
from retrieval.choosing.recipes import OFF, Recipe, Source, fusions, neighbours
from retrieval.choosing.settings import check_send_first, source_of
from retrieval.distributed import several
from retrieval.embedding.cache import Cache
from retrieval.errors import InputError, NotDownloadedError, RunError
from retrieval.files import as_json, write_whole
from retrieval.forms import Form
from retrieval.records import Embeddings, Ranking
from retrieval.run import EARLIER, PER_RUN, SUBMISSION, Run, log_outcome, set_aside
from retrieval.settings import LOCAL
from retrieval.submission.client import command_to_send, send_submission
from retrieval.submission.submission_file import make_submission

RECIPE, FIRST_REPLY, TUNING, REHEARSAL = "recipe.json", "first_reply.txt", "tuning", "rehearsal"
DAYS_OF_PEOPLE = 100  # by identity: each has one query a person
EVERY = 5  # each fifth of these days serves where many means are tried
OF_THE_REST = 0.5  # of the time that is left: a network beside the first may take it, so that means get some
STEPS = 4  # that the search may take beside those to other networks

log = logging.getLogger("retrieval.choosing")


@contextmanager
def begin_search(run: Run) -> Iterator[Search]:
    """Find the images of a run of choose.py, and write the first submission; yield the search.

    After Ctrl-C the log says which submission there is and how to send it. Raises InputError where the
    folders cannot be used, or under torchrun with several processes; RunError if no network runs.
    """
    settings = run.settings
    if several():
        raise InputError("choose.py searches in one process: start it with python, and without torchrun")
    check_send_first(settings)
    images = find_all(settings)
    run.check_output_dir(images.queries, images.gallery, settings.train_dir)
    clock = Clock(settings.minutes, reserve(len(images.queries) + len(images.gallery)), run.started)
    networks = Networks(Cache(settings.cache_dir), clock, settings.device, len(images))
    models = list(dict.fromkeys(map(source_of, settings.models)))
    folder = settings.output_dir / REHEARSAL if settings.rehearse else settings.output_dir
    folder.mkdir(exist_ok=True)
    search = Search(images, models, clock, networks, folder, settings.train_dir,
                    settings.group_name, settings.matches, settings.seed, settings.rehearse)  # fmt: skip
    try:
        search.begin()
        yield search
        search._write_recipe()  # with the networks that were passed over last
    except KeyboardInterrupt:
        if search.best and not search.rehearsal:
            path, url = search.folder / SUBMISSION, str(settings.server_url)
            given = [url] if url and url != LOCAL else []
            log.info("%s is valid, by %s; send it with\n    %s\nThe same command would search anew, with "
                     "vectors from the cache, and move this submission to %s",
                     path, search.best, command_to_send(path, *given), search.folder / EARLIER)  # fmt: skip
        raise


@dataclass
class Search:
    """A search for the best recipe. Call its methods in their order, and stop whenever you like.

    From `begin` on, submission.json in `folder` is valid: each better recipe replaces it in one piece, and
    recipe.json beside it. A rehearsal writes only recipe.json.
    """

    images: Images
    models: list[Source]  # the first one is the plain way, which stays unless another is shown to be better
    clock: Clock
    networks: Networks
    folder: Path
    train_dir: Path
    group_name: str
    matches: int | None = None  # gallery images of an identity; None: by the look of the gallery
    seed: int = 0
    rehearsal: bool = False
    plain: Recipe | None = field(default=None, init=False)  # None: there is no submission yet
    best: Recipe | None = field(default=None, init=False)
    guesses: bool = field(init=False)  # whether networks tell `matches`
    evidence: Evidence | None = field(default=None, init=False)
    steps: list[Step] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)  # networks, and why
    _of_day: dict[Source, tuple[Embeddings, Embeddings]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guesses = self.matches is None

    @property
    def tests(self) -> int:
        """Return how many steps the search may ask about; the interval of each is corrected for them."""
        return 3 * len(self.models) + STEPS

    # ---- the stages

    def begin(self) -> None:
        """Rank with the first network that runs, and write the first submission and its recipe.

        The files of an earlier run move to earlier/ then. Raises RunError if no network runs.
        """
        for source in self.models:
            try:
                self.networks.look_for_faces(source, self.images.gallery)
                queries, gallery = self._embed_day(source)
                break
            except (InputError, RunError) as error:
                self._pass_over(source, error)
        else:
            raise RunError("no network of --models can be used, for the reasons above: give others, such as "
                           "efficientnet_lite0 or, for faces, dlib, which need no download")  # fmt: skip
        ranking = rank_recipe(Recipe(source), [(queries, gallery, None)], self._device(source))
        set_aside(self.folder, (*PER_RUN, RECIPE, FIRST_REPLY, TUNING))
        self._write_submission(ranking)
        self.best = self.plain = Recipe(source)
        self._write_recipe()
        if not self.rehearsal:
            log.info("%.0f s: %s holds a valid submission by %s",
                     self.clock.passed, self.folder / SUBMISSION, self.best)  # fmt: skip

    def send_first(self, settings: Form) -> None:
        """Send the first submission, and keep the reply. A failure is logged, and the search goes on.

        Raises KeyboardInterrupt after Ctrl-C.
        """
        path = self.folder / SUBMISSION
        outcome = send_submission(path, settings.server_url, settings.group_token.get_secret_value())
        log_outcome(outcome)
        if (reply := path.with_name("reply.txt")).exists():  # of a submission that will be replaced
            reply.replace(path.with_name(FIRST_REPLY))
        if outcome.word == "interrupted":
            raise KeyboardInterrupt

    def try_networks(self) -> None:
        """Embed the labelled images with each network, and take the steps that pay.

        First each network is compared alone, so that no time goes into means beside a network that another
        one beats; then come the means, and then the other networks with the means that were taken. Without
        labelled vectors of the plain way nothing can be compared with it, and it stays.
        """
        if not self.images.train:
            return
        if not self._add(self.plain.source):
            log.warning("%s stays, since nothing can be compared with it: give more --minutes, or another "
                        "network as the first of --models", self.plain)  # fmt: skip
            return
        for source in self.models:
            waits = source != self.plain.source and str(source) not in self.passed_over
            if waits and self._add(source, OF_THE_REST):
                self._step([Recipe(source)])
        if self.guesses and self.best != self.plain:
            self._guess_again()
        self._climb()
        for source in self.models:
            other = Recipe(source, self.best.means)
            if other.means != OFF and other != self.best and self._step([other]):
                self._climb()

    def try_tuned(self, tune: Callable[[Source, Path, Path, float, str], Path]) -> None:
        """Fine-tune the best network on a part of the labelled images, and try it on days of the others.

        `tune(source, folder, save_dir, minutes, device)` returns the checkpoint. If the tuned network is
        taken, all days from here on show images that it has not learnt from.
        """
        if not self.evidence:
            return
        source, train = self.best.source, self.images.train
        learn = rows_to_learn_from([file.name for file in train], seed=self.seed)
        rest = np.setdiff1d(np.arange(len(train)), learn)
        folder, before = self.folder / TUNING, (self.images, self.evidence)
        vectors = {other: of_other.some(rest) for other, of_other in self.evidence.vectors.items()}
        try:
            self.clock.require_time()
            self._draw_days(vectors[source])  # raises InputError if too few images are left for it
            link([train[row] for row in learn], folder / "train")
            minutes = self.clock.left / 60 / 2
            checkpoint = tune(source, folder / "train", folder / "checkpoint", minutes, self.networks.device)
        except (InputError, RunError) as error:
            self._pass_over(source._replace(checkpoint="tuned"), error)
            self.images, self.evidence = before
            return
        self.images = replace(self.images, train=[train[row] for row in rest])
        self.evidence.vectors |= vectors
        tuned = Source(source.model, checkpoint=str(checkpoint.absolute()))
        means = replace(self.best.means, projection=None, cover=False)  # it has learnt from the labels
        recipes = [Recipe(tuned), Recipe(tuned, means)]
        if self._add(tuned) and any(self._step([recipe]) for recipe in recipes):
            self._climb()
        else:
            self.images, self.evidence = before

    def try_fusions(self) -> None:
        """Try to fuse each other network with the best."""
        for others in fusions(self.best, list(self.evidence.vectors) if self.evidence else []).values():
            self._step(others)

    def try_views(self) -> None:
        """Try the mean of each image's vector and its mirror image's, by every network of the best recipe.

        This comes after the fusions, which need no new vectors. So no mirror image is embedded by a network
        that is not in the recipe.
        """
        flipped = self.best.flipped()
        if self.evidence and all(map(self._add, flipped.sources)) and self._step([flipped]):
            self._climb()

    # ---- steps

    def _climb(self) -> None:
        while self._step(neighbours(self.best, self.matches), EVERY if len(self.evidence.days) > DAYS else 1):
            pass

    def _step(self, others: list[Recipe], every: int = 1) -> bool:
        """Compare recipes with the best one so far, on each `every`-th day; take the best if that pays."""
        known = set(self.evidence.vectors)  # not those that were passed over
        others = [
            other for other in dict.fromkeys(others) if other != self.best and known.issuperset(other.sources)
        ]
        if len(self.steps) == self.tests or self.clock.left < 0:
            return False
        step = self.evidence.step(self.best, others, self.tests, self.clock.end, every, self.seed)
        if not step.tries:
            return False
        self._show(step)
        if step.pays and not self._adopt(step.best):
            return False
        self.steps.append(step)
        self._write_recipe()
        return step.pays

    def _show(self, step: Step) -> None:
        log.info("%.0f s: beside %s (%.1f [%.0f, %.0f] on drawn days):",
                 self.clock.passed, step.before, step.score, *step.score_interval)  # fmt: skip
        for tried in sorted(step.tries, key=lambda tried: -tried.score):
            log.info("  %-60s %6.1f  %+6.1f [%+.1f, %+.1f]", tried.recipe, tried.score, tried.gain,
                     *tried.interval)  # fmt: skip
        verdict = "taken" if step.pays else "not shown to pay, so the plainer way stays"
        log.info("  the best of them gains %+.1f [%+.1f, %+.1f] on images that did not choose it: %s",
                 step.gain, *step.interval, verdict)  # fmt: skip

    def _adopt(self, recipe: Recipe) -> bool:
        """Rank the day's queries by a recipe, and replace the submission in one piece."""
        for source in recipe.sources:
            try:
                self._embed_day(source)
            except (InputError, RunError) as error:
                self._pass_over(source, error)
                del self.evidence.vectors[source]  # so that it is not fused with another network
                return False
        self._write_submission(self.rank(recipe))
        self.best = recipe
        log.info("%.0f s: the %s is now by %s",
                 self.clock.passed, "choice" if self.rehearsal else "submission", recipe)  # fmt: skip
        return True

    def has_day_of(self, recipe: Recipe) -> bool:
        """Return whether the day's images are embedded by all networks of a recipe."""
        return set(recipe.sources) <= set(self._of_day)

    def rank(self, recipe: Recipe) -> Ranking:
        """Rank the day's queries by a recipe. Raises as the embedding of its networks."""
        of_day = [self._embed_day(source) for source in recipe.sources]
        train = [self.evidence.vectors[source] if recipe.means.learns else None for source in recipe.sources]
        members = [(*pair, of_train) for pair, of_train in zip(of_day, train, strict=True)]
        return rank_recipe(recipe, members, self._device(recipe.source))

    # ---- vectors

    def _add(self, source: Source, share: float = 1) -> bool:
        """Embed the labelled images, unless the network fails, finds no faces, or would take too long.

        Too long is more than a `share` of the time that is left.
        """
        try:
            self.clock.require_time()
            self.networks.look_for_faces(source, self.images.gallery)
            of_day = 0 if source in self._of_day else len(self.images.queries) + len(self.images.gallery)
            self.networks.fill_cache(source, self.images.train, of_day, share)
            with quiet("retrieval.embedding", logging.WARNING):  # not that all come from the cache
                vectors = self.networks.embed(source, self.images.train, "labelled images")
        except (InputError, RunError) as error:
            self._pass_over(source, error)
            return False
        if not self.evidence:
            self._draw_days(vectors)
        self.evidence.vectors[source] = vectors
        return True

    def _guess_matches(self, vectors: Embeddings) -> None:
        gallery = self._of_day[self.best.source][1]
        if by_identity(vectors.names):
            self.matches = matches_in(gallery, vectors)
            log.info("to %s the gallery looks as if an identity had %d images in it (--matches takes another "
                     "number)", self.best.source, self.matches)  # fmt: skip
        else:
            self.matches = max(1, len(gallery.names) // len(set(map(label_of, vectors.names))))

    def _draw_days(self, vectors: Embeddings) -> None:
        if self.matches is None:
            self._guess_matches(vectors)
        gallery, identities = self._of_day[self.best.source][1], by_identity(vectors.names)
        count = DAYS_OF_PEOPLE if identities else DAYS
        days = draw_days(vectors.names, self.matches, self.images.share, count, self.seed)
        check_days(vectors.names, days)
        self.evidence = Evidence(vectors.names, days, self._device(self.best.source))
        kind = "other people than those that a fit sees" if identities else "the classes that a fit sees"
        log.info("drew %d days with %d queries and %d gallery images, of %s; the real day has %d and %d, so "
                 "its score will differ", count, len(days[0].queries), len(days[0].gallery), kind,
                 len(self.images.queries), len(gallery.names))  # fmt: skip

    def _guess_again(self) -> None:
        """Guess by the network that is now the best; draw other days if it guesses otherwise."""
        vectors, before = self.evidence.vectors, self.matches
        self._guess_matches(vectors[self.best.source])
        if self.matches != before:
            self._draw_days(vectors[self.best.source])
            self.evidence.vectors = vectors

    def _embed_day(self, source: Source) -> tuple[Embeddings, Embeddings]:
        if source not in self._of_day:
            gallery = self.networks.embed(source, self.images.gallery, "gallery images")
            self._of_day[source] = self.networks.embed(source, self.images.queries, "queries"), gallery
        return self._of_day[source]

    def _device(self, source: Source) -> str:
        return self.networks.runtime(source).backbone.device

    def _pass_over(self, source: Source, error: Exception) -> None:
        self.passed_over[str(source)] = str(error)
        if isinstance(error, NotDownloadedError):  # the report has the whole sentence
            error = f"its weights cannot be downloaded (python -m retrieval.backbones --fetch {source.model})"
        log.warning("%s is passed over: %s", source, error)

    # ---- what is kept

    def _write_submission(self, ranking: Ranking) -> None:
        """Check and write a submission; in a rehearsal, whose image names are made up, write none."""
        if not self.rehearsal:
            write_whole(self.folder / SUBMISSION, as_json(make_submission(ranking, self.group_name)))

    def arguments(self, settings: Form) -> list[str]:
        """Return the arguments of the script that runs the best recipe, saves, sends and shows."""
        given = {"recipe": self.folder / RECIPE, "group_token": settings.group_token.get_secret_value(),
                 "server_url": settings.server_url.full}  # fmt: skip
        for name in ("query_dir", "gallery_dir", "output_dir", "group_name", "device", "cache_dir"):
            given[name] = getattr(settings, name)
        arguments = [f"--{name}={value}" for name, value in given.items()]  # a group may be called -a
        return [*arguments, *(["--custom_dataset"] if settings.custom_dataset else [])]

    def _write_recipe(self) -> None:
        """Write the best recipe so far, for --recipe, and what was tried on the way to it."""
        kept = {"recipe": str(self.best), "settings": self.best.settings(self.train_dir)}
        kept |= {"passed_over": self.passed_over, "steps": [step.as_dict() for step in self.steps]}
        if self.steps:
            score, interval = self.evidence.score(self.best)
            kept |= {"score_on_drawn_days": score, "score_interval": interval, "matches": self.matches,
                     "days": len(self.evidence.days), "seed": self.seed, "tests": self.tests}  # fmt: skip
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

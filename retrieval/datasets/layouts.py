"""A folder or an archive of labelled images in; train, test/query and test/gallery without duplicates out."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from get_images import ImageFile, find_images, label_of
from retrieval.datasets.archives import unpacked
from retrieval.datasets.duplicates import find_duplicates
from retrieval.datasets.readable import readable_images
from retrieval.datasets.sides import GALLERY, QUERY, TRAIN, find_sides, side_of, without_common_folders
from retrieval.errors import InputError, RunError
from retrieval.files import as_json, naming

QUERIES = 0.4  # share of a class's test images, as in the SimCLR-SupCon study; the others are its gallery
PLAN = "split.json"
INTEL = ["buildings", "forest", "glacier", "mountain", "sea", "street"]
INTEL_ON_KAGGLE = "puneet6060/intel-image-classification"

Places = dict[str, ImageFile]  # a name in the new folder → the image that goes there

log = logging.getLogger("retrieval.datasets")


# ---- the data sets --------------------------------------------------------------------------------


def lay_out_intel(out: Path, archive: Path | None, seed: int = 0, keep_duplicates: bool = False) -> None:
    """Lay out the Intel scenes: seg_train to train, 40 % of each class of seg_test to query, 60 % to gallery.

    `archive` is the zip of Kaggle or the folder it was unpacked to; with None kagglehub downloads it. Raises
    InputError for another data set, RunError if the download fails, and the errors of lay_out_split.
    """
    _refuse_full(out)
    source = archive or _download_intel()
    with unpacked(source, out) as folder:
        files, unreadable = readable_images(folder, source)
        train, test = _below(files, "seg_train"), _below(files, "seg_test")
        for part, images in (("seg_train", train), ("seg_test", test)):
            classes = sorted({label_of(image.name) or "none" for image in images})
            if classes != INTEL:
                raise InputError(
                    f"{source} is not the Intel set: {part} holds {', '.join(classes) or 'nothing'}, "
                    f"and not {', '.join(INTEL)} (`python -m retrieval.datasets split` lays out other sets)"
                )
        places = {f"{TRAIN}/{image.name}": image for image in train} | _divided(test, 0.0, seed)
        _lay_out(out, places, source, {"seed": seed} | unreadable, keep_duplicates)


def lay_out_split(
    out: Path, source: Path, train: float = 0.7, seed: int = 0, keep_duplicates: bool = False
) -> None:
    """Lay out a folder or an archive with a folder per class: a share of each to train, the rest 40 : 60.

    A class too small for a query and a gallery image goes to train as a whole, with a warning. Raises
    InputError for another layout, or if all classes are that small, and FileExistsError if `out` holds a data
    set already.
    """
    _refuse_full(out)
    with unpacked(source, out) as folder:
        files, unreadable = readable_images(folder, source)
        files = without_common_folders(files, least=1)
        _check_classes(files, source)
        _check_sizes(files, source, train)
        notes = {"seed": seed, "train": train} | unreadable
        _lay_out(out, _divided(files, train, seed), source, notes, keep_duplicates)


def lay_out_competition(out: Path, archive: Path, keep_duplicates: bool = False) -> None:
    """Lay out the organisers' archive: its train, query and gallery folders, as find_sides finds them.

    All test images stay, since the server asks for them; only train loses its duplicates of test images.
    Raises InputError if the folders are missing, and the errors of lay_out_split.
    """
    _refuse_full(out)
    with unpacked(archive, out) as folder:
        files, unreadable = readable_images(folder, archive)
        places = {f"{side}/{image.name}": image
                  for side, images in find_sides(files, archive).items() for image in images}  # fmt: skip
        _lay_out(out, places, archive, unreadable, keep_duplicates, all_of_the_test=True)


def lay_out_sample(out: Path) -> None:
    """Write scikit-learn's 1797 handwritten digits (8 × 8 px, ten classes) as PNG files below `out`.

    Each class gives 20 images to test/query, 80 to test/gallery and the rest to train, no image twice.
    The folder appears whole or not at all. A folder that already holds the sample is left as it is. Raises
    FileExistsError if the folder holds anything else.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    random = np.random.default_rng(0)
    names: dict[int, str] = {}  # a row of the digits → the name of its file
    for label in np.unique(digits.target):
        rows = random.permutation(np.flatnonzero(digits.target == label))
        for place, part in ((QUERY, rows[:20]), (GALLERY, rows[20:100]), (TRAIN, rows[100:])):
            names |= {row: f"{place}/{label}/digit_{row:04d}.png" for row in part}
    if out.exists() and any(out.iterdir()):
        there = {image.name for image in find_images(out)}
        if there != set(names.values()):
            raise FileExistsError(f"{out} holds something else than this sample: give another --out")
        log.info("%d images already lie in %s", len(names), out)
        return
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)  # the data set counts ink from 0 to 16
    with _unfinished(out) as folder:
        for row, name in names.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey[row]).save(folder / name)
    log.info("wrote %d images to %s", len(names), out)


def _download_intel() -> Path:
    try:
        import kagglehub
    except ModuleNotFoundError:
        raise InputError(
            f"download https://www.kaggle.com/datasets/{INTEL_ON_KAGGLE} in a browser, and give the zip by "
            "--archive; or `pip install kagglehub`, which then downloads it"
        ) from None
    try:
        return Path(kagglehub.dataset_download(INTEL_ON_KAGGLE))
    except Exception as error:  # kagglehub raises errors of any class
        raise RunError(
            f"kagglehub cannot download {INTEL_ON_KAGGLE} ({error}): download it in a browser, and give the "
            "zip by --archive"
        ) from error


# ---- what a source must hold -----------------------------------------------------------------------


def _check_classes(files: list[ImageFile], source: Path) -> None:
    """Raise InputError unless the images lie in several folders that may be classes."""
    bare = [image.name for image in files if label_of(image.name) is None]
    if bare:
        raise InputError(
            f"{len(bare)} images of {source}, such as {bare[0]}, lie in no class folder: lay them out as "
            f"{source.name}/<class>/x.jpg"
        )
    classes = sorted({label_of(image.name) for image in files})
    if len(classes) < 2:
        raise InputError(
            f"all images of {source} lie in one class folder, {classes[0]}: give what holds several"
        )
    parts = [name for name in classes if side_of(name) or re.fullmatch("(?i)(seg_)?(test|val|valid.*)", name)]
    if len(parts) > 1:
        command = f"python -m retrieval.datasets competition --archive {shlex.quote(str(source))}"
        raise InputError(
            f"{source} is already divided into {', '.join(parts)}: give one of these folders, or, if they "
            f"are train, query and gallery, use `{command}`"
        )


def _check_sizes(files: list[ImageFile], source: Path, train: float) -> None:
    """Warn of classes that are too small for a test; raise InputError if all are."""
    sizes = Counter(label_of(image.name) for image in files)
    small = [label for label, count in sizes.items() if not _tested(count, train)]
    if len(small) == len(sizes):
        largest = max(sizes.values())
        cure = f"give --train {10 * (largest - 2) // largest / 10:g}" if largest > 1 else "give more images"
        raise InputError(
            f"no class of {source} is large enough for a query and a gallery image beside --train {train:g}: "
            f"the largest, {sizes.most_common(1)[0][0]}, has {largest}: {cure}"
        )
    if small:
        log.warning("%d of %d classes are too small for a query and a gallery image beside --train %g, and "
                    "go to train as a whole: %s%s", len(small), len(sizes), train, ", ".join(small[:5]),
                    ", …" * (len(small) > 5))  # fmt: skip


# ---- the places of the images ---------------------------------------------------------------------


def _below(files: list[ImageFile], part: str) -> list[ImageFile]:
    """Return the images below the innermost folder called `part`, with names that begin there."""
    return [ImageFile(f"/{image.name}".rpartition(f"/{part}/")[2], image.path)
            for image in files if f"/{part}/" in f"/{image.name}"]  # fmt: skip


def _tested(count: int, train: float) -> int:
    """Return how many images of a class are for the test: at least two, or none."""
    tested = count - round(train * count)
    return tested if tested > 1 else 0


def _divided(files: list[ImageFile], train: float, seed: int) -> Places:
    """Divide each class: a share to train, 40 % of the rest to the queries and 60 % to the gallery."""
    random = np.random.default_rng(seed)
    of_class: dict[str | None, list[ImageFile]] = {}
    for image in sorted(files, key=lambda image: image.name):
        of_class.setdefault(label_of(image.name), []).append(image)
    places: Places = {}
    for members in of_class.values():
        members = [members[row] for row in random.permutation(len(members))]
        tested = _tested(len(members), train)
        queries = min(max(1, round(QUERIES * tested)), tested)
        parts = (QUERY, members[:queries]), (GALLERY, members[queries:tested]), (TRAIN, members[tested:])
        places |= {f"{place}/{image.name}": image for place, part in parts for image in part}
    return places


def _lay_out(
    out: Path,
    places: Places,
    source: Path,
    notes: dict,
    keep_duplicates: bool,
    all_of_the_test: bool = False,
) -> None:
    """Write the images to their places, and split.json; leave out images that an earlier part has too."""
    sides = {side: {name: image.path for name, image in sorted(places.items()) if name.startswith(f"{side}/")}
             for side in (QUERY, GALLERY, TRAIN)}  # fmt: skip
    duplicates = {} if keep_duplicates else find_duplicates(list(sides.values()))
    left_out = {name: asdict(duplicate) for name, duplicate in duplicates.items()
                if not all_of_the_test or name in sides[TRAIN]}  # fmt: skip
    for name, duplicate in list(duplicates.items())[:5]:
        stays = "" if name in left_out else ", and is kept: the server asks for it"
        log.warning("%s has %s as %s%s", name, duplicate.because, duplicate.of, stays)
    if duplicates:
        log.warning("%d images are duplicates of images in another part, and %d of them are left out "
                    "(--keep_duplicates keeps them)", len(duplicates), len(left_out))  # fmt: skip
    kept = {name: image for name, image in sorted(places.items()) if name not in left_out}
    counts = {side: sum(name not in left_out for name in names) for side, names in sides.items()}
    if not (counts[QUERY] and counts[GALLERY]):
        raise InputError(
            f"{source} has no gallery image that is not a duplicate of a query: give other images, or "
            "--keep_duplicates"
        )
    plan = {"source": source.name, **notes, "counts": counts, "left_out": left_out,
            "files": {name: image.name for name, image in kept.items()}}  # fmt: skip
    with _unfinished(out) as folder:
        for name, image in kept.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(image.path, folder / name)
        (folder / PLAN).write_bytes(as_json(plan, indent=1))
    log.info("laid out %s in %s; %s lists where each image went",
             ", ".join(f"{count} {side}" for side, count in counts.items()), out, PLAN)  # fmt: skip


# ---- write ----------------------------------------------------------------------------------------


def _refuse_full(out: Path) -> None:
    """Raise FileExistsError if the folder holds one of the names that are laid out."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a folder as --out")
    there = [name for name in ("train", "test", PLAN) if os.path.lexists(out / name)]
    if there:
        what = " and ".join(there)
        raise FileExistsError(f"{out} holds {what} already: give another --out, or remove what is there")


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Yield a folder to write into. Its content moves to `out` at the end; after an error it is removed."""
    out = out.absolute()
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        with naming(out):
            yield unfinished
        out.mkdir(parents=True, exist_ok=True)
        for part in unfinished.iterdir():
            part.rename(out / part.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _link(file: Path, path: Path) -> None:
    """Make a hard link to a file, or a copy where the disk allows no link."""
    try:
        os.link(os.path.realpath(file), path)
    except OSError:
        shutil.copyfile(file, path)

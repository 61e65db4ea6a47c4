"""The images of a folder in; those of train, query and gallery, whatever the names of their folders, out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from get_images import ImageFile, label_of
from retrieval.errors import InputError

TRAIN, QUERY, GALLERY = "train", "test/query", "test/gallery"
SIDES = (TRAIN, QUERY, GALLERY)
WORDS = {
    TRAIN: ("train", "training"),
    QUERY: ("query", "queries", "probe", "probes"),
    GALLERY: ("gallery", "galleries", "database", "db", "index", "reference", "references"),
}

log = logging.getLogger("retrieval.datasets")


def side_of(folder: str) -> str | None:
    """Return the side that the name of a folder means, or None.

    >>> side_of("Training"), side_of("2_query_images"), side_of("DB"), side_of("forest")
    ('train', 'test/query', 'test/gallery', None)
    """
    letters = re.sub("[^a-z]", "", folder.lower())
    word = re.sub("^(seg|test)|(data|set|images?|imgs?)+$", "", letters)
    return next((side for side in SIDES if word in WORDS[side]), None)


def find_sides(files: list[ImageFile], source: Path) -> dict[str, list[ImageFile]]:
    """Return the images of each side; their names begin below its folder. Train may have none.

    A side's folder may have any of WORDS as its name, in any letter case, at any depth. Of several, that in a
    folder `test` wins, then the least deep one. Logs what is taken for what, and warns of other images.

    Raises InputError if there is no query or no gallery folder, or two of equal rank.
    """
    folders: dict[str, list[ImageFile]] = {}
    for image in without_common_folders(files):
        folder, name = _split_at_side(image.name)
        folders.setdefault(folder, []).append(ImageFile(name, image.path))
    chosen = {side: _choose(side, [folder for folder in folders if side_of(_last(folder)) == side], source)
              for side in SIDES}  # fmt: skip
    missing = [side for side in (QUERY, GALLERY) if not chosen[side]]
    if missing:
        raise InputError(
            f"{source} holds no images in {' and '.join(f'{side}/' for side in missing)}: they lie in "
            f"{_counted(files)}. Name the folders train/, test/query/ and test/gallery/ (or training, "
            "queries, probe, database, index), and give the folder around them"
        )
    _log_choice(chosen, folders, source)
    return {side: _without_repeated_folder(side, folders.get(folder, [])) for side, folder in chosen.items()}


def inside(files: list[ImageFile]) -> list[ImageFile]:
    """Return the images below the first folders of their names, with names that begin there."""
    return [ImageFile(image.name.partition("/")[2], image.path) for image in files if "/" in image.name]


def without_common_folders(files: list[ImageFile], least: int = 0) -> list[ImageFile]:
    """Remove the folders around all images from their names, as long as each keeps `least` folders."""
    while len({label_of(image.name) for image in files}) == 1 and all(
        image.name.count("/") > least for image in files
    ):
        files = inside(files)
    return files


def _split_at_side(name: str) -> tuple[str, str]:
    """Return the path of the outermost folder that means a side, and the name below it; or '' and the name.

    >>> _split_at_side("day/Queries/ann/1.jpg"), _split_at_side("notes/1.jpg")
    (('day/Queries', 'ann/1.jpg'), ('', 'notes/1.jpg'))
    """
    *folders, file = name.split("/")
    for depth, folder in enumerate(folders, start=1):
        if side_of(folder):
            return "/".join(folders[:depth]), "/".join([*folders[depth:], file])
    return "", name


def _last(folder: str) -> str:
    return folder.rpartition("/")[2]


def _choose(side: str, folders: list[str], source: Path) -> str | None:
    """Return the folder of a side, or None. Raises InputError if two are equally likely."""

    def _rank(folder: str) -> tuple[bool, int]:
        above = folder.lower().split("/")[:-1]
        return side != TRAIN and above[-1:] != ["test"], len(above)

    best = [folder for folder in folders if _rank(folder) == min(map(_rank, folders))]
    if len(best) > 1:
        raise InputError(
            f"{source} holds {len(best)} folders that may be {side}/, {', '.join(sorted(best)[:5])}: unpack "
            "it if need be, remove or rename all but one, and give the folder around them"
        )
    return best[0] if best else None


def _without_repeated_folder(side: str, images: list[ImageFile]) -> list[ImageFile]:
    """Remove a folder around all images of a side that is called like it, as in query/query/1.jpg."""
    labels = {label_of(image.name) or "" for image in images}
    return inside(images) if len(labels) == 1 and side_of(labels.pop()) == side else images


def _log_choice(chosen: dict[str, str | None], folders: dict[str, list[ImageFile]], source: Path) -> None:
    named = [f"{folder}/ for {side}/" for side, folder in chosen.items()
             if folder and not f"/{side}".endswith(f"/{folder}")]  # fmt: skip
    if named:
        log.info("%s: took %s", source, ", ".join(named))
    if not chosen[TRAIN]:
        log.info("%s holds no train/: only the test folders are laid out", source)
    others = [
        ImageFile(f"{folder}/{image.name}".lstrip("/"), image.path)
        for folder, images in folders.items()
        if folder not in chosen.values()
        for image in images
    ]
    if others:
        log.warning("%d images of %s lie in no such folder and are left out: %s",
                    len(others), source, _counted(others))  # fmt: skip


def _counted(files: list[ImageFile]) -> str:
    """Return the folders with most images, at most five, each down to a side or two folders deep."""
    counts = Counter(
        _split_at_side(image.name)[0] or "/".join(image.name.split("/")[:-1][:2]) or "no folder"
        for image in files
    )
    shown = ", ".join(f"{folder} ({count})" for folder, count in counts.most_common(5))
    return f"{shown}{' …' * (len(counts) > 5)}"

"""The installed packages and the table of networks in; docs/licences.md, their licences, out.

python -m docs.licences

It runs in the environment of `make`. A test compares the page with tests/requirements.lock and the networks.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from retrieval.backbones.zoo import PRETRAINED

ROOT = Path(__file__).parent.parent
HEAD = """# Licences

This project is under the [MIT licence](../LICENSE). What it installs and downloads has licences of its own,
as each package and publisher states them. `python -m docs.licences` writes this page.

## Weights

{weights}

The face detectors: `mtcnn` is MIT (in facenet-pytorch), `dlib`'s is public domain, `scrfd` and `scrfd:small`
are InsightFace's, for research only, and `yunet` is MIT.

## Packages

All packages of `tests/requirements.lock` on Linux: those that a run needs, and those for the tests.
Other systems install fewer or a few more, such as `colorama` (BSD) on Windows. Versions stand in the lock.

{packages}
"""
# One name for each of these licences.
NAMES = {"Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD": "BSD License"}


def page() -> str:
    """Return the text of docs/licences.md."""
    weights = ["| network | licence |", "|---|---|"]
    weights += [f"| `{name}` | {row.licence} |" for name, row in PRETRAINED.items()]
    packages: dict[str, list[str]] = {}  # by their licence
    for name in locked_packages():
        with suppress(PackageNotFoundError):  # of another system
            packages.setdefault(licence_of(metadata(name)), []).append(name)
    rows = ["| licence | packages |", "|---|---|"]
    rows += [
        f"| {licence} | {', '.join(names)} |" for licence, names in sorted(packages.items(), key=_by_size)
    ]
    return HEAD.format(weights="\n".join(weights), packages="\n".join(rows))


def locked_packages() -> list[str]:
    """Return the names of the packages in the tests' lock, which holds those of a run too."""
    lock = (ROOT / "tests" / "requirements.lock").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"^([a-z0-9._-]+)==", lock, re.M)))


def licence_of(package: PackageMetadata) -> str:
    """Return the licence that a package states: an SPDX expression, its classifiers, or a few words."""
    classifiers = [
        line.split(" :: ")[-1] for line in package.get_all("Classifier", []) if "License ::" in line
    ]
    words = (package.get("License") or "").partition("\n")[0]
    stated = package.get("License-Expression") or "; ".join(classifiers) or words
    return NAMES.get(stated, stated).replace("UNKNOWN", "") or "not stated"


def _by_size(row: tuple[str, list[str]]) -> tuple[int, str]:
    return -len(row[1]), row[0]


if __name__ == "__main__":
    (ROOT / "docs" / "licences.md").write_text(page(), encoding="utf-8")

"""docs/guarantees.md, docs/licences.md and the locks, beside what they speak of."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs import guarantees, licences

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", guarantees.PROMISES)
def test_every_campaign_has_its_row_and_its_last_run_had_no_failure(name):
    (line,) = [line for line in PAGE.splitlines() if f"| `{name}`: " in line]
    result = line.split(" | ")[2]
    assert line == guarantees.row(name, result)
    assert re.fullmatch(r"[1-9]\d* cases, 0 failed \(seed \d+, 20\d\d-\d\d-\d\d\)", result)
    assert find_spec(f"tests.torture.{name}"), f"tests/torture/{name}.py is missing"


def test_a_new_result_replaces_the_last_one_of_its_campaign_alone():
    changed = guarantees.page(PAGE, {"cache": "2 cases, 1 failed (seed 5, 2030-01-02)"}).splitlines()
    new = [line for line, old in zip(changed, PAGE.splitlines(), strict=True) if line != old]
    assert new == [guarantees.row("cache", "2 cases, 1 failed (seed 5, 2030-01-02)")]


def test_every_test_that_a_promise_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 20
    for file, test in named:
        found = (f"def {test}(" if test else "def ") in (ROOT / file).read_text(encoding="utf-8")
        assert found, f"{file} has no {test}"


RUNS, TESTS = "requirements.txt", "tests/requirements.txt"


def locked(name):
    """The packages of a lock, with their digests: a name and a version, as NAME==VERSION → its lines."""
    lock = (ROOT / name).read_text(encoding="utf-8")
    packages = re.split(r"^(?=[a-z0-9])", lock, flags=re.M)[1:]
    return {package.split()[0]: package for package in packages}


@pytest.mark.parametrize(
    ("lock", "files"), [("requirements.lock", [RUNS]), ("tests/requirements.lock", [RUNS, TESTS])]
)
def test_a_lock_holds_the_versions_of_its_requirements_and_a_digest_of_each_file(lock, files):
    packages = locked(lock)
    assert len(packages) > 90
    assert [package for package in packages.values() if "--hash=sha256:" not in package] == []
    for file in files:
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / file).read_text(), re.M):
            pinned = f"{name.lower().replace('_', '-')}=={version}"
            assert pinned in packages, f"{file} has {pinned}: write {lock} anew"


def test_the_tests_run_on_the_packages_that_users_install():
    runs, tests = locked("requirements.lock"), locked("tests/requirements.lock")
    assert runs.items() <= tests.items()
    assert not [package for package in runs if package.startswith(("pytest", "ruff", "wandb", "selenium"))]


def test_the_page_of_licences_names_every_locked_package_and_every_network():
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w.-]+", page.partition("## Packages")[2]))
    elsewhere = {"cffi", "colorama", "httpx2-jsfetch", "pycparser"}  # other systems'
    assert set(licences.locked_packages()) - listed <= elsewhere
    assert licences.page().partition("## Packages")[0] == page.partition("## Packages")[0]

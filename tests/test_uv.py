"""`uv run model_not_tuned.py …` from a clone, without a download: on the packages that are there already."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

UV = shutil.which("uv")
SCRIPTS = ("model_not_tuned.py", "fine_tuning.py", "model_fine_tuned.py", "choose.py")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not UV, reason="uv is not on the PATH: `pip install uv`")]


@pytest.fixture
def clone(tmp_path):
    """The project, with the packages of whoever runs the tests as its environment."""
    for name in (*SCRIPTS, "get_images.py", "retrieval", "supcon", "pyproject.toml", "requirements.txt"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    return tmp_path


def uv(*arguments, cwd):
    """Run uv offline, with an empty cache: what needs a download fails."""
    env = os.environ | {"UV_CACHE_DIR": str(cwd / "uv"), "VIRTUAL_ENV": sys.prefix, "UV_OFFLINE": "1"}
    return subprocess.run([UV, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_runs_each_script(script, clone):
    ended = uv("run", "--active", "--no-sync", script, "--help", cwd=clone)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: {script} [flags]" in ended.stdout


def install(clone):
    """What uv would install before it runs a script: setuptools reads the requirements, as for `uv run`."""
    arguments = ("--dry-run", "--no-build-isolation", "--python", sys.executable, "--editable", ".")
    return uv("pip", "install", *arguments, cwd=clone)


def test_uv_installs_the_packages_of_requirements_txt(clone):
    ended = install(clone)
    assert ended.returncode == 0, ended.stderr
    assert "Would install 1 package" in ended.stderr  # the project itself: all others are there
    with open(clone / "requirements.txt", "a") as file:
        file.write("nowhere-to-be-found==1.0\n")
    ended = install(clone)
    assert ended.returncode != 0
    assert "nowhere-to-be-found" in ended.stderr

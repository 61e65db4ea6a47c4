"""examples/competition.ipynb: its cells, run from top to bottom on the digits, as a kernel runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise

import pytest
from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "competition.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PARTS = ("get_images.py", "model_not_tuned.py", "retrieval", "supcon", "requirements.txt")

# What a kernel brings: here an image only has to be one.
DISPLAY = """
from PIL.Image import open as Image
def display(image): image.load(); print(f"shows {image.width} x {image.height} pixels")
"""


def as_python(cell):
    """The cell with its !lines as calls; unlike in a notebook, a command that fails ends the run."""
    call = "__import__('subprocess').run(f{!r}, shell=True, check=True)"
    return re.sub(r"^!(.*)$", lambda line: call.format(line[1]), cell, flags=re.M)


def run_cells(cells, folder, **environment):
    """Run cells one after the other in one process, in `folder`."""
    (folder / "IPython").mkdir(exist_ok=True)
    (folder / "IPython" / "__init__.py").write_text("")
    (folder / "IPython" / "display.py").write_text(DISPLAY)
    program = "".join(
        f"exec(compile({as_python(cell)!r}, 'cell {number}', 'exec'))\nsys.stdout.flush()\n"
        for number, cell in enumerate(cells, 1)
    )
    (folder / "cells.py").write_text(f"import sys\nsys.path[:0] = ['', {str(folder)!r}]\n{program}")
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": ""} | environment
    command = [sys.executable, "cells.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def copy_project(folder):
    folder.mkdir(exist_ok=True)
    for name in PARTS:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_the_notebook_runs_from_top_to_bottom_on_the_digits(tmp_path):
    copy_project(tmp_path)
    ended = run_cells(CELLS, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "installing" not in ended.stdout
    own = float(re.search(r"^([\d.]+) of 1000, and [\d.]+ without the mean$", ended.stdout, re.M)[1])
    assert own == pytest.approx(887, abs=10)  # as `make demo`
    assert f"the server's score: {own:g} of 1000" in ended.stdout
    assert re.search(r"^shows \d+ x \d+ pixels$", ended.stdout, re.M)
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert {"notebook/report.html", "submitted/submission.json"} <= set(archive.namelist())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["archive", "archive with a folder", "repository"])
def test_the_first_cell_brings_the_project_and_goes_into_it(way, tmp_path):
    project, there = tmp_path / "a" / "b", tmp_path / "notebook"
    project.parent.mkdir()
    there.mkdir()
    copy_project(project)
    cell = CELLS[0]
    if way == "repository":
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", project]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            subprocess.run([*git, *command], check=True)
        cell = cell.replace('REPOSITORY = ""', f'REPOSITORY = "{project.as_uri()}"')
    else:
        shutil.make_archive(there / "project", "zip", project.parent if "folder" in way else project)
    ended = run_cells([cell, "print(os.getcwd(), os.path.exists('model_not_tuned.py'))"], there)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{there / 'project'}{'/b' if 'folder' in way else ''} True"


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["nowhere==1.0", "No_Where.2==1.0", "nowhere==1.0  # why"])
def test_only_missing_packages_are_installed(missing, tmp_path):
    copy_project(tmp_path)
    with open(tmp_path / "requirements.txt", "a") as file:
        file.write(f"{missing}\n")
    instead = "subprocess.run = lambda command, check: print('runs', *command[1:])"
    cell = CELLS[0].replace("REPOSITORY =", f"{instead}\nREPOSITORY =")
    ended = run_cells([cell], tmp_path)
    assert ended.returncode == 0, ended.stderr
    package = missing.partition(" ")[0]
    assert ended.stdout == f"installing {package}\nruns -m pip install --quiet {package}\n"


def test_the_notebook_is_kept_without_outputs_and_its_cells_are_short():
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs")
        assert len(cell["source"]) <= 30
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert ("code", "code") not in set(pairwise(kinds))  # words between them
    for name in re.findall(r"`(docs/[\w.]+)`", str(NOTEBOOK)):
        assert (ROOT / name).is_file()

"""The walls of the house: who may import whom, and how long things may be."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"model_not_tuned", "fine_tuning", "model_fine_tuned", "choose"}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("retrieval/**/*.py"), *ROOT.glob("supcon/*.py")])
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_of(path) for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, at the top or anywhere in a function."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level], "relative import"
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_imports_point_down_and_in_no_circle():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # the layers: pyproject.toml
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_only_choose_imports_scripts_and_the_ground_floor_imports_nothing_of_ours(path):
    above = {"get_images": OURS, "choose": {"choose"}}.get(module_of(path), SCRIPTS)
    assert not imports_of(path) & above


def test_only_the_console_exits():
    assert [module_of(path) for path in SOURCES if "SystemExit" in path.read_text()] == ["retrieval.console"]


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS, *TESTS], ids=module_of)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        assert function.end_lineno - function.lineno < 60, f"{function.name} is too long"


@pytest.mark.parametrize("script", sorted(SCRIPTS & OURS))
def test_main_is_a_short_story_without_loops(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    main = next(node for node in tree.body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno <= 30
    assert not [node for node in ast.walk(main) if isinstance(node, ast.For | ast.While | ast.Try)]
    assert f"python {script}.py" in ast.get_docstring(tree)


def test_public_things_have_docstrings():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                told = (
                    "main",
                    "read",
                    "increment",
                    "forward",
                    "network",
                    "load",
                    "load_all",
                )  # by what they are in
                documented = node.name in told or len(node.body) == 1 or ast.get_docstring(node)
                assert documented, f"{path.name}: {node.name}"


def test_the_readme_is_short_and_every_setting_is_described():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    listed = re.findall(r"^\| `--.*", (ROOT / "docs" / "settings.md").read_text(), re.M)
    for script in sorted(SCRIPTS & OURS):
        for name in import_module(script).Settings.model_fields:
            assert any(f"`--{name}`" in row for row in listed), f"docs/settings.md does not list --{name}"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).is_file()

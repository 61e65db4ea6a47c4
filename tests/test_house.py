"""The walls of the house: who may import whom, and how long things may be."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"model_not_tuned", "fine_tuning", "model_fine_tuned"}
# Rooms of retrieval/ that import nothing above them, and what lies below them in the same room of the house.
BELOW = {
    "retrieval.words": set(),
    "retrieval.settings": {"retrieval.words"},
    "retrieval.ranking": set(),
    "retrieval.neighbours": {"retrieval.settings", "retrieval.ranking"},
    "retrieval.metrics": {"retrieval.settings", "retrieval.ranking"},
    "retrieval": set(),
    "retrieval.ledger": {"retrieval.settings", "retrieval.ranking"},
    "retrieval.sending": {"retrieval.ledger"},
    "retrieval.submission": {"retrieval.settings", "retrieval.ledger", "retrieval.sending"},
    "retrieval.transforms": set(),
    "retrieval.faces": {"retrieval.transforms", "retrieval.weights"},
    "retrieval.readers": {"retrieval.settings", "retrieval.processes", "retrieval.transforms"},
    "retrieval.folding": set(),
    "retrieval.dlib_network": {"retrieval.settings"},
    "retrieval.weights": {"retrieval.settings"},
    "retrieval.model_zoo": {
        "retrieval.settings",
        "retrieval.transforms",
        "retrieval.faces",
        "retrieval.dlib_network",
        "retrieval.weights",
    },
    "retrieval.timm_zoo": {
        "retrieval.settings",
        "retrieval.transforms",
        "retrieval.weights",
        "retrieval.model_zoo",
    },
    "retrieval.backbones": {
        "retrieval.settings",
        "retrieval.transforms",
        "retrieval.faces",
        "retrieval.weights",
        "retrieval.model_zoo",
        "retrieval.processes",
        "retrieval.timm_zoo",
    },
    "retrieval.processes": {"retrieval.settings"},
    "retrieval.space": {"retrieval.settings"},
    "retrieval.onnx_network": {"retrieval.backbones"},
    "retrieval.engines": {
        "retrieval.settings",
        "retrieval.backbones",
        "retrieval.onnx_network",
        "retrieval.ledger",
        "retrieval.processes",
        "retrieval.weights",
    },
    "retrieval.embedding": {
        "retrieval.settings",
        "retrieval.ranking",
        "retrieval.cache",
        "retrieval.engines",
        "retrieval.readers",
        "retrieval.space",
        "retrieval.thumbnails",
        "retrieval.transforms",
    },
    "retrieval.shards": {
        "retrieval.cache",
        "retrieval.embedding",
        "retrieval.engines",
        "retrieval.ledger",
        "retrieval.processes",
        "retrieval.ranking",
        "retrieval.settings",
    },
    "retrieval.cache": {"retrieval.settings", "retrieval.transforms"},
    "retrieval.thumbnails": {"retrieval.ledger"},
    "retrieval.figures": {"retrieval.ledger", "retrieval.thumbnails"},
    "retrieval.page": set(),
    "retrieval.comparison": {
        "retrieval.settings",
        "retrieval.ledger",
        "retrieval.metrics",
        "retrieval.page",
    },
    "retrieval.report": {
        "retrieval.settings",
        "retrieval.backbones",
        "retrieval.comparison",
        "retrieval.figures",
        "retrieval.ledger",
        "retrieval.metrics",
        "retrieval.page",
        "retrieval.ranking",
        "retrieval.thumbnails",
        "retrieval.weights",
    },
    "retrieval.tracking": {"retrieval.settings"},
    "retrieval.judging": {"retrieval.settings", "retrieval.metrics"},
    "retrieval.database": {"retrieval.settings"},
    "retrieval.leaderboard": {"retrieval.database", "retrieval.judging"},
    "retrieval.api": {
        "retrieval.database",
        "retrieval.judging",
        "retrieval.leaderboard",
        "retrieval.page",
        "retrieval.sending",
    },
    "retrieval.server": {"retrieval.settings", "retrieval.api", "retrieval.database", "retrieval.judging"},
    "retrieval.archives": {"retrieval.settings"},
    "retrieval.duplicates": set(),
    "retrieval.layout": {
        "retrieval.archives",
        "retrieval.duplicates",
        "retrieval.ledger",
        "retrieval.settings",
    },
    "retrieval.job": {
        "retrieval.backbones",
        "retrieval.cache",
        "retrieval.embedding",
        "retrieval.engines",
        "retrieval.ledger",
        "retrieval.metrics",
        "retrieval.neighbours",
        "retrieval.processes",
        "retrieval.ranking",
        "retrieval.report",
        "retrieval.sending",
        "retrieval.shards",
        "retrieval.server",
        "retrieval.settings",
        "retrieval.judging",
        "retrieval.submission",
        "retrieval.tracking",
    },
    "retrieval.fine_tuned": {
        "retrieval.settings",
        "retrieval.transforms",
        "retrieval.faces",
        "retrieval.weights",
        "retrieval.folding",
        "retrieval.ledger",
        "retrieval.backbones",
        "retrieval.timm_zoo",
    },
}
# … and of supcon/, all of which lie above retrieval/.
BELOW |= {
    "supcon": set(),
    "supcon.losses": set(),
    "supcon.views": set(),
    "supcon.layers": set(),
    "supcon.gather": set(),
    "supcon.start": set(),
    "supcon.heads": {"supcon.losses"},
    "supcon.variants": {"supcon.heads"},
    "supcon.batches": {"supcon.variants"},
    "supcon.checkpoints": {"supcon.batches"},
    "supcon.validation": {"supcon.batches", "supcon.views"},
    "supcon.state": {
        "supcon.batches",
        "supcon.checkpoints",
        "supcon.gather",
        "supcon.layers",
        "supcon.start",
        "supcon.validation",
        "supcon.variants",
    },
    "supcon.steps": {"supcon.gather", "supcon.heads", "supcon.state", "supcon.views"},
    "supcon.training": {
        "supcon.batches",
        "supcon.checkpoints",
        "supcon.gather",
        "supcon.layers",
        "supcon.state",
        "supcon.steps",
        "supcon.validation",
    },
}
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("retrieval/*.py"), *ROOT.glob("supcon/*.py")])
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_of(path) for path in SOURCES}


def imports_of(source: str) -> set[str]:
    """Our modules that this source imports, at the top or anywhere in a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in OURS and name not in ("retrieval", "supcon")}
    return found


def allowed(module: str, imported: str) -> bool:
    """The arrows: scripts → supcon → retrieval → get_images, and inside retrieval only downwards."""
    if imported in SCRIPTS or imported == module:
        return False
    if module in SCRIPTS:
        return True
    if module == "get_images":
        return imported in ("retrieval.settings", "retrieval.layout")
    if module == "supcon.losses":
        return False
    if module.startswith("supcon") and not imported.startswith("supcon"):
        return True
    if imported == "get_images":
        return module not in ("retrieval.settings", "retrieval.ranking")
    return imported in BELOW[module]


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    wrong = {imported for imported in imports_of(path.read_text()) if not allowed(module, imported)}
    assert not wrong, f"{module} imports {wrong}"


def test_the_images_room_imports_ours_only_for_its_command_line():
    tree = ast.parse((ROOT / "get_images.py").read_text())
    outside_main = [node for node in tree.body if getattr(node, "name", "") != "main"]
    assert not any(imports_of(ast.unparse(node)) for node in outside_main)


def test_this_test_would_see_a_wrong_arrow():
    assert imports_of("def f():\n    from retrieval import embedding") == {"retrieval.embedding"}
    assert imports_of("import model_not_tuned as m") == {"model_not_tuned"}
    assert not allowed("retrieval.ranking", "retrieval.embedding")
    assert not allowed("retrieval.metrics", "model_not_tuned")
    assert not allowed("get_images", "retrieval.embedding")
    assert not allowed("model_fine_tuned", "model_not_tuned")
    assert not allowed("retrieval.fine_tuned", "supcon.heads")
    assert not allowed("supcon.losses", "retrieval.settings")
    assert not allowed("supcon.batches", "supcon.training")


def test_no_two_rooms_lie_below_each_other():
    order, remaining = [], dict(BELOW)
    while remaining:
        ready = [room for room, below in remaining.items() if below <= set(order)]
        assert ready, f"a circle among {set(remaining)}"
        order += ready
        remaining = {room: below for room, below in remaining.items() if room not in ready}


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS, *sorted(ROOT.glob("tests/*.py"))], ids=module_of)
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


def test_the_readme_is_short_and_maps_every_file_and_every_setting_is_described():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for path in SOURCES:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.name}", text), f"README.md does not say what {path.name} is for"
    listed = re.findall(r"^\| `--.*", (ROOT / "docs" / "settings.md").read_text(), re.M)
    for script in sorted(SCRIPTS & OURS):
        for name in import_module(script).Settings.model_fields:
            assert any(f"`--{name}`" in row for row in listed), f"docs/settings.md does not list --{name}"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).is_file()

"""Every command and link of the README and of the pages below docs/, run and followed as a reader does."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, Server, answer, run_here
from hub import lay_in_hub
from huggingface_hub import constants

from retrieval.datasets.layouts import INTEL

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
THE_DAY = ROOT / "docs" / "the_day.md"
MAKEFILE = " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())


def blocks(page, language):
    """Return the code blocks of a page in this language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands_of(page):
    """Return every command in the page's bash blocks, with its continuation lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


@pytest.fixture
def project(few, sample, tmp_path):
    """A copy of the project with a few digits at the places that the pages name."""
    for name in ("get_images.py", "model_not_tuned.py", "fine_tuning.py", "model_fine_tuned.py", "choose.py",
                 "retrieval", "supcon", ".env.example"):  # fmt: skip
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    shutil.copytree(few, tmp_path / "data" / "sample" / "test")
    for label in "0123":
        folder = tmp_path / "data" / "sample" / "train" / label
        folder.mkdir(parents=True)
        for path in sorted((sample / "train" / label).iterdir())[:16]:  # choose.py needs so many
            shutil.copy(path, folder)
    with zipfile.ZipFile(tmp_path / "handed_out.zip", "w") as archive:
        for path in few.glob("*/*/*.png"):
            archive.write(path, f"test/{path.parts[-3]}/{path.name}")
        for label in "0123":
            for path in sorted((sample / "train" / label).iterdir())[:6]:
                archive.write(path, f"train/{label}/{path.name}")
    with zipfile.ZipFile(tmp_path / "intel.zip", "w") as archive:
        for digit, label in enumerate(INTEL):
            for part, count in (("train", 4), ("test", 3)):
                folder = sample / ("train" if part == "train" else "test/gallery") / str(digit)
                for path in sorted(folder.iterdir())[:count]:
                    archive.write(path, f"seg_{part}/seg_{part}/{label}/{path.name}")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    return tmp_path


def weights_of_the_study(folder):
    """Write untrained weights where the study's networks are looked for; return the environment for them."""
    import torch
    from facenet_pytorch import InceptionResnetV1
    from torchvision.models import resnet50

    network = resnet50()
    places = {
        folder / "torch" / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth": network.state_dict(),
        folder / "torch" / "checkpoints" / "20180402-114759-vggface2.pt": InceptionResnetV1().state_dict(),
    }
    for place, state in places.items():
        place.parent.mkdir(parents=True)
        torch.save(state, place)
    simclr = {"resnet50-1x.pth": lambda file: torch.save({"state_dict": network.state_dict()}, file)}
    lay_in_hub(folder, "lightly-ai/simclrv1-imagenet1k-resnet50-1x", **simclr)
    return {"TORCH_HOME": str(folder / "torch"), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run_pages(project, monkeypatch):
    """Run every command of some pages, in their order and each once; return the server's requests.

    A test below runs `make demo`. Placeholders become real: HOST a server of the test, the epochs one, and
    the minutes half of one. The README's commands start processes, as a reader does; those of the other
    pages run in this one, which has imported torch already.
    """
    places = weights_of_the_study(project)
    places["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", places["HF_HUB_CACHE"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def start(command, in_a_shell):
        if in_a_shell or not command.startswith("python "):
            command, env = ["bash", "-c", command], os.environ | places
            return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        return run_here(*shlex.split(command)[1:], cwd=project, **places)

    def run_pages(*pages):
        done = {"make demo"}
        with Server(answer()) as server:
            for page in pages:
                for told in commands_of(page):
                    if told in done:
                        continue
                    done.add(told)
                    command = told.replace("http://HOST:3001/retrieval/", server.url)
                    command = re.sub(r"--epochs \d+", "--epochs 1", command)
                    command = re.sub(r"--minutes \d+", "--minutes 0.5", command)
                    ended = start(command, in_a_shell=page == "README.md")
                    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        return server.received

    return run_pages


@pytest.mark.usefixtures("exported")
def test_every_command_of_the_first_pages_runs(run_pages):
    received = run_pages("README.md", "docs/tutorial.md", "docs/choosing.md")
    assert len(received) == 4  # the README's two submissions, the tutorial's, and the same one again
    assert received[2][3] == received[3][3]


@pytest.mark.usefixtures("exported")
def test_every_command_of_the_page_for_the_day_runs_and_sends_three_submissions(run_pages, project):
    received = run_pages("docs/the_day.md")
    assert [method for method, *_ in received] == ["HEAD", "POST", "POST", "POST"]  # the doctor's, and ours
    bodies = [body for *_, body in received[1:]]
    assert bodies[0] == bodies[2] == (project / "results" / "submission.json").read_bytes()
    assert bodies[1] == (project / "results" / "chosen" / "submission.json").read_bytes()


def test_the_page_for_the_day_quotes_what_the_program_says():
    source = "".join(path.read_text() for path in [*ROOT.glob("retrieval/**/*.py"), ROOT / "get_images.py"])
    (table,) = re.findall(r"^\| the line says.*?\n\n|^\| the line says.*", THE_DAY.read_text(), re.M | re.S)
    quoted = [text for row in table.splitlines()[2:] for text in re.findall("`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) >= 10
    for text in quoted:
        assert text in source, f"docs/the_day.md: no line says `{text}`"


def test_the_page_for_the_day_is_one_printed_page(browser, tmp_path):
    """On A4, in the size and with the margins of a browser's print of a plain page."""
    from markdown import markdown
    from selenium.webdriver.common.print_page_options import PrintOptions

    body = markdown(THE_DAY.read_text(), extensions=["tables", "fenced_code"])
    (tmp_path / "page.html").write_text(f'<meta charset="utf-8"><body style="font: 10pt sans-serif">{body}')
    browser.driver.get((tmp_path / "page.html").as_uri())
    a4 = PrintOptions()
    a4.page_width, a4.page_height = 21.0, 29.7  # cm
    printed = base64.b64decode(browser.driver.print_page(a4))
    (tmp_path / "page.pdf").write_bytes(printed)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1


@pytest.mark.usefixtures("exported")
def test_every_command_of_the_pages_about_networks_runs(run_pages, project):
    from retrieval.backbones.fine_tuned import read_fine_tuned

    run_pages("docs/backbones.md", "docs/fine_tuning.md", "docs/fusion.md")
    recipe = read_fine_tuned(project / "checkpoints" / "intel" / "fine_tuned_model.pth")[0]
    assert (recipe.word, recipe.mean) == ("simclr", (0, 0, 0))  # its input is not normalised


def test_the_python_of_the_readme_runs(project):
    (program,) = blocks("README.md", "python")
    with Server(answer()) as server:
        program = program.replace("http://HOST:3001/retrieval/", server.url)
        ended = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert server.received[0][3] == (project / "results" / "library" / "submission.json").read_bytes()


def test_make_demo_from_a_bare_checkout_prints_what_the_readme_shows(tmp_path):
    """With the environment that runs the tests in the place of .venv, since that is what `make` made."""
    for name in (
        "get_images.py",
        "model_not_tuned.py",
        "retrieval",
        "supcon",
        "Makefile",
        "requirements.txt",
    ):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    installed = f"{sys.prefix}/installed"
    ended = subprocess.run(
        ["make", "--old-file", installed, f"VENV={sys.prefix}", "demo"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    score = float(re.search(r"score ([\d.]+) of 1000", ended.stdout)[1])
    # Measured on this sample: 887. Processors differ in the last bits, and a query is worth 5 points.
    assert score == pytest.approx(887, abs=10)
    again = run_here("-m", "retrieval.datasets", "sample", "--out", "data/sample", cwd=tmp_path)
    assert again.returncode == 0, again.stderr  # as for a second `make demo`
    assert "1797 images already lie in " in again.stdout
    metrics = json.loads((tmp_path / "results" / "sample" / "metrics.json").read_text())
    assert metrics["queries"] == 200
    for line in blocks("README.md", "text")[0].splitlines():  # up to its figures, which may differ a little
        assert line.partition(" 0.")[0] in ended.stdout


def test_the_readme_begins_with_make_demo_and_what_the_pages_make_there_is():
    assert commands_of("README.md")[0] == "make demo"
    for page in PAGES:
        for variable, target in re.findall(r"(?:`|^ *)make (?:(\w+)=\S+ )?(\w+)", page.read_text(), re.M):
            assert re.search(rf"\.PHONY:[^#$]*\b{target}\b", MAKEFILE), f"{page.name}: make {target}"
            assert not variable or re.search(rf"\b{variable}\b", MAKEFILE), f"{page.name}: {variable}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_and_tests_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:retrieval|supcon|tests|docs|examples)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), test

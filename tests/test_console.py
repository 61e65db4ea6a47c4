"""retrieval/console.py: a script ends with a sentence and an exit status."""

import errno
import io
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, run
from tqdm import tqdm

from retrieval import console, errors, files
from retrieval.errors import InputError
from retrieval.forms import Form
from retrieval.settings import CACHE_DIR, NewFolder, PositiveInt


class Example(Form):
    """A form with every kind of setting."""

    top_k: PositiveInt = 10
    """k of the metric"""


def test_a_full_disk_names_the_flag_of_its_folder(monkeypatch, tmp_path, capsys):
    class Writing(Form):
        """A form with two folders."""

        output_dir: NewFolder = tmp_path / "a"
        """folder of the results"""
        save_dir: NewFolder = tmp_path / "b"
        """folder of the checkpoints"""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    (tmp_path / "b").mkdir()
    with pytest.raises(SystemExit):
        console.run_script(lambda form: files.write_whole(form.save_dir / "best.pth", b"a"), Writing)
    advice = "no space left on device: make room, or give another --save_dir"
    assert capsys.readouterr().err == f"error: {tmp_path / 'b' / 'best.pth'}: {advice}\n"


class Placed(Form):
    """A form with a folder below the home."""

    cache_dir: NewFolder = CACHE_DIR
    """folder of the cache"""


@pytest.mark.parametrize(
    ("home", "folder"),
    [(None, "/.cache"), ("", "/.cache"), ("/", "/.cache"), ("/home/ann", "/home/ann/.cache")],
)
@pytest.mark.skipif(os.name != "posix", reason="no user ids")
def test_a_user_id_without_a_home_has_the_root_as_its_home(home, folder, monkeypatch):
    import pwd

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    monkeypatch.delenv("CACHE_DIR")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    forms = []
    console.run_script(forms.append, Placed)
    assert forms[0].cache_dir == Path(folder) / "image-retrieval"


def test_no_text_commands_the_terminal(monkeypatch, capsys):
    def main(form):
        logging.getLogger("retrieval").warning("a \x1b[2Jname\r")
        raise InputError("\x1b]0;title\x07\nsecond line")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        console.run_script(main, Example)
    shown = "warning: a \\x1b[2Jname\\r\nerror: \\x1b]0;title\\x07\nsecond line\n"
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("level", ["info", "warning"])
@pytest.mark.parametrize("bars", [1, 2])
def test_a_line_stands_above_the_bars_and_not_behind_one(monkeypatch, level, bars):
    terminal = io.StringIO()

    def main(form):
        with ExitStack() as stack:
            for row in range(bars):
                stack.enter_context(tqdm(total=8, desc="images", file=terminal, position=row))
            getattr(logging.getLogger("retrieval"), level)("loading")

    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    console.run_script(main, Example)
    lines = re.split(r"[\r\n]+(?:\x1b\[A)*", terminal.getvalue())  # ESC [A: one line up
    assert lines.count("loading" if level == "info" else "warning: loading") == 1
    assert lines[-2].startswith("images:")  # drawn again


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("wrong"), 2, "error: wrong"),
        (FileNotFoundError("no images"), 2, "error: no images"),
        (FileExistsError("something else"), 2, "error: something else"),
        (errors.RunError("no answer"), 1, "error: no answer"),
        (OSError(28, "No space left on device", "results/x"), 1, "error: results/x: no space left on device"),
        (ModuleNotFoundError("No module named 'timm'"), 1, "pip install -r requirements.txt"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (errors.StopError(130), 130, ""),
    ],
)
def test_a_script_ends_with_a_sentence_and_a_status(monkeypatch, capsys, error, status, sentence):
    def main(form):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        console.run_script(main, Example)
    assert end.value.code == status
    assert sentence in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(form):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ZeroDivisionError):
        console.run_script(main, Example)


def test_commands(monkeypatch, capsys):
    asked = []
    commands = {"one": (Example, asked.append), "two": (Example, asked.append)}
    monkeypatch.setattr(sys, "argv", ["script.py", "two", "--top_k", "3"])
    console.run_command(commands)
    assert [form.top_k for form in asked] == [3]
    for arguments, status in (([], 2), (["three"], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as end:
            console.run_command(commands)
        assert end.value.code == status
        said = capsys.readouterr()
        assert "one          A form with every kind" in said.out + said.err


@pytest.mark.parametrize("script", ["model_not_tuned", "model_fine_tuned", "fine_tuning", "choose"])
@pytest.mark.parametrize("module", ["retrieval.distributed", "pydantic_settings", "retrieval.settings"])
def test_ctrl_c_while_a_script_imports_is_one_line(script, module, tmp_path):
    """SIGINT comes as the import of the module begins."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {module!r} and 'retrieval.console' in sys.modules:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
    )
    ended = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], cwd=tmp_path, text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "error: stopped by Ctrl-C; no file is half-written\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["model_not_tuned", "model_fine_tuned", "fine_tuning", "choose"])
def test_ctrl_c_at_any_moment_of_the_start_leaves_no_traceback(script, tmp_path):
    """The clock starts where retrieval/console.py runs: before that only Python itself can answer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Begin:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'retrieval.distributed':\n"
        "            print('begun', flush=True)\n"
        "sys.meta_path.insert(0, Begin)\n"
    )
    folders = ["--train_dir=."] if script in ("fine_tuning", "choose") else []
    folders += ["--query_dir=.", "--gallery_dir=."] if script != "fine_tuning" else []
    command = [sys.executable, ROOT / f"{script}.py", "--device=cpu", *folders]
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
        started.stdout.readline()
        time.sleep(seconds)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate()
        assert re.fullmatch("error: .*\n", errors)  # one line: the folder holds no images, or this:
        assert (started.returncode == 130) == (
            errors == "error: stopped by Ctrl-C; no file is half-written\n"
        )


@pytest.mark.parametrize("version", [(3, 8), (3, 9), (3, 10)])
def test_an_old_python_is_a_sentence(version, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(
        SystemExit, match=rf"^error: Python 3\.{version[1]} is not supported: take 3\.11 to 3\.14$"
    ):
        runpy.run_path(str(ROOT / "retrieval" / "console.py"))


def test_a_reader_that_goes_away_is_no_noise(tmp_path):
    script = f"{sys.executable} {ROOT / 'model_not_tuned.py'} --help | head -1"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.startswith("usage: model_not_tuned.py")
    assert "Logging error" not in ended.stderr


@pytest.mark.slow
def test_a_file_name_that_no_console_can_show_stops_nothing(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("")
    ended = run(
        "model_not_tuned.py", "--query_dir", ".", "--gallery_dir", ".", cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert ended.returncode == 2
    assert "1 .txt (\\udcff.txt)" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["model_not_tuned.py"], "model_not_tuned.py"),
        (["-m", "retrieval.backbones"], "python -m retrieval.backbones"),
        (["-m", "retrieval.datasets", "split"], "python -m retrieval.datasets split"),
    ],
)
def test_the_name_of_the_program_is_what_one_types(command, name, tmp_path):
    assert run(*command, "--help", cwd=tmp_path).stdout.startswith(f"usage: {name} [flags]")

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from dotenv import dotenv_values

from retrieval import console, errors
from retrieval.errors import InputError
from retrieval.settings import WORDS, Device, Folder, Form, GroupName, PositiveInt, ServerUrl, read_form


class Example(Form):
    """A form with every kind of setting."""

    query_dir: Folder = Path()
    top_k: PositiveInt = 10
    custom_dataset: bool = False
    server_url: ServerUrl = ""
    group_name: GroupName = "my-team"
    device: Device = "auto"


def read(*arguments):
    return read_form(Example, list(arguments))


def test_flag_over_environment_over_dotenv_over_default(monkeypatch):
    assert read().group_name == "my-team"
    Path(".env").write_text("GROUP_NAME=from dotenv\nTOP_K=3  # three\n")
    assert (read().group_name, read().top_k) == ("from dotenv", 3)
    monkeypatch.setenv("GROUP_NAME", "from environment")
    assert (read().group_name, read().top_k) == ("from environment", 3)
    assert read("--group_name", "Team Ä 1").group_name == "Team Ä 1"
    assert read("--group_name=Team Ä 1").group_name == "Team Ä 1"
    assert read("--group_name", "None").group_name == "None"


def test_an_empty_value_in_the_environment_counts_as_none(monkeypatch):
    Path(".env").write_text("GROUP_NAME=mine\nSERVER_URL=\n")
    monkeypatch.setenv("GROUP_NAME", "")
    assert (read().group_name, read().server_url) == ("mine", "")


@pytest.mark.parametrize("name", [word.upper() for word in WORDS if word.islower()])
def test_words_of_the_system_are_flags_only(monkeypatch, name):
    monkeypatch.setenv(name, "nonsense")
    Path(".env").write_text(f"{name}=nonsense\n")
    assert read().device == "auto"


def test_names_are_in_capitals(monkeypatch):
    monkeypatch.setenv("top_k", "3")
    assert read().top_k == 10


def test_unknown_names_in_dotenv_are_warned_of(caplog):
    Path(".env").write_text("QUERRY_DIR=x\nDEVICE=cpu\nquery_dir=x\nGROUP_NAME=a\n")
    read()
    assert [record.getMessage() for record in caplog.records] == [
        ".env sets QUERRY_DIR, which no script reads; did you mean QUERY_DIR?",
        ".env sets DEVICE, which no script reads: it is a flag only, --device",
        ".env sets query_dir, which no script reads; did you mean QUERY_DIR?",
    ]


@pytest.mark.parametrize(
    "line", ['GROUP_NAME="Team BBB', "SERVER_URL: http://a/", "this is no setting", "TOP_K"]
)
def test_a_broken_line_in_dotenv_is_an_error_and_not_another_name(line):
    Path(".env").write_text(f"# mine\n\nDEVICE=cpu\n\n\n{line}\n")
    with pytest.raises(InputError) as error:
        read()
    assert re.search(r"/\.env, line 6: .*" + re.escape(line.strip('"')[:8]), str(error.value))


def test_a_dotenv_from_notepad():
    Path(".env").write_text("\ufeffGROUP_NAME=a\r\n", encoding="utf-8")
    assert read().group_name == "a"
    Path(".env").write_text("GROUP_NAME=a\n", encoding="utf-16")
    with pytest.raises(InputError, match="save it as UTF-8"):
        read()


def test_switches_take_no_value(monkeypatch):
    assert read("--custom_dataset").custom_dataset is True
    with pytest.raises(InputError, match="true is neither a flag nor"):
        read("--custom_dataset", "true")
    monkeypatch.setenv("CUSTOM_DATASET", "true")
    assert read().custom_dataset is True
    assert read("--no-custom_dataset").custom_dataset is False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--querry_dir", "x"], "there is no flag --querry_dir; did you mean --query_dir? (--help lists"),
        (["--query"], "there is no flag --query; did you mean --query_dir?"),  # no abbreviations
        (["--query_dir"], "argument --query_dir: expected one argument"),
        (["--query_dir", "nowhere"], "--query_dir is 'nowhere': there is no folder /"),
        (["--query_dir", "data.zip"], "--query_dir is 'data.zip': it is a file"),
        (["--query_dir", ""], "--query_dir is '': it may not be empty"),
        (["--TOP_K", "3"], "there is no flag --TOP_K; did you mean --top_k?"),
        (["--query_dir", "x" * 300], "there is no folder /"),
        (["--query_dir", "~nobody-has-this-name/x"], "there is no such user"),
        (["--top_k", "0"], "--top_k is '0': it should be greater than 0"),
        (["--top_k=three"], "--top_k is 'three': it should be a valid integer"),
        (["--device", "gpu"], "--device is 'gpu': it should be 'auto', 'cpu', 'cuda' or 'mps'"),
        (["--group_name", " "], "--group_name is ' ': it may not be empty"),
    ],
)
def test_a_wrong_flag_is_a_sentence(arguments, sentence):
    Path("data.zip").touch()
    with pytest.raises(InputError) as error:
        read(*arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_sentence_says_where_a_wrong_value_stands(monkeypatch):
    Path(".env").write_text("QUERY_DIR=gone\n")
    with pytest.raises(InputError, match=r"^QUERY_DIR in \.env is 'gone'"):
        read()
    monkeypatch.setenv("QUERY_DIR", "lost")
    with pytest.raises(InputError, match=r"^QUERY_DIR in the environment is 'lost'"):
        read()

    class Elsewhere(Form):
        query_dir: Folder = Path("data/test/query")

    monkeypatch.delenv("QUERY_DIR")
    Path(".env").unlink()
    with pytest.raises(InputError, match=r"^the script's default for --query_dir is 'data/test/query'"):
        read_form(Elsewhere, [])


@pytest.mark.parametrize(
    "url", ["http://10.0.0.7:3001/retrieval/", "https://example.org/x", "http://[::1]:80/"]
)
def test_urls(url, caplog):
    assert read("--server_url", url).server_url == url
    assert not caplog.records
    assert read("--server_url", f" {url} ").server_url == url
    assert "removed the blanks" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "10.0.0.7:3001/x",
        "ftp://a/",
        "http://",
        "http://a:x/",
        "http://a b/",
        "http://h:0/",
        "http://a:99999/",
    ],
)
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="looks like http://10"):
        read("--server_url", url)


def test_the_placeholder_of_the_readme_is_no_server():
    with pytest.raises(InputError, match="HOST stands for the name or the address of your server"):
        read("--server_url", "http://HOST:3001/retrieval/")


def test_every_setting_of_a_form_needs_a_meaning():
    with pytest.raises(TypeError, match="colour needs a meaning"):

        class Wrong(Form):
            colour: str = "red"


def test_env_example_lists_what_the_environment_knows_and_the_defaults_of_the_script():
    import fine_tuning
    import model_not_tuned

    text = (ROOT / ".env.example").read_text()
    names = [line.removeprefix("# ").partition("=")[0] for line in text.splitlines() if "=" in line]
    assert names == [word for word in WORDS if word.isupper()]
    blocks = [block.splitlines() for block in text.split("\n\n")[1:]]
    assert all(
        len(block) == 2 and block[0].startswith("# ") and block[0].endswith((".", "false."))
        for block in blocks
    )
    Path(".env").write_text("\n".join(block[1].removeprefix("# ") for block in blocks))
    given = dotenv_values(".env")
    assert set(given) == set(names)
    forms = (fine_tuning.Settings, model_not_tuned.Settings)
    defaults = {name: field.default for form in forms for name, field in form.model_fields.items()}
    for name, value in given.items():
        if name not in ("SERVER_URL", "CUSTOM_DATASET"):
            assert value == str(defaults[name.lower()])


# ---- running a script


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
        assert "one        A form with every kind" in said.out + said.err


def test_a_reader_that_goes_away_is_no_noise(tmp_path):
    script = f"{sys.executable} {ROOT / 'model_not_tuned.py'} --help | head -1"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.startswith("usage: model_not_tuned.py")
    assert "Logging error" not in ended.stderr


def test_a_file_name_that_no_console_can_show_stops_nothing(tmp_path):
    from conftest import run

    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("")
    ended = run(
        "model_not_tuned.py", "--query_dir", ".", "--gallery_dir", ".", cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert ended.returncode == 2
    assert "such as \\udcff.txt" in ended.stderr

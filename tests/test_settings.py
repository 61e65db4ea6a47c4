import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from dotenv import dotenv_values

from retrieval.errors import InputError
from retrieval.forms import IN_ENVIRONMENT, Form, read_form
from retrieval.settings import Device, Folder, GroupName, PositiveInt, RetrievalSettings, ServerUrl

SCRIPTS = ("model_not_tuned", "model_fine_tuned", "fine_tuning", "choose")


class Example(Form):
    """A form with every kind of setting."""

    query_dir: Folder = Path()
    """folder of images"""
    top_k: PositiveInt = 10
    """k of the metric"""
    custom_dataset: bool = False
    """send nothing"""
    server_url: ServerUrl = ""
    """where to send it"""
    group_name: GroupName = "my-team"
    """who sends it"""
    device: Device = "auto"
    """device of the network"""


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_the_system_are_flags_only(monkeypatch, script):
    form = import_module(script).Settings
    given = {name: "." for name in ("query_dir", "gallery_dir", "train_dir") if name in form.model_fields}
    if script == "model_fine_tuned":
        given["weights"] = __file__
    defaults = form(**given)
    for name in form.model_fields:
        if name not in IN_ENVIRONMENT:
            monkeypatch.setenv(name.upper(), "nonsense")
            with open(".env", "a") as file:
                file.write(f"{name.upper()}=nonsense\n")
    assert read_form(form, [f"--{name}={value}" for name, value in given.items()]) == defaults


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
    assert re.search(r"/\.env, line 6 is not of the form NAME=value", str(error.value))
    assert line not in str(error.value)  # it may hold a password


def test_a_dotenv_from_notepad():
    Path(".env").write_text("\ufeffGROUP_NAME=a\r\n", encoding="utf-8")
    assert read().group_name == "a"
    Path(".env").write_text("GROUP_NAME=a\n", encoding="utf-16")
    with pytest.raises(InputError, match="save it as UTF-8"):
        read()


@pytest.mark.parametrize(("script", "arguments", "sentence"), [
    ("fusion", "a b --mix 0.7 0.3", "0.3 is neither a flag nor a flag's value: write --mix 0.7,0.3, without"),
    ("fusion", "a b --mix=0.7 0.2 0.1 --seed 1", "write --mix 0.7,0.2,0.1, without a blank"),
    ("model_not_tuned", "--fuse clip=0.3 dlib=0.2", "write --fuse clip=0.3,dlib=0.2, without a blank"),
    ("model_not_tuned", "--views flip scales", "write --views flip,scales, without a blank"),
    ("choose", "--models dlib clip", "write --models dlib,clip, without a blank"),
    ("model_not_tuned", "--group_name Team AAA", "AAA is neither a flag nor a flag's value: quote what has"),
    ("model_not_tuned", "here --top_k 3", "here is neither a flag nor a flag's value: quote what has blanks"),
])  # fmt: skip
def test_a_list_with_blanks_is_told_its_commas(script, arguments, sentence):
    form = import_module("retrieval.fusion" if script == "fusion" else script).Settings
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_form(form, arguments.split())


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

    class Elsewhere(Example):
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


def test_a_password_in_the_servers_url_is_shown_nowhere(caplog):
    form = read("--server_url", " https://team:secret@10.0.0.7/x/@me ")
    assert form.server_url.full == "https://team:secret@10.0.0.7/x/@me"
    shown = "https://***@10.0.0.7/x/@me"
    assert form.model_dump()["server_url"] == form.model_dump(mode="json")["server_url"] == shown
    assert [str(form.server_url), f"{form.server_url}", repr(form.server_url)] == [shown, shown, repr(shown)]
    assert "secret" not in repr(form) + form.model_dump_json() + caplog.text
    for wrong in ("http://team:secret@HOST/", "http://team:sec/ret@10.0.0.7/", "ftp://team:secret@10.0.0.7/"):
        with pytest.raises(InputError) as refused:
            read("--server_url", wrong)
        assert "sec" not in str(refused.value)


def test_the_placeholder_of_the_readme_is_no_server():
    with pytest.raises(InputError, match="HOST stands for the name or the address of your server"):
        read("--server_url", "http://HOST:3001/retrieval/")


# ---- the form at the top of a script


def mistake_in(form):
    with pytest.raises(InputError) as error:
        read_form(form, [])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_setting_without_its_type_is_a_sentence():
    class Edited(RetrievalSettings):
        top_k = 3
        query_dir: Folder = Path()

    assert mistake_in(Edited) == (
        "test_settings.py: top_k needs its type again: write top_k: PositiveInt = 3"
    )


def test_a_misspelt_setting_is_a_sentence_with_or_without_its_type():
    class Typed(RetrievalSettings):
        groupname: GroupName = "Team AAA"  # a comment is no help

    class Untyped(RetrievalSettings):
        groupname = "Team AAA"

    for form in (Typed, Untyped):
        sentence = mistake_in(form)
        assert sentence.startswith(
            "test_settings.py: there is no setting groupname; did you mean group_name?"
        )


def test_all_mistakes_in_a_form_are_told_at_once():
    class Edited(RetrievalSettings):
        top_k = 3
        groupname = "x"
        colour: str = "red"

    with pytest.raises(InputError) as error:
        read_form(Edited, [])
    first, second, third = str(error.value).split("\nerror: ")
    assert "top_k: PositiveInt = 3" in first
    assert "did you mean group_name?" in second
    assert "there is no setting colour (a new one needs its help below it)" in third


def test_a_script_with_a_mistake_ends_with_status_2(tmp_path):
    text = (ROOT / "model_not_tuned.py").read_text()
    edited = tmp_path / "mine.py"
    edited.write_text(text.replace("top_k: PositiveInt = 10", "top_k = 3"))
    ended = subprocess.run([sys.executable, edited], capture_output=True, text=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "error: mine.py: top_k needs its type again: write top_k: PositiveInt = 3\n"


def test_a_windows_path_with_single_backslashes_is_a_sentence():
    class Edited(RetrievalSettings):
        query_dir: Folder = Path("C:\new\table")
        gallery_dir: Folder = Path()

    class Zero(RetrievalSettings):
        query_dir: Folder = Path("C:\0_images")
        gallery_dir: Folder = Path()

    assert mistake_in(Zero).startswith(r"the script's default for --query_dir is 'C:\x00_images': ")
    sentence = mistake_in(Edited)
    assert sentence.startswith(r"the script's default for --query_dir is 'C:\new\table': ")
    assert 'write r"…" around the path, or forward slashes' in sentence


def test_a_path_that_really_holds_a_tab_can_be_given(tmp_path):
    (tmp_path / "a\tb").mkdir()
    assert read("--query_dir", str(tmp_path / "a\tb")).query_dir == tmp_path / "a\tb"


def test_it_is_logged_when_the_environment_wins_over_an_edited_default(monkeypatch, caplog):
    caplog.set_level("INFO")

    class Edited(Example):
        top_k: PositiveInt = 3
        group_name: GroupName = "Team AAA"

    Path(".env").write_text("GROUP_NAME=Team BBB\nTOP_K=10\nCUSTOM_DATASET=true\n")
    assert read().group_name == "Team BBB"  # of a form that nobody edited
    assert not caplog.records
    read_form(Edited, [])
    assert [record.getMessage() for record in caplog.records] == [
        "TOP_K in .env (10) wins over the script's default for top_k (3)",
        "GROUP_NAME in .env (Team BBB) wins over the script's default for group_name (Team AAA)",
    ]
    caplog.clear()
    monkeypatch.setenv("TOP_K", "5")
    read_form(Edited, ["--group_name=mine"])
    (record,) = caplog.records
    assert record.getMessage() == "TOP_K in the environment (5) wins over the script's default for top_k (3)"


# ---- the files and pages that describe the settings


def test_the_settings_page_and_env_example_are_those_of_the_forms():
    from docs.settings import env_example, settings_page

    for name, text in (("docs/settings.md", settings_page()), (".env.example", env_example())):
        assert (ROOT / name).read_text() == text, "run python -m docs.settings"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_row_a_flag(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "120")
    form = import_module(script).Settings
    with pytest.raises(SystemExit):
        read_form(form, ["--help"], script)
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {script} [flags]\n")
    for ugly in ("--no-no", "SecretStr", "(default )", "Path", "{", "False", "None", "\n  --no-"):
        assert ugly not in told
    for name in form.model_fields:
        assert re.search(rf"^  --{name}( [A-Z:,]+)?\s{{2,}}\w", told, re.M), name
    folded = len(
        re.findall(r"^  --\S.{24,}$(?=\n {20})", told, re.M)
    )  # flags so long that their help follows below
    assert len(told.splitlines()) < len(form.model_fields) + folded + 27


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_switch_can_be_undone_and_every_none_asked_for(script):
    form = import_module(script).Settings
    given = [f"--{name}=." for name in ("query_dir", "gallery_dir", "train_dir") if name in form.model_fields]
    if script == "model_fine_tuned":
        given.append(f"--weights={__file__}")
    for name, field in form.model_fields.items():
        if field.default is False:
            assert getattr(read_form(form, [*given, f"--{name}"]), name) is True
            assert getattr(read_form(form, [*given, f"--{name}", f"--no-{name}"]), name) is False
        elif field.default is None:
            assert getattr(read_form(form, [*given, f"--{name}", "unset"]), name) is None


def test_env_example_lists_what_the_environment_knows_and_the_defaults_of_the_script():
    import fine_tuning
    import model_not_tuned

    text = (ROOT / ".env.example").read_text()
    names = [line.removeprefix("# ").partition("=")[0] for line in text.splitlines() if "=" in line]
    assert names == [name.upper() for name in IN_ENVIRONMENT]
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
    defaults["train_dir"] = fine_tuning.Settings.model_fields["train_dir"].default
    for name, value in given.items():
        if name not in ("SERVER_URL", "CUSTOM_DATASET"):
            assert value == ("" if defaults[name.lower()] is None else str(defaults[name.lower()]))

"""--recipe: a JSON file takes the place of the script's defaults, the environment and .env."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import run_here

from retrieval.errors import InputError
from retrieval.forms import read_form
from retrieval.recipe import IN_RECIPE

PLACES = ["--query_dir=.", "--gallery_dir=."]
FOLDERS = ("--query_dir", "query", "--gallery_dir", "gallery")


def read(settings, *flags, script="model_not_tuned"):
    """The settings of a script with this recipe, and with flags."""
    Path("recipe.json").write_text(json.dumps({"settings": settings, "evidence": [1, {"score": 950}]}))
    return read_form(import_module(script).Settings, [*PLACES, "--recipe", "recipe.json", *flags])


def test_flag_over_recipe_over_environment_over_dotenv_over_default(monkeypatch):
    Path(".env").write_text("CROP=face\nMODEL_TYPE=efficientnet_lite2\n")
    monkeypatch.setenv("MODEL_TYPE", "efficientnet_lite1")
    recipe = {"model_type": "dlib", "views": "flip", "hubs": 10, "fuse": ["facenet=0.3"], "image_size": None}
    settings = read(recipe)
    assert (settings.model_type, settings.views, settings.hubs) == ("dlib", "flip", 10)
    assert settings.fuse == ["facenet=0.3"]
    assert settings.crop == "face"  # of .env
    settings = read(recipe, "--model_type=clip", "--hubs=3", "--fuse=clip@loose=0.2,sface=0.1")
    assert (settings.model_type, settings.views, settings.hubs) == ("clip", "flip", 3)
    assert settings.fuse == ["clip@loose=0.2", "sface=0.1"]
    settings = read(recipe, "--hubs=unset", "--fuse=unset")
    assert (settings.hubs, settings.fuse) == (None, None)
    assert read({"whiten": True}, "--no-whiten").whiten is False
    assert read({}, "--recipe=unset").model_type == "efficientnet_lite1"


@pytest.mark.parametrize(("script", "name", "chosen", "given"), [
    ("model_not_tuned", "model_type", "dlib", "facenet"),
    ("model_not_tuned", "model_type", "efficientnet_lite0", "timm:resnet18.a1_in1k"),
    ("model_fine_tuned", "weights", "a.pth", "b.pth"),
])  # fmt: skip
def test_another_network_than_the_recipe_s_is_warned_of(script, name, chosen, given, caplog):
    Path("a.pth").touch()
    Path("b.pth").touch()
    recipe = {name: chosen, "whiten": True}
    read(recipe, script=script)
    read(recipe, f"--{name}={chosen}", "--hubs=5", script=script)
    assert not caplog.records
    read(recipe, f"--{name}={given}", script=script)
    assert [record.getMessage() for record in caplog.records] == [
        f"--{name} {given} wins over {name} in recipe.json ({chosen}), for which the recipe was chosen: "
        "nothing shows that its other settings help here"
    ]


def test_each_setting_of_a_recipe_is_one_of_the_first_script():
    form = import_module("model_not_tuned").Settings
    assert set(IN_RECIPE) < set(form.model_fields)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"hubs": "x"}, "hubs in recipe.json is 'x': it should be a valid integer"),
    ({"views": "flop"}, "views in recipe.json is 'flop': it should be 'none', 'flip'"),
    ({"fuse": ["dlib=1"]}, "fuse in recipe.json is 'dlib=1': the shares add up to 1 or more"),
    ({"weights": "none.pth", "model_type": "dlib"}, "weights in recipe.json is 'none.pth': there is"),
    ({"hub": 3}, "recipe.json sets hub, which is no setting; did you mean hubs?"),
    ({"server_url": "http://a/"}, "server_url in recipe.json is not for a recipe, which sets only the"),
    ({"query_dir": "."}, "take it out, and give --query_dir"),
    ({"weights": "a.pth"}, "a checkpoint of fine_tuning.py: run model_fine_tuned.py --recipe recipe.json"),
    ([1], 'recipe.json has no object "settings": give a recipe of choose.py'),
])  # fmt: skip
def test_a_wrong_recipe_is_a_sentence_that_says_where(settings, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read(settings)


def test_a_flag_takes_the_place_of_a_wrong_value():
    assert read({"hubs": "x"}, "--hubs", "3").hubs == 3
    with pytest.raises(InputError, match=r"^--hubs is '0'"):
        read({"hubs": 5}, "--hubs=0")


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe\x00", b"{'settings': {}}"])
def test_what_is_no_json_is_a_sentence(content):
    Path("recipe.json").write_bytes(content)
    with pytest.raises(
        InputError, match=r"^recipe\.json is no JSON file \(.*\): give a recipe of choose\.py"
    ):
        read_form(import_module("model_not_tuned").Settings, [*PLACES, "--recipe=recipe.json"])
    with pytest.raises(InputError, match=r"^--recipe is 'none\.json': there is no file"):
        read_form(import_module("model_not_tuned").Settings, [*PLACES, "--recipe=none.json"])


def test_a_recipe_of_the_first_script_is_not_for_a_checkpoint():
    for name, value in (("model_type", "dlib"), ("crop", "auto"), ("image_size", 64)):
        with pytest.raises(
            InputError, match=rf"^{name} in recipe\.json is not .* setting of model_not_tuned\.py$"
        ):
            read({name: value}, script="model_fine_tuned")
    settings = read({"weights": "recipe.json", "whiten": True}, script="model_fine_tuned")
    assert (settings.weights, settings.whiten) == (Path("recipe.json"), True)


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_a_recipe_gives_the_submission_of_its_flags_and_the_ledger_records_its_values(few, tmp_path):
    recipe = {"model_type": "efficientnet_lite0", "image_size": 64, "views": "flip", "projection": "lda",
              "train_dir": str(few / "gallery"), "hubs": 5}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps({"settings": recipe}))
    flags = [part for name, value in recipe.items() for part in (f"--{name}", value)]
    lines = []
    for name, given in (("flags", flags), ("recipe", ["--recipe", tmp_path / "recipe.json"])):
        ended = run_here("model_not_tuned.py", *FOLDERS, "--custom_dataset", "--no_report", *given,
                         "--output_dir", tmp_path / name, cwd=few)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        lines.append(json.loads((tmp_path / name / "runs.jsonl").read_text())["settings"])
    by_flags, by_recipe = ((tmp_path / name / "submission.json").read_bytes() for name in ("flags", "recipe"))
    assert by_flags == by_recipe
    differ = {name for name in lines[0] if lines[0][name] != lines[1][name]}
    assert differ == {"recipe", "output_dir"}
    metrics = json.loads((tmp_path / "recipe" / "metrics.json").read_text())
    assert metrics["means"] == {"projection": "lda", "hubs": 5}

"""retrieval/forms.py: a flag that a script does not have is a sentence that leads to the right one."""

import re
from importlib import import_module

import pytest

from retrieval.errors import InputError
from retrieval.forms import read_form


@pytest.mark.parametrize(
    ("script", "flag", "sentence"),
    [
        ("model_not_tuned", "--epochs", "it is a flag of fine_tuning.py, which trains a network"),
        ("model_not_tuned", "--no-resume", "it is a flag of fine_tuning.py"),
        ("model_fine_tuned", "--loss", "it is a flag of fine_tuning.py"),
        ("choose", "--lr", "it is a flag of fine_tuning.py"),
        ("fine_tuning", "--query_dir", "it is a flag of model_not_tuned.py and model_fine_tuned.py"),
        ("fine_tuning", "--rerank", "it is a flag of model_not_tuned.py"),
        ("fine_tuning", "--no-flip", "it is a flag of model_not_tuned.py"),
        ("fine_tuning", "--model_type", "here it is --model"),
        ("model_not_tuned", "--model", "here it is --model_type"),
        ("choose", "--model_type", "here it is --models"),
        ("model_fine_tuned", "--model", "the checkpoint of --weights knows it"),
    ],
)
def test_a_flag_of_another_script_names_that_script(script, flag, sentence):
    with pytest.raises(InputError, match=f"^{flag} is not for this script: {re.escape(sentence)}"):
        read_form(import_module(script).Settings, [flag, "1"])


@pytest.mark.parametrize("typed", [
    "--nocache", "--no-cache", "--no_flip", "--noflip", "--no-report", "--no_custom_dataset",
    "--verify-cache", "--custom-dataset", "--save_embedding", "--no-save-embeddings",
])  # fmt: skip
def test_a_suggested_switch_works_as_it_is_typed_and_means_no_where_no_is_typed(typed):
    form = import_module("model_not_tuned").Settings
    with pytest.raises(InputError) as error:
        read_form(form, [typed])
    suggested = re.search(r"did you mean (\S+)\?", str(error.value))[1]
    read_form(form, [suggested, "--query_dir=.", "--gallery_dir=."])
    assert suggested.startswith("--no") == typed.startswith("--no")


@pytest.mark.parametrize(("typed", "sentence"), [
    ("--cache", "there is no flag --cache: it is the default, and --no_cache undoes it"),
    ("--report", "there is no flag --report: it is the default, and --no_report undoes it"),
    ("--no_cache=true", "argument --no_cache: a switch takes no value (--help lists the flags)"),
    ("--flip=1", "argument --flip: a switch takes no value (--help lists the flags)"),
])  # fmt: skip
def test_a_switch_that_is_on_or_has_a_value_is_a_sentence(typed, sentence):
    with pytest.raises(InputError) as error:
        read_form(import_module("model_not_tuned").Settings, [typed])
    assert str(error.value) == sentence

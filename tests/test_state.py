"""supcon/state.py: what a training begins with."""

import pytest
from conftest import begun, settings_of

from retrieval.fine_tuned import read_fine_tuned
from retrieval.settings import InputError
from supcon import training


def test_one_class_left_to_learn_from_is_a_sentence(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "train")
    for label in "123":
        for path in (tmp_path / "train" / label).iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"images of 1 classes are left to learn from"):
        begun(settings_of(tmp_path / "train", tmp_path))


def test_the_folder_of_the_start_may_be_the_folder_of_the_result(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    file = settings.save_dir / "fine_tuned_model.pth"
    again = settings.model_copy(update={"weights": file, "loss": "supcon", "overwrite": True})
    run = begun(again)
    training.fit(run)
    assert read_fine_tuned(file)[0].loss == "supcon"

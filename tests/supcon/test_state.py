"""supcon/state.py: what a training begins with."""

import pytest
import torch
from conftest import SMALL, begun, settings_of, small_weights

from retrieval.backbones.fine_tuned import read_fine_tuned
from retrieval.errors import InputError, RunError
from supcon import state, training


def test_one_class_left_to_learn_from_is_a_sentence(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "train")
    for label in "123":
        for path in (tmp_path / "train" / label).iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"images of 1 classes are left to learn from"):
        begun(settings_of(tmp_path / "train", tmp_path))


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (lambda value: value[1:] if isinstance(value, list) else value, "could read other images"),
        (lambda value: value if isinstance(value, list) else value * 1.001, "has other weights of"),
    ],
)
def test_a_process_that_begins_with_others_than_the_first_is_refused(
    others, told, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(state, "from_rank_0", others)
    with pytest.raises(RunError, match=f"process 1 {told}"):
        begun(settings_of(tiny, tmp_path))


def test_weights_whose_features_are_all_zero_are_a_sentence(tiny, tmp_path):
    weights = torch.load(small_weights(tmp_path), weights_only=True)
    weights["conv_stem.weight"].zero_()
    torch.save(weights, tmp_path / "zero.pth")
    with pytest.raises(InputError, match="features of length 0, from which nothing can be learnt"):
        begun(settings_of(tiny, tmp_path, model=SMALL, weights=tmp_path / "zero.pth"))


def test_the_folder_of_the_start_may_be_the_folder_of_the_result(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    file = settings.save_dir / "fine_tuned_model.pth"
    again = settings.model_copy(update={"weights": file, "loss": "supcon", "overwrite": True})
    run = begun(again)
    training.fit(run)
    assert read_fine_tuned(file)[0].loss == "supcon"

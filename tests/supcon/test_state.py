"""supcon/state.py: what a training begins with."""

import numpy as np
import pytest
import torch
from conftest import assert_same, begun, settings_of

from retrieval.backbones.fine_tuned import read_fine_tuned
from retrieval.errors import InputError, RunError
from supcon import state, training
from supcon.state import save
from supcon.steps import step


def test_one_class_left_to_learn_from_is_a_sentence(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "train")
    for label in "123":
        for path in (tmp_path / "train" / label).iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"images of 1 classes are left to learn from"):
        begun(settings_of(tmp_path / "train", tmp_path))


@pytest.mark.parametrize(("asked", "told"), [(0, "could read other images"), (2, "has other weights of")])
def test_a_process_that_begins_with_others_than_the_first_is_refused(
    asked, told, tiny, tmp_path, monkeypatch
):
    values = []

    def from_rank_0(value):
        values.append(value)
        return value * 1.001 if len(values) - 1 == asked else value

    monkeypatch.setattr(state, "from_rank_0", from_rank_0)
    with pytest.raises(RunError, match=f"process 1 {told}"):
        begun(settings_of(tiny, tmp_path))


def test_the_folder_of_the_start_may_be_the_folder_of_the_result(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    file = settings.save_dir / "fine_tuned_model.pth"
    again = settings.model_copy(update={"weights": file, "loss": "supcon", "overwrite": True})
    run = begun(again)
    training.fit(run)
    assert read_fine_tuned(file)[0].loss == "supcon"


def test_a_training_saved_before_there_was_one_kernel_for_all_weights_goes_on_with_it(tiny, tmp_path):
    """Its last.pth says nothing of that kernel, or that the device had none."""
    weights = []
    for word in ("now", "before"):
        settings = settings_of(tiny, tmp_path / word)
        run = begun(settings)
        assert run.optimizer.defaults["fused"]
        run.settings = settings.model_copy(update={"epochs": 1})
        training.fit(run)
        run.settings = settings
        save(run)
        file = settings.save_dir / "last.pth"
        saved = torch.load(file, weights_only=True)
        if word == "before":
            for group in saved["optimizer"]["param_groups"]:
                group["fused"] = None
        torch.save(saved, file)
        run = begun(settings.model_copy(update={"resume": True}))
        assert all(group["fused"] for group in run.optimizer.param_groups)
        training.fit(run)
        weights.append(run.tuned.network.state_dict())
    assert_same(*weights)


def test_one_kernel_for_all_weights_changes_them_as_the_plain_way_does(tiny, tmp_path):
    runs = [begun(settings_of(tiny, tmp_path / word)) for word in ("fused", "plain")]
    for run in runs:
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-3  # else AdamW divides a gradient of next to nothing, which is noise, by itself
    for group in runs[1].optimizer.param_groups:
        group |= {"fused": False, "foreach": False}
    for run in runs:
        for seed in range(3):
            step(run, np.arange(8), seed)
    plain = dict(runs[1].tuned.network.named_parameters())
    for name, parameter in runs[0].tuned.network.named_parameters():
        torch.testing.assert_close(parameter, plain[name], rtol=1e-3, atol=1e-5)

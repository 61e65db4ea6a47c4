"""supcon/checkpoints.py: a folder holds one training."""

import shutil
from collections import namedtuple

import pytest
import torch
from conftest import begun, settings_of

from retrieval.errors import InputError, RunError
from supcon import checkpoints, training


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed_or_replaced(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    with pytest.raises(
        InputError, match=r"holds another run .*--resume goes on with it, --overwrite moves it"
    ):
        begun(settings)
    changed = settings.model_copy(update={"resume": True, "lr": 0.5, "seed": 3})
    with pytest.raises(InputError, match=r"but --lr was 0.001 and is 0.5; --seed was 0 and is 3"):
        begun(changed)
    with pytest.raises(InputError, match="give one of them"):
        begun(settings.model_copy(update={"resume": True, "overwrite": True}))
    begun(settings.model_copy(update={"overwrite": True}))
    (earlier,) = (settings.save_dir / "earlier").iterdir()
    assert {"fine_tuned_model.pth", "last.pth", "best.pth", "history.jsonl"} <= {
        path.name for path in earlier.iterdir()
    }
    with pytest.raises(InputError, match=r"holds no last\.pth to go on from"):
        begun(settings.model_copy(update={"resume": True}))


def test_a_resume_from_what_is_no_state_of_a_training_is_a_sentence(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    last, again = settings.save_dir / "last.pth", settings.model_copy(update={"resume": True})
    saved = torch.load(last, weights_only=True)
    for other in (saved["tuned"], [], torch.zeros(3), {**saved, "settings": 3}, {**saved, "progress": []}):
        torch.save(other, last)
        with pytest.raises(InputError, match=r"last\.pth is no state of a training"):
            begun(again)
    for name in saved.keys() - {"settings", "images", "tracked"}:
        for wrong in (None, 3, {"a": 1}, [torch.zeros(2)]):
            torch.save({**saved, name: wrong}, last)
            try:
                begun(again)
            except InputError as error:
                assert "last.pth" in str(error)  # noqa: PT017


def test_other_images_are_another_run(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "train")
    settings = settings_of(tmp_path / "train", tmp_path, epochs=1)
    training.fit(begun(settings))
    next((tmp_path / "train" / "0").iterdir()).unlink()
    with pytest.raises(InputError, match=r"the images in .*train are others"):
        begun(settings.model_copy(update={"resume": True}))


def test_a_disk_that_cannot_hold_the_checkpoints_is_known_before_the_images_are_read(
    tiny, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2e9, 1.99e9, 10**7))
    monkeypatch.setattr("supcon.state.load_images", None)
    with pytest.raises(RunError, match=r"take up to 1\d\d MB, and the disk of .* has 10 left: make room"):
        begun(settings_of(tiny, tmp_path, model="efficientnet_lite0"))


def test_what_a_killed_training_left_half_written_is_removed(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    settings.save_dir.mkdir(parents=True)
    left = settings.save_dir / f".{checkpoints.LAST}.unfinished-123456"
    left.write_bytes(b"half")
    begun(settings)
    assert not left.exists()

"""supcon/checkpoints.py: a folder holds one training."""

import pytest
from conftest import begun, settings_of

from retrieval.settings import InputError
from supcon import training


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed_or_replaced(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1)
    training.fit(begun(settings))
    with pytest.raises(
        InputError, match=r"holds another run .*--resume goes on with it, --overwrite moves it"
    ):
        begun(settings)
    changed = settings.model_copy(update={"resume": True, "lr": 0.5, "seed": 3})
    with pytest.raises(InputError, match=r"but --seed was 0 and is 3; --lr was 0.001 and is 0.5"):
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


def test_other_images_are_another_run(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "train")
    settings = settings_of(tmp_path / "train", tmp_path, epochs=1)
    training.fit(begun(settings))
    next((tmp_path / "train" / "0").iterdir()).unlink()
    with pytest.raises(InputError, match=r"the images in .*train are others"):
        begun(settings.model_copy(update={"resume": True}))

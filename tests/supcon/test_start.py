"""supcon/start.py: the network to start from, of any word, or of a training before."""

import json

import pytest
import torch
from conftest import begun, settings_of
from hub import lay_in_hub

from retrieval.backbones.fine_tuned import load_fine_tuned, read_fine_tuned
from retrieval.backbones.zoo import PRETRAINED
from retrieval.errors import InputError
from supcon import training
from supcon.start import load_start, size_for


def test_small_images_are_learned_from_in_small_squares(backbone, tiny, tmp_path):
    from dataclasses import replace

    from PIL import Image

    from get_images import find_images
    from retrieval.backbones.face_crop import FaceCrop

    for side, size in ((8, 96), (100, 128), (150, 192), (250, 224), (1000, 224)):
        folder = tmp_path / str(side)
        folder.mkdir()
        Image.new("RGB", (side * 2, side)).save(folder / "a.png")
        assert size_for(find_images(folder), backbone) == size
    assert size_for(find_images(tiny), replace(backbone, transform=FaceCrop("dlib", 150, 0.3, 0.1))) == 150


def test_the_study_s_networks_take_the_same_path(tiny, tmp_path):
    """ResNet-50 here; SimCLR's is fine-tuned by a command of the README."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), tmp_path / "weights.pth")
    settings = settings_of(
        tiny, tmp_path, model="resnet50", weights=tmp_path / "weights.pth", loss="supcon", epochs=1
    )
    training.fit(begun(settings))
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.mean == (0.485, 0.456, 0.406)
    assert load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu").dimension == 2048


def test_a_network_in_an_onnx_file_cannot_be_tuned(tiny, tmp_path):
    file = tmp_path / "w.onnx"
    for given in ({"model": "arcface"}, {"model": "resnet50", "weights": file}):
        file.write_bytes(b"")
        with pytest.raises(
            InputError, match=r"(arcface|w\.onnx) is a network in an ONNX file.*cannot be fine"
        ):
            load_start(settings_of(tiny, tmp_path, **given), [])


def test_a_network_of_the_hub_is_rebuilt_without_the_hub(tiny, tmp_path, monkeypatch):
    import shutil

    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    network = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": network.pretrained_cfg}
    files = {"config.json": lambda file: file.write_text(json.dumps(config)),
             "model.safetensors": lambda file: save_file(network.state_dict(), file)}  # fmt: skip
    lay_in_hub(tmp_path, "someone/small", **files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = settings_of(tiny, tmp_path, model="timm:hf-hub:someone/small", epochs=1)
    training.fit(begun(settings))
    shutil.rmtree(tmp_path / "hub")
    backbone = load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu")
    assert backbone.dimension == network.num_features
    further = settings_of(
        tiny, tmp_path, model=settings.model, weights=settings.save_dir / "fine_tuned_model.pth"
    )
    assert load_start(further, []).tuned.dimension == network.num_features


def test_a_fine_tuned_checkpoint_is_a_start(tiny, tmp_path):
    first = settings_of(tiny, tmp_path / "first", epochs=1)
    training.fit(begun(first))
    file = first.save_dir / "fine_tuned_model.pth"
    second = settings_of(tiny, tmp_path / "second", loss="supcon", weights=file)
    run = begun(second)
    tuned = read_fine_tuned(file)[1]
    for name, tensor in run.untuned.network.state_dict().items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-5, atol=1e-6)


def test_a_start_that_learned_from_images_set_aside_now_is_warned_of(tiny, tmp_path, caplog):
    first = settings_of(tiny, tmp_path / "first", epochs=1)
    training.fit(begun(first))
    start = {"weights": first.save_dir / "fine_tuned_model.pth"}
    begun(settings_of(tiny, tmp_path / "same", **start))
    assert not caplog.text
    begun(settings_of(tiny, tmp_path / "other", seed=1, **start))
    assert "was trained with --seed 0: if it was on these images, it has learned from some" in caplog.text


def test_a_linear_map_is_learned_further_and_found_again(tiny, tmp_path):
    first = settings_of(tiny, tmp_path / "first", epochs=1, freeze="backbone")
    run = begun(first)
    training.fit(run)
    training.choose(run)
    file = first.save_dir / "fine_tuned_model.pth"
    for freeze in ("backbone", "stem"):
        second = settings_of(tiny, tmp_path / freeze, epochs=1, freeze=freeze, weights=file)
        run = begun(second)
        learned = sum(p.requires_grad for p in run.tuned.network.parameters())
        assert (learned == 1) == (freeze == "backbone")
        training.fit(run)
        training.choose(run)  # which loads the file that it wrote
        assert read_fine_tuned(second.save_dir / "fine_tuned_model.pth")[0].mapped


def test_the_crop_and_the_detector_reach_the_checkpoint(tiny, tmp_path):
    from retrieval.backbones.face_crop import FaceCrop

    settings = settings_of(
        tiny, tmp_path, model="efficientnet_lite0", crop="align", detector="dlib", epochs=1
    )
    training.fit(begun(settings))
    file, expected = settings.save_dir / "fine_tuned_model.pth", FaceCrop("dlib", 224, 0.0, 0.08, "align")
    recipe, _, _ = read_fine_tuned(file)
    assert FaceCrop(**recipe.prepare).of_size(224) == expected
    assert load_fine_tuned(file, "cpu").transform.of_size(224) == expected


@pytest.mark.parametrize(
    ("model", "size", "own", "embedding"),
    [
        ("clip:base", 96, 512, "untuned + tuned"),
        ("clip:base", 64, 512, "mixed weights"),
        ("dinov2", 112, 768, "tuned"),
    ],
)
def test_a_vit_is_tuned_at_a_smaller_size_and_embeds_again(
    model, size, own, embedding, tiny, tmp_path, monkeypatch
):
    """With one block. The sizes of the first and the third are chosen for these small images."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **({"depth": 1} | k)))
    monkeypatch.setattr(
        training, "best_of", lambda found, *_, **__: next((c, "") for c in found if c.embedding == embedding)
    )
    torch.manual_seed(0)
    network = timm.create_model(PRETRAINED[model].network.args[0])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    chosen = None if size in (96, 112) else size
    settings = settings_of(
        tiny, tmp_path, model=model, weights=tmp_path / "weights.pth", epochs=1, image_size=chosen
    )
    run = begun(settings)
    assert (run.untuned.transform.size, run.tuned.transform.size) == (224, size)
    training.fit(run)
    training.choose(run)  # which loads the file, and compares its score
    file = settings.save_dir / "fine_tuned_model.pth"
    recipe, tuned, _ = read_fine_tuned(file)
    assert (recipe.embedding, recipe.tuned_size) == (embedding, size)
    assert not torch.equal(tuned["norm.weight"], run.untuned.network.norm.weight.cpu())
    joined = embedding == "untuned + tuned"
    backbone = load_fine_tuned(file, "cpu")
    assert (backbone.dimension, backbone.transform.size) == (own * (1 + joined), 224 if joined else size)
    further = settings_of(tiny, tmp_path / "further", model=model, weights=file, image_size=None)
    assert begun(further).tuned.transform.size == (size if size < 112 else 112)


def test_a_size_that_is_no_multiple_of_the_patch_is_a_sentence(tiny, tmp_path):
    import timm

    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    weights = tmp_path / "weights.pth"
    settings = settings_of(tiny, tmp_path, model=f"timm:{name}", weights=weights, image_size=100)
    with pytest.raises(
        InputError, match=r"its patches have 16, and its input must be a multiple .* 96 or 112"
    ):
        begun(settings)

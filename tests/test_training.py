"""supcon/training.py, steps.py and state.py: it learns, goes on bit by bit, and says when it cannot."""

import json
import logging
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import lay_in_hub

import fine_tuning
from retrieval.fine_tuned import load_fine_tuned, read_fine_tuned
from retrieval.settings import InputError, RunError
from supcon import state, steps, training
from supcon.batches import Split, find_and_split
from supcon.checkpoints import open_folder
from supcon.start import load_start, size_for
from supcon.variants import VARIANTS, choices_of


@pytest.fixture(scope="session")
def tiny(few):
    """Four classes of six digits each."""
    return few / "gallery"


def settings_of(folder, tmp_path, **given):
    small = {"image_size": 32, "batch_size": 8, "epochs": 2, "device": "cpu", "val_share": 0.34}
    return fine_tuning.Settings(train_dir=folder, save_dir=tmp_path / "save", **(small | given))


def begun(settings):
    choices, split = choices_of(settings), find_and_split(settings)
    saved = open_folder(settings, split)
    return state.begin(settings, choices, split, load_start(settings, split.train), saved)


def weights_of(settings):
    """Of the state that was saved last."""
    saved = torch.load(settings.save_dir / "last.pth", weights_only=True)
    return {name: tensor for part in ("tuned", "head") for name, tensor in saved[part].items()}


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


# Measured on the tiny set, first and last of ten epochs: ce 2.0 → 0.4, supcon 2.8 → 2.0 (it cannot fall below
# the logarithm of the positives, 1.6), nt_xent 2.3 → 0.03 (in thirty), arcface 6.0 → 0.4, cosface 4.5 → 0.1,
# proxy_anchor 9.7 → 0.6, triplet 0.24 → 0.0, ce+supcon 3.6 → 1.3.
FALLS_BELOW = {"ce": 0.9, "supcon": 2.3, "nt_xent": 1.0, "arcface": 2.0, "cosface": 1.5, "proxy_anchor": 3.0,
               "triplet": 0.1, "ce+supcon": 2.0}  # fmt: skip


@pytest.mark.parametrize("loss", VARIANTS)
def test_every_variant_overfits_a_tiny_set_and_then_retrieves_it_perfectly(loss, tiny, tmp_path):
    epochs, batch_size = (30, 24) if loss == "nt_xent" else (10, 12)
    settings = settings_of(tiny, tmp_path, loss=loss, epochs=epochs, image_size=48, augmentation="gentle",
                           freeze="bn", batch_size=batch_size)  # fmt: skip
    choices, split = choices_of(settings), find_and_split(settings)
    everything = sorted([*split.train, *split.validation], key=lambda file: file.name)
    split = Split(everything, everything, split.by)  # to overfit: what it learns from is what it retrieves
    run = state.begin(
        settings, choices, split, load_start(settings, split.train), open_folder(settings, split)
    )
    training.fit(run)
    history = run.progress.history
    assert history[-1]["loss"] < FALLS_BELOW[loss] < history[0]["loss"]
    assert max(line["top_1"] for line in history) == 1.0


@pytest.mark.parametrize("more", [{}, {"loss": "supcon", "memory": 16, "ema": 0.9}, {"freeze": "backbone"}])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_going_on_after_any_step_gives_bitwise_the_weights_of_the_undisturbed_run(
    stop_after, more, tiny, tmp_path, monkeypatch
):
    whole = settings_of(tiny, tmp_path / "whole", **more)
    training.fit(begun(whole))

    halves = settings_of(tiny, tmp_path / "halves", **more)
    run, real, taken = begun(halves), steps.step, []

    def step(*arguments):
        taken.append(real(*arguments))
        if len(taken) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(training, "step", step)
    with pytest.raises(KeyboardInterrupt):
        training.fit(run)
    assert run.progress.epoch * 2 + run.progress.step == stop_after
    training.fit(begun(halves.model_copy(update={"resume": True})))
    assert_same(weights_of(whole), weights_of(halves))
    lines = [[json.loads(line) for line in (s.save_dir / "history.jsonl").read_text().splitlines()]
             for s in (whole, halves)]  # fmt: skip
    for undisturbed, gone_on in zip(*lines, strict=True):
        assert undisturbed["loss"] == gone_on["loss"]
        assert undisturbed["score"] == gone_on["score"]


def test_cached_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    """GradCache: a contrastive batch in parts has the gradients of the batch, in every weight."""
    gradients = []
    for micro_batch in (None, 5, 1):
        settings = settings_of(
            tiny, tmp_path / str(micro_batch), loss="supcon", freeze="bn", micro_batch=micro_batch
        )
        run = begun(settings)
        run.settings = settings.model_copy(update={"clip": 1e9})
        run.optimizer.step = lambda: None
        steps.step(run, np.arange(8), seed=3)
        gradients.append({name: p.grad for name, p in run.tuned.network.named_parameters()}
                         | {name: p.grad for name, p in run.head.named_parameters()})  # fmt: skip
    for in_parts in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                in_parts[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()
            )


@pytest.mark.parametrize("more", [{"loss": "ce"}, {"loss": "supcon", "memory": 32}])
def test_a_step_that_is_tried_again_is_the_same_step(more, tiny, tmp_path, monkeypatch):
    """Out of memory after the head was called: the dropout is drawn again alike, no memory counts twice."""
    losses = []
    for fails in (False, True):
        run = begun(settings_of(tiny, tmp_path / str(fails), micro_batch=8, **more))
        real, failed = steps._gradients, []

        def gradients(*arguments, real=real, failed=failed, fails=fails):
            loss = real(*arguments)
            if fails and not failed:
                failed.append(True)
                raise RuntimeError("CUDA out of memory")
            return loss

        monkeypatch.setattr(steps, "_gradients", gradients)
        losses.append([steps.step(run, np.arange(8), seed=3), steps.step(run, np.arange(8, 16), seed=4)])
        monkeypatch.setattr(steps, "_gradients", real)
        if "memory" in more:
            assert int(run.head.memory.seen) == 32
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_batch_that_does_not_fit_is_halved_with_the_same_gradients(tiny, tmp_path, monkeypatch, caplog):
    run = begun(settings_of(tiny, tmp_path, loss="supcon"))
    real = steps._features

    def features(run, pixels):
        if len(pixels) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(run, pixels)

    monkeypatch.setattr(steps, "_features", features)
    with caplog.at_level(logging.WARNING):
        steps.step(run, np.arange(8), seed=3)
    assert run.micro_batch == 4
    assert "does not fit into the memory of cpu: 4 views at once" in caplog.text
    monkeypatch.setattr(steps, "_features", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RunError, match="not one image fits into the memory of cpu"):
        steps.step(run, np.arange(8), seed=3)


def test_the_checkpoint_embeds_as_it_was_validated(tiny, tmp_path, caplog):
    settings = settings_of(tiny, tmp_path, epochs=1)
    with caplog.at_level(logging.INFO):
        run = begun(settings)
        training.fit(run)
        training.choose(run)
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.word == "efficientnet_lite0"
    assert recipe.classes == list("0123")
    assert recipe.settings["lr"] == settings.lr
    assert recipe.settings["label_smoothing"] == 0.1  # the loss's own
    assert set(recipe.versions) == {"python", "torch", "torchvision", "timm"}
    assert recipe.metrics["epoch"] == 1
    assert len(recipe.metrics["candidates"]) == 8
    from supcon.validation import validate

    backbone = load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu")
    assert validate(run.validation, backbone)["score"] == recipe.metrics["tuned"]["score"]
    assert recipe.metrics["tuned"]["score"] in recipe.metrics["candidates"].values()
    for words in (
        "untuned: top-1",
        "a loss that stays at about 1.39",
        "epoch 1 of 1: loss",
        "before: ",
        "after: ",
    ):
        assert words in caplog.text
    assert (settings.save_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("embedding", ["untuned + tuned", "mixed weights"])
def test_whatever_embedding_is_chosen_the_checkpoint_has_the_score_of_the_choice(
    embedding, tiny, tmp_path, monkeypatch
):
    from supcon.validation import validate

    settings = settings_of(tiny, tmp_path, epochs=1)
    run = begun(settings)
    training.fit(run)
    monkeypatch.setattr(
        training, "best_of", lambda found, _: next(c for c in found if c.embedding == embedding)
    )
    training.choose(run)
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.embedding == embedding
    figures = validate(run.validation, load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu"))
    figures["mean_cosine"] = pytest.approx(figures["mean_cosine"], abs=1e-5)
    assert recipe.metrics["tuned"] == training.told(figures)


def test_a_training_that_came_to_its_end_is_not_chosen_from_twice(tiny, tmp_path, caplog):
    settings = settings_of(tiny, tmp_path, epochs=1)
    run = begun(settings)
    training.fit(run)
    training.choose(run)
    before = (settings.save_dir / "fine_tuned_model.pth").read_bytes()
    with caplog.at_level(logging.INFO):
        run = begun(settings.model_copy(update={"resume": True}))
        training.fit(run)
        training.choose(run)
    assert "this training had come to its end" in caplog.text
    assert (settings.save_dir / "fine_tuned_model.pth").read_bytes() == before


def test_tuned_no_better_than_untuned_is_said_loudly_and_stays_near_it(tiny, tmp_path, caplog):
    settings = settings_of(tiny, tmp_path, epochs=1)
    run = begun(settings)
    training.fit(run)
    run.progress.untuned |= {"score": 1000.0, "points": [1000] * 8}
    with caplog.at_level(logging.WARNING):
        training.choose(run)
    assert "NOT SHOWN TO BE BETTER THAN UNTUNED: " in caplog.text
    assert "on 8 validation images. Submit with model_not_tuned.py" in caplog.text
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert (recipe.embedding, recipe.weight) == ("untuned + tuned", 0.5)  # the nearest to it


def test_minutes_end_in_time_with_the_best_so_far(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=1000, minutes=0.2)
    started = time.monotonic()
    run = begun(settings)
    training.fit(run)
    training.choose(run)
    assert 1 <= run.progress.epoch < 1000
    assert time.monotonic() - started < 60  # 12 s, and room for a slow machine
    assert (
        run.optimizer.param_groups[0]["lr"] < 0.2 * run.optimizer.param_groups[0]["rate"]
    )  # it had come down
    assert (settings.save_dir / "fine_tuned_model.pth").exists()


def test_minutes_that_are_over_before_the_first_step_are_a_sentence(tiny, tmp_path):
    run = begun(settings_of(tiny, tmp_path, minutes=0.001))
    with pytest.raises(
        RunError, match=r"--minutes 0\.001 are over before the first step: reading the images"
    ):
        training.fit(run)


def test_one_step_without_a_finite_loss_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path, epochs=1))
    real, taken = run.head.forward, []

    def forward(features, labels):
        taken.append(real(features, labels))
        return taken[-1] * float("nan") if len(taken) == 1 else taken[-1]

    monkeypatch.setattr(run.head, "forward", forward)
    training.fit(run)
    (line,) = run.progress.history
    assert line["skipped_steps"] == 1
    assert line["loss"] == taken[1].item()


def test_a_training_that_goes_on_after_its_minutes_chooses_again_and_keeps_the_better(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=4)
    run = begun(settings)
    run.settings = settings.model_copy(update={"epochs": 2})
    training.fit(run)
    training.choose(run)
    run.progress.kept = 2000.0  # what was chosen is better than any epoch to come
    run.settings = settings
    state.save(run)
    before = (settings.save_dir / "fine_tuned_model.pth").read_bytes()
    run = begun(settings.model_copy(update={"resume": True}))
    training.fit(run)
    assert (settings.save_dir / "fine_tuned_model.pth").read_bytes() == before
    training.choose(run)
    assert run.progress.chosen == 4


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


def test_a_file_that_does_not_embed_as_it_was_chosen_is_refused(tiny, tmp_path, monkeypatch):
    settings = settings_of(tiny, tmp_path, epochs=1)
    run = begun(settings)
    training.fit(run)
    real = training.validate
    monkeypatch.setattr(training, "validate", lambda *arguments: real(*arguments) | {"score": 3.0})
    with pytest.raises(RunError, match=r"fine_tuned_model\.pth scores 3 on the validation images where"):
        training.choose(run)


def test_gradients_that_are_not_finite_change_nothing_and_end_in_a_sentence(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path))
    before = {name: tensor.clone() for name, tensor in run.tuned.network.state_dict().items()}
    monkeypatch.setattr(run.head, "forward", lambda features, labels: features.sum() * float("nan"))
    for _ in range(9):
        steps.step(run, np.arange(8), seed=3)
    with pytest.raises(RunError, match=r"gradients of 10 steps in a row were not finite.*a smaller --lr"):
        steps.step(run, np.arange(8), seed=3)
    assert_same(before, run.tuned.network.state_dict())


def test_a_network_that_does_not_learn_is_noticed_at_the_first_step(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path))
    real = steps._features
    monkeypatch.setattr(steps, "_features", lambda *arguments: real(*arguments).detach().requires_grad_())
    with pytest.raises(RunError, match="a step has changed no weight of the network"):
        training.fit(run)


def test_collapsed_embeddings_are_noticed(tiny, tmp_path, monkeypatch, caplog):
    run = begun(settings_of(tiny, tmp_path, epochs=1))
    monkeypatch.setattr(training, "COLLAPSED", -1.0)
    with caplog.at_level(logging.WARNING):
        training.fit(run)
    assert re.search(
        r"the embeddings have collapsed: two images have a cosine of [\d.]+ in the mean", caplog.text
    )


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


def test_small_images_are_learned_from_in_small_squares(backbone, tiny, tmp_path):
    from dataclasses import replace

    from PIL import Image

    from get_images import find_images
    from retrieval.faces import FaceCrop

    for side, size in ((8, 96), (100, 128), (150, 192), (250, 224), (1000, 224)):
        folder = tmp_path / str(side)
        folder.mkdir()
        Image.new("RGB", (side * 2, side)).save(folder / "a.png")
        assert size_for(find_images(folder), backbone) == size
    assert size_for(find_images(tiny), replace(backbone, prepare=FaceCrop("dlib", 150, 0.3, 0.1))) == 150


@pytest.mark.parametrize("word", ["simclr", "resnet50"])
def test_the_study_s_networks_take_the_same_path(word, tiny, tmp_path, monkeypatch):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), tmp_path / "weights.pth")
    settings = settings_of(
        tiny, tmp_path, model=word, weights=tmp_path / "weights.pth", loss="supcon", epochs=1
    )
    run = begun(settings)
    training.fit(run)
    training.choose(run)
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.mean == ((0.0,) * 3 if word == "simclr" else (0.485, 0.456, 0.406))
    assert load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu").dimension in (2048, 4096)


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


def test_a_fine_tuned_checkpoint_is_a_start(tiny, tmp_path):
    first = settings_of(tiny, tmp_path / "first", epochs=1)
    training.fit(begun(first))
    file = first.save_dir / "fine_tuned_model.pth"
    second = settings_of(tiny, tmp_path / "second", loss="supcon", weights=file)
    run = begun(second)
    tuned = read_fine_tuned(file)[1]
    for name, tensor in run.untuned.network.state_dict().items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-5, atol=1e-6)

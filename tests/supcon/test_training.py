"""supcon/training.py, steps.py and state.py: it learns, goes on bit by bit, and says when it cannot."""

import json
import logging
import os
import platform
import re
import signal
import threading
import time

import pytest
import torch
from conftest import SMALL, assert_same, begun, settings_of

from retrieval.backbones.backbone import package_versions
from retrieval.backbones.fine_tuned import ALONE, JOINED, MIXED, load_fine_tuned, read_fine_tuned
from retrieval.errors import InputError, RunError
from supcon import state, steps, training
from supcon.batches import Split, find_and_split
from supcon.checkpoints import open_folder
from supcon.start import load_start
from supcon.variants import VARIANTS, choices_of


def weights_of(settings):
    """Of the state that was saved last."""
    saved = torch.load(settings.save_dir / "last.pth", weights_only=True)
    return {name: tensor for part in ("tuned", "head") for name, tensor in saved[part].items()}


# Measured on the tiny set, first and last epoch: ce 2.7 → 0.5, supcon 2.8 → 2.0 (the logarithm of the
# number of positives, 1.6, is its lower bound), nt_xent 2.3 → 0.03, arcface 4.0 → 0.1, cosface 2.8 → 0.0,
# proxy_anchor 8.0 → 0.3, triplet 0.12 → 0.0, ce+supcon 3.2 → 1.4.
FALLS_BELOW = {"ce": 0.9, "supcon": 2.3, "nt_xent": 1.0, "arcface": 2.0, "cosface": 1.5, "proxy_anchor": 3.0,
               "triplet": 0.1, "ce+supcon": 2.0}  # fmt: skip
# Copies make an epoch of more steps, so that fewer are validated; to nt_xent a copy is another image.
FROM_RANDOM_WEIGHTS = {"copies": 5, "epochs": 4, "batch_size": 12, "lr": 5e-3, "layer_decay": 1.0}
OF_LITE0 = {"nt_xent": {"copies": 1, "epochs": 25, "batch_size": 24, "model": "efficientnet_lite0"},
            "triplet": {"copies": 5, "epochs": 2, "batch_size": 12,
                        "model": "efficientnet_lite0"}}  # fmt: skip


@pytest.mark.parametrize("loss", VARIANTS)
def test_every_variant_overfits_a_tiny_set_and_then_retrieves_it_perfectly(loss, tiny, tmp_path):
    more = dict(OF_LITE0.get(loss, FROM_RANDOM_WEIGHTS))
    copies = more.pop("copies")
    settings = settings_of(
        tiny, tmp_path, loss=loss, image_size=48, augmentation="gentle", freeze="bn", **more
    )
    choices, split = choices_of(settings), find_and_split(settings)
    everything = sorted([*split.train, *split.validation], key=lambda file: file.name)
    split = Split(everything * copies, everything, split.by)  # it learns from what it retrieves
    with open_folder(settings, split) as saved:
        run = state.begin(settings, choices, split, load_start(settings, split.train), saved)
    training.fit(run)
    history = run.progress.history
    assert history[-1]["loss"] < FALLS_BELOW[loss] < history[0]["loss"]
    assert max(line["top_1"] for line in history) == 1.0


@pytest.fixture(
    params=[{}, {"loss": "supcon", "memory": 16, "ema": 0.9}, {"freeze": "backbone"}], scope="module", ids=str
)
def undisturbed(request, tiny, tmp_path_factory):
    """What a training differs in from others, and its settings after it has come to its end."""
    whole = settings_of(tiny, tmp_path_factory.mktemp("whole"), **request.param)
    training.fit(begun(whole))
    return request.param, whole


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_going_on_after_any_step_gives_bitwise_the_weights_of_the_undisturbed_run(
    stop_after, undisturbed, tiny, tmp_path, monkeypatch
):
    more, whole = undisturbed
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
    for once, gone_on in zip(*lines, strict=True):
        assert once["loss"] == gone_on["loss"]
        assert once["score"] == gone_on["score"]


def test_the_checkpoint_embeds_as_it_was_validated(tiny, tmp_path, caplog):
    settings = settings_of(tiny, tmp_path, epochs=1)
    with caplog.at_level(logging.INFO):
        run = begun(settings)
        training.fit(run)
        training.choose(run)
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.word == SMALL
    assert recipe.classes == list("0123")
    assert recipe.settings["lr"] == settings.lr
    assert recipe.settings["label_smoothing"] == 0.1  # the loss's own
    assert recipe.versions == {"python": platform.python_version()} | package_versions()
    assert recipe.metrics["epoch"] == 1
    assert len(recipe.metrics["candidates"]) == 9
    from supcon.validation import validate

    backbone = load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu")
    assert validate(run.validation, backbone)["score"] == recipe.metrics["tuned"]["score"]
    assert recipe.metrics["tuned"]["score"] in recipe.metrics["candidates"].values()
    for words in (
        "untuned: top-1",
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
        training, "best_of", lambda found, *_, **__: next((c, "") for c in found if c.embedding == embedding)
    )
    training.choose(run)
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert recipe.embedding == embedding
    figures = validate(run.validation, load_fine_tuned(settings.save_dir / "fine_tuned_model.pth", "cpu"))
    figures["mean_cosine"] = pytest.approx(figures["mean_cosine"], abs=1e-5)
    assert recipe.metrics["tuned"] == training.without_points(figures)


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
    settings = settings_of(tiny, tmp_path, epochs=1, model="efficientnet_lite0")
    run = begun(settings)
    training.fit(run)
    run.progress.untuned |= {"score": 1000.0, "points": [1000] * 8}
    with caplog.at_level(logging.WARNING):
        training.choose(run)
    assert "NOT SHOWN TO BE BETTER THAN UNTUNED: " in caplog.text
    assert "of 1000 on 8 validation images; no gain. The result stays near the untuned network" in caplog.text
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert (recipe.embedding, recipe.weight) == ("untuned + tuned", 0.5)  # near it: as good, not better


def test_minutes_end_in_time_with_the_best_so_far(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=10_000, minutes=0.1)
    started = time.monotonic()
    run = begun(settings)
    training.fit(run)
    training.choose(run)
    assert 1 <= run.progress.epoch < 10_000
    assert time.monotonic() - started < 60  # 6 s, and room for a slow machine
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


def test_one_step_without_a_finite_loss_is_skipped_and_counted(tiny, tmp_path, monkeypatch, caplog):
    run = begun(settings_of(tiny, tmp_path, epochs=1))
    real, taken = run.head.forward, []

    def forward(features, labels):
        taken.append(real(features, labels))
        return taken[-1] * float("nan") if len(taken) == 1 else taken[-1]

    monkeypatch.setattr(run.head, "forward", forward)
    with caplog.at_level("INFO", "retrieval"):
        training.fit(run)
    (line,) = run.progress.history
    assert line["skipped_steps"] == 1
    assert line["loss"] == taken[1].item()
    assert "· 1 of 2 steps skipped, without a finite loss ·" in caplog.text
    assert "1 of 2 steps had no finite loss, and nothing was learnt from them" in caplog.text


def test_a_training_that_goes_on_after_its_minutes_chooses_again_and_keeps_the_better(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, epochs=4)
    run = begun(settings)
    run.settings = settings.model_copy(update={"epochs": 2})
    training.fit(run)
    kept = torch.load(settings.save_dir / "best.pth", weights_only=True)
    kept["tuned"] = run.untuned.network.state_dict()  # as if an earlier epoch had been the best
    torch.save(kept, settings.save_dir / "best.pth")
    training.choose(run)
    last = torch.load(settings.save_dir / "last.pth", weights_only=True)["tuned"]
    assert_same(last, run.tuned.network.state_dict())  # it goes on from where its optimiser is
    assert any(not torch.equal(tensor, kept["tuned"][name]) for name, tensor in last.items())
    run.progress.kept = 2000.0  # what was chosen is better than any epoch to come
    run.settings = settings
    state.save(run)
    before = (settings.save_dir / "fine_tuned_model.pth").read_bytes()
    run = begun(settings.model_copy(update={"resume": True}))
    training.fit(run)
    assert (settings.save_dir / "fine_tuned_model.pth").read_bytes() == before
    training.choose(run)
    assert run.progress.chosen == 4


def test_a_folder_is_of_one_training_at_a_time(tiny, tmp_path, monkeypatch):
    settings = settings_of(tiny, tmp_path)
    split = find_and_split(settings)
    unfinished = settings.save_dir / ".last.pth.unfinished-1"
    with open_folder(settings, split) as saved:
        assert saved is None
        unfinished.touch()
        with pytest.raises(InputError, match="another run writes into"), open_folder(settings, split):
            pass
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with open_folder(settings, split):  # another process of the one that is refused
            pass
        monkeypatch.delenv("WORLD_SIZE")
        assert unfinished.exists()  # of the training that runs
    with open_folder(settings, split):
        assert not unfinished.exists()


def test_of_epochs_that_validation_cannot_tell_apart_the_latest_is_kept(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path, epochs=4))
    right = iter([40, 60, 58, 20])  # of a hundred queries
    real = training.validate

    def validate(validation, backbone):
        if run.progress.untuned is None:
            return real(validation, backbone)
        count = next(right)
        points = [1000] * count + [0] * (100 - count)
        return real(validation, backbone) | {"score": 10.0 * count, "points": points}

    monkeypatch.setattr(training, "validate", validate)
    training.fit(run)
    kept = torch.load(run.settings.save_dir / "best.pth", weights_only=True)
    assert kept["metrics"]["epoch"] == 3
    assert run.progress.highest["score"] == 600.0


@pytest.mark.parametrize("embedding", [ALONE, MIXED, JOINED])
def test_a_file_that_does_not_embed_as_it_was_chosen_is_refused(embedding, tiny, tmp_path, monkeypatch):
    """The untuned network is written in the place of the tuned one."""
    settings = settings_of(tiny, tmp_path, epochs=1)
    run = begun(settings)
    training.fit(run)
    real, untuned = training.write_fine_tuned, run.untuned.network.state_dict()
    monkeypatch.setattr(
        training, "write_fine_tuned", lambda *arguments: real(*arguments[:2], untuned, arguments[3])
    )
    monkeypatch.setattr(
        training, "best_of", lambda found, *_, **__: [(c, "") for c in found if c.embedding == embedding][-1]
    )
    with pytest.raises(RunError, match=r"fine_tuned_model\.pth does not embed as .*a cosine of 0\.[0-9]+"):
        training.choose(run)


def test_a_network_that_does_not_learn_is_noticed_at_the_first_step(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path))
    real = steps._features
    monkeypatch.setattr(steps, "_features", lambda *arguments: real(*arguments).detach().requires_grad_())
    with pytest.raises(RunError, match="a step has changed no weight of the network"):
        training.fit(run)


def test_views_made_ahead_change_nothing_and_leave_no_thread(tiny, tmp_path, monkeypatch):
    plain, ahead = (settings_of(tiny, tmp_path / word, loss="supcon") for word in ("plain", "ahead"))
    training.fit(begun(plain))
    monkeypatch.setattr(steps, "PREFETCHING", ("cpu",))
    run, real = begun(ahead), steps.step

    def step(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "step", step)
        with pytest.raises(KeyboardInterrupt):
            training.fit(run)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]
    training.fit(begun(ahead.model_copy(update={"resume": True})))
    assert_same(weights_of(plain), weights_of(ahead))


def test_collapsed_embeddings_are_noticed(tiny, tmp_path, monkeypatch, caplog):
    run = begun(settings_of(tiny, tmp_path, epochs=1))
    monkeypatch.setattr(training, "COLLAPSED", -1.0)
    with caplog.at_level(logging.WARNING):
        training.fit(run)
    assert re.search(
        r"the embeddings have collapsed: two images have a cosine of [\d.]+ in the mean", caplog.text
    )

"""supcon/steps.py: one step has the gradients of its batch, whatever fits into the memory."""

import logging
import threading

import numpy as np
import pytest
import torch
from conftest import assert_same, begun, settings_of

from retrieval.errors import RunError
from supcon import steps


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
    assert "does not fit into the memory of cpu: trying 4 at once" in caplog.text
    monkeypatch.setattr(steps, "_features", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RunError, match="not one image fits into the memory of cpu"):
        steps.step(run, np.arange(8), seed=3)


def test_gradients_that_are_not_finite_change_nothing_and_end_in_a_sentence(tiny, tmp_path, monkeypatch):
    run = begun(settings_of(tiny, tmp_path))
    before = {name: tensor.clone() for name, tensor in run.tuned.network.state_dict().items()}
    monkeypatch.setattr(run.head, "forward", lambda features, labels: features.sum() * float("nan"))
    for _ in range(9):
        steps.step(run, np.arange(8), seed=3)
    with pytest.raises(RunError, match=r"gradients of 10 steps in a row were not finite.*a smaller --lr"):
        steps.step(run, np.arange(8), seed=3)
    assert_same(before, run.tuned.network.state_dict())


def test_views_that_find_no_room_beside_the_step_before_are_made_by_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PREFETCHING", ("cpu",))
    run = begun(settings_of(tiny, tmp_path))
    wanted = steps.step(begun(settings_of(tiny, tmp_path / "other")), np.arange(8), seed=3)
    real = steps.augment

    def augment(*arguments):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(steps, "augment", augment)
    ((_, _, views),) = steps.with_views(run, [(np.arange(8), 3)])
    assert views is None
    assert steps.step(run, np.arange(8), 3) == wanted

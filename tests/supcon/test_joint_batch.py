"""supcon/joint_batch.py: several real processes take the steps, and write the files, of one."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, assert_same, begun, run, settings_of, small_weights

from retrieval import distributed
from retrieval.errors import InputError
from supcon import joint_batch, state, steps, training

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
FLAGS = ("--image_size", 32, "--device", "cpu", "--val_share", 0.34)
# Takes three steps of each case and writes, for its process: the losses, the first gradients, the weights.
STEPS = """
import sys
from pathlib import Path

import torch

sys.path[:0] = {paths!r}
from conftest import begun, settings_of
from retrieval import distributed
from supcon import steps

torch.set_num_threads(1)
real = steps._features


def take_three_steps(case, out):
    more = dict(word.split("=") for word in case.split())
    fails, failed = more.pop("fails", ""), []
    run = begun(settings_of(Path(sys.argv[2]), out, **more))

    def features(run, pixels):
        if str(distributed.rank()) == fails and len(failed) < 2:
            failed.append(len(pixels))
            if len(failed) == 2 or len(pixels) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(run, pixels)

    steps._features = features
    batches = [rows for rows, _ in steps.planned_steps(run)]
    for group in run.optimizer.param_groups:
        group["eps"] = 1e-3  # else AdamW divides a gradient of next to nothing, which is noise, by itself
    parts = {{"network": run.tuned.network, "head": run.head}}
    losses = [steps.step(run, batches[0], 0)]
    gradients = {{f"{{word}}.{{name}}": p.grad.clone() for word, part in parts.items()
                 for name, p in part.named_parameters() if p.grad is not None}}
    losses += [steps.step(run, batches[number % 2], number) for number in (1, 2)]
    weights = {{f"{{word}}.{{name}}": tensor for word, part in parts.items()
               for name, tensor in part.state_dict().items()}}
    torch.save([losses, gradients, weights, run.micro_batch], out / f"{{distributed.rank()}}.pt")


for number, case in enumerate(sys.argv[3:]):
    take_three_steps(case, Path(sys.argv[1]) / str(number))
"""


def after_three_steps(folder, tmp_path, count, *cases):
    """For each case (losses, the first gradients, weights, views at once) of each process."""
    script, out = tmp_path / "steps.py", tmp_path / f"of-{count}"
    script.write_text(STEPS.format(paths=[str(ROOT), str(ROOT / "tests")]))
    for number in range(len(cases)):
        (out / str(number)).mkdir(parents=True)
    if count == 1:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [str(script), str(out), str(folder), *cases])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(steps, "_features", steps._features)  # what the script puts there goes with it
            try:
                runpy.run_path(str(script))
            finally:
                torch.set_num_threads(threads)
    else:
        done = run(*TORCHRUN, count, script, out, folder, *cases, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    return [
        [torch.load(file, weights_only=True) for file in sorted((out / str(number)).glob("*.pt"))]
        for number in range(len(cases))
    ]


def assert_same_steps(found, wanted):
    losses, gradients, weights, _ = wanted
    assert found[0][0] == pytest.approx(losses[0], abs=1e-5)
    assert found[0] == pytest.approx(losses, abs=1e-3)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=close, msg=name)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[2][name], tensor, rtol=0, atol=1e-4, msg=name)


def assert_steps_of_one(found, count, one):
    assert len(found) == count
    for each in found:
        assert_same_steps(each, one)
        assert_same(each[2], found[0][2])  # none drifts from another


def test_three_processes_take_the_steps_of_one_also_where_memory_is_too_small_for_one_of_them(tiny, tmp_path):
    """Batches of 8 in shares of 3, 3 and 2.

    Memory fails before the features are gathered, and after: where they are sent through again.
    """
    supcon = "loss=supcon memory=32 ema=0.9"
    (ce,), (one,) = after_three_steps(tiny, tmp_path, 1, "loss=ce", supcon)
    of_ce, found, halved = after_three_steps(tiny, tmp_path, 3, "loss=ce", supcon, f"{supcon} fails=1")
    assert_steps_of_one(of_ce, 3, ce)
    assert_steps_of_one(found, 3, one)
    assert_steps_of_one(halved, 3, one)
    assert [each[3] for each in found] == [6, 6, 6]
    assert [each[3] for each in halved] == [1, 1, 1]


def test_shares_are_as_large_as_each_other_but_for_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        shares.append(distributed.shard(8))
    assert shares == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert torch.equal(
        joint_batch.own_rows(torch.arange(16).view(16, 1), 2).flatten(), torch.tensor([6, 7, 14, 15])
    )


# ---- the script


def flags(folder, out, *more):
    network = ("--model", SMALL, "--weights", small_weights(out.parent))
    return (
        "fine_tuning.py",
        "--train_dir",
        folder,
        "--save_dir",
        out,
        "--batch_size",
        8,
        *network,
        *FLAGS,
        *more,
    )


def test_more_processes_than_a_batch_has_images_are_a_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "world_size", lambda: 3)
    with pytest.raises(
        InputError, match="a batch of 2 images has no share for each of 3 processes: give a lar"
    ):
        begun(settings_of(tiny, tmp_path, batch_size=2))


@pytest.fixture
def begun_two(tiny, tmp_path):
    """A training of two processes that has ended an epoch, the numbers of its processes, and what it says."""
    arguments = [*map(str, (*TORCHRUN, 2, *flags(tiny, tmp_path / "two", "--epochs", 1000)))]
    command = [sys.executable, *[str(ROOT / part) if part.endswith(".py") else part for part in arguments]]
    said, log = tmp_path / "log", (tmp_path / "log").open("w")
    launched = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    deadline, children = time.monotonic() + 250, []
    try:
        while "epoch 1 of 1000" not in said.read_text():
            assert launched.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(launched.pid)], capture_output=True, text=True
        )
        children = [int(word) for word in listed.stdout.split()]
        yield launched, children, said
    finally:
        launched.terminate()  # which ends its processes
        launched.wait(timeout=60)
        log.close()


def first_loss_of_one(tiny, tmp_path, monkeypatch):
    """The loss of the first epoch of the same training by one process, which ends in the second epoch."""
    run, real, taken = begun(settings_of(tiny, tmp_path / "one", epochs=1000)), steps.step, []

    def step(*arguments):
        taken.append(real(*arguments))
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(training, "step", step)
        with pytest.raises(KeyboardInterrupt):
            training.fit(run)
    return run.progress.history[0]["loss"]


def test_two_processes_train_as_one_and_ctrl_c_and_minutes_end_both_and_one_goes_on(
    begun_two, tiny, tmp_path, monkeypatch
):
    launched, children, said = begun_two
    launched.send_signal(signal.SIGINT)
    launched.wait(timeout=200)
    told = said.read_text()
    assert told.count("epoch 1 of 1000: loss") == 1  # the first process alone speaks
    assert len(re.findall(r"stopped in epoch \d+ after \d steps, and saved: the same command", told)) == 1, (
        told
    )
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    two = tmp_path / "two"
    more = ("--epochs", 1000, "--resume", "--minutes", 0.15)
    done = run(*TORCHRUN, 2, *flags(tiny, two, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on in epoch" in done.stdout
    assert f"wrote {two / 'fine_tuned_model.pth'}" in done.stdout
    assert sorted(os.listdir(two)) == [
        ".lock", "best.pth", "fine_tuned_model.pth", "history.jsonl", "last.pth", "loss.png"
    ]  # fmt: skip
    lines = [json.loads(line) for line in (two / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["loss"] == pytest.approx(first_loss_of_one(tiny, tmp_path, monkeypatch), abs=1e-3)
    settings = settings_of(tiny, tmp_path, save_dir=two, epochs=1000, resume=True)
    alone = begun(settings)
    epoch = alone.progress.epoch
    assert epoch > 0
    alone.settings = settings.model_copy(update={"epochs": epoch + 1})
    training.fit(alone)
    assert alone.progress.epoch == epoch + 1


def test_a_process_that_is_killed_ends_the_others_with_a_sentence(begun_two):
    launched, children, said = begun_two
    os.kill(children[1], signal.SIGKILL)
    assert launched.wait(timeout=200) != 0
    told = said.read_text()
    assert "error: another process of this run has ended" in told
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)

"""retrieval/tracking.py, and what trainings and runs have tracked: real event files, a real offline wandb."""

import json
import logging
import os
import re
import signal
import time

import pytest
import torch
from conftest import assert_same, begun, run, run_here, settings_of

import fine_tuning
from retrieval import tracking
from retrieval.backbones.fine_tuned import read_fine_tuned
from retrieval.errors import InputError
from retrieval.forms import read_form
from retrieval.tracking import check_tracker, track_run
from supcon import steps, training

FAILED = "tracking has failed"


@pytest.fixture(autouse=True)
def _no_wandb_from_outside(monkeypatch, tmp_path):
    """Neither the login nor the settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))


def scalars_of(folder):
    """What TensorBoard shows of the one run tracked below a folder: a name → its (step, value)s."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tracked,) = (folder / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(tracked), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def history_of(settings):
    return [json.loads(line) for line in (settings.save_dir / "history.jsonl").read_text().splitlines()]


def about(pairs):
    """The same steps exactly, and the same values as far as an event file, which is float32, keeps them."""
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


# ---- who may be asked for


LOOK = """
import logging, os, resource, sys
from pathlib import Path
import fine_tuning, retrieval.forms
from retrieval.tracking import check_tracker, start_tracking, track_run
logging.basicConfig(format="%(message)s")
class Form(retrieval.forms.Form):
    seed: int = 3
for tracker in ("none", "tensorboard"):
    check_tracker(tracker)
    track_run(tracker, Path("out"), "name", Form(_cli_parse_args=[]), {"top_1": 0.5})
    print(sorted({"accelerate", "tensorboard", "wandb"} & set(sys.modules)), os.listdir())
with start_tracking("tensorboard", Path("full"), "name", {"lr": 0.1}) as tracking:
    tracking.log({"loss": 1.0}, 1)
    (file,) = Path("full").glob("tensorboard/*/events*")
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, -1))  # as on a full disk
    for step in range(2, 9):
        tracking.log({"loss": 1.0 / step}, step)
print("the run goes on")
"""


@pytest.mark.slow
def test_only_the_tracker_that_is_asked_for_is_imported_and_a_full_disk_is_one_warning(tmp_path):
    pytest.importorskip("tensorboard")
    ended = run("-c", LOOK, cwd=tmp_path)
    none, tensorboard, last = ended.stdout.splitlines()
    assert (none, tensorboard) == ("[] []", "['accelerate', 'tensorboard'] ['out']")
    assert scalars_of(tmp_path / "out") == {"top_1": [(0, 0.5)]}
    assert (ended.returncode, last) == (0, "the run goes on")
    assert ended.stderr.count(FAILED) == 1
    assert "File too large): this run goes on without it" in ended.stderr
    assert scalars_of(tmp_path / "full")["loss"] == [(1, 1.0)]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_a_sentence_before_images_are_looked_for(tracker, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    settings = settings_of(tmp_path / "empty", tmp_path, tracker=tracker)
    monkeypatch.setattr(tracking, "version_of", {"torch": "2"}.get)
    sentence = f"--tracker {tracker} needs the package {tracker}: run pip install {tracker}"
    with pytest.raises(InputError, match=f"^{sentence}$"):
        fine_tuning.main(settings)
    assert not settings.save_dir.exists()


@pytest.mark.slow
def test_a_wandb_that_cannot_log_in_is_a_sentence(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    what, do = "--tracker wandb cannot log in", "run `wandb login`, or set WANDB_MODE=offline"
    for environment, why in [
        ({"WANDB_API_KEY": "x"}, "API key"),
        ({"WANDB_MODE": "no"}, "'no'"),
        ({}, "no key"),
    ]:
        wandb.teardown()  # or it keeps the settings of before
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            with pytest.raises(InputError) as refused:
                check_tracker("wandb")
        assert re.fullmatch(rf"{what} \(.*{why}.*\): {do}", str(refused.value))
    wandb.teardown()
    ended = run_here("fine_tuning.py", "--train_dir", tiny, "--tracker", "wandb", cwd=tmp_path)
    wandb.teardown()
    sentence = f"error: {what} (there is no key): {do}\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)
    assert not (tmp_path / "checkpoints").exists()


def test_the_environment_may_set_it(tiny, monkeypatch):
    monkeypatch.setenv("TRACKER", "tensorboard")
    assert read_form(fine_tuning.Settings, ["--train_dir", str(tiny)]).tracker == "tensorboard"


# ---- a training


def fitted(settings):
    started = begun(settings)
    with started.tracking:
        training.fit(started)
    return started


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A training of two epochs of two steps that nothing disturbed, and the way to embed chosen."""
    pytest.importorskip("tensorboard")
    started = begun(settings_of(tiny, tmp_path_factory.mktemp("whole"), tracker="tensorboard"))
    with started.tracking:
        training.fit(started)
        training.choose(started)
    return started


def test_a_training_shows_its_history_in_tensorboard(whole):
    settings = whole.settings
    shown, history = scalars_of(settings.save_dir), history_of(settings)
    for name in ("top_1", "top_3", "score", "mean_cosine"):
        lines = [whole.progress.untuned, *history]
        assert shown[f"validation/{name}"] == about((2 * i, line[name]) for i, line in enumerate(lines))
    ends = list(zip((2, 4), history, strict=True))
    assert shown["train/epoch"] == [(2, 1), (4, 2)]
    assert shown["train/epoch_loss"] == about((step, line["loss"]) for step, line in ends)
    speeds = [(step, line["images"] / line["seconds"]) for step, line in ends]
    assert shown["train/images_per_second"] == about(speeds)
    steps_of_loss, losses = zip(*shown["train/loss"], strict=True)
    assert steps_of_loss == (1, 2, 3, 4)
    assert [sum(losses[:2]) / 2, sum(losses[2:]) / 2] == pytest.approx([line["loss"] for line in history])
    rates = [rate for _, rate in shown["train/learning_rate"]]
    assert settings.lr > rates[0] > rates[1] > rates[2] > rates[3] > 0
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert shown["chosen/score"] == about([(4, recipe.metrics["tuned"]["score"])])
    (config,) = (settings.save_dir / "tensorboard").glob("*/*/hparams.yml")
    for line in ("lr: 0.001", "loss: ce", "resume: false", "label_smoothing: 0.1"):  # the last by the loss
        assert line in config.read_text().splitlines()


def assert_learned_alike(settings, others):
    one, other = (torch.load(s.save_dir / "best.pth", weights_only=True) for s in (settings, others))
    assert_same(one["tuned"], other["tuned"])


def stop_at(number, monkeypatch, how):
    """Make `how` happen in a step of the training."""
    taken = []

    def step(*arguments):
        taken.append(steps.step(*arguments))
        if len(taken) == number:
            how()
        return taken[-1]

    monkeypatch.setattr(training, "step", step)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("the power is out")


# Ctrl-C in step 3 keeps that step; a crash in step 4 resumes at the end of the first epoch.
@pytest.mark.parametrize(
    ("how", "number", "ends"), [(ctrl_c, 3, KeyboardInterrupt), (crash, 4, RuntimeError)]
)
def test_however_a_training_ends_its_tracking_does_and_a_resumed_one_shows_each_step_once(
    how, number, ends, whole, tiny, tmp_path, monkeypatch
):
    from accelerate.tracking import TensorBoardTracker

    real, finished = TensorBoardTracker.finish, []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finished.append(real(self)))
    halves = settings_of(tiny, tmp_path, tracker="tensorboard")
    stop_at(number, monkeypatch, how)
    with pytest.raises(ends):
        fine_tuning.main(halves)
    assert len(finished) == 1
    assert scalars_of(halves.save_dir)["train/loss"][-1][0] == 3
    monkeypatch.setattr(training, "step", steps.step)
    fitted(halves.model_copy(update={"resume": True}))
    shown, expected = scalars_of(halves.save_dir), scalars_of(whole.settings.save_dir)
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown.pop("train/images_per_second")] == [2, 4]
    assert shown == {tag: expected[tag] for tag in expected if tag in shown}
    assert {tag.partition("/")[0] for tag in expected if tag not in shown} == {"chosen", "train"}


def test_a_checkpoint_of_before_there_were_trackers_resumes_with_one_and_learns_the_same(
    whole, tiny, tmp_path, monkeypatch
):
    settings = settings_of(tiny, tmp_path)
    stop_at(3, monkeypatch, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        fitted(settings)
    assert not (settings.save_dir / "tensorboard").exists()
    saved = torch.load(settings.save_dir / "last.pth", weights_only=True)
    del saved["tracked"], saved["settings"]["tracker"]
    torch.save(saved, settings.save_dir / "last.pth")
    monkeypatch.setattr(training, "step", steps.step)
    fitted(settings.model_copy(update={"resume": True, "tracker": "tensorboard"}))
    shown = scalars_of(settings.save_dir)
    assert [step for step, _ in shown["train/loss"]] == [4]
    assert shown["validation/score"] == about([(4, history_of(settings)[1]["score"])])
    assert_learned_alike(settings, whole.settings)


def test_a_tracker_that_fails_in_a_training_costs_it_nothing(whole, tiny, tmp_path, monkeypatch, caplog):
    settings = settings_of(tiny, tmp_path, tracker="tensorboard")
    started = begun(settings)
    writer = started.tracking.tracker.tracker.file_writer.event_writer
    stop_at(3, monkeypatch, writer.close)  # what comes now raises an OSError
    with caplog.at_level(logging.INFO), started.tracking:
        training.fit(started)
    assert caplog.text.count(FAILED) == 1
    assert "tracking has failed (Writer is closed): this run goes on without it" in caplog.text
    assert [step for step, _ in scalars_of(settings.save_dir)["train/loss"]] == [1, 2]
    assert len(history_of(settings)) == 2
    assert_learned_alike(settings, whole.settings)


# ---- a run of retrieval


FIGURES = {"backbone": "word", "tuned": True, "queries": 8, "k": None, "top_1": 0.5, "top_1_interval": [0, 1],
           "per_class": {"forest": {"top_1": 1.0, "top_1_interval": [0.5, 1]}},
           "seconds": {"embed": 1.5}}  # fmt: skip


def test_the_numbers_of_a_run_are_tracked_under_the_path_to_them(tiny, tmp_path):
    for part in ("one", "other"):
        track_run("tensorboard", tmp_path / part, "timm/a word", settings_of(tiny, tmp_path), FIGURES)
    values = {"queries": 8, "top_1": 0.5, "per_class/forest/top_1": 1, "seconds/embed": 1.5}
    assert scalars_of(tmp_path / "one") == {name: [(0, value)] for name, value in values.items()}
    (one,), (other,) = (os.listdir(tmp_path / part / "tensorboard") for part in ("one", "other"))
    assert one != other  # each run is another one
    assert re.fullmatch(r"\d{8}-\d{6}-timm-a-word-[0-9a-f]{4}", one)


# ---- wandb


def records_of(path):
    """The records of a short .wandb file, LevelDB's: one block, and before each 7 bytes with its length."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, start, records = path.read_bytes(), 7, []
    assert len(data) < 2**15
    while start < len(data):
        end = start + 7 + int.from_bytes(data[start + 4 : start + 6], "little")
        records.append(Record.FromString(data[start + 7 : end]))
        start = end
    return records


def items_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_runs(folder):
    """Of the offline runs below a folder, oldest first: the id, the config and the rows by step."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        config, rows, records = {}, {}, records_of(path)
        for record in records:
            config |= items_of([*record.config.update, *record.run.config.update])
            if record.HasField("history"):
                row = items_of(record.history.item)
                rows.setdefault(row.get("_step", record.history.step.num), {}).update(row)
        (run_id,) = {record.run.run_id for record in records if record.HasField("run")}
        found.append((run_id, config, rows))
    return found


RUNS = """
import logging, psutil, sys
from pathlib import Path
from retrieval.tracking import check_tracker, start_tracking
logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO)
check_tracker("wandb")
with start_tracking("wandb", Path("out"), "a name", {"lr": 0.1, "none": None}) as tracking:
    for step in range(4):
        tracking.log({"loss": 1.0 / (1 + step)}, step)
    tracking.log({"validation": {"score": 2}})
with start_tracking("wandb", Path("out"), "a name", {"lr": 0.1}, tracking.state) as tracking:
    tracking.log({"chosen": {"score": 1}})
    tracking.log({"loss": 0.2}, 4)
with start_tracking("wandb", Path("died"), "other", {"lr": 0.1}) as tracking:
    tracking.log({"loss": 1.0}, 1)
    for child in psutil.Process().children():
        if "wandb" in child.name():
            child.kill()
            child.wait()
            print("killed")
    for step in range(2, 9):
        tracking.log({"loss": 1.0}, step)
print("the run goes on")
"""


@pytest.mark.slow
def test_offline_wandb_runs_are_resumed_at_the_next_step_and_one_that_dies_is_one_warning(tmp_path):
    pytest.importorskip("wandb")
    ended = run("-c", RUNS, cwd=tmp_path, WANDB_MODE="offline")
    assert ended.returncode == 0
    *begun_at, killed, warning, last = ended.stdout.splitlines()  # wandb prints nothing itself
    for line, folder in zip(begun_at, ("out", "out", "died"), strict=True):
        assert re.fullmatch(rf"tracking: wandb sync \S*{folder}/wandb/offline-run-\S+ uploads this run", line)
    assert re.fullmatch(rf"{FAILED} \(.+\): this run goes on without it", warning)
    assert (killed, last) == ("killed", "the run goes on")
    (first, config, rows), (second, _, more) = offline_runs(tmp_path / "out")
    assert first == second
    assert "a-name" in first
    assert (config["lr"], "none" in config) == (0.1, False)
    assert [(step, row["loss"]) for step, row in rows.items()] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    assert rows[3]["validation/score"] == 2
    assert list(more) == [3, 4]
    assert (more[3]["chosen/score"], more[4]["loss"]) == (1, 0.2)
    assert os.listdir(tmp_path / "out") == ["wandb"]
    assert set(os.listdir(tmp_path)) <= {"out", "died", "home"}


ALONE = """
import logging
from pathlib import Path
from retrieval import tracking
logging.basicConfig(format="%(message)s")
tracking.LONGEST_START = 0.3
tracking.check_tracker("wandb")
with tracking.start_tracking("wandb", Path("out"), "name", {"lr": 0.1}) as tracked:
    for step in range(8):
        tracked.log({"loss": 1.0}, step)
print("the run goes on")
"""


@pytest.mark.slow
def test_a_wandb_that_nobody_answers_is_one_warning_and_not_waited_for(tmp_path):
    pytest.importorskip("wandb")
    started = time.monotonic()
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    ended = run("-c", ALONE, cwd=tmp_path, **nobody)
    assert (ended.returncode, ended.stdout) == (0, "the run goes on\n"), ended.stderr
    assert re.fullmatch(rf"{FAILED} \(.+\): this run goes on without it\n", ended.stderr)
    assert time.monotonic() - started < 60  # wandb itself waits for 90

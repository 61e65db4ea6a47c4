"""retrieval/tracking.py, and what trainings and runs have tracked: real event files, a real offline wandb."""

import json
import logging
import os
import re
import signal
import sys
import time
from importlib.machinery import PathFinder

import pytest
import torch
from conftest import assert_same, begun, run, settings_of

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
import sys
from pathlib import Path
import fine_tuning, retrieval.forms
from retrieval.tracking import check_tracker, track_run
check_tracker(sys.argv[1])
class Settings(retrieval.forms.Form):
    seed: int = 3
track_run(sys.argv[1], Path("out"), "word", Settings(_cli_parse_args=[]), {"top_1": 0.5})
print(sorted({"accelerate", "tensorboard", "wandb"} & set(sys.modules)))
"""


def test_only_the_tracker_that_is_asked_for_is_imported_and_writes(tmp_path):
    ended = run("-c", LOOK, "none", cwd=tmp_path)
    assert (ended.stdout, ended.stderr, os.listdir(tmp_path)) == ("[]\n", "", [])
    pytest.importorskip("tensorboard")
    ended = run("-c", LOOK, "tensorboard", cwd=tmp_path)
    assert (ended.stdout, os.listdir(tmp_path)) == ("['accelerate', 'tensorboard']\n", ["out"])


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_a_sentence_before_images_are_looked_for(tracker, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    settings = settings_of(tmp_path / "empty", tmp_path, tracker=tracker)
    monkeypatch.setitem(sys.modules, tracker, None)
    sentence = f"--tracker {tracker} needs the package {tracker}: run pip install {tracker}"
    with pytest.raises(InputError, match=f"^{sentence}$"):
        fine_tuning.main(settings)
    assert not settings.save_dir.exists()


def test_a_folder_called_wandb_as_wandb_leaves_them_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(tracking, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert tracking.find_spec("wandb") is not None
    with pytest.raises(InputError, match="needs the package wandb"):
        check_tracker("wandb")


LOCKED_OUT = [({}, "there is no key"), ({"WANDB_API_KEY": "x"}, "API key"), ({"WANDB_MODE": "no"}, "'no'")]


@pytest.mark.parametrize(("environment", "why"), LOCKED_OUT)
def test_a_wandb_that_cannot_log_in_is_a_sentence(environment, why, tiny, tmp_path):
    pytest.importorskip("wandb")
    ended = run("fine_tuning.py", "--train_dir", tiny, "--tracker", "wandb", cwd=tmp_path, **environment)
    assert ended.returncode == 2
    what, do = "error: --tracker wandb cannot log in", "run `wandb login`, or set WANDB_MODE=offline"
    assert re.fullmatch(rf"{what} \(.*{why}.*\): {do}\n", ended.stderr)
    assert not ended.stdout
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


def test_a_tracker_changes_no_bit_of_what_is_learned(whole, tiny, tmp_path):
    plain = fitted(settings_of(tiny, tmp_path)).settings
    assert not (plain.save_dir / "tensorboard").exists()
    one, other = (torch.load(s.save_dir / "best.pth", weights_only=True) for s in (plain, whole.settings))
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


# A crash in step 4 goes on from the end of the first epoch, and in step 2 from the untuned network.
@pytest.mark.parametrize(("how", "number", "last"), [(ctrl_c, 3, 3), (crash, 4, 3), (crash, 2, 1)])
def test_a_training_that_goes_on_shows_each_step_once(how, number, last, whole, tiny, tmp_path, monkeypatch):
    halves = settings_of(tiny, tmp_path, tracker="tensorboard")
    stop_at(number, monkeypatch, how)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        fitted(halves)
    assert scalars_of(halves.save_dir)["train/loss"][-1][0] == last
    monkeypatch.setattr(training, "step", steps.step)
    fitted(halves.model_copy(update={"resume": True}))
    shown, expected = scalars_of(halves.save_dir), scalars_of(whole.settings.save_dir)
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown.pop("train/images_per_second")] == [2, 4]
    assert shown == {tag: expected[tag] for tag in expected if tag in shown}
    assert {tag.partition("/")[0] for tag in expected if tag not in shown} == {"chosen", "train"}


def test_a_checkpoint_of_before_there_were_trackers_goes_on_with_one(tiny, tmp_path, monkeypatch):
    settings = settings_of(tiny, tmp_path)
    stop_at(3, monkeypatch, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        fitted(settings)
    saved = torch.load(settings.save_dir / "last.pth", weights_only=True)
    del saved["tracked"], saved["settings"]["tracker"]
    torch.save(saved, settings.save_dir / "last.pth")
    monkeypatch.setattr(training, "step", steps.step)
    fitted(settings.model_copy(update={"resume": True, "tracker": "tensorboard"}))
    shown = scalars_of(settings.save_dir)
    assert [step for step, _ in shown["train/loss"]] == [4]
    assert shown["validation/score"] == about([(4, history_of(settings)[1]["score"])])


@pytest.mark.parametrize(("how", "ends"), [(ctrl_c, KeyboardInterrupt), (crash, RuntimeError)])
def test_however_a_training_ends_its_tracking_does(how, ends, tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    real, finished = TensorBoardTracker.finish, []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finished.append(real(self)))
    stop_at(2, monkeypatch, how)
    with pytest.raises(ends):
        fine_tuning.main(settings_of(tiny, tmp_path, tracker="tensorboard"))
    assert len(finished) == 1


def test_a_tracker_that_fails_in_a_training_costs_it_nothing(tiny, tmp_path, monkeypatch, caplog):
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


# ---- a run of retrieval


FIGURES = {"backbone": "word", "tuned": True, "queries": 8, "k": None, "top_1": 0.5, "top_1_interval": [0, 1],
           "score": float("nan"), "per_class": {"forest": {"top_1": 1.0, "top_1_interval": [0.5, 1]}},
           "seconds": {"embed": 1.5}}  # fmt: skip


def test_the_numbers_of_a_run_are_tracked_under_the_path_to_them(tiny, tmp_path):
    for part in ("one", "other"):
        track_run("tensorboard", tmp_path / part, "timm/a word", settings_of(tiny, tmp_path), FIGURES)
    values = {"queries": 8, "top_1": 0.5, "per_class/forest/top_1": 1, "seconds/embed": 1.5}
    assert scalars_of(tmp_path / "one") == {name: [(0, value)] for name, value in values.items()}
    (one,), (other,) = (os.listdir(tmp_path / part / "tensorboard") for part in ("one", "other"))
    assert one != other  # each run is another one
    assert re.fullmatch(r"\d{8}-\d{6}-timm-a-word-[0-9a-f]{4}", one)


FULL = """
import logging, os, resource, sys
from pathlib import Path
from retrieval.tracking import start_tracking
logging.basicConfig(format="%(message)s")
with start_tracking("tensorboard", Path("out"), "word", {"lr": 0.1}) as tracking:
    tracking.log({"loss": 1.0}, 1)
    (file,) = Path("out").glob("tensorboard/*/events*")
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, -1))  # as on a full disk
    for step in range(2, 9):
        tracking.log({"loss": 1.0 / step}, step)
print("the run goes on")
"""


def test_a_disk_that_is_full_in_mid_run_is_warned_of_once(tmp_path):
    ended = run("-c", FULL, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "the run goes on\n")
    assert ended.stderr.count(FAILED) == 1
    assert "File too large): this run goes on without it" in ended.stderr
    assert scalars_of(tmp_path / "out")["loss"] == [(1, 1.0)]


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


def test_a_training_shows_its_history_in_an_offline_wandb(tiny, tmp_path):
    pytest.importorskip("wandb")
    settings = settings_of(tiny, tmp_path)
    flags = ["--train_dir", tiny, "--save_dir", settings.save_dir, "--tracker", "wandb"]
    for name in ("image_size", "batch_size", "epochs", "device", "val_share"):
        flags += [f"--{name}", getattr(settings, name)]
    ended = run("fine_tuning.py", *flags, cwd=tmp_path, WANDB_MODE="offline")
    assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    assert f"tracking: wandb sync {settings.save_dir}/wandb/offline-run-" in ended.stdout
    assert "wandb:" not in ended.stdout + ended.stderr  # it prints nothing itself
    ((run_id, config, rows),) = offline_runs(settings.save_dir)
    assert "efficientnet_lite0-ce" in run_id
    assert (config["lr"], config["loss"], config["label_smoothing"]) == (0.001, "ce", 0.1)
    lines = history_of(settings)
    assert [step for step, row in rows.items() if "train/loss" in row] == [1, 2, 3, 4]
    assert [step for step, row in rows.items() if "validation/score" in row] == [0, 2, 4]
    for step, line in zip((2, 4), lines, strict=True):
        assert rows[step]["validation/score"] == line["score"]
        assert rows[step]["train/epoch_loss"] == line["loss"]
        assert (rows[step - 1]["train/loss"] + rows[step]["train/loss"]) / 2 == pytest.approx(line["loss"])
    recipe, _, _ = read_fine_tuned(settings.save_dir / "fine_tuned_model.pth")
    assert rows[4]["chosen/score"] == recipe.metrics["tuned"]["score"]
    assert set(os.listdir(tmp_path)) <= {"save", "home"}


TWICE = """
from pathlib import Path
from retrieval.tracking import start_tracking
with start_tracking("wandb", Path("out"), "word", {"lr": 0.1, "none": None}) as tracking:
    for step in range(4):
        tracking.log({"loss": 1.0 / (1 + step)}, step)
with start_tracking("wandb", Path("out"), "word", {"lr": 0.1}, tracking.state) as tracking:
    tracking.log({"chosen": {"score": 1}})
    tracking.log({"loss": 0.2}, 4)
"""


def test_a_wandb_run_that_goes_on_is_the_same_run_at_the_next_step(tmp_path):
    pytest.importorskip("wandb")
    ended = run("-c", TWICE, cwd=tmp_path, WANDB_MODE="offline")
    assert (ended.returncode, ended.stderr) == (0, "")
    (first, config, rows), (second, _, more) = offline_runs(tmp_path / "out")
    assert first == second
    assert (config["lr"], "none" in config) == (0.1, False)
    assert [(step, row["loss"]) for step, row in rows.items()] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    assert list(more) == [3, 4]
    assert (more[3]["chosen/score"], more[4]["loss"]) == (1, 0.2)
    assert os.listdir(tmp_path / "out") == ["wandb"]


DIES = """
import logging, psutil
from pathlib import Path
from retrieval import tracking
logging.basicConfig(format="%(message)s")
tracking.LONGEST_START = 2
with tracking.start_tracking("wandb", Path("out"), "word", {"lr": 0.1}) as tracked:
    tracked.log({"loss": 1.0}, 1)
    dying = [child for child in psutil.Process().children() if "wandb" in child.name()]
    print(len(dying), "killed")
    for child in dying:
        child.kill()
        child.wait()
    for step in range(2, 9):
        tracked.log({"loss": 1.0}, step)
print("the run goes on")
"""


NOBODY = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}


@pytest.mark.parametrize(("environment", "killed"), [({"WANDB_MODE": "offline"}, 1), (NOBODY, 0)])
def test_a_wandb_that_fails_is_warned_of_once_and_not_waited_for(environment, killed, tmp_path):
    pytest.importorskip("wandb")
    started = time.monotonic()
    ended = run("-c", DIES, cwd=tmp_path, **environment)
    assert (ended.returncode, ended.stdout) == (0, f"{killed} killed\nthe run goes on\n"), ended.stderr
    assert re.fullmatch(rf"{FAILED} \(.+\): this run goes on without it\n", ended.stderr)
    assert time.monotonic() - started < 60  # wandb itself waits for 90

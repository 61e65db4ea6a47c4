"""fine_tuning.py and model_fine_tuned.py, run as a user runs them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, Server, answer, run_here, small_weights

FLAGS = ("--image_size", "32", "--batch_size", "8", "--device", "cpu", "--val_share", "0.34")
TRAIN = ("fine_tuning.py", "--train_dir", "train", *FLAGS)
QUICK = ("--model", SMALL, "--weights", "small.pth")


@pytest.fixture
def trainable(few, tmp_path):
    """A folder with train, query, gallery, and the weights of a small network."""
    small_weights(tmp_path)
    shutil.copytree(few, tmp_path, dirs_exist_ok=True)
    shutil.copytree(few / "gallery", tmp_path / "train")
    return tmp_path


def weights(folder):
    saved = torch.load(folder / "last.pth", weights_only=True)
    return {name: tensor for part in ("tuned", "head") for name, tensor in saved[part].items()}


def test_from_a_folder_to_a_checkpoint_to_a_score(trainable):
    ended = run_here(*TRAIN, *QUICK, "--epochs", "2", cwd=trainable)
    assert ended.returncode == 0, ended.stderr
    for words in (
        "found 24 images of 4 classes: 16 to learn from, 8 to validate on",
        "untuned: top-1",
        "epoch 2 of 2: loss",
        "ways to embed compared",
        "wrote checkpoints/fine_tuned_model.pth",
    ):
        assert words in ended.stdout
    assert sorted(os.listdir(trainable / "checkpoints")) == [
        ".lock", "best.pth", "fine_tuned_model.pth", "history.jsonl", "last.pth", "loss.png"
    ]  # fmt: skip
    lines = [
        json.loads(line) for line in (trainable / "checkpoints" / "history.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "top_1", "top_3", "score", "score_interval", "seconds"} <= set(lines[0])
    shutil.rmtree(trainable / "train")  # the checkpoint needs nothing else
    with Server(answer()) as server:
        ended = run_here("model_fine_tuned.py", "--query_dir", "query", "--gallery_dir", "gallery",
                         cwd=trainable, SERVER_URL=server.url)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"({SMALL} fine-tuned with ce" in ended.stdout
    assert "the server's score: 698" in ended.stdout
    (line,) = map(json.loads, (trainable / "results" / "runs.jsonl").read_text().splitlines())
    assert line["script"] == "model_fine_tuned.py"
    assert json.loads(server.received[0][3])["images"].keys() == {
        f"{label}/{name}" for label in "0123" for name in os.listdir(trainable / "query" / label)
    }


def test_after_a_kill_at_any_moment_it_goes_on_to_bitwise_the_same_weights(trainable):
    flags = (*QUICK, "--epochs", "16", "--loss", "supcon", "--ema", "0.9")
    assert run_here(*TRAIN, *flags, "--save_dir", "whole", cwd=trainable).returncode == 0
    chance = random.Random(0)
    command = [sys.executable, ROOT / TRAIN[0], *TRAIN[1:], *flags, "--save_dir", "killed"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=trainable, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while b"epoch 1 of 16" not in process.stdout.readline():
        assert process.poll() is None
    while not (trainable / "killed" / "last.pth").exists():
        time.sleep(0.01)
    time.sleep(chance.random() * 0.3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    ended = run_here(*TRAIN, *flags, "--save_dir", "killed", "--resume", cwd=trainable)
    assert ended.returncode == 0, ended.stderr
    one, other = weights(trainable / "whole"), weights(trainable / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_saves_and_says_how_to_go_on(trainable):
    command = [sys.executable, ROOT / TRAIN[0], *TRAIN[1:], *QUICK, "--epochs", "1000"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=trainable, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while b"epoch 1 of 1000" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "and saved: the same command with --resume goes on" in errors
    assert "Traceback" not in errors
    assert {"fine_tuned_model.pth", "last.pth"} <= set(os.listdir(trainable / "checkpoints"))
    ended = run_here(*TRAIN, *QUICK, "--epochs", "1000", "--resume", "--minutes", "0.05", cwd=trainable)
    assert ended.returncode == 0, ended.stderr
    assert "wrote checkpoints/fine_tuned_model.pth" in ended.stdout


def test_unlabelled_images_serve_nt_xent(trainable):
    (trainable / "flat").mkdir()
    for path in (trainable / "gallery").glob("*/*.png"):
        shutil.copy(path, trainable / "flat")
    flags = ("--train_dir", "flat", "--loss", "nt_xent", "--epochs", "1", *FLAGS, *QUICK)
    ended = run_here("fine_tuning.py", *flags, cwd=trainable)
    assert ended.returncode == 0, ended.stderr
    assert (
        "found 24 images: 16 to learn from, 8 to validate on (each to be found from a view of it)"
        in ended.stdout
    )


def test_one_image_a_class_is_warned_of(trainable):
    for label in "0123":
        for path in sorted((trainable / "train" / label).iterdir())[1:]:
            path.rename(trainable / "train" / path.stem)
            (trainable / "train" / path.stem).rename(path.with_suffix(".tmp"))
            (trainable / "train" / f"p{path.stem}").mkdir()
            path.with_suffix(".tmp").rename(trainable / "train" / f"p{path.stem}" / path.name)
    ended = run_here(*TRAIN, *QUICK, "--epochs", "1", "--loss", "supcon", cwd=trainable)
    assert ended.returncode == 0, ended.stderr
    assert (
        "there is little to learn from, and validation looks for an image from a view of it" in ended.stderr
    )
    assert "each to be found from a view of it" in ended.stdout


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (("--train_dir", "query/0"), 2, "lie in no class folder"),
        (("--train_dir", "none"), 2, "--train_dir is 'none': there is no folder"),
        (("--loss", "supcom"), 2, "did you mean supcon?"),
        (("--model", "efficientnet_lite9"), 2, "there is no such backbone"),
        (("--batch_size", "1"), 2, "--batch_size 1 holds one image"),
        (("--temperature", "0.2"), 2, "--temperature changes nothing for --loss ce"),
        (("--resume",), 2, "checkpoints holds no last.pth to go on from"),
        (("--save_dir", "train/0/x.png"), 2, "is not a folder but a file"),
        (("--lr", "nan"), 2, "--lr is 'nan'"),
        (("--image_size", "16", "--model", "dlib", "--crop", "none"), 2, "does not take images of 16 pixels"),
    ],
)
def test_wrong_input_is_a_sentence_before_anything_is_learned(trainable, flags, status, sentence):
    picture = next((trainable / "train" / "0").iterdir())
    picture.rename(picture.with_name("x.png"))
    ended = run_here(*TRAIN, *flags, cwd=trainable)
    assert (ended.returncode, "Traceback" in ended.stderr) == (status, False), ended.stderr
    assert sentence in ended.stderr
    assert "untuned:" not in ended.stdout


@pytest.mark.parametrize(
    "flag", ["--model_type", "--crop", "--image_size", "--detector", "--face_margin", "--min_face_size"]
)
def test_what_the_checkpoint_knows_is_no_setting(flag, trainable):
    ended = run_here("model_fine_tuned.py", flag, "1", cwd=trainable)
    assert ended.returncode == 2
    assert f"{flag} is not for this script: the checkpoint of --weights knows it" in ended.stderr


def test_each_script_names_the_other_for_the_other_s_file(trainable):
    torch.save({"a": torch.zeros(1)}, trainable / "a.pth")
    folders = ("--query_dir", "query", "--gallery_dir", "gallery")
    ended = run_here("model_fine_tuned.py", "--weights", "a.pth", *folders, cwd=trainable)
    assert ended.returncode == 2
    assert (
        "a.pth was not written by fine_tuning.py: for other weights run `python model_not_tuned.py"
        in ended.stderr
    )
    torch.save({"recipe": {}, "network": {}}, trainable / "a.pth")
    ended = run_here("model_not_tuned.py", "--weights", "a.pth", *folders, cwd=trainable)
    assert ended.returncode == 2
    assert "run `python model_fine_tuned.py --weights a.pth`" in ended.stderr

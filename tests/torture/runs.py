"""Whole runs and trainings that are killed, fill the disk, run beside each other, or read bad numbers.

    python -m tests.torture.runs --seed 0 --minutes 10

The scripts run as processes on small images. After whatever happened, the saved submission is an old one or a
new one, whole, and the next run gives the bytes of an undisturbed one.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tests.torture.campaign import run, temporary

ROOT = Path(__file__).parent.parent.parent
TICKS = os.sysconf("SC_CLK_TCK")  # of processor time, a second
PATIENCE = 600  # seconds of one process, on a machine that does other work
FLAGS = ("--query_dir=images/query", "--gallery_dir=images/gallery", "--output_dir=out", "--cache_dir=cache",
         "--engine=torch", "--server_url=local", "--device=cpu")  # fmt: skip
RUN = ("model_not_tuned.py", *FLAGS)
TRAINING = ("fine_tuning.py", "--train_dir=images/gallery", "--save_dir=out", "--epochs=2", "--batch_size=8",
            "--image_size=64", "--val_share=0.25", "--device=cpu")  # fmt: skip


# ---- what all cases share -------------------------------------------------------------------------


@functools.cache
def images() -> Path:
    """Make a folder with images of four classes; return it."""
    folder = temporary()
    rng = np.random.default_rng(0)
    for part, count in (("query", 3), ("gallery", 8)):
        for label in range(4):
            (folder / part / str(label)).mkdir(parents=True)
            for number in range(count):
                levels = rng.integers(0, 256, (6, 6, 3)) // 2 + rng.integers(0, 256, 3) * (1 + label) // 8
                image = Image.fromarray(levels.astype(np.uint8)).resize((48, 48))
                image.save(folder / part / str(label) / f"{number}.png")
    return folder


class Undisturbed(NamedTuple):
    """The folder of an undisturbed run or training, and its processor time in seconds."""

    folder: Path
    seconds: float


@functools.cache
def undisturbed(*command: str) -> Undisturbed:
    """Run a script to its end in a folder of its own."""
    folder = temporary()
    (folder / "images").symlink_to(images())
    process = start(folder, *command)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{command} ended with {status}: {said[-1000:]}"
    return Undisturbed(folder, used.ru_utime + used.ru_stime)


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script, or with a leading "-m" a module, in a process group of its own."""
    first = [command[0]] if command[0] == "-m" else [str(ROOT / command[0])]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = (sys.executable, *first, *command[1:])
    return subprocess.Popen(command, cwd=folder, env=variables, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def right(folder: Path, *command: str, **environment: str) -> str:
    """Run a script that has to end well; return what it printed."""
    process = start(folder, *command, **environment)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, f"{command} ended with {process.returncode}: {said[-1000:]}"
    return said


def kill_at(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill a process and its children once it has had this much processor time; False if it ended before."""
    while process.poll() is None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        if (int(fields[11]) + int(fields[12])) / TICKS >= seconds:  # in user and in system mode
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.005)
    process.communicate()
    return False


# ---- promises -------------------------------------------------------------------------------------


def submission_of(folder: Path) -> bytes | None:
    """Return the bytes of a folder's submission, or None where there is none."""
    file = folder / "submission.json"
    return file.read_bytes() if file.exists() else None


def same_submission(folder: Path, *flags: str) -> list[str]:
    """Return what is wrong with a submission that an undisturbed run with these flags would have written."""
    same = submission_of(folder) == submission_of(undisturbed(*RUN, *flags).folder / "out")
    return [] if same else [f"{folder} holds another submission"]


def same_weights(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint that an undisturbed training would have written."""
    one, other = (torch.load(place / "fine_tuned_model.pth", weights_only=True)
                  for place in (undisturbed(*TRAINING).folder / "out", folder))  # fmt: skip
    pairs = [(one["network"][name], other["network"][name]) for name in one["network"]]
    return [] if all(torch.equal(*pair) for pair in pairs) else [f"{folder} holds other weights"]


def spoken(process: subprocess.Popen[str], said: str) -> list[str]:
    """Return what is wrong with the end of a process: it ended well, or with a sentence."""
    if "Traceback" in said:
        return ["a traceback: " + said[said.index("Traceback") :][-600:]]
    sentence = process.returncode > 0 and "error: " in said
    return [] if process.returncode == 0 or sentence else [f"ended with {process.returncode}: {said[-300:]}"]


# ---- kinds of cases -------------------------------------------------------------------------------


def killed_run(rng: random.Random, folder: Path) -> list[str]:
    """A run is killed, at any moment of its processor time; then it runs again, and nothing is lost."""
    earlier = b'{"groupname": "of an earlier run", "images": {}}'
    (folder / "out").mkdir()
    (folder / "out" / "submission.json").write_bytes(earlier)
    kill_at(start(folder, *RUN), rng.random() * undisturbed(*RUN).seconds)
    old_is_there = earlier in map(Path.read_bytes, (folder / "out").rglob("submission.json"))
    broken = [] if old_is_there else ["the old submission is lost"]
    if submission_of(folder / "out") not in (None, earlier):
        broken += same_submission(folder / "out")
    right(folder, *RUN)
    return broken + same_submission(folder / "out")


def killed_training(rng: random.Random, folder: Path) -> list[str]:
    """A training is killed once or twice, and goes on to bitwise the weights of an undisturbed one."""
    whole = undisturbed(*TRAINING).seconds
    for _ in range(rng.choice([1, 1, 2])):
        kill_at(start(folder, *TRAINING, *_resumed(folder)), rng.random() * whole)
    right(folder, *TRAINING, *_resumed(folder))
    return same_weights(folder / "out")


def _resumed(folder: Path) -> list[str]:
    return ["--resume" if (folder / "out" / "last.pth").exists() else "--overwrite"]


def full_disk(rng: random.Random, folder: Path) -> list[str]:
    """The disk of the results, or of the cache, fills up after a number of bytes."""
    kind = rng.choice(["results_disk", "cache_disk"])
    small, flags = folder / kind, ("--output_dir=results_disk", "--cache_dir=cache_disk")
    small.mkdir()
    size = int(2 ** rng.uniform(12, 25))  # 4 kB to 32 MB
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small], check=True)
    try:
        process = start(folder, *RUN, *flags)
        said = process.communicate(timeout=PATIENCE)[0]
        broken = spoken(process, said)
        if process.returncode and kind not in said:
            broken.append(f"the sentence does not name {kind}: {said[-300:]}")
        if submission_of(folder / "results_disk") is not None:
            broken += same_submission(folder / "results_disk")
        elif process.returncode == 0 or kind == "cache_disk":
            broken.append(f"no submission with {size} bytes for {kind}: {said[-300:]}")
        return broken
    finally:
        subprocess.run(["umount", small], check=True)


def two_at_once(rng: random.Random, folder: Path) -> list[str]:
    """Two runs with one cache, and perhaps one folder of results; a moment lies between them."""
    outs = rng.choice([("out", "out"), ("out", "other")])
    whole = undisturbed(*RUN).seconds
    processes = []
    for out in outs:
        processes.append(start(folder, *RUN, f"--output_dir={out}"))
        time.sleep(rng.choice([0, rng.random() * whole]))
    broken = []
    for process in processes:
        broken += spoken(process, process.communicate(timeout=PATIENCE)[0])
    return broken + [wrong for out in set(outs) for wrong in same_submission(folder / out)]


def bad_numbers(rng: random.Random, folder: Path) -> list[str]:
    """Some weights are no numbers, infinite, huge, tiny or zero."""
    checkpoint = torch.load(undisturbed(*TRAINING).folder / "out" / "fine_tuned_model.pth", weights_only=True)
    network = checkpoint["network"]
    for name in rng.sample(sorted(network), rng.choice([1, 3, len(network)])):
        if network[name].is_floating_point():
            value = rng.choice([float("nan"), float("inf"), 0.0, 1e38, 1e-40, -1.0])
            share = torch.rand(network[name].shape) < rng.choice([1.0, 0.01])
            network[name] = torch.where(share, torch.tensor(value), network[name])
    torch.save(checkpoint, folder / "bad.pth")
    process = start(folder, "model_fine_tuned.py", *FLAGS, "--weights=bad.pth")
    said = process.communicate(timeout=PATIENCE)[0]
    broken = spoken(process, said)
    if process.returncode == 0:
        ranked = json.loads(submission_of(folder / "out"))["images"]
        if len(ranked) != 12 or any(len(set(names)) != 10 for names in ranked.values()):
            broken.append("the submission has not ten names for each query")
    return broken


def other_circumstances(rng: random.Random, folder: Path) -> list[str]:
    """Another batch size, number of threads or processes, or state of the cache: the same bytes."""
    cache, engine = rng.choice(["none", "empty", "half", "full"]), f"--engine={rng.choice(['torch', 'onnx'])}"
    command = (*RUN, engine, f"--batch_size={rng.randint(1, 64)}")
    if cache == "full":
        shutil.copytree(undisturbed(*RUN, engine).folder / "cache", folder / "cache")
    elif cache == "half":
        part = f"--gallery_dir=images/gallery/{rng.randrange(4)}"
        right(folder, *RUN, engine, "--server_url=", "--output_dir=first", part)
    elif cache == "none":
        command += ("--no_cache",)
    if rng.random() < 0.3:
        command = ("-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / command[0]), *command[1:])
    right(folder, *command, OMP_NUM_THREADS=str(rng.randint(1, 4)))
    return same_submission(folder / "out", engine)


KINDS = {
    "killed run": killed_run,
    "killed training": killed_training,
    "full disk": full_disk,
    "two at once": two_at_once,
    "bad numbers": bad_numbers,
    "other circumstances": other_circumstances,
}


def attempt(kind: str, rng: random.Random) -> list[str]:
    """Try a case in a folder of its own; return a sentence for each promise that did not hold."""
    torch.manual_seed(rng.randrange(2**31))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").symlink_to(images())
        return KINDS[kind](rng, Path(folder))


if __name__ == "__main__":
    kinds = list(KINDS)
    if os.geteuid() != 0:
        kinds.remove("full disk")
        print("no disk is filled: only root mounts a small one")
    sys.exit(run("runs", kinds, attempt))

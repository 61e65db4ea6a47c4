"""model_not_tuned.py on photographs of people, with dlib's real network and the reader processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, by_torch, run, run_here
from hub import lay_detector, scrfds
from huggingface_hub import constants
from onnx_graphs import graph
from photographs import face_photograph
from PIL import Image
from torchvision.transforms.v2.functional import resize

from get_images import find_images, read_image
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.onnx_detectors import SCRFD

FLAGS = ("--model_type", "dlib", "--query_dir", "query", "--gallery_dir", "gallery")


@pytest.fixture
def people(tmp_path):
    """Two people, each as a query and mirrored in the gallery, and there also what is nobody."""
    for name in ("hopper", "collins"):
        photo = resize(face_photograph(name), [300], antialias=True)
        for part, pixels in (("query", photo), ("gallery", photo.flip(2))):
            (tmp_path / part / name).mkdir(parents=True)
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            picture.save(tmp_path / part / name / f"{part}.jpg")
    (tmp_path / "gallery" / "nobody").mkdir()
    for number in range(3):
        Image.new("RGB", (40 + number, 60), "black").save(tmp_path / "gallery" / "nobody" / f"{number}.png")
    (tmp_path / "gallery" / "nobody" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_people_are_found_and_nobody_loses_a_row(people):
    ended = run("model_not_tuned.py", *FLAGS, "--custom_dataset", "--save_crops", "crops", cwd=people)
    assert ended.returncode == 0, ended.stderr
    assert "no face was found in 3 of the 6 gallery images, such as nobody/0.png" in ended.stderr
    found = json.loads((people / "results" / "metrics.json").read_text())
    assert found["top_1"] == 1.0
    assert (found["queries_without_face"], found["gallery_images_without_face"]) == (0, 3)
    assert found["unreadable_gallery_images"] == ["nobody/broken.jpg"]
    names = json.loads((people / "results" / "without_face.json").read_text())
    assert names == {"queries": [], "gallery_images": [f"nobody/{number}.png" for number in range(3)]}
    images = json.loads((people / "results" / "submission.json").read_text())["images"]
    assert {len(ranked) for ranked in images.values()} == {6}  # all of the gallery
    crops = sorted(str(path.relative_to(people / "crops")) for path in (people / "crops").rglob("*.png"))
    assert len(crops) == 7
    assert "queries/hopper/query.jpg.png" in crops
    assert Image.open(people / "crops" / "gallery_images" / "nobody" / "0.png.png").size == (150, 150)


def test_a_network_in_an_onnx_file_from_photographs_to_the_report(people):
    """Twice: the second run finds all vectors in the cache."""
    onnx.save(graph(), people / "own.onnx")
    flags = (
        "--model_type",
        "arcface",
        "--weights",
        "own.onnx",
        *FLAGS[2:],
        "--custom_dataset",
        "--cache_dir",
        "c",
    )
    submissions = []
    for folder in ("first", "second"):
        ended = run_here("model_not_tuned.py", *flags, "--output_dir", folder, cwd=people)
        assert ended.returncode == 0, ended.stderr
        assert "as 64-d unit vectors (arcface by ONNX Runtime, cpu)" in ended.stderr + ended.stdout
        found = json.loads((people / folder / "metrics.json").read_text())
        assert (found["backbone"], found["top_1"]) == ("arcface", 1.0)
        assert (people / folder / "report.html").is_file()
        submissions.append((people / folder / "submission.json").read_bytes())
    assert submissions[0] == submissions[1]
    assert "2 of 2 queries were embedded before" in ended.stdout + ended.stderr


def test_without_a_crop_no_face_is_looked_for(people):
    ended = run_here("model_not_tuned.py", *FLAGS, "--crop", "none", "--no_report", cwd=people)
    assert ended.returncode == 0, ended.stderr
    assert "no face" not in ended.stderr
    assert "queries_without_face" not in (people / "results" / "metrics.json").read_text()
    assert not (people / "results" / "without_face.json").exists()


def test_a_face_crop_before_any_network(people):
    ended = run_here(
        "model_not_tuned.py", *FLAGS[2:], "--custom_dataset", "--no_report", cwd=people, CROP="face"
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((people / "results" / "metrics.json").read_text())["top_1"] == 1.0
    assert "no face was found in 3 of the 6 gallery images" in ended.stderr
    assert "if these are no portraits" not in ended.stderr  # half of them are


def test_reader_processes_find_faces_by_an_onnx_file(people):
    """Each photograph has the planted face in its upper left: 300 pixels of it are 640 of the detector's."""
    planted = scrfds((32, 8, 8, 0, 0.9, [4, 4, 4, 4]))
    lay_detector(people, SCRFD, planted, [1, 3, 640, 640])
    flags = ("--crop", "loose", "--detector", "scrfd", "--custom_dataset", "--save_crops", "crops",
             "--no_report")  # fmt: skip
    hub = {"HF_HUB_CACHE": str(people / "hub"), "HF_HUB_OFFLINE": "1"}
    ended = run("model_not_tuned.py", *FLAGS, *flags, cwd=people, **hub)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((people / "results" / "metrics.json").read_text())
    assert (found["queries_without_face"], found["gallery_images_without_face"]) == (0, 0)
    saved = np.asarray(Image.open(people / "crops" / "queries" / "hopper" / "query.jpg.png")).astype(int)
    method = FaceCrop("scrfd", 150, 0.5, 0.08, "loose")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", hub["HF_HUB_CACHE"])
        expected = method(read_image(people / "query" / "hopper" / "query.jpg")).pixels.transpose(1, 2, 0)
    assert np.array_equal(saved, expected)
    assert np.std(saved) > 20


def test_a_detector_that_is_not_here_is_a_sentence_at_the_start(people):
    hub = {"HF_HUB_CACHE": str(people / "empty"), "HF_HUB_OFFLINE": "1"}
    ended = run("model_not_tuned.py", *FLAGS, "--detector", "yunet", cwd=people, **hub)
    assert ended.returncode == 1
    assert "face_detection_yunet_2023mar.onnx could not be downloaded" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--save_crops", "gallery/crops"), "--save_crops gallery/crops lies in the images' folder"),
        (("--weights", "gone.pth"), "--weights is 'gone.pth': there is no file"),
        (("--weights", "tuned.pth"), "run `python model_fine_tuned.py --weights tuned.pth`"),
        (("--weights", "query/hopper/query.jpg"), "is not a file of weights, or only a part of one"),
        (("--face_margin", "1"), "--face_margin is '1': it should be less than 1"),
        (("--min_face_size", "0"), "--min_face_size is '0': it should be greater than 0"),
        (("--save_crops", "tuned.pth"), "--save_crops tuned.pth is not a folder but a file"),
        (("--weights", "query"), "--weights is 'query': it is a folder; give the file"),
        (("--image_size", "20"), "dlib does not take images of 20 pixels"),
        (("--crop", "faces"), "--crop is 'faces': it should be 'auto', 'none', 'face', 'align' or 'loose'"),
        (("--detector", "retina"), "--detector is 'retina': it should be 'auto', 'mtcnn', 'dlib', 'scrfd'"),
    ],
)
def test_wrong_input_is_a_sentence(people, flags, sentence):
    torch.save({"recipe": {"word": "dlib"}, "network": {}}, people / "tuned.pth")
    ended = run_here("model_not_tuned.py", *FLAGS, *flags, cwd=people)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


@contextmanager
def running(people):
    """The script, embedding many images in a process group of its own, which ends with this block."""
    for number in range(600):
        os.link(people / "query" / "hopper" / "query.jpg", people / "query" / "hopper" / f"{number}.jpg")
    command = [sys.executable, ROOT / "model_not_tuned.py", *FLAGS]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=people, env=env, start_new_session=True, **pipes)
    try:
        while b"found" not in process.stdout.readline():
            assert process.poll() is None
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("seconds", [0, 3])  # while the readers start, and when they work
def test_ctrl_c_ends_the_reader_processes_too(people, seconds):
    with running(people) as process:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to each process of the group
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in errors
    assert "Traceback" not in errors


def test_a_killed_program_leaves_no_reader_behind(people):
    with running(people) as process:
        process.kill()
        process.communicate()
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)  # nothing, if any process of the group is left
            except ProcessLookupError:
                return
            time.sleep(0.1)
    pytest.fail("reader processes are left")


def readers_of(program):
    """The processes whose parent's parent is the program: what its fork server made."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in parents.items() if parents.get(parent) == program]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the readers in /proc")
def test_a_killed_reader_is_a_sentence_and_no_hang(people):
    with running(people) as process:
        for _ in range(200):
            readers = readers_of(process.pid)
            if len(readers) == os.cpu_count():
                break
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(readers[0], signal.SIGKILL)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert "error: a process that reads images has ended" in errors
    assert "Traceback" not in errors


def test_a_disk_that_gets_full_costs_the_crops_only(monkeypatch, people, caplog):
    from retrieval.backbones.backbone import load_backbone
    from retrieval.embedding import embed

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embed, "_write_png", full)
    queries = find_images(people / "query")
    vectors = embed.embed(
        queries, by_torch(load_backbone("dlib", "cpu"), 8), "queries", people / "crops"
    ).vectors
    assert vectors.any(axis=1).all()
    assert "2 crops could not be written, such as" in caplog.text
    assert "No space left on device" in caplog.text

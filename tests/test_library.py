"""docs/library.md runs as it stands; the library is lazy and installs whole."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import ROOT, ranking_of
from hub import lay_in_hub
from huggingface_hub import constants
from safetensors.torch import save_file

import retrieval
from get_images import find_images
from retrieval.backbones.backbone import Backbone, find_backbone, load_backbone
from retrieval.backbones.transform import Transform
from retrieval.errors import InputError
from retrieval.server.answer_key import key_of_folders
from retrieval.server.serve import local_server
from retrieval.submission.submission_file import write_submission

URL = "http://HOST:3001/retrieval/"


def test_every_example_of_the_page_runs(few, tmp_path, monkeypatch):
    (tmp_path / "data" / "sample").mkdir(parents=True)
    (tmp_path / "data" / "sample" / "test").symlink_to(few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    state = timm.create_model("resnet18.a1_in1k", pretrained=False).state_dict()
    lay_in_hub(
        tmp_path, "timm/resnet18.a1_in1k", **{"model.safetensors": lambda file: save_file(state, file)}
    )
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    names = {}
    key = key_of_folders(find_images(few / "query"), find_images(few / "gallery"))
    with local_server(key, tmp_path / "competition.sqlite") as url:
        for block in blocks:
            exec(block.replace(URL, url), names)
    assert names["outcome"].word == "scored"
    assert names["outcome"].accuracy == pytest.approx(retrieval.score(names["ranking"])["score"], abs=0.01)
    assert (tmp_path / "results" / "submission.json").is_file()
    assert list((tmp_path / ".cache" / "image-retrieval").glob("*.sqlite"))
    assert names["embeddings"].vectors.shape == (24, 16)
    assert names["backbone"].dimension == 512


def test_the_package_imports_nothing_until_a_name_is_used():
    code = (
        "import sys; import retrieval; before = len(sys.modules); names = dir(retrieval); "
        "heavy = {'numpy', 'torch', 'PIL', 'pydantic', 'requests', 'get_images'} & sys.modules.keys(); "
        "print(sorted(heavy), set(retrieval.__all__) <= set(names))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["[]", "True"], ended.stderr
    for name in retrieval.__all__:
        assert callable(getattr(retrieval, name))
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        retrieval.embedd  # noqa: B018


def test_the_library_never_imports_the_console_which_exits_if_a_package_is_missing(few):
    code = (
        "import sys, retrieval; everything = [getattr(retrieval, name) for name in retrieval.__all__]; "
        "backbone = retrieval.load_backbone('efficientnet_lite0', 'cpu'); "
        "queries, gallery = (retrieval.embed(folder, backbone, engine='torch') for folder in sys.argv[1:]); "
        "print(len(retrieval.rank(queries, gallery).names()), 'retrieval.console' in sys.modules)"
    )
    command = [sys.executable, "-c", code, few / "query", few / "gallery"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["8", "False"], ended.stderr


def test_a_folder_and_a_loaded_backbone_give_what_files_and_a_lazy_one_give(few):
    files = find_images(few / "query")
    by_files = retrieval.embed(files, find_backbone("efficientnet_lite0", "cpu"), engine="torch")
    by_folder = retrieval.embed(
        str(few / "query"), load_backbone("efficientnet_lite0", "cpu"), engine="torch"
    )
    assert by_files.names == by_folder.names
    assert (by_files.vectors == by_folder.vectors).all()


def test_a_loaded_network_has_no_cache_since_its_weights_may_change(few, tmp_path):
    from torch import nn

    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    mine = Backbone(network, 12, Transform(16, "bilinear"), (0.5,) * 3, (0.5,) * 3, "mine")
    with pytest.raises(InputError, match="or without a cache"):
        retrieval.embed(few / "query", mine, cache=tmp_path)
    assert retrieval.embed(few / "query", mine).vectors.shape == (8, 12)
    assert not network.training


@pytest.mark.parametrize("wrong", ["data/query", None, [1, 0], np.eye(2, dtype=np.float32)])
@pytest.mark.parametrize("side", [0, 1])
def test_rank_says_what_it_takes(wrong, side):
    sides = [retrieval.Embeddings(["x"], np.ones((1, 2), np.float32)) for _ in range(2)]
    sides[side] = wrong
    with pytest.raises(InputError, match="rank takes Embeddings, as embed returns them, and not "):
        retrieval.rank(*sides)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("query", "dlib"), "embed takes a backbone, such as load_backbone('dlib'), and not 'dlib'"),
    (("query", None), "embed takes a backbone, such as load_backbone('dlib'), and not None"),
    ((["a.jpg"], None), "embed takes a folder, or a list of at least one image as find_images returns it, "
                        "and not ['a.jpg']"),
    (([], None), "and not []"), ((3, None), "and not 3"),
])  # fmt: skip
def test_embed_says_what_it_takes(arguments, sentence):
    with pytest.raises(InputError) as refused:
        retrieval.embed(*arguments)
    assert str(refused.value).endswith(sentence)


def test_a_path_to_submit_may_be_text(tmp_path):
    path = write_submission(ranking_of({"q": ["a", "b"]}), "team", tmp_path)
    assert retrieval.submit(str(path), "").sentence == retrieval.submit(path, "").sentence


def test_readers_start_from_a_script_without_a_guard(tmp_path):
    """Which they would otherwise run once more, each."""
    from photographs import face_photograph, photo_of
    from PIL import Image

    (tmp_path / "faces").mkdir()
    Image.fromarray(photo_of(face_photograph("hopper"))).save(tmp_path / "faces" / "hopper.png")
    (tmp_path / "mine.py").write_text(
        "print('begun')\n"
        "from retrieval import embed, load_backbone\n"
        "print(embed('faces', load_backbone('dlib', 'cpu')).without_face)\n"
    )
    command = [sys.executable, "mine.py"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stdout == "begun\n[]\n", ended.stderr


def test_every_package_and_template_is_installed(monkeypatch):
    from setuptools import Distribution
    from setuptools.config.pyprojecttoml import apply_configuration

    monkeypatch.chdir(ROOT)
    distribution = apply_configuration(Distribution(), "pyproject.toml")
    distribution.include_package_data = False  # or setuptools writes a list of files into this folder
    code = {path.parent for folder in ("retrieval", "supcon") for path in (ROOT / folder).rglob("*.py")}
    packages = {str(path.relative_to(ROOT)).replace("/", ".") for path in code}
    assert packages <= set(distribution.packages)
    assert distribution.py_modules == ["get_images"]
    built = distribution.get_command_obj("build_py")
    built.ensure_finalized()
    data = {Path(folder) / name for _, folder, _, names in built.data_files for name in names}
    templates = {path.relative_to(ROOT) for path in ROOT.glob("retrieval/**/templates/*")}
    assert templates <= data
    assert any(need.startswith("torch==") for need in distribution.install_requires)

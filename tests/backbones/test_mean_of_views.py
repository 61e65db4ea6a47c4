"""Views beside a naive reference: the plain backbone's unit vectors of each view of an image, averaged."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import run_here
from onnx_graphs import graph
from photographs import face_photograph, photo_of
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

from get_images import find_images, read_image
from retrieval.backbones.backbone import Backbone, LazyBackbone, find_backbone, place
from retrieval.backbones.fine_tuned import Joined
from retrieval.backbones.transform import Transform
from retrieval.backbones.views import with_views
from retrieval.embedding.cache import Cache, contents
from retrieval.embedding.embed import embed
from retrieval.errors import InputError

ROOT_2 = 2**0.5


class Uneven(nn.Module):
    """Convolutions that tell left from right, and a mean."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 8, 5, stride=2), nn.Conv2d(8, 8, 3)

    def forward(self, images):
        return self.second(self.first(images).relu()).relu().mean((2, 3))


def lazy(network, size=32, key=b"1" * 32):
    backbone = place(Backbone(network, 0, Transform(size, "bilinear"), (0.4,) * 3, (0.3,) * 3, "small"))
    return LazyBackbone("small", backbone.transform, "cpu", key, lambda: backbone)


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return find_images(tmp_path / "images")


def unit(vector):
    return vector / np.linalg.norm(vector)


def naive(files, plain, views):
    """Embed each view by itself with the plain backbone; return the unit means (images, dimension)."""
    backbone, means = plain.load(), []
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (backbone.mean, backbone.std))
    for file in files:
        pixels = backbone.transform(read_image(file.path)).pixels
        inputs = [pixels, pixels[:, :, ::-1]] if "flip" in views else [pixels]
        vectors = []
        for one in inputs:
            normalised = ((torch.from_numpy(one.copy()) / 255 - mean) / std)[None]
            size = normalised.shape[-1]
            for scale in (1, 1 / ROOT_2, ROOT_2) if "scales" in views else (1,):
                side = [round(size * scale)] * 2
                resized = interpolate(normalised, side, mode="bilinear", antialias=True)
                with torch.inference_mode():
                    vectors.append(unit(backbone.network(resized)[0].numpy().astype(float)))
        means.append(unit(np.mean(vectors, axis=0)))
    return np.array(means)


def cosines(ours, theirs):
    return (ours.astype(float) * theirs).sum(1)


@pytest.mark.parametrize("engine", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("views", ["flip", "scales", "flip,scales"])
def test_the_embedding_is_the_mean_of_its_views(files, engine, views, tmp_path):
    plain = lazy(Uneven())
    ours = embed(files, with_views(plain, views=views), engine=engine).vectors
    assert cosines(ours, naive(files, plain, views)).min() > 1 - 1e-6
    assert cosines(ours, embed(files, plain, engine=engine).vectors).max() < 1 - 1e-5


def test_flip_gives_an_image_and_its_mirror_one_embedding(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, ::-1]).save(tmp_path / "b.png")
    one, other = embed(tmp_path, with_views(lazy(Uneven()), flip=True)).vectors
    assert np.allclose(one, other, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_face_is_mirrored_after_its_crop(tmp_path, engine):
    for name in ("hopper", "collins"):
        photo = photo_of(resize(face_photograph(name), [300], antialias=True))
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    plain, files = find_backbone("dlib", "cpu"), find_images(tmp_path)
    found = embed(files, with_views(plain, flip=True), cache=tmp_path / "cache", engine=engine)
    assert found.without_face == []
    assert cosines(found.vectors, naive(files, plain, "flip")).min() > 0.9999
    assert cosines(found.vectors, embed(files, plain, engine=engine).vectors).max() < 0.9999


def test_a_network_in_an_onnx_file(files, tmp_path):
    onnx.save(graph(), tmp_path / "w.onnx")
    plain = find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")
    ours = embed(files, with_views(plain, flip=True)).vectors
    assert cosines(ours, naive(files, plain, "flip")).min() > 1 - 1e-6
    with pytest.raises(
        InputError, match=r"arcface cannot take images of 79 and 158 pixels beside its 112 \("
    ):
        with_views(plain, views="scales").load()


def test_a_network_of_one_size_is_a_sentence(files):
    plain = lazy(timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32))
    with pytest.raises(InputError, match=r"--views scales: small .*\): leave scales out$"):
        embed(files, with_views(plain, views="flip,scales"))
    assert embed(files, with_views(plain, flip=True)).vectors.shape == (6, 64)


def test_both_halves_of_a_checkpoint_see_the_mirror_and_only_one_would_see_scales(files):
    plain = lazy(Joined(Uneven(), Uneven(1), 2.0, 24))
    ours = embed(files, with_views(plain, flip=True)).vectors
    assert cosines(ours, naive(files, plain, "flip")).min() > 1 - 1e-6
    with pytest.raises(InputError, match="its tuned half sees every image at 24"):
        with_views(plain, views="scales").load()


# ---- the cache, the settings ----------------------------------------------------------------------


def test_without_views_it_is_the_backbone_itself():
    plain = lazy(Uneven())
    assert with_views(plain) is plain
    found = [with_views(plain, views=views) for views in ("flip", "scales", "flip,scales")]
    assert len({plain.key, *(viewed.key for viewed in found)}) == 4
    assert with_views(plain, flip=True).key == found[0].key
    assert with_views(plain, flip=True, views="scales").key == found[2].key
    assert with_views(replace(plain, key=b"2" * 32), flip=True).key != found[0].key
    assert [viewed.model_name for viewed in found] == [
        "small with flip", "small with scales", "small with flip and scales",
    ]  # fmt: skip


def kept_in(folder):
    """What the cache holds, and of how many images."""
    return {what: count for what, count, *_ in contents(Cache(folder))}


def test_a_second_run_embeds_nothing_and_gives_the_same_bits(files, tmp_path):
    plain = lazy(Uneven())
    first = embed(files, with_views(plain, flip=True), cache=tmp_path / "cache").vectors
    embed(files, plain, cache=tmp_path / "cache")

    def load():
        raise AssertionError("all is in the cache")

    again = embed(files, with_views(replace(plain, load=load), flip=True), cache=tmp_path / "cache").vectors
    assert again.tobytes() == first.tobytes()
    kept = kept_in(tmp_path / "cache")
    assert kept == {"small with flip by torch": 6, "small by torch": 6}


@pytest.mark.slow
def test_the_crops_are_those_of_a_run_without(tmp_path):
    photo = photo_of(resize(face_photograph("hopper"), [300], antialias=True))
    Image.fromarray(photo).save(tmp_path / "a.png")
    plain, folder = find_backbone("dlib", "cpu"), tmp_path / "cache"
    embed(tmp_path, plain, cache=folder)
    before = kept_in(folder)
    embed(tmp_path, with_views(plain, flip=True), cache=folder)
    assert kept_in(folder) == before | {"dlib with flip by torch": 1}


@pytest.mark.slow
def test_the_scripts_take_both_flags(few, exported, tmp_path):
    def vectors_and_names(*flags):
        folders = ("--query_dir", few / "query", "--gallery_dir", few / "gallery", "--custom_dataset")
        ended = run_here("model_not_tuned.py", *folders, "--no_report", *flags, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
        return metrics["backbone"], (tmp_path / "results" / "submission.json").read_bytes()

    name, plain = vectors_and_names()
    assert name == "efficientnet_lite0"
    name, flipped = vectors_and_names("--flip")
    assert name == "efficientnet_lite0 with flip"
    assert flipped != plain
    assert vectors_and_names("--views", "flip") == (name, flipped)
    assert vectors_and_names() == ("efficientnet_lite0", plain)
    ended = run_here("model_not_tuned.py", "--views", "mirror", cwd=tmp_path)
    assert "--views is 'mirror': it should be 'none', 'flip', 'scales' or 'flip,scales'" in ended.stderr

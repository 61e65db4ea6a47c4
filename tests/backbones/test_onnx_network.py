"""Networks in ONNX files: our vectors beside those of ONNX Runtime called as the authors' READMEs call it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from facenet_pytorch import MTCNN
from hub import lay_in_hub
from huggingface_hub import constants
from odd_images import write_odd_images
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import graph
from photographs import face_photograph, photo_of
from PIL import Image
from skimage.transform import SimilarityTransform, warp
from torchvision.transforms.v2.functional import resize, rotate

from get_images import find_images
from retrieval.backbones.backbone import find_backbone, find_pretrained, load_backbone
from retrieval.backbones.fine_tuned import find_fine_tuned
from retrieval.backbones.onnx_session import choose_onnx_device
from retrieval.embedding.embed import embed
from retrieval.errors import InputError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and of torch.hub, without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def images(tmp_path):
    write_odd_images(tmp_path / "images")
    return tmp_path / "images"


def lay_down(home, name, model):
    """Write the network where the row's weights are looked for."""
    weights = find_pretrained(name).weights
    if hasattr(weights, "repository"):
        lay_in_hub(home, weights.repository, **{weights.names[0]: lambda file: onnx.save(model, file)})
    else:
        weights.place().parent.mkdir(parents=True)
        onnx.save(model, weights.place())


# Each name's preprocessing as its authors write it, from float32 RGB (height, width, 3).
REFERENCES = {
    "arcface": lambda rgb: (rgb - 127.5) / 127.5,  # insightface/model_zoo/arcface_onnx.py, swapRB=True
    "arcface:small": lambda rgb: (rgb - 127.5) / 127.5,
    "adaface": lambda rgb: (rgb[..., ::-1] / 255 - 0.5) / 0.5,  # AdaFace's to_input: BGR
    "lvface": lambda rgb: (rgb / 255 - 0.5) / 0.5,  # LVFace's inference_onnx.py
    "sface": lambda rgb: rgb,  # face_recognize.cpp: blobFromImage(bgr, 1, …, swapRB=true)
}
WRONG = {
    "colour order": lambda name, rgb: REFERENCES[name](rgb[..., ::-1]),
    "mean": lambda name, rgb: REFERENCES[name](rgb + 30),
    "scale": lambda name, rgb: REFERENCES[name](rgb) * (1 / 255 if name == "sface" else 128),
}


def reference(model, files, prepare, size=112):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    vectors = []
    for file in files:
        image = Image.open(file.path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        blob = prepare(np.asarray(image, np.float32)).transpose(2, 0, 1)[None].astype(np.float32)
        vectors.append(session.run(["embedding"], {"image": np.ascontiguousarray(blob)})[0][0])
    vectors = np.stack(vectors).astype(float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_name_prepares_images_as_its_authors(home, images, name):
    model = graph()
    lay_down(home, name, model)
    files = find_images(images)
    ours = embed(files, find_backbone(name, "cpu", crop="none")).vectors.astype(float)
    cosines = (ours * reference(model, files, REFERENCES[name])).sum(1)
    assert len(cosines) == 10
    assert cosines.min() >= 0.9999
    for wrong in WRONG.values():
        theirs = reference(model, files, lambda rgb, wrong=wrong: wrong(name, rgb))
        assert (ours * theirs).sum(1).min() < 0.9999


def norm_crop(photo, points):
    """InsightFace's norm_crop: skimage's similarity transform to the template, one bilinear warp."""
    template = [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
    to_crop = SimilarityTransform.from_estimate(points.astype(float), np.array(template))
    return warp(photo, to_crop.inverse, output_shape=(112, 112), order=1, preserve_range=True).astype(
        np.float32
    )


@pytest.mark.parametrize("name", ["arcface", "adaface", "sface"])
def test_a_face_is_aligned_before_it(home, name):
    model = graph()
    lay_down(home, name, model)
    photos = [resize(face_photograph(who), [300], antialias=True) for who in ("hopper", "collins")]
    photos += [rotate(photos[0], 20), photos[1].flip(2)]
    (home / "faces").mkdir()
    for number, photo in enumerate(photos):
        Image.fromarray(photo_of(photo)).save(home / "faces" / f"{number}.png")
    found = embed(home / "faces", find_backbone(name, "cpu"))
    assert found.without_face == []
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for photo, ours in zip(map(photo_of, photos), found.vectors, strict=True):
        mtcnn = MTCNN(selection_method="center_weighted_size", min_face_size=round(0.08 * max(photo.shape)))
        _, _, points = mtcnn.detect(Image.fromarray(photo), landmarks=True)
        cosines = []
        for crop in (norm_crop(photo, points[0]), norm_crop(photo, points[0][[1, 0, 2, 4, 3]])):
            blob = REFERENCES[name](crop).transpose(2, 0, 1)[None].astype(np.float32)
            theirs = session.run(["embedding"], {"image": np.ascontiguousarray(blob)})[0][0]
            cosines.append(ours @ theirs / np.linalg.norm(theirs))
        assert cosines[0] >= 0.9999
        assert cosines[1] < 0.99  # its twin with left and right exchanged


@pytest.mark.parametrize("count", [1, 3, 4, None, "n"])
def test_any_number_of_images_that_a_file_takes_gives_the_same_vectors(tmp_path, images, count):
    onnx.save(graph(count), tmp_path / "some.onnx")
    files = find_images(images)
    backbone = load_backbone("arcface", "cpu", tmp_path / "some.onnx", crop="none")
    assert backbone.dimension == 64
    several = embed(files, backbone).vectors
    one_by_one = np.concatenate([embed([file], backbone).vectors for file in files])
    assert np.array_equal(several, one_by_one)
    assert (several * reference(graph(), files, REFERENCES["arcface"])).sum(1).min() >= 0.9999


def test_half_precision_and_initializers_among_the_inputs(tmp_path, images):
    """Files of old exporters list their tensors as inputs; others compute in float16."""
    tensor = helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 3, 7, 7])
    onnx.save(graph(inputs=[tensor]), tmp_path / "old.onnx")
    half = graph()
    half.graph.node.insert(0, helper.make_node("Cast", ["half"], ["image"], to=TensorProto.FLOAT))
    half.graph.input[0].name = "half"
    half.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(half, tmp_path / "half.onnx")
    files = find_images(images)
    expected = reference(graph(), files, REFERENCES["arcface"])
    for name in ("old.onnx", "half.onnx"):
        ours = embed(files, find_backbone("arcface", "cpu", tmp_path / name, crop="none")).vectors
        assert (ours * expected).sum(1).min() >= 0.9999


def test_weights_in_an_onnx_file_replace_the_network_of_any_name(tmp_path, images, caplog):
    caplog.set_level("INFO")
    onnx.save(graph(size=112), tmp_path / "own.onnx")
    backbone = load_backbone("resnet50", "cpu", tmp_path / "own.onnx")
    assert (backbone.dimension, backbone.transform.size, backbone.transform.crop_mode) == (64, 112, "center")
    assert (
        "own.onnx replaces the network of resnet50, and gets its images as resnet50 would: 112" in caplog.text
    )
    assert "--model_type arcface (adaface, sface) aligns faces" in caplog.text
    with pytest.raises(InputError, match=r"takes images of 112 pixels only: leave --image_size 224 out"):
        find_backbone("resnet50", "cpu", tmp_path / "own.onnx", image_size=224)
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"arcface is a network in an ONNX file, named \.onnx"):
        find_backbone("arcface", "cpu", tmp_path / "w.pth")


def of_shape(*shape, dtype=TensorProto.FLOAT):
    model = graph()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", dtype, shape))
    return model


def without_embedding():
    model = graph()
    del model.graph.output[1]
    return model


REFUSED = {
    "takes image (n, 112, 112, 3)": of_shape("n", 112, 112, 3),
    "takes image (n, 3, 112, 96)": of_shape("n", 3, 112, 96),
    "takes image (n, 1, 112, 112)": of_shape("n", 1, 112, 112),
    "takes image (n, 3)": of_shape("n", 3),
    "takes image (n, 4, 112, 112)": of_shape("n", 4, 112, 112),
    "takes image (n, 3, 112, 112), size (1)": graph(
        inputs=[helper.make_tensor_value_info("size", TensorProto.FLOAT, [1])]
    ),
    "cannot be run by ONNX Runtime": of_shape("n", 3, 112, 112, dtype=TensorProto.UINT8),
    "to norm [4, 1]: a network for embeddings maps floats to (n, dimension)": without_embedding(),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_file_that_does_not_fit_is_a_sentence(tmp_path, sentence):
    onnx.save(REFUSED[sentence], tmp_path / "w.onnx")
    with pytest.raises(InputError) as raised:
        load_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")
    assert sentence in str(raised.value)
    assert "w.onnx" in str(raised.value)


NOT_ONNX = {
    "takes nothing": b"",
    "is a web page": b"<html>",
    "is only a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "is only a part of an ONNX file: download it again": graph().SerializeToString()[:99_000],
}


@pytest.mark.parametrize("sentence", NOT_ONNX)
def test_a_file_that_is_not_onnx_is_a_sentence(tmp_path, sentence):
    (tmp_path / "w.onnx").write_bytes(NOT_ONNX[sentence])
    with pytest.raises(InputError, match=rf"w\.onnx ({sentence})"):
        load_backbone("arcface", "cpu", tmp_path / "w.onnx")


def test_model_fine_tuned_runs_no_onnx_file(tmp_path):
    onnx.save(graph(), tmp_path / "w.onnx")
    with pytest.raises(InputError, match=r"w\.onnx was not written by fine_tuning\.py.*model_not_tuned\.py"):
        find_fine_tuned(tmp_path / "w.onnx", "cpu")


def test_dimensions_without_names_or_with_one_name(tmp_path, images):
    """As some exporters write them: any number of channels, or a ? for each dimension."""
    files = find_images(images)
    expected = reference(graph(), files, REFERENCES["arcface"])
    for shape in (("n", "channels", "h", "w"), ("?", 3, "?", "?")):
        onnx.save(of_shape(*shape), tmp_path / "w.onnx")
        ours = embed(files, find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")).vectors
        assert (ours * expected).sum(1).min() >= 0.9999


def test_a_network_that_normalises_by_itself_gets_pixels_from_0_to_255(tmp_path, images):
    """InsightFace tells it by the names of the first operations, as MXNet exports them."""
    model = graph()
    for row, (name, kind, value) in enumerate([("_minusscalar0", "Sub", 127.5), ("_mulscalar0", "Mul", 0.5)]):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
        source = "raw" if row == 0 else "x0"
        out = "x0" if row == 0 else "image"
        model.graph.node.insert(row, helper.make_node(kind, [source, name], [out], name=name))
    model.graph.input[0].name = "raw"
    onnx.save(model, tmp_path / "w.onnx")
    files = find_images(images)
    ours = embed(files, find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")).vectors
    expected = reference(graph(), files, lambda rgb: (rgb - 127.5) * 0.5)
    assert (ours * expected).sum(1).min() >= 0.9999


def save_in_two_files(folder, seed=0):
    onnx.save(graph(seed=seed), folder / "w.onnx", save_as_external_data=True, location="w.data",
              size_threshold=0)  # fmt: skip


def test_tensors_are_read_only_from_beside_the_file(tmp_path, images):
    save_in_two_files(tmp_path)
    lazy = find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")
    files = find_images(images)
    expected = reference(graph(), files, REFERENCES["arcface"])
    assert (embed(files, lazy).vectors * expected).sum(1).min() >= 0.9999
    data = (tmp_path / "w.data").read_bytes()
    (tmp_path / "w.data").write_bytes(data[:-4] + b"\0\0\0\0")
    assert find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none").key != lazy.key
    (tmp_path / "w.data").unlink()
    with pytest.raises(InputError, match=r"w\.onnx lacks w\.data.*put it beside that file"):
        find_backbone("arcface", "cpu", tmp_path / "w.onnx")
    model = onnx.load(tmp_path / "w.onnx", load_external_data=False)
    for elsewhere in ("../w.data", "/etc/passwd", "folder/w.data", ""):
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = elsewhere
        (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match=rf"wants to read '{elsewhere}': its tensors are read only from"):
            find_backbone("arcface", "cpu", tmp_path / "w.onnx")


def test_a_tensor_of_an_operation_may_lie_beside_it_too(tmp_path):
    """Not all are initializers; the cache key must know each file."""
    model = graph()
    constant = numpy_helper.from_array(np.zeros(64, np.float32), "c")
    onnx.external_data_helper.set_external_data(constant, "c.bin")
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=constant))
    (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"w\.onnx lacks c\.bin"):
        find_backbone("arcface", "cpu", tmp_path / "w.onnx")
    keys = []
    for content in (bytes(256), b"1" * 256):
        (tmp_path / "c.bin").write_bytes(content)
        keys.append(find_backbone("arcface", "cpu", tmp_path / "w.onnx").key)
    assert keys[0] != keys[1]


def test_torch_cannot_run_it(tmp_path, images):
    onnx.save(graph(), tmp_path / "w.onnx")
    with pytest.raises(InputError, match="arcface is an ONNX file, which torch cannot run"):
        embed(images, find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none"), engine="torch")


def test_the_cache_keeps_its_vectors(tmp_path, images):
    onnx.save(graph(), tmp_path / "w.onnx")
    lazy = find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")
    first = embed(images, lazy, cache=tmp_path / "cache")
    lazy = find_backbone("arcface", "cpu", tmp_path / "w.onnx", crop="none")
    object.__setattr__(lazy, "load", None)  # the second run needs no network
    assert np.array_equal(embed(images, lazy, cache=tmp_path / "cache").vectors, first.vectors)


@pytest.mark.parametrize(("device", "providers", "chosen"), [
    ("cpu", ["CPUExecutionProvider"], "cpu"),
    ("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
    ("cuda", ["CPUExecutionProvider"], "cpu"),
    ("mps", ["CoreMLExecutionProvider", "CPUExecutionProvider"], "cpu"),
])  # fmt: skip
def test_the_device_is_one_that_onnx_runtime_can_use(monkeypatch, caplog, device, providers, chosen):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert choose_onnx_device(device, "auto") == chosen
    assert ("the network runs on the CPU" in caplog.text) == (device != chosen)
    if device != chosen:
        hint = ".*onnxruntime-gpu" if device == "cuda" else ""
        with pytest.raises(InputError, match=rf"--device {device}: {hint}.*use --device cpu"):
            choose_onnx_device(device, device)

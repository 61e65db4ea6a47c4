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
from photographs import face_photograph, photo_of
from PIL import Image
from skimage.transform import SimilarityTransform, warp
from torchvision.transforms.v2.functional import resize, rotate

from get_images import find_images
from retrieval.backbones import onnx_file
from retrieval.backbones.backbone import find_backbone, find_pretrained, load_backbone
from retrieval.embedding.embed import embed
from retrieval.errors import InputError


def graph(images="n", size=112, seed=0, **others):
    """A small network, (images, 3, size, size) → a norm (images, 1) and an embedding (images, 64)."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": (16, 3, 7, 7),
        "bias": (16, 1),
        "slope": (16, 1, 1),
        "w2": (32, 16, 5, 5),
        "fc": (288, 64),
    }
    tensors = [
        numpy_helper.from_array(
            rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32), name
        )
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Flatten", ["bias"], ["b"], axis=0),
        helper.make_node("Squeeze", ["b"], ["b1"]),
        helper.make_node("Conv", ["image", "w", "b1"], ["c"], strides=[4, 4]),
        helper.make_node("PRelu", ["c", "slope"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["c2"], strides=[4, 4]),
        helper.make_node("MaxPool", ["c2"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["embedding"]),
        helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [images, 3, size, size])
    outputs = [("norm", 1), ("embedding", 64)]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [images, d]) for n, d in outputs]
    inputs = [image, *others.get("inputs", [])]
    made = helper.make_graph(nodes, "network", inputs, outputs, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


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
    assert "own.onnx replaces the network of resnet50" in caplog.text
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


@pytest.mark.parametrize("content", [b"", b"<html>", b"half"])
def test_a_file_that_is_not_onnx_is_a_sentence(tmp_path, content):
    whole = graph().SerializeToString()
    (tmp_path / "w.onnx").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(InputError, match=r"w\.onnx (is not an ONNX file|takes nothing)"):
        load_backbone("arcface", "cpu", tmp_path / "w.onnx")


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
    for elsewhere in ("../w.data", "/etc/passwd", "folder/w.data"):
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = elsewhere
        (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match=rf"wants to read {elsewhere}: its tensors are read only from"):
            find_backbone("arcface", "cpu", tmp_path / "w.onnx")


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
    assert onnx_file.choose_onnx_device(device, "auto") == chosen
    assert ("the network runs on the CPU" in caplog.text) == (device != chosen)
    if device != chosen:
        with pytest.raises(InputError, match=rf"--device {device}: .*onnxruntime-gpu.*use --device cpu"):
            onnx_file.choose_onnx_device(device, device)

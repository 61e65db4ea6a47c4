"""Our vectors of ten odd images beside those of each network's authors' code, from the same seeded weights.

The networks have their own width, head and activation, but two blocks: the full depth takes minutes.
"""

import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from hub import lay_in_hub
from huggingface_hub import constants
from odd_images import write_odd_images
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

from get_images import find_images
from retrieval import embed
from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD

# Our name → timm's; the dimension; the name and tag in open_clip, whose preprocessing is the authors' own.
NAMES = {
    "clip": ("vit_large_patch14_clip_quickgelu_224.openai", 768, ("ViT-L-14-quickgelu", "openai")),
    "clip:base": ("vit_base_patch16_clip_quickgelu_224.openai", 512, ("ViT-B-16-quickgelu", "openai")),
    "siglip2": (
        "vit_so400m_patch14_siglip_378.v2_webli", 1152, ("ViT-SO400M-14-SigLIP2-378", "webli"),
    ),
    "siglip2:base": ("vit_base_patch16_siglip_224.v2_webli", 768, ("ViT-B-16-SigLIP2", "webli")),
    "pe": ("vit_pe_core_large_patch14_336.fb", 1024, ("PE-Core-L-14-336", "meta")),
    "dinov2": ("vit_base_patch14_reg4_dinov2.lvd142m", 768, None),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", 768, None),
}  # fmt: skip
OF_DINO = {
    "dinov2": [v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224)],  # its data/transforms.py
    "dinov3": [v2.Resize((256, 256))],  # its README
}
NORMAL = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
OF_DINO = {name: v2.Compose([*steps, *NORMAL]) for name, steps in OF_DINO.items()}
SAME = 0.9999


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of ten images of odd sizes and modes."""
    folder = tmp_path_factory.mktemp("odd") / "images"
    write_odd_images(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def two_blocks(monkeypatch):
    """Let timm build networks with two blocks, for us and for the reference; the largest with one."""
    create = timm.create_model

    def small(name, *args, **given):
        depth = {"depth": 1 if "so400m" in name or "pe_core" in name else 2}
        return create(name, *args, **(depth | given))

    monkeypatch.setattr(timm, "create_model", small)


def lively(network):
    """Seed the weights so that images differ: as they begin, all images have nearly the same vector."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and name.endswith(("weight", "proj")):
                parameter.copy_(noise * 1.5 / math.sqrt(parameter[0].numel()))
            elif name.endswith(("gamma", "gamma_1", "gamma_2")):  # DINO's layer scale begins at 1e-5
                parameter.copy_(0.5 + 0.1 * noise)
            elif name.endswith(("c_fc.bias", "fc1.bias")):  # where GELU and QuickGELU differ most
                parameter.copy_(0.1 * noise - 2)
            elif not name.endswith("weight"):
                parameter.copy_(0.1 * noise)
    return network.eval()


def lay(hub, name, state):
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    repository = f"timm/{name.replace('_quickgelu', '')}"
    lay_in_hub(hub, repository, **{"model.safetensors": lambda file: save_file(state, file)})


def ours(name, folder, size=None):
    backbone = find_backbone(name, "cpu", image_size=size)
    return torch.from_numpy(embed(find_images(folder), backbone, engine="torch").vectors)


def theirs(folder, transform, network, bgr=False):
    """Embed as the README of a network does: open with Pillow, transform, run."""
    vectors = []
    for file in sorted(folder.iterdir()):
        image = Image.open(file).convert("RGB")
        if bgr:
            image = Image.fromarray(np.asarray(image)[:, :, ::-1].copy())
        with torch.inference_mode():
            vectors.append(network(transform(image)[None])[0])
    return functional.normalize(torch.stack(vectors))


def cosines(a, b):
    return (a * b).sum(1)


def assert_same(a, b):
    assert a.shape == b.shape
    assert cosines(a, b).min() >= SAME
    between = a @ a.T - torch.eye(len(a))
    assert between.max() < 0.999  # the network tells the images apart


def preprocessing(open_clip_name, **changed):
    """Return open_clip's preprocess_val of a pretrained model; `changed` makes it a wrong one."""
    config = open_clip.get_pretrained_cfg(*open_clip_name)
    size = open_clip.get_model_config(open_clip_name[0])["vision_cfg"]["image_size"]
    seen = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return image_transform_v2(PreprocessCfg(**({"size": size} | seen | changed)), is_train=False)


def openai_clip(name):
    """Return open_clip's model with two blocks."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = 2
    config["text_cfg"] |= {"layers": 1, "vocab_size": 8}
    return open_clip.create_model(name, **config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "clip:base"])
def test_clip_is_open_clips_encode_image(name, odd, hub, two_blocks):
    timms, dimension, in_open_clip = NAMES[name]
    model = lively(openai_clip(in_open_clip[0]))
    lay(hub, timms, model.state_dict())  # as OpenAI published it: timm renames the tensors
    vectors = ours(name, odd)
    assert vectors.shape == (10, dimension)
    assert_same(vectors, theirs(odd, preprocessing(in_open_clip), model.encode_image))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip2", "siglip2:base", "pe", "dinov2", "dinov3"])
def test_a_name_is_its_authors_preprocessing_and_timms_network(name, odd, hub, two_blocks):
    timms, dimension, in_open_clip = NAMES[name]
    size = {"img_size": 224} if name == "dinov2" else {}  # of the 518 pixels that its file is made for
    lay(hub, timms, lively(timm.create_model(timms)).state_dict())
    network = timm.create_model(timms, pretrained=True, **size).eval()
    transform = preprocessing(in_open_clip) if in_open_clip else OF_DINO[name]

    def reference(pixels):
        return network.forward_head(network.forward_features(pixels), pre_logits=name != "pe")

    vectors = ours(name, odd)
    assert vectors.shape == (10, dimension)
    assert_same(vectors, theirs(odd, transform, reference))
    if name not in ("siglip2", "pe"):  # the slowest, whose transforms are siglip2:base's in other sizes
        seen = timm.data.resolve_model_data_config(network, args=size)
        wrong = timm.data.create_transform(**seen, is_training=False)  # shows other parts of the image
        assert cosines(vectors, theirs(odd, wrong, reference)).min() < SAME


@pytest.mark.slow
def test_each_wrong_twin_of_clip_is_another_network(odd, hub, two_blocks):
    """One thing at a time as it must not be: the comparison above would show it."""
    timms, _, in_open_clip = NAMES["clip:base"]
    model = lively(openai_clip(in_open_clip[0]))
    lay(hub, timms, model.state_dict())
    vectors, right = ours("clip:base", odd), preprocessing(in_open_clip)
    gelu = openai_clip("ViT-B-16").eval()
    gelu.load_state_dict(model.state_dict())
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    timms_crop = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(timms).to_dict())
    )  # resizes to 248 pixels, of which it cuts 224
    twins = {
        "colour order": theirs(odd, right, model.encode_image, bgr=True),
        "activation": theirs(odd, right, gelu.encode_image),
        "interpolation": theirs(
            odd, preprocessing(in_open_clip, interpolation="bilinear"), model.encode_image
        ),
        "size": theirs(odd, timms_crop, model.encode_image),
        "crop": theirs(odd, preprocessing(in_open_clip, resize_mode="squash"), model.encode_image),
        "normalisation": theirs(odd, preprocessing(in_open_clip, **imagenet), model.encode_image),
    }
    for what, wrong in twins.items():
        assert cosines(vectors, wrong).min() < SAME, what
    model.visual.proj = None
    assert theirs(odd, right, model.encode_image).shape == (10, 768)
    assert ours(f"timm:{timms}:features", odd).shape == (10, 768)
    assert_same(ours(f"timm:{timms}:features", odd), theirs(odd, timms_crop, model.encode_image))

"""Every name of timm as a row: what it sees, what it gives, and what is said of it. Needs no weights."""

import re

import open_clip
import pytest
import timm

from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.timm_zoo import is_contrastive, with_input_size
from retrieval.backbones.zoo import PRETRAINED
from retrieval.errors import InputError

NAMES = timm.list_pretrained()
CONFIGS = {name: timm.get_pretrained_cfg(name).to_dict() for name in NAMES}
OF_TIMM = {
    "clip": "vit_large_patch14_clip_quickgelu_224.openai",
    "clip:base": "vit_base_patch16_clip_quickgelu_224.openai",
    "siglip2": "vit_so400m_patch14_siglip_378.v2_webli",
    "siglip2:base": "vit_base_patch16_siglip_224.v2_webli",
    "pe": "vit_pe_core_large_patch14_336.fb",
    "dinov2": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov3": "vit_base_patch16_dinov3.lvd1689m",
}
OF_OPEN_CLIP = {
    "clip": ("ViT-L-14-quickgelu", "openai"),
    "clip:base": ("ViT-B-16-quickgelu", "openai"),
    "siglip2": ("ViT-SO400M-14-SigLIP2-378", "webli"),
    "siglip2:base": ("ViT-B-16-SigLIP2", "webli"),
    "pe": ("PE-Core-L-14-336", "meta"),
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_a_row_is_what_timms_config_says(name):
    row, timms = PRETRAINED[name], find_pretrained(f"timm:{OF_TIMM[name]}")
    size = 224 if name == "dinov2" else timms.transform.size
    assert (row.transform.size, row.mean, row.std) == (size, timms.mean, timms.std)
    assert row.weights == timms.weights
    licence = "MIT" if name.startswith("clip") else timms.licence  # OpenAI's; timm's config says apache-2.0
    assert row.licence.lower() == licence.lower()
    assert is_contrastive(OF_TIMM[name], CONFIGS[OF_TIMM[name]]) == (name in ("clip", "clip:base", "pe"))


def test_the_contrastive_models_are_those_with_a_projection():
    """Two ways to tell them: by name, and by a number of classes that no set of classes has."""
    by_name = {
        name for name in NAMES if re.search("clip|pe_core", name) and not re.search("in1k|in12k", name)
    }
    by_number = {
        name for name, config in CONFIGS.items()
        if 384 <= config["num_classes"] <= 1280 and config["num_classes"] != 1000
    }  # fmt: skip
    ours = {name for name, config in CONFIGS.items() if is_contrastive(name, config)}
    assert ours == by_number
    assert {name for name in by_name - ours if "_clip_gap." not in name} == set()  # those have no projection
    assert len(ours) > 100


def test_no_name_is_refused_but_those_whose_inputs_are_not_square(monkeypatch):
    monkeypatch.setattr(timm, "list_pretrained", lambda: NAMES)  # takes 40 ms, for each name
    refused = {}
    for name in NAMES:
        try:
            find_pretrained(f"timm:{name}")
        except InputError as error:
            refused[name] = str(error)
    assert len(refused) == 5
    assert all("sapiens2" in name and "dinov3" in refused[name] for name in refused)


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_image_text_models_see_what_open_clip_shows_them(name):
    """timm's config differs: it crops CLIP's and SigLIP's images to 90 %, which their authors do not."""
    row, config = PRETRAINED[name], open_clip.get_pretrained_cfg(*OF_OPEN_CLIP[name])
    seen = row.transform.crop_mode, row.transform.interpolation, row.transform.resize, row.mean, row.std
    mode = {"shortest": "center", "squash": "squash"}[config["resize_mode"]]
    theirs = mode, config["interpolation"], row.transform.size
    assert seen == (*theirs, tuple(config["mean"]), tuple(config["std"]))


def test_features_are_of_contrastive_models_alone():
    assert find_pretrained("timm:vit_base_patch16_clip_224.openai:features").transform.size == 224
    for name in ("resnet18.a1_in1k", "resnet50_clip_gap.openai", "vit_base_patch16_clip_224.openai_ft_in1k"):
        with pytest.raises(InputError, match=rf"timm:{name} has no projection .*: give timm:{name}$"):
            find_pretrained(f"timm:{name}:features")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", "dlib", "clip:base", "dinov2"])
def test_gmacs_and_millions_are_the_networks(name):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    row = PRETRAINED[name]
    size = row.transform.size
    with torch.device("meta"):
        network = with_input_size(row.network(None).eval(), size)
        with FlopCounterMode(display=False) as counter:
            vectors = network(torch.zeros(1, 3, size, size))
    assert row.gmacs == pytest.approx(counter.get_total_flops() / 2e9, rel=0.02)
    assert vectors.shape == (1, row.dimension)
    assert row.millions == round(sum(p.numel() for p in network.parameters()) / 1e6, 1)

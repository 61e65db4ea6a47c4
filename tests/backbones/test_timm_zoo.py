"""A timm network from a file: with its projection or without it, and at another input size, as by timm."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hub import lay_in_hub
from huggingface_hub import constants
from safetensors.torch import save_file

from retrieval.backbones.backbone import find_backbone, load_backbone
from retrieval.backbones.fine_tuned import Mapped
from retrieval.backbones.timm_zoo import size_step, with_input_size
from retrieval.embedding.onnx_runtime import export, open_exported, run_onnx
from retrieval.errors import InputError
from supcon.validation import mixed

CLIP = "vit_base_patch32_clip_224.openai"
QUICK = "vit_base_patch32_clip_quickgelu_224.openai"


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """Let timm build transformers with one block; a Swin with one a stage, and a second that shifts."""
    create = timm.create_model

    def small(name, *args, **given):
        depth = {} if any(each in name for each in ("resnet", "maxvit")) else {"depth": 1}
        depth = {"depths": (2, 1, 1, 1)} if "swin" in name else depth
        return create(name, *args, **(depth | given))

    monkeypatch.setattr(timm, "create_model", small)
    torch.manual_seed(0)


def file_of(name, folder):
    network = timm.create_model(name)
    if getattr(network, "pos_embed", None) is not None:
        torch.nn.init.normal_(network.pos_embed)
    torch.save(network.state_dict(), folder / "w.pth")
    return folder / "w.pth"


# ---- the projection and the activation


def test_the_projection_is_kept_and_features_are_what_lies_before_it(tmp_path, caplog):
    caplog.set_level("INFO")
    file = file_of(QUICK, tmp_path)
    projected = load_backbone(f"timm:{QUICK}", "cpu", file)
    assert f"timm:{QUICK} keeps its projection, to 512 dimensions; timm:{QUICK}:features gives" in caplog.text
    assert "QuickGELU" not in caplog.text
    before = load_backbone(f"timm:{QUICK}:features", "cpu", file)
    assert (projected.dimension, before.dimension) == (512, 768)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    head = torch.load(file)["head.weight"]
    with torch.inference_mode():
        torch.testing.assert_close(projected.embed(images), before.embed(images) @ head.T)
    keys = [find_backbone(f"timm:{QUICK}{end}", "cpu", file).key for end in ("", ":features")]
    assert keys[0] != keys[1]


def test_a_file_without_the_projection_is_a_sentence(tmp_path):
    file = file_of(CLIP, tmp_path)
    without = {name: tensor for name, tensor in torch.load(file).items() if not name.startswith("head.")}
    for state in (without, without | {"head.weight": torch.ones(10, 768), "head.bias": torch.ones(10)}):
        torch.save(state, file)
        with pytest.raises(InputError, match=f"projection of timm:{CLIP}, to 512.*: timm:{CLIP}:features"):
            load_backbone(f"timm:{CLIP}", "cpu", file)
        assert load_backbone(f"timm:{CLIP}:features", "cpu", file).dimension == 768
    del without["cls_token"]
    torch.save(without, file)
    with pytest.raises(InputError, match=f"does not hold the weights of timm:{CLIP}: .*cls_token"):
        load_backbone(f"timm:{CLIP}", "cpu", file)


def test_weights_that_want_quickgelu_are_warned_of(tmp_path, caplog):
    load_backbone(f"timm:{CLIP}", "cpu", file_of(CLIP, tmp_path))
    assert f"runs GELU, but its weights were trained with QuickGELU: give timm:{QUICK}" in caplog.text


def test_a_repository_of_the_hub_keeps_its_projection_too(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    network = timm.create_model(CLIP)
    config = {"architecture": CLIP.partition(".")[0], "num_classes": 512,
              "pretrained_cfg": network.pretrained_cfg}  # fmt: skip
    for repository in ("clips/vit_clip", "clips/vit"):
        lay_in_hub(
            tmp_path, repository,
            **{"config.json": lambda file: file.write_text(json.dumps(config)),
               "model.safetensors": lambda file: save_file(network.state_dict(), file)},
        )  # fmt: skip
    dimensions = {"clips/vit_clip": 512, "clips/vit_clip:features": 768, "clips/vit": 768}
    for name, dimension in dimensions.items():
        assert load_backbone(f"timm:hf-hub:{name}", "cpu").dimension == dimension


# ---- the size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 336),
        ("vit_small_patch14_dinov2.lvd142m", 224),
        ("vit_small_patch14_dinov2.lvd142m", 336),
        ("vit_small_patch14_dinov2.lvd142m", 518),
        ("eva02_tiny_patch14_224.mim_in22k", 336),
        ("vit_pe_core_tiny_patch16_384.fb", 224),
        ("vit_small_patch16_dinov3.lvd1689m", 224),
        ("beit_base_patch16_224.in22k_ft_in22k", 160),
        ("swin_tiny_patch4_window7_224.ms_in1k", 448),
    ],
)
def test_another_size_is_as_timm_resamples_it(name, size, tmp_path):
    file = file_of(name, tmp_path)
    ours = load_backbone(f"timm:{name}", "cpu", file, image_size=size)
    state = {"state_dict": torch.load(file), "source": ""}
    # A Swin's windows grow with its input by set_input_size, and keep their size by img_size.
    given = {"window_size": 14} if "swin" in name else {}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=state, img_size=size, **given
    ).eval()
    if "pe_core" not in name:
        theirs.reset_classifier(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (ours.mean, ours.std))
    with torch.inference_mode():
        expected = theirs((images / 255 - mean) / std)
        torch.testing.assert_close(ours.embed(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 100, "images of 100 pixels: its patches have 16.* 96 or 112$"),
        ("vit_small_patch14_dinov2.lvd142m", 7, "images of 7 pixels: .* multiple of that, such as 14 or 28$"),
        ("vit_small_patch16_dinov3.lvd1689m", 250, "such as 240 or 256$"),
        ("cait_xxs24_224.fb_dist_in1k", 192, r"does not take images of 192 .*its own size is 224$"),
        ("maxvit_rmlp_pico_rw_256.sw_in1k", 16, r"does not take images of 16 .*its own size is 256$"),
    ],
)
def test_a_size_that_it_cannot_have_names_those_that_it_can(name, size, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        load_backbone(f"timm:{name}", "cpu", file_of(name, tmp_path), image_size=size)


def test_a_resized_vit_runs_in_onnx_runtime(tmp_path):
    name = "vit_small_patch14_dinov2.lvd142m"
    backbone = load_backbone(f"timm:{name}", "cpu", file_of(name, tmp_path), image_size=224)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 224, 224), np.uint8)
    with torch.inference_mode():
        wanted = backbone.embed(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(
        run_onnx(open_exported(export(backbone)), images), wanted, rtol=1e-3, atol=1e-3
    )


def test_a_wrapped_network_is_resized_and_others_are_left_alone():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert size_step(Mapped(network, 192)) == 16
    with_input_size(Mapped(network, 192), 64)
    assert network.pos_embed.shape == (1, 17, 192)
    resnet = timm.create_model("resnet18")
    assert (with_input_size(resnet, 100), size_step(resnet)) == (resnet, 1)


def test_weights_for_two_sizes_are_mixed_at_the_tuned_one(tmp_path):
    """WiSE-FT, where the position embeddings have two shapes."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    file = file_of(name, tmp_path)
    untuned = load_backbone(f"timm:{name}", "cpu", file)
    at_96 = load_backbone(f"timm:{name}", "cpu", file, image_size=96)
    with torch.no_grad():
        tuned = replace(at_96, network=load_backbone(f"timm:{name}", "cpu", file, image_size=96).network)
        for parameter in tuned.network.parameters():
            parameter.add_(1)
    for share in (0.0, 0.25, 1.0):
        got = mixed(untuned, tuned, share)
        assert got.transform.size == 96
        for (key, parameter), start in zip(
            got.network.named_parameters(), at_96.network.parameters(), strict=True
        ):
            torch.testing.assert_close(parameter, start + share, msg=key)
    assert untuned.network.pos_embed.shape == (1, 197, 192)  # as it was

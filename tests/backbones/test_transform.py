import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from get_images import read_image
from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.transform import Transform

SIZES = [(640, 427), (60, 90), (224, 224), (7, 1)]  # width, height


def photograph(folder, size, name="china.jpg"):
    """A photograph of this size: as Pillow's image, and as the pixels that a script reads."""
    image = Image.fromarray(load_sample_image(name)).resize(size)
    image.save(folder / "a.png")
    return image, read_image(folder / "a.png")


def assert_alike(pixels, expected):
    """Pillow and torch round differently: by a grey level, and by two at hardly any pixel."""
    difference = abs(pixels.transpose(1, 2, 0).astype(int) - np.asarray(expected, int))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_squash_keeps_the_whole_image_as_pillow_does(tmp_path, name, size):
    image, pixels = photograph(tmp_path, size, name)
    seen = Transform(224, "bicubic")(pixels)
    assert seen.pixels.shape == (3, 224, 224)
    assert seen.face is None
    assert_alike(seen.pixels, image.resize((224, 224), Image.Resampling.BICUBIC))


def assert_sees_alike(word, theirs, folder, size):
    """What the word sees, beside `theirs`: a function from Pillow's image to normalised pixels."""
    image, pixels = photograph(folder, size)
    row = find_pretrained(word)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (row.mean, row.std))
    expected = ((theirs(image) * std + mean) * 255).round().permute(1, 2, 0)
    assert_alike(row.transform(pixels).pixels, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word", ["resnet50", "resnet50:IMAGENET1K_V1"])
def test_resnet50_sees_what_torchvisions_weights_object_says(tmp_path, word, size):
    from torchvision.models import ResNet50_Weights

    weights = ResNet50_Weights[word.partition(":")[2] or "IMAGENET1K_V2"]
    assert_sees_alike(word, weights.transforms(), tmp_path, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name",
    [
        "resnet18.a1_in1k",
        "vit_so400m_patch14_siglip_378.webli_ft_in1k",
        "deepseek_vit_412m.deepseek_v4_flash_vision_exp",  # grey beside the image
        "vit_base_patch14_dinov2.lvd142m",
        "volo_d4_448.sail_in1k",  # its square is larger than what is resized
    ],
)
def test_timm_words_see_what_timms_own_transform_gives(tmp_path, name, size):
    import timm

    config = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    assert_sees_alike(f"timm:{name}", theirs, tmp_path, size)


def test_grey_beside_the_image_is_the_same_on_a_gpu():
    transform = find_pretrained("timm:deepseek_vit_412m.deepseek_v4_flash_vision_exp").transform
    image = load_sample_image("china.jpg").copy()
    (on_gpu,), _ = transform.on_gpu([torch.from_numpy(image).permute(2, 0, 1)])
    here = torch.from_numpy(transform(image).pixels)
    top = (392 - round(392 * 427 / 640)) // 2
    for pixels in (on_gpu, here):
        assert (pixels[:, :top] == 128).all()
    difference = (on_gpu.int() - here.int()).abs()
    assert (difference > 2).float().mean() < 1e-3  # where bicubic leaves 0 to 255, which integers cannot


def test_simclr_sees_the_central_seven_eighths_of_0_to_1(tmp_path):
    image, pixels = photograph(tmp_path, (320, 240))
    row = find_pretrained("simclr")
    assert (row.mean, row.std) == ((0, 0, 0), (1, 1, 1))
    square = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    assert_alike(row.transform(pixels).pixels, square)


def test_of_size_keeps_the_share_that_is_cut_away():
    assert Transform(224, "bilinear", "center", 256).of_size(112) == Transform(112, "bilinear", "center", 128)
    assert Transform(160, "bilinear").of_size(96) == Transform(96, "bilinear")


def test_a_line_of_pixels_fills_no_memory():
    line = np.random.default_rng(0).integers(0, 256, (1, 100_000, 3), np.uint8)
    for image in (line, line.transpose(1, 0, 2)):
        assert Transform(224, "bilinear", "center", 256)(image).pixels.shape == (3, 224, 224)

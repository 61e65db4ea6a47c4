"""supcon/views.py against torchvision's own transforms, given the same random numbers."""

import dataclasses
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from supcon.views import AUGMENTATIONS, Draw, augment, draw

SIDE = 40


def squares(count=1):
    return torch.randint(
        0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def drawn(box=(0, 0, 1, 1), flipped=False, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=False):
    """One view."""
    numbers = (torch.tensor([value]) for value in (flipped, brightness, contrast, saturation, hue, grey))
    return Draw(torch.tensor([box], dtype=torch.float32), *numbers)


def test_a_view_without_any_change_is_the_image():
    pixels = squares()
    torch.testing.assert_close(augment(pixels, SIDE, drawn()), pixels / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("box", [(4, 8, 20, 16), (0, 0, 40, 40), (20, 0, 20, 40)])
def test_crop_and_flip_are_torchvisions(box, flipped):
    left, top, width, height = box
    pixels = squares()
    wanted = tv.resized_crop(pixels / 255, top, left, height, width, [24, 24], antialias=False)
    wanted = tv.horizontal_flip(wanted) if flipped else wanted
    shares = tuple(number / SIDE for number in box)
    given = augment(pixels, 24, drawn(shares, flipped))
    inner = (..., slice(1, -1), slice(1, -1))  # at a crop's edge, ours still sees the pixels beside it
    torch.testing.assert_close(given[inner], wanted[inner], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("change", "factor"), [("brightness", 0.6), ("contrast", 0.7), ("saturation", 0.5)])
def test_colours_change_as_torchvision_changes_them(change, factor):
    pixels = squares()
    wanted = getattr(tv, f"adjust_{change}")(pixels / 255, factor)
    given = augment(pixels, SIDE, drawn(**{change: factor}))
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)


def test_changes_follow_each_other_as_in_torchvision():
    pixels = (squares().float() * 0.4 + 60).byte()  # torchvision cuts at black and white each time
    wanted = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(pixels / 255, 1.1), 0.8), 0.7)
    given = augment(pixels, SIDE, drawn(brightness=1.1, contrast=0.8, saturation=0.7))
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)


def test_grey_is_torchvisions_and_ends_the_colours():
    pixels = squares()
    wanted = tv.rgb_to_grayscale(pixels / 255, num_output_channels=3)
    torch.testing.assert_close(augment(pixels, SIDE, drawn(grey=True, hue=0.2)), wanted, atol=1e-4, rtol=0)


def test_hue_turns_colours_keeps_greys_and_comes_round():
    colour = torch.tensor([200, 100, 100], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    turned = augment(colour, SIDE, drawn(hue=1 / 3))[0, :, 0, 0]
    assert turned.argmax() == 1  # red, a third further, is green, as in torchvision's adjust_hue
    assert tv.adjust_hue(colour / 255, 1 / 3)[0, :, 0, 0].argmax() == 1
    torch.testing.assert_close(augment(colour, SIDE, drawn(hue=1.0)), colour / 255, atol=2e-3, rtol=0)
    grey = torch.full((1, 3, SIDE, SIDE), 120, dtype=torch.uint8)
    torch.testing.assert_close(augment(grey, SIDE, drawn(hue=0.4)), grey / 255, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_what_is_drawn_stays_within_the_augmentation(kind):
    limits = AUGMENTATIONS[kind]
    numbers = draw(limits, 4000, torch.Generator().manual_seed(0))
    left, top, width, height = numbers.boxes.unbind(1)
    assert (numbers.boxes >= 0).all()
    assert ((left + width) <= 1 + 1e-6).all()
    assert ((top + height) <= 1 + 1e-6).all()
    whole = (width < 1) & (height < 1)  # a side longer than the square is cut to it
    areas = (width * height)[whole]
    assert areas.min() >= limits.scale[0] - 1e-6
    assert areas.max() <= limits.scale[1] + 1e-6
    ratios = (width / height)[whole]
    assert limits.ratio[0] - 1e-4 <= ratios.min() <= ratios.max() <= limits.ratio[1] + 1e-4
    for name in ("brightness", "contrast", "saturation"):
        amount, factors = getattr(limits, name), getattr(numbers, name)
        assert (factors - 1).abs().max() <= amount
        assert (factors == 1).float().mean().item() == pytest.approx(
            1 - limits.jitter if amount else 1, abs=0.03
        )
    assert numbers.hue.abs().max() <= limits.hue
    assert numbers.grey.float().mean().item() == pytest.approx(limits.grey, abs=0.03)
    assert numbers.flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_each_image_of_a_batch_is_changed_by_its_own_numbers_and_the_same_seed_gives_the_same():
    pixels = squares(6)
    numbers = draw(AUGMENTATIONS["strong"], 6, torch.Generator().manual_seed(3))
    together = augment(pixels, 24, numbers)
    for row in range(6):
        one = Draw(**{f.name: getattr(numbers, f.name)[row : row + 1] for f in dataclasses.fields(Draw)})
        torch.testing.assert_close(
            augment(pixels[row : row + 1], 24, one)[0], together[row], atol=1e-6, rtol=0
        )
    again = augment(pixels, 24, draw(AUGMENTATIONS["strong"], 6, torch.Generator().manual_seed(3)))
    assert torch.equal(together, again)
    assert together.min() >= 0
    assert together.max() <= 1
    assert not math.isclose(together[0].mean(), together[1].mean(), rel_tol=1e-6)

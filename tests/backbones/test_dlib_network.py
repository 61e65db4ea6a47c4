"""The torch network beside dlib's own, on photographs; and files that are not quite dlib's."""

import dlib
import numpy as np
import pytest
import torch
from photographs import face_photograph, seen_of

from retrieval.backbones.dlib_network import MEAN, DlibFaceNetwork, read_dlib_weights
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.zoo import PRETRAINED
from retrieval.errors import InputError

FILE = PRETRAINED["dlib"].weights.fetch()


@pytest.fixture(scope="module")
def network():
    network = DlibFaceNetwork()
    network.load_state_dict(read_dlib_weights(FILE))
    return network.eval()


def chips():
    """Aligned faces of two people, upright and mirrored, and what is none: (6, 3, 150, 150)."""
    crop = FaceCrop("dlib", 150, 1 / 3, 0.08)
    photographs = [face_photograph(name) for name in ("hopper", "collins")]
    faces = [seen_of(crop, p).pixels for photo in photographs for p in (photo, photo.flip(2))]
    noise = torch.randint(0, 256, (3, 150, 150), dtype=torch.uint8, generator=torch.manual_seed(0))
    return torch.stack([*faces, noise, torch.zeros_like(noise)])


def test_the_descriptors_are_dlibs(network):
    theirs = dlib.face_recognition_model_v1(str(FILE))
    images = chips()
    with torch.inference_mode():
        ours = network((images.float() - torch.tensor(MEAN).view(3, 1, 1)) / 256).numpy()
    for image, descriptor in zip(images, ours, strict=True):
        chip = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        expected = np.array(theirs.compute_face_descriptor(chip))
        cosine = descriptor @ expected / np.linalg.norm(descriptor) / np.linalg.norm(expected)
        assert cosine > 1 - 1e-6
        assert abs(descriptor - expected).max() < 2e-6


def test_the_table_and_the_file_have_the_same_mean():
    assert [share * 255 for share in PRETRAINED["dlib"].mean] == pytest.approx(MEAN)


def test_it_can_be_trained(network):
    images = (chips()[:4].float() - 110) / 256
    before = network.fc.weight.detach().clone()
    loss = network(images).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert torch.equal(network.fc.weight, before)
    network.zero_grad()


def test_channels_last_changes_nothing(network):
    images = (chips().float() - 110) / 256
    with torch.inference_mode():
        plain = network(images)
        other = DlibFaceNetwork().eval().to(memory_format=torch.channels_last)
        other.load_state_dict(network.state_dict())
        assert torch.allclose(other(images.to(memory_format=torch.channels_last)), plain, atol=1e-5)


CONTENT = FILE.read_bytes()


def flipped(at):
    content = bytearray(CONTENT)
    content[at] ^= 0x55
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello, I am no network", r"no \(4736, 1, 1, 1\) numbers after byte 0"),
        (CONTENT[: len(CONTENT) // 2], "no .* numbers after byte"),
        (CONTENT[:-1], "its layers have other settings"),
        (CONTENT + b"x", "its layers have other settings"),
        (flipped(CONTENT.index(b"input_rgb") + 25), "its layers have other settings"),  # the mean
        (flipped(CONTENT.index(b"relu_")), "its layers have other settings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_quite_dlibs_is_refused(tmp_path, content, problem):
    (tmp_path / "net.dat").write_bytes(content)
    with pytest.raises(InputError, match=rf"net\.dat does not hold dlib's face network: {problem}"):
        read_dlib_weights(tmp_path / "net.dat")

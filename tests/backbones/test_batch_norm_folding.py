"""retrieval/folding.py: the same numbers from fewer layers."""

import pytest
import torch
from torch import nn

from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.batch_norm_folding import fold_batch_norms


def norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def with_statistics(network):
    """A network in inference mode whose normalisations do something."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.mark.parametrize("word", ["efficientnet_lite0", "resnet50", "facenet", "timm:convnext_atto.d2_in1k"])
def test_the_folded_network_computes_the_same_and_has_no_normalisation_left(word):
    network = with_statistics(find_pretrained(word).network(None))
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    before = norms(network)
    folded = fold_batch_norms(network, images)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-4)
    assert norms(folded) == 0
    assert norms(network) == before  # it is a copy
    assert len(list(folded.parameters())) < len(list(network.parameters())) or not before


class Shared(nn.Module):
    """A convolution that feeds something beside its normalisation."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.convolution(x)
        return (x + self.norm(x)).mean((2, 3))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="computes something else"):
        fold_batch_norms(with_statistics(Shared()), torch.rand(2, 3, 8, 8))


def test_a_normalisation_before_its_convolution_stays():
    network = with_statistics(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    )
    assert norms(fold_batch_norms(network, torch.rand(2, 3, 8, 8))) == 2

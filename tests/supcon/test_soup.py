"""supcon/soup.py: the mean of checkpoints is a checkpoint; unlike ones are refused."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import SMALL, assert_same, begun, run_here, settings_of
from torch import nn

from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.fine_tuned import (
    JOINED,
    Recipe,
    find_fine_tuned,
    load_fine_tuned,
    read_fine_tuned,
    write_fine_tuned,
)
from retrieval.backbones.transform import Transform
from retrieval.errors import InputError
from supcon.soup import soup

# The command runs in this process, which has imported the module before.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
RECIPE = Recipe(
    word=SMALL,
    prepare=asdict(Transform(32, "bicubic", "center", 32)),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    folded=False,
    mapped=False,
    tuned_size=32,
    embedding="tuned",
    weight=1.0,
    loss="ce",
    settings={"seed": 0, "weights": None},
    classes=["a", "b"],
    versions={},
    metrics={"untuned": {"top_1": 0.4}, "tuned": {"top_1": 0.5}},
    history=[{"epoch": 1, "loss": 0.1}],
    hub_config=None,
)


@pytest.fixture(scope="module")
def ancestor():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return find_pretrained(SMALL).network(None).eval()


def tuned(ancestor, seed):
    """The weights after a made-up training: batch-norm statistics stay, as fine_tuning.py leaves them."""
    random = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in ancestor.state_dict().items()}
    for name, parameter in ancestor.named_parameters():
        state[name] += 0.01 * torch.randn(parameter.shape, generator=random)
    return state


@pytest.fixture
def write(ancestor, tmp_path):
    def written(name, seed, untuned=None, state=None, **changes):
        recipe = replace(RECIPE, **changes)
        write_fine_tuned(tmp_path / name, recipe, state or tuned(ancestor, seed), untuned)
        return tmp_path / name

    return written


def test_the_soup_of_two_copies_is_the_same_network(write, tmp_path):
    first, copy = write("a.pth", 1), write("b.pth", 1)
    ended = run_here("-m", "supcon.soup", first, copy, "--out", "new/c.pth", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "nobody has measured" in ended.stdout
    made = tmp_path / "new" / "c.pth"
    assert_same(read_fine_tuned(made)[1], read_fine_tuned(first)[1])
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vectors, others = (load_fine_tuned(file, "cpu").network(pixels) for file in (made, first))
    assert torch.equal(vectors, others)


def test_every_weight_is_the_mean_and_the_recipe_says_what_it_is(write):
    files = [write(f"{seed}.pth", seed, settings={"seed": seed, "weights": None}) for seed in range(3)]
    recipe, mean, untuned = soup(files)
    states = [read_fine_tuned(file)[1] for file in files]
    for name, tensor in mean.items():
        assert tensor.dtype == states[0][name].dtype
        for place in range(0, tensor.numel(), 97):
            by_hand = sum(state[name].flatten()[place].item() for state in states) / 3
            assert tensor.flatten()[place].item() == pytest.approx(by_hand, abs=1e-6)
    assert untuned is None
    assert recipe.settings["soup"] == [str(file) for file in files]
    assert recipe.loss == "ce, a soup of 3"
    assert recipe.metrics == {"untuned": {}}
    assert recipe.history == []


def test_a_soup_of_joined_networks_keeps_the_untuned_one(write, ancestor):
    untuned = ancestor.state_dict()
    files = [write(f"{seed}.pth", seed, untuned, embedding=JOINED, weight=2.0) for seed in range(2)]
    recipe, _, kept = soup(files)
    assert recipe.embedding == JOINED
    assert_same(kept, untuned)
    backbone = find_fine_tuned(files[0], "cpu")
    assert backbone.trained.joined


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"word": "timm:test_vit.r160_in1k"}, "the network (timm:test_efficientnet"),
        ({"tuned_size": 64}, "the size of the tuned network's input (32 and 64)"),
        ({"mean": (0.4, 0.5, 0.5)}, "the normalisation of pixels"),
        ({"embedding": "mixed weights"}, "the way to embed"),
        ({"weight": 0.5}, "the weight of the way to embed"),
        ({"folded": True}, "the folding of batch norms"),
        ({"loss": "supcon"}, "the loss (ce and supcon)"),
        ({"classes": ["a", "c"]}, "the classes of the training images:"),
        ({"settings": {"weights": "other.pth"}}, "was tuned from the pretrained weights and"),
    ],
)
def test_unlike_checkpoints_are_refused(write, changes, what):
    files = write("a.pth", 1), write("b.pth", 2, **changes)
    with pytest.raises(InputError) as error:
        soup(files)
    assert what in str(error.value)
    assert str(files[1]) in str(error.value)


def test_other_ancestors_are_refused(write, ancestor):
    other = nn.Module.state_dict(ancestor) | {"bn1.running_mean": ancestor.bn1.running_mean + 1}
    with pytest.raises(InputError, match="differ in their batch-norm statistics"):
        soup([write("a.pth", 1), write("b.pth", 2, state=other)])
    joined = {"embedding": JOINED, "weight": 2.0}
    files = (
        write("c.pth", 1, ancestor.state_dict(), **joined),
        write("d.pth", 2, tuned(ancestor, 3), **joined),
    )
    with pytest.raises(InputError, match="differ in their untuned weights"):
        soup(files)


def test_wrong_commands_are_sentences(write, tmp_path):
    first, other = write("a.pth", 1), write("b.pth", 2)
    for flags, sentence in (
        ((first,), "give two checkpoints or more"),
        ((first, other, "--out", "b.pth"), "--out b.pth exists: give the name of a new file"),
    ):
        ended = run_here("-m", "supcon.soup", *flags, cwd=tmp_path)
        assert ended.returncode == 2
        assert f"error: {sentence}" in ended.stderr


@pytest.mark.slow
def test_two_seeds_of_a_training_become_a_network_that_model_fine_tuned_runs(few, tiny, tmp_path):
    from supcon.training import fit

    files = []
    for seed in (0, 1):
        training = begun(settings_of(tiny, tmp_path, seed=seed, epochs=1, save_dir=tmp_path / str(seed)))
        with training.tracking:
            fit(training)
        files.append(tmp_path / str(seed) / "fine_tuned_model.pth")
    first, second = (read_fine_tuned(file)[1] for file in files)
    assert any(not first[name].equal(second[name]) for name in first)
    ended = run_here("-m", "supcon.soup", *files, "--out", "soup.pth", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    ended = run_here("model_fine_tuned.py", "--weights", "soup.pth", "--query_dir", few / "query",
                     "--gallery_dir", few / "gallery", "--custom_dataset", cwd=tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "fine-tuned with ce, a soup of 2" in (tmp_path / "results" / "report.html").read_text()
    assert not (tmp_path / "results" / "loss.png").exists()  # no epochs were measured

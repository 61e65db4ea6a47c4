"""The name of a timm model and a file of weights in; its network, which gives the model's embedding, out."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.filling import does_not_fit, read_checkpoint, without_heads
from retrieval.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# The last layer of a face network that was trained with a margin loss is the embedding, no classifier.
ENDS_IN_EMBEDDING = re.compile(r"\.(arcface|cosface|adaface)_")
FEATURES = ":features"  # the end of a name: a contrastive model without its projection
HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
VERSION = 2  # part of the cache key: raise it when the same weights give other vectors
NEW_NORM = ("head.norm.", "head_norm.")
PROJECTION_BIAS = ("head.bias", "head.fc.bias")  # CLIP's projection has none, and timm's has one of zeros

# The tensors of a file → the network with these; None → a new network.
Build = Callable[[dict[str, "Tensor"] | None], "nn.Module"]

log = logging.getLogger("retrieval.backbones")


def is_contrastive(name: str, config: dict[str, Any]) -> bool:
    """Return whether a model's last layer is the projection of its contrastive training, not a classifier.

    CLIP's kin and PE-Core end in a projection to 384 to 1280 dimensions. Fine-tuned to ImageNet they have
    1000 or more classes. `name` may end in :features.

    >>> is_contrastive("vit_base_patch16_clip_224.openai", {"num_classes": 512})
    True
    >>> is_contrastive("vit_base_patch16_clip_224.openai_ft_in1k", {"num_classes": 1000})
    False
    """
    outputs = config["num_classes"]
    named = re.search(r"clip|pe_core", name.rpartition("/")[2])  # the owner on the hub may be called anything
    return bool(named) and 384 <= outputs <= 1280 and outputs != 1000


def named_network(name: str, file: Path | None) -> nn.Module:
    """Build the network of one of timm's own names, and load `file` into it."""
    import timm

    return timm_network(name, name, timm.get_pretrained_cfg(name).to_dict(), file)


def network_of_hub_config(model_name: str, text: str) -> nn.Module:
    """Build the network that the text of a config.json describes, with random weights; needs no download."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        network = _build(f"local-dir:{folder}", None)
    if not _keeps_last_layer(model_name, network.pretrained_cfg):
        network.reset_classifier(0)
    return network


def timm_network(name: str, architecture: str, config: dict[str, Any], file: Path | None) -> nn.Module:
    """Build a timm network without its classifier, and load `file` into it.

    A contrastive model keeps its projection, unless `name` ends in :features. The file is loaded by timm,
    which also knows the layouts that its models were published in. The first try includes the last layer. A
    file with another classifier, or none, is loaded into a network without one. Raises InputError unless the
    file fills every tensor of the embedding.
    """
    kept, without = _keeps_last_layer(name, config), False
    build = partial(_build, architecture)
    state, under = read_checkpoint(file, _without_weights(architecture)) if file else (None, "")
    title = f"timm:{name}{under}"
    try:
        network = _built(build, state, file, title)
    except InputError:
        if ENDS_IN_EMBEDDING.search(name):
            raise
        without = True
        build = partial(build, num_classes=0, label_offset=0)
        state = _without_classifier(state, architecture, config, file)
        network = _built(build, state, file, title)
    if not kept:
        network.reset_classifier(0)
    if state and (missing := _missing(network, build, state)):
        raise does_not_fit(file, title, [f"{tensor} is missing" for tensor in missing])
    if kept and without:
        raise InputError(
            f"{file} does not hold the projection of timm:{name}, to {config['num_classes']} dimensions: "
            f"timm:{name}{FEATURES} takes it, and gives what lies before the projection"
        )
    if file:
        _log_what_it_gives(name, config)
    return network


def _keeps_last_layer(name: str, config: dict[str, Any]) -> bool:
    projects = is_contrastive(name, config) and not name.endswith(FEATURES)
    return projects or bool(ENDS_IN_EMBEDDING.search(name))


def _log_what_it_gives(name: str, config: dict[str, Any]) -> None:
    """Log that a projection is kept, and warn of OpenAI's weights (and others) without their activation."""
    import timm

    if is_contrastive(name, config) and not name.endswith(FEATURES):
        log.info("timm:%s keeps its projection, to %d dimensions; timm:%s%s gives what lies before it",
                 name, config["num_classes"], name, FEATURES)  # fmt: skip
    if "QuickGELU" in str(config.get("notes")) and "quickgelu" not in name:
        own = f"{config['architecture']}.{config.get('tag')}".replace("_clip_", "_clip_quickgelu_")
        give = f": give timm:{own}" if own in timm.list_pretrained() else ""
        log.warning("timm:%s runs GELU, but its weights were trained with QuickGELU%s", name, give)


# ---- the size of its input ------------------------------------------------------------------------


def with_input_size(network: nn.Module, size: int) -> nn.Module:
    """Change a network in place for inputs of `size` × `size` pixels, if timm can, and return it.

    timm resamples position embeddings, biases and windows. Other networks stay as they are. Raises InputError
    if `size` is no multiple of the network's patches.
    """
    resizable, step = _resizable(network), size_step(network)
    if resizable is None:
        return network
    config = resizable.pretrained_cfg
    own = config["input_size"][-1]
    if size % step and size != own:  # SigLIP's own 384 pixels are no multiple of its patches of 14
        below = size // step * step
        fitting = f"{below} or {below + step}" if below else f"{step} or {2 * step}"
        raise InputError(
            f"{config['architecture']} does not take images of {size} pixels: its patches have {step}, and "
            f"its input must be a multiple of that, such as {fitting}"
        )
    try:
        resizable.set_input_size(img_size=(size, size))
    except Exception as error:  # each family fails in a way of its own where its windows do not fit
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{config['architecture']} does not take images of {size} pixels ({reason}); "
            f"its own size is {own}"
        ) from None
    return network


def size_step(network: nn.Module) -> int:
    """Return the pixels of which a network's input size must be a multiple: of a ViT, its patch's side."""
    embed = getattr(_resizable(network), "patch_embed", None)
    return embed.feat_ratio() if hasattr(embed, "feat_ratio") else 1


def _resizable(network: nn.Module) -> nn.Module | None:
    """Return the timm network that can change its input size: the network itself, or what it wraps."""
    modules = (part for part in network.modules() if hasattr(part, "pretrained_cfg"))
    return next((part for part in modules if hasattr(part, "set_input_size")), None)


# ---- its weights ----------------------------------------------------------------------------------


def _build(architecture: str, state: dict[str, Tensor] | None, **overlay: Any) -> nn.Module:
    """Build a timm network, with `overlay` in its config, and load the tensors of a file, if given."""
    import timm

    if state is None:
        return timm.create_model(architecture, pretrained_cfg_overlay=overlay)
    overlay |= {"state_dict": dict(state), "source": ""}  # or timm asks the source in its config
    return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)


def _built(build: Build, state: dict[str, Tensor] | None, file: Path | None, title: str) -> nn.Module:
    """Build a network. Raises InputError where the tensors of `file` do not fit."""
    try:
        return build(state)
    except Exception as error:  # timm's renaming of the tensors raises anything
        if not file:
            raise
        problems = [line.strip()[:200] for line in str(error).splitlines()]
        raise does_not_fit(file, title, problems[1:] or problems) from None


def _without_classifier(
    state: dict[str, Tensor], architecture: str, config: dict[str, Any], file: Path
) -> dict[str, Tensor]:
    bare = _without_weights(architecture)
    classifiers = config.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    state = {n: t for n, t in state.items() if n in bare or n.rpartition(".")[0] not in classifiers}
    return without_heads(state, bare, file)


def _without_weights(architecture: str) -> dict[str, Tensor]:
    """Return a network's tensors by name, without its classifier. They have shapes, but no values."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()


def _missing(network: nn.Module, build: Build, state: dict[str, Tensor]) -> list[str]:
    """Name the tensors of a network that loading `state` leaves at their random start.

    timm loads some families with strict=False, and renames tensors before it loads them. So tensors that are
    not in the file under their own name are checked by loading the file with NaN in the place of each number:
    a tensor that the file does not fill stays as it is in a new network with the same random seed. timm adds
    a norm of the head to networks that were trained without (fcmae): it keeps its start.
    """
    import torch

    places = network.state_dict()
    suspects = [name for name in places if name not in state and not name.startswith(NEW_NORM)]
    suspects = [name for name in suspects if name not in PROJECTION_BIAS or places[name].any()]
    if not suspects:
        return []
    filled_with_nan = {
        name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = build(filled_with_nan).state_dict()
        torch.manual_seed(0)
        new = build(None).state_dict()
    return [
        name for name in suspects
        if places[name].is_floating_point() and torch.equal(loaded[name], new[name])
    ]  # fmt: skip

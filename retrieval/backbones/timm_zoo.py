"""The name of a timm model in; its row, as the table in zoo.py has them, out."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.filling import does_not_fit, read_checkpoint, without_heads
from retrieval.backbones.transform import Transform
from retrieval.backbones.weights import Download, OnHub
from retrieval.backbones.zoo import FACES, Pretrained, torch_checkpoints
from retrieval.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

# The last layer of a face network that was trained with a margin loss is the embedding, no classifier.
ENDS_IN_EMBEDDING = re.compile(r"\.(arcface|cosface|adaface)_")
HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
VERSION = 1  # part of the cache key: raise it when the same weights give other vectors
NEW_NORM = ("head.norm.", "head_norm.")

# The tensors of a file → the network with these; None → a new network.
Build = Callable[[dict[str, "Tensor"] | None], "nn.Module"]


def find_timm(name: str) -> Pretrained:
    """Return the row of a timm model, NAME or hf-hub:OWNER/NAME. Raises InputError for an unknown one."""
    hub = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)", name)
    if hub:
        return _timm_row(name, *_config_on_hub(hub[1]), OnHub(hub[1], HUB_NAMES))
    config = _config_in_timm(name)
    hub_id, url = config.get("hf_hub_id"), config.get("url")
    weights = OnHub(hub_id, HUB_NAMES) if hub_id else Download(url, torch_checkpoints)
    return _timm_row(name, name, config, weights)


def hub_config(model_name: str) -> str | None:
    """Return the text of the downloaded config.json of timm:hf-hub:OWNER/NAME; None for other names."""
    hub = re.fullmatch(r"timm:hf[-_]hub:([\w.-]+/[\w.-]+)", model_name)
    file = OnHub(hub[1], ("config.json",)).find() if hub else None
    return file.read_text(encoding="utf-8") if file else None


def network_of_hub_config(model_name: str, text: str) -> nn.Module:
    """Build the network that the text of a config.json describes, with random weights; needs no download."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return _timm_network(model_name, f"local-dir:{folder}", {}, None)


def _config_in_timm(name: str) -> dict[str, Any]:
    import timm

    known = timm.list_pretrained()
    if name in known or ("." not in name and timm.is_model(name)):  # without a tag, timm chooses one
        config = timm.get_pretrained_cfg(name)
        if config.has_weights:
            return config.to_dict()
    hint = did_you_mean(name, [*known, *timm.list_models()]) or ": timm.list_pretrained() lists them"
    raise InputError(f"timm has no weights for {name}{hint}")


def _config_on_hub(repository: str) -> tuple[str, dict[str, Any]]:
    """Return the name by which timm builds a network of the hub, and its config, both from config.json."""
    import timm
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository} cannot be a repository of the hub: {error}") from None
    fetch = f"`python -m retrieval.backbones --fetch timm:hf-hub:{repository}`"
    file = OnHub(repository, ("config.json",), by_hand=f"copy the cache that {fetch} makes there").fetch()
    folder = f"local-dir:{file.parent}"
    try:
        return folder, timm.create_model(folder, pretrained=False).pretrained_cfg
    except Exception as error:  # anybody may have written config.json: anything may be wrong in it
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{repository} is no model of timm: its config.json describes none ({reason})"
        ) from None


def _timm_row(name: str, architecture: str, config: dict[str, Any], weights: OnHub | Download) -> Pretrained:
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=config)
    channels, height, width = data["input_size"]
    known = data["crop_mode"] in ("center", "squash") and data["interpolation"] in ("bilinear", "bicubic")
    if channels != 3 or height != width or not known:
        raise InputError(
            f"timm:{name} sees {channels} × {height} × {width} by {data['crop_mode']}, "
            f"{data['interpolation']}; supported are square RGB images by center or squash, "
            "bilinear or bicubic"
        )
    return Pretrained(
        lambda file: _timm_network(name, architecture, config, file),
        weights,
        None,
        None,
        Transform(height, data["interpolation"], data["crop_mode"], int(height / data["crop_pct"])),
        tuple(data["mean"]),
        tuple(data["std"]),
        config.get("license") or "see its model card",
        FACES if ENDS_IN_EMBEDDING.search(name) else "what it was trained on",
        FaceCrop("mtcnn", height, 0, 0.08, "align") if ENDS_IN_EMBEDDING.search(name) else None,
    )


def _timm_network(name: str, architecture: str, config: dict[str, Any], file: Path | None) -> nn.Module:
    """Build a timm network without its classifier, and load `file` into it.

    The file is loaded by timm, which also knows the layouts that its models were published in. The first try
    includes the classifier. A file with another classifier, or none, is loaded into a network without one.
    Raises InputError unless the file fills every tensor of the embedding.
    """
    ends_in_embedding = bool(ENDS_IN_EMBEDDING.search(name))
    build = partial(_build, architecture)
    state, under = read_checkpoint(file, _without_weights(architecture)) if file else (None, "")
    title = f"timm:{name}{under}"
    try:
        network = _built(build, state, file, title)
    except InputError:
        if ends_in_embedding:
            raise
        build = partial(build, num_classes=0, label_offset=0)
        state = _without_classifier(state, architecture, config, file)
        network = _built(build, state, file, title)
    if not ends_in_embedding:
        network.reset_classifier(0)
    if state and (missing := _missing(network, build, state)):
        raise does_not_fit(file, title, [f"{tensor} is missing" for tensor in missing])
    return network


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

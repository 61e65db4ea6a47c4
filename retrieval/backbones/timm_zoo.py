"""The name of a timm model in; a row like those of the table of the words out."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.transform import Transform
from retrieval.backbones.weights import Download, OnHub, does_not_fit, read_checkpoint, without_heads
from retrieval.backbones.zoo import FACES, Pretrained, torch_checkpoints
from retrieval.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

# Face networks trained with a margin loss end in the layer that gives the embedding; it is no classifier.
ENDS_IN_EMBEDDING = re.compile(r"\.(arcface|cosface|adaface)_")


def find_timm(name: str) -> Pretrained:
    """The row of a timm model, NAME or hf-hub:OWNER/NAME. Raises InputError for an unknown one."""
    hub = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)", name)
    if hub:
        return _timm_row(name, *_config_on_hub(hub[1]), OnHub(hub[1], HUB_NAMES))
    config = _config_in_timm(name)
    hub_id, url = config.get("hf_hub_id"), config.get("url")
    weights = OnHub(hub_id, HUB_NAMES) if hub_id else Download(url, torch_checkpoints)
    return _timm_row(name, name, config, weights)


def hub_config(word: str) -> str | None:
    """The text of config.json, of a word timm:hf-hub:OWNER/NAME whose network was loaded; None of others."""
    hub = re.fullmatch(r"timm:hf[-_]hub:([\w.-]+/[\w.-]+)", word)
    file = OnHub(hub[1], ("config.json",)).find() if hub else None
    return file.read_text(encoding="utf-8") if file else None


def network_of_hub_config(word: str, text: str) -> nn.Module:
    """The network that a config.json describes, without its weights; the hub is not asked."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return _timm_network(word, f"local-dir:{folder}", {}, None)


HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


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
    """What timm calls the network, and the config of its weights, as timm reads them in config.json."""
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
    except Exception as error:  # config.json is anybody's: anything may be wrong in it
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{repository} is no model of timm: its config.json describes none ({reason})"
        ) from None


def _timm_row(name: str, architecture: str, config: dict[str, Any], weights: OnHub | Download) -> Pretrained:
    from timm.data import resolve_data_config

    sees = resolve_data_config(pretrained_cfg=config)
    channels, height, width = sees["input_size"]
    known = sees["crop_mode"] in ("center", "squash") and sees["interpolation"] in ("bilinear", "bicubic")
    if channels != 3 or height != width or not known:
        raise InputError(
            f"timm:{name} sees {channels} × {height} × {width} by {sees['crop_mode']}, "
            f"{sees['interpolation']}; supported are square RGB images by center or squash, "
            "bilinear or bicubic"
        )
    return Pretrained(
        lambda file: _timm_network(name, architecture, config, file),
        weights,
        None,
        None,
        Transform(height, sees["interpolation"], sees["crop_mode"], int(height / sees["crop_pct"])),
        tuple(sees["mean"]),
        tuple(sees["std"]),
        config.get("license") or "see its model card",
        FACES if ENDS_IN_EMBEDDING.search(name) else "what it was trained on",
    )


def _timm_network(name: str, architecture: str, config: dict[str, Any], file: Path | None) -> nn.Module:
    import timm

    ends_in_embedding = bool(ENDS_IN_EMBEDDING.search(name))
    if file:
        network = _loaded_by_timm(name, architecture, config, file, ends_in_embedding)
    else:
        network = timm.create_model(architecture, pretrained=False)
    if not ends_in_embedding:
        network.reset_classifier(0)
    return network


def _loaded_by_timm(
    name: str, architecture: str, config: dict[str, Any], file: Path, ends_in_embedding: bool
) -> nn.Module:
    """The network by timm's own loading, which also knows the layouts that its models were published in.

    It is loaded with its classifier, since without timm would load only what fits. A file with another
    classifier, or none, is loaded without, and then has to fill every other place.
    """
    state = read_checkpoint(file)
    try:
        return _load_by_timm(name, architecture, {"state_dict": dict(state)}, file)
    except InputError:
        if ends_in_embedding:
            raise
        state = _without_classifier(state, architecture, config, file)
        without = {"state_dict": state, "num_classes": 0, "label_offset": 0}
        return _load_by_timm(name, architecture, without, file)


def _load_by_timm(name: str, architecture: str, overlay: dict[str, Any], file: Path) -> nn.Module:
    import timm

    overlay["source"] = ""  # so that timm takes the state dict
    try:
        with _nothing_missing(file, f"timm:{name}"):
            return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    except InputError:
        raise
    except Exception as error:  # torch's load_state_dict, or timm's renaming before it, which raises anything
        problems = [line.strip()[:200] for line in str(error).splitlines()]
        raise does_not_fit(file, f"timm:{name}", problems[1:] or problems) from None


def _without_classifier(
    state: dict[str, Tensor], architecture: str, config: dict[str, Any], file: Path
) -> dict[str, Tensor]:
    import timm

    bare = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
    classifiers = config.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    state = {n: t for n, t in state.items() if n in bare or n.rpartition(".")[0] not in classifiers}
    return without_heads(state, bare, file)


@contextmanager
def _nothing_missing(file: Path, network: str) -> Iterator[None]:
    """Refuse a file that leaves a place empty, also where timm loads a whole family with strict=False.

    A new norm of the head is no such place: timm adds it to networks that were trained without (fcmae).
    """
    from torch.nn import Module

    load = Module.load_state_dict

    def load_all(module: nn.Module, *arguments: Any, **more: Any) -> Any:
        result = load(module, *arguments, **more)
        missing = [n for n in result.missing_keys if not n.startswith(("head.norm.", "head_norm."))]
        if missing:
            raise does_not_fit(file, network, [f"{name} is missing" for name in missing])
        return result

    Module.load_state_dict = load_all
    try:
        yield
    finally:
        Module.load_state_dict = load

"""The name of a timm model in; its row, as the table in zoo.py has them, out."""

from __future__ import annotations

import re
from typing import Any

from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.timm_zoo import ENDS_IN_EMBEDDING, FEATURES, HUB_NAMES, is_contrastive, timm_network
from retrieval.backbones.transform import GREY, Transform
from retrieval.backbones.weights import Download, OnHub
from retrieval.backbones.zoo import FACES, Pretrained, torch_checkpoints
from retrieval.errors import InputError, did_you_mean, printable

HUB_NAME = re.compile(r"hf[-_]hub:([\w.-]+/[\w.-]+)")


def find_timm(name: str) -> Pretrained:
    """Return the row of a timm model: NAME or hf-hub:OWNER/NAME, each also with :features at its end.

    Raises InputError for an unknown name, and for :features of a model without a projection.
    """
    plain = name.removesuffix(FEATURES)
    if hub := HUB_NAME.fullmatch(plain):
        architecture, config = _config_on_hub(hub[1])
        weights = OnHub(hub[1], HUB_NAMES)
    else:
        architecture, config = plain, _config_in_timm(plain)
        hub_id, url = config.get("hf_hub_id"), config.get("url")
        weights = OnHub(hub_id, HUB_NAMES) if hub_id else Download(url, torch_checkpoints)
    if name != plain and not is_contrastive(plain, config):
        raise InputError(f"timm:{plain} has no projection that {FEATURES} could leave out: give timm:{plain}")
    return _timm_row(name, architecture, config, weights)


def hub_config(model_name: str) -> str | None:
    """Return the text of the downloaded config.json of timm:hf-hub:OWNER/NAME; None for other names."""
    hub = HUB_NAME.fullmatch(model_name.removeprefix("timm:").removesuffix(FEATURES))
    file = OnHub(hub[1], ("config.json",)).find() if hub else None
    return file.read_text(encoding="utf-8") if file else None


def _config_in_timm(name: str) -> dict[str, Any]:
    import timm

    known = timm.list_pretrained()
    if name in known or ("." not in name and timm.is_model(name)):  # without a tag, timm chooses one
        config = timm.get_pretrained_cfg(name)
        if config.has_weights:
            return config.to_dict()
    hint = did_you_mean(name, [*known, *timm.list_models()]) or ": timm.list_pretrained() lists them"
    raise InputError(f"timm has no weights for {printable(name)}{hint}")


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
    if height != width:
        raise InputError(
            f"timm:{name} sees {height} × {width} pixels, and supported are only square inputs: "
            "give another ViT, such as dinov3"
        )
    grey = data["crop_mode"] == "border" and {round(255 * mean) for mean in data["mean"]} == {GREY}
    crops = grey or data["crop_mode"] in ("center", "squash")
    if channels != 3 or not crops or data["interpolation"] not in ("bilinear", "bicubic"):
        raise InputError(
            f"timm:{name} sees {channels} × {height} × {width} by {data['crop_mode']}, "
            f"{data['interpolation']}; supported are square RGB images by center, squash or border (grey), "
            "bilinear or bicubic: give another network, such as dinov3"
        )
    return Pretrained(
        lambda file: timm_network(name, architecture, config, file),
        weights,
        None,
        None,
        None,
        Transform(height, data["interpolation"], data["crop_mode"], int(height / data["crop_pct"])),
        tuple(data["mean"]),
        tuple(data["std"]),
        config.get("license") or "see its model card",
        FACES if ENDS_IN_EMBEDDING.search(name) else "what it was trained on",
        FaceCrop("mtcnn", height, 0, 0.08, "align") if ENDS_IN_EMBEDDING.search(name) else None,
    )

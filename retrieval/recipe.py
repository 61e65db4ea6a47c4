"""A recipe in, the JSON file that choose.py writes; its settings, with checked names, out."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retrieval.errors import InputError, did_you_mean

# The settings that a recipe may hold: the network, its views, and the means.
IN_RECIPE = (
    "model_type", "weights", "crop", "image_size", "detector", "face_margin", "min_face_size", "flip",
    "views", "fuse", "train_dir", "projection", "centre", "whiten", "gallery_augmentation", "query_expansion",
    "hubs", "rerank", "cover",
)  # fmt: skip


def read_recipe(path: Path, known: Collection[str], refused: dict[str, str]) -> dict[str, Any]:
    """Return the "settings" of a recipe, whose values are not checked yet. Its other keys are ignored.

    `known` are the names of the script's settings; `refused` are settings of another script, and why this one
    has none of them. Raises InputError if the file is no recipe, or for a setting that it cannot hold here.
    """
    settings = _settings_in(path)
    for name in settings:
        if name in refused and name not in known:
            raise InputError(f"{name} in {path} is not for this script: {refused[name]}")
        if name not in known:
            raise InputError(f"{path} sets {name}, which is no setting{did_you_mean(name, IN_RECIPE)}")
        if name not in IN_RECIPE:
            raise InputError(
                f"{name} in {path} is not for a recipe, which sets only the network, its views and the "
                f"means: take it out, and give --{name}"
            )
    if "model_type" in known and settings.get("weights") and "model_type" not in settings:
        raise InputError(
            f"{path} sets weights without model_type, so they are a checkpoint of fine_tuning.py: "
            f"run model_fine_tuned.py --recipe {path}"
        )
    return settings


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # it is no JSON, or no text
        raise InputError(f"{path} is no JSON file ({error}): give a recipe of choose.py") from None
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise InputError(f'{path} has no object "settings": give a recipe of choose.py')
    return settings

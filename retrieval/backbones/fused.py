"""The models of --fuse in; their backbones, for the same views of the images as the run's own, out."""

from __future__ import annotations

from dataclasses import replace

from retrieval.backbones.backbone import LazyBackbone, find_backbone
from retrieval.backbones.views import with_views
from retrieval.errors import InputError, RunError
from retrieval.flag_values import fused_of
from retrieval.settings import RetrievalSettings


def find_fused(settings: RetrievalSettings, own: LazyBackbone) -> list[LazyBackbone]:
    """Find the networks to fuse with the run's own, in the order of --fuse; none without the flag.

    Their names are those of the flag, such as clip@loose. Raises as find_backbone, and InputError if two
    networks, or one and the run's own, have the same name.
    """
    found = [own]
    for text in settings.fuse or []:
        model, crop, _ = fused_of(text)
        try:
            backbone = find_backbone(model, settings.device, crop=crop)
        except InputError as error:
            raise InputError(f"--fuse {text}: {error}") from None
        except RunError as error:  # no weights; those of --weights are the run's own network's
            said = str(error).replace(", or give it with --weights FILE", "")
            raise RunError(f"--fuse {text}: {said}") from None
        backbone = replace(backbone, model_name=text.rpartition("=")[0])
        found.append(with_views(backbone, settings.flip, settings.views))
    names = [backbone.model_name for backbone in found]
    if len(set(names)) < len(names):
        raise InputError(
            f"--fuse {','.join(settings.fuse)} has a network twice, or the run's own, {names[0]}: give other "
            "networks, or another crop, such as clip@loose=0.3"
        )
    return found[1:]

"""A file of weights and a network in; the network, with every tensor from the file, out.

The network decides what is taken from a file. Its tensors are looked for under each holder (a dict in the
file, such as `state_dict`) and each prefix of the names (such as `module.encoder_q.`). The place with most of
them must fill the network exactly. What lies elsewhere is left out and logged: heads, criteria, queues,
momentum encoders, text towers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.weights_file import is_fine_tuned, is_weights, unpickle
from retrieval.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = 1  # part of the cache key with --weights: raise it when other tensors of the same file are taken

log = logging.getLogger("retrieval.weights")

# If a file has a network twice, its authors evaluate these: the default of --checkpoint_key in DINO and iBOT,
# that of use_ema in timm, and what main_lincls.py keeps in MoCo and MoCo v3.
CHOSEN = {"teacher", "model_ema", "state_dict_ema", "ema", "ema_model", "encoder_q", "base_encoder"}
# Prefixes of a backbone's tensors, where its names are not the network's own, since timm converts them.
BEFORE = ("module.", "model.", "net.", "backbone.", "encoder.", "encoder_q.", "teacher.", "student.")
# Modules that wrap another one at any depth: torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What follows a backbone in training, and what its loss keeps: a retrieval needs none of it.
HEADS = ("fc", "classifier", "logits", "head", "projection_head", "prediction_head", "online_classifier",
         "projector", "predictor", "prototypes", "criterion", "loss", "queue", "queue_ptr")  # fmt: skip
COUNTER = "num_batches_tracked"  # of a batch norm's training steps: old files lack it, and nothing uses it

Holders = dict[str, dict[str, "Tensor"]]  # the keys that lead to a dict, joined by dots → its tensors
Place = tuple[str, str]  # a holder, and the prefix of the network's names in it


def load_weights(network: nn.Module, file: Path, title: str, rename: Callable[[str], str] = str) -> None:
    """Load the checkpoint `file` into `network`; `rename` maps the file's names of tensors to the network's.

    A head that the network does not have is left out, and logged. Raises InputError, which calls the network
    `title`, unless every other tensor at the network's place in the file belongs to it and none is missing.
    """
    wanted, holders = network.state_dict(), _read_holders(file)
    place, known = _find_place(holders, wanted, rename)
    _log_left_out(holders, place, file)
    title += _under(place)
    given = without_heads(_renamed(_at(holders, place), rename, file), wanted, file)
    if not known and next(iter(given)) not in wanted:
        raise does_not_fit(file, title, [_first_of_each(given, wanted)])
    for name, tensor in wanted.items():
        if name.endswith(COUNTER):
            given.setdefault(name, tensor)
    fill(network, given, file, title)


def read_checkpoint(file: Path, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a checkpoint that may need conversion to a network's names; heads are included.

    `wanted` are the network's tensors, which tell its place in the file. If no place has half of them, the
    names are returned without the prefixes of BEFORE that they share. Also returns the end of a sentence that
    names the place, such as " under state_dict". Raises InputError for a file without tensors, and for a
    checkpoint of fine_tuning.py.
    """
    holders = _read_holders(file)
    place, _ = _find_place(holders, wanted)
    _log_left_out(holders, place, file)
    return _at(holders, place), _under(place)


def fill(network: nn.Module, given: Mapping[str, Tensor], file: Path, title: str) -> None:
    """Load the tensors that `file` gave into `network`; raises InputError unless they are all that it has."""
    wanted = network.state_dict()
    problems = [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} has no place" for name in given if name not in wanted]
    if problems:
        raise does_not_fit(file, title, problems)
    network.load_state_dict(given)


def does_not_fit(file: Path, network: str, problems: list[str]) -> InputError:
    """Return the error for a file of another network, with the first three problems."""
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return InputError(f"{file} does not hold the weights of {network}: {shown}")


def without_heads(given: dict[str, Tensor], wanted: Iterable[str], file: Path) -> dict[str, Tensor]:
    """Return the tensors without those of heads, unless the network has them; `wanted` are its names."""
    on_it = {name for name in given if name not in wanted and name.partition(".")[0] in HEADS}
    heads = ", ".join(sorted({name.partition(".")[0] for name in on_it}))
    if len(on_it) == len(given):
        raise InputError(f"{file} holds only a classifier ({heads}): give the weights of its backbone")
    if on_it:
        log.info("left out of %s: %s, which a retrieval does not need", file, heads)
    return {name: tensor for name, tensor in given.items() if name not in on_it}


# ---- the holders in a file ------------------------------------------------------------------------


def _read_holders(file: Path) -> Holders:
    """Read the dicts of tensors in a file. Raises InputError if there is none, or a fine-tuned network."""
    content = unpickle(file)
    if is_fine_tuned(content):
        raise InputError(
            f"{file} is a fine-tuned checkpoint, which knows its network and its crop: "
            f"run `python model_fine_tuned.py --weights {file}`"
        )
    holders = dict(_holders(content))
    if not holders:
        raise InputError(
            f"{file} holds no weights, but {_described(content)}: save the network's state_dict()"
        )
    return holders


def _holders(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dicts of tensors, outermost first, without those of an optimiser (it has param_groups)."""
    if not isinstance(content, dict) or "param_groups" in content or len(keys) > 5:
        return
    tensors = {_unwrapped(str(name)): value for name, value in content.items() if is_weights(value)}
    if tensors:
        yield ".".join(keys), tensors
    for key, value in content.items():
        yield from _holders(value, (*keys, str(key)))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if "param_groups" in content:
        return "the state of an optimiser"
    kinds = [f"{name}: {type(value).__name__}" for name, value in content.items()]
    return ", ".join(kinds[:3]) if kinds else "nothing"


# ---- the network's place --------------------------------------------------------------------------


def _find_place(
    holders: Holders, wanted: Mapping[str, Tensor], rename: Callable[[str], str] = str
) -> tuple[Place, bool]:
    """Return the network's place, and whether it has at least half of the wanted names.

    A name whose tensor has the wanted shape counts twice. If no place has half of the names, the place is the
    one that the names in the file alone suggest.
    """
    wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith(COUNTER)}
    named, fitting = Counter(), Counter()
    for holder, tensors in holders.items():
        for name, tensor in tensors.items():
            for prefix in _prefixes(name):
                inner = rename(name.removeprefix(prefix))
                if inner in wanted:
                    named[holder, prefix] += 1
                    fitting[holder, prefix] += tensor.shape == wanted[inner].shape
    best = max(named, key=lambda place: (named[place] + fitting[place], _is_chosen(place)), default=None)
    known = best is not None and named[best] >= len(wanted) / 2
    return (best if known else _plain_place(holders)), known


def _prefixes(name: str) -> list[str]:
    """Return the prefixes under which a network may lie.

    It does not lie under open_clip's visual., since timm also needs the projection beside the network.

    >>> _prefixes("module.encoder.conv1.weight")
    ['', 'module.', 'module.encoder.', 'module.encoder.conv1.']
    """
    parts = [f"{part}." for part in name.split(".")[:-1]]
    return [prefix for prefix in accumulate(["", *parts]) if "visual." not in prefix]


def _is_chosen(place: Place) -> bool:
    return not CHOSEN.isdisjoint(".".join(place).split("."))


def _plain_place(holders: Holders) -> Place:
    """Return the largest holder, and the prefixes of BEFORE that all its names share, heads excepted."""
    holder = max(holders, key=lambda name: (_is_chosen((name, "")), len(holders[name])))
    names, prefix = list(holders[holder]), ""
    while step := next((step for step in BEFORE if _shared(step, names)), ""):
        names = [name.removeprefix(step) for name in names if name.startswith(step)]
        prefix += step
    return holder, prefix


def _shared(prefix: str, names: list[str]) -> bool:
    others = {name.partition(".")[0] for name in names if not name.startswith(prefix)}
    return others <= set(HEADS) and any(name.startswith(prefix) for name in names)


def _at(holders: Holders, place: Place) -> dict[str, Tensor]:
    """Return the tensors at a place, under the names that they have there."""
    holder, prefix = place
    return {n.removeprefix(prefix): t for n, t in holders[holder].items() if n.startswith(prefix)}


def _under(place: Place) -> str:
    keys = ".".join(part for part in place if part).rstrip(".")
    return f" under {keys}" if keys else ""


def _log_left_out(holders: Holders, place: Place, file: Path) -> None:
    """Log the network's place in a file, and what lies elsewhere: holders, and names by their first part."""
    holder, prefix = place
    around = prefix[: prefix.rstrip(".").rfind(".") + 1]  # module. around module.encoder_q.
    outside = (
        name.removeprefix(around).partition(".")[0] for name in holders[holder] if not name.startswith(prefix)
    )
    others = [*dict.fromkeys(outside), *(other for other in holders if other != holder)]
    if any(place):
        left_out = f"; left out: {', '.join(others[:8])}" if others else ""
        log.info("the weights in %s are those%s%s", file, _under(place), left_out)


def _renamed(state: dict[str, Tensor], rename: Callable[[str], str], file: Path) -> dict[str, Tensor]:
    renamed = {rename(name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise InputError(f"{file}: {len(state) - len(renamed)} tensors share a name with another")
    return renamed


def _first_of_each(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Describe two networks that have little in common by the first tensor of each."""
    (name, tensor), (needed, like) = next(iter(given.items())), next(iter(wanted.items()))
    return (
        f"most of its names are not the network's: the first is {name} {tuple(tensor.shape)}, "
        f"and the network's first is {needed} {tuple(like.shape)}"
    )

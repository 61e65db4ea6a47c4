"""The source of a file of weights in; the file on this machine, and a network that holds its tensors, out."""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from retrieval.errors import InputError, RunError
from retrieval.files import write_whole
from retrieval.machine import require

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("retrieval.weights")


# ---- where a file lies ----------------------------------------------------------------------------


@dataclass(frozen=True)
class InPackage:
    """Weights that an installed package carries."""

    package: str  # as pip calls it
    module: str
    path: str  # below the module's folder

    def find(self) -> Path | None:
        """Return the file if it is on this machine. Does not import the package, which may need others."""
        spec = find_spec(self.module)
        file = Path(spec.submodule_search_locations[0]) / self.path if spec else None
        return file if file and file.is_file() else None

    def fetch(self) -> Path:
        """Return the file. Raises InputError if the package is not installed."""
        require(self.package, self.module)
        file = self.find()
        if not file:
            raise InputError(f"the package {self.package} lacks {self.path}: install it again")
        return file


@dataclass(frozen=True)
class Download:
    """Weights at a URL, kept in the folder of the library that publishes them."""

    url: str
    folder: Callable[[], Path]  # a function, since it depends on the environment
    sha256: str = ""  # the first digits of the file's digest, if its publisher gives them

    def place(self) -> Path:
        """Return the path of the file, downloaded or not."""
        return self.folder() / self.url.rpartition("/")[2]

    def find(self) -> Path | None:
        """Return the file if it is on this machine."""
        return self.place() if self.place().is_file() else None

    def fetch(self) -> Path:
        """Return the file; download it first if need be, whole or not at all. Raises RunError if it fails."""
        file = self.place()
        if not file.is_file():
            log.info("downloading %s to %s", self.url, file.parent)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, self._download())
            except OSError as error:  # of the network (requests' errors are OSErrors) or the disk
                raise _no_download(
                    self.url, error, f"put it at {file}, or give it with --weights FILE"
                ) from None
        return file

    def _download(self) -> bytearray:
        import requests  # slow, and the readers import this module

        content = bytearray()
        with requests.get(self.url, stream=True, timeout=60) as reply:
            reply.raise_for_status()
            size = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=self.url.rpartition("/")[2]) as bar:
                for chunk in reply.iter_content(2**20):  # a body that ends too early raises
                    content += chunk
                    bar.update(len(chunk))
        if not hashlib.sha256(content).hexdigest().startswith(self.sha256):
            raise OSError("it is not the file that its publisher describes: its SHA-256 is another one")
        return content


@dataclass(frozen=True)
class OnHub:
    """Weights in a repository of the Hugging Face hub, kept in the hub's cache."""

    repository: str
    names: tuple[str, ...]  # possible names of the file: the first that exists is used
    by_hand: str = "give it with --weights FILE"

    def find(self) -> Path | None:
        """Return the file if it is on this machine."""
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(self.repository, name) for name in self.names)
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def fetch(self) -> Path:
        """Return the file; download it first if need be. Raises RunError if that fails."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        file = self.find()
        if file:
            return file
        for name in self.names:
            url = f"https://huggingface.co/{self.repository}/resolve/main/{name}"
            log.info("downloading %s", url)
            try:
                return Path(hf_hub_download(self.repository, name))
            except RemoteEntryNotFoundError as error:
                failed = error  # try the next name
            except LocalEntryNotFoundError as error:
                failed = error.__cause__ or error
                break
            except (OSError, ValueError) as error:
                failed = error
                break
        raise _no_download(url, failed, self.by_hand) from None


def _no_download(url: str, error: BaseException, by_hand: str) -> RunError:
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    return RunError(
        f"{url} could not be downloaded ({reason}): fetch it on a machine with a network, and {by_hand}"
    )


# ---- what a file holds ----------------------------------------------------------------------------

# Keys around the tensors: Lightning, lightly and the converted SimCLR; SupContrast; PyTorch's tutorials.
AROUND = ("state_dict", "model", "model_state_dict")
# Prefixes of a backbone's tensors: DataParallel; Lightning; SupContrast; lightly.
BEFORE = ("module.", "model.", "encoder.", "backbone.")
# Classifiers and projections on a backbone, which retrieval leaves out.
HEADS = ("fc", "classifier", "logits", "head", "projection_head", "prediction_head", "online_classifier")


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under the backbone's names; heads are included.

    Reads state dicts and safetensors, also with the keys of AROUND around them and the prefixes of BEFORE.
    Executes nothing in the file (torch.load with weights_only). Raises InputError for any other file, and for
    a checkpoint of fine_tuning.py.
    """
    state = unpickle(file)
    if is_fine_tuned(state):
        raise InputError(
            f"{file} is a fine-tuned checkpoint, which knows its network and its crop: "
            f"run `python model_fine_tuned.py --weights {file}`"
        )
    while (inner := _inside(state)) is not None:
        state = inner
    others = _others_than_tensors(state)
    if others:
        raise InputError(
            f"{file} does not hold named tensors alone, but {others}: save the network's state_dict()"
        )
    return _bare_names(state, file)


def is_fine_tuned(content: Any) -> bool:
    """Return whether a file's content is a checkpoint of fine_tuning.py: a recipe and a network."""
    return isinstance(content, dict) and {"recipe", "network"} <= set(content)


def unpickle(file: Path) -> Any:
    """Read a file of torch.save or safetensors without executing code in it.

    Raises InputError if it holds anything but tensors and plain values.
    """
    import torch

    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError:
            raise InputError(f"{file} is not a file of weights, or only a part of one") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # SupContrast's settings: no code
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises anything on a file that is no checkpoint
        refused = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        if refused:
            raise InputError(
                f"{file} holds a Python object ({refused[1]}), which is not loaded, since that could run any "
                "code: save the network's state_dict() alone"
            ) from None
        what = "is empty" if not file.stat().st_size else "is not a file of weights, or only a part of one"
        raise InputError(f"{file} {what}") from None


def _inside(state: Any) -> dict[str, Any] | None:
    """Return the dict under one of the keys AROUND."""
    inner = (state.get(key) for key in AROUND) if isinstance(state, dict) else ()
    return next((value for value in inner if isinstance(value, dict)), None)


def _others_than_tensors(state: Any) -> str:
    """Describe whatever is no named tensor; "" if there is nothing else."""
    import torch

    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    others = [f"{name}: {type(v).__name__}" for name, v in state.items() if not torch.is_tensor(v)]
    return ", ".join(others[:3]) if state else "nothing"


def load_weights(network: nn.Module, file: Path, title: str, rename: Callable[[str], str] = str) -> None:
    """Load the checkpoint `file` into `network`; `rename` maps the file's names of tensors to the network's.

    A head that the network does not have is left out, and logged. Raises InputError, which calls the network
    `title`, unless every other tensor of the file belongs to the network and none is missing.
    """
    wanted = network.state_dict()
    given = without_heads(_renamed(read_checkpoint(file), rename, file), wanted, file)
    for name, tensor in wanted.items():  # a counter of training steps: old files lack it
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, tensor)
    fill(network, given, file, title)


def fill(network: nn.Module, given: dict[str, Tensor], file: Path, title: str) -> None:
    """Load the tensors that `file` gave into `network`; raises InputError unless they are all that it has."""
    wanted = network.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} has no place" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise does_not_fit(file, title, problems)
    network.load_state_dict(given)


def does_not_fit(file: Path, network: str, problems: list[str]) -> InputError:
    """Return the error for a file of another network, with the first three problems."""
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return InputError(f"{file} does not hold the weights of {network}: {shown}")


def _renamed(state: dict[str, Tensor], rename: Callable[[str], str], file: Path) -> dict[str, Tensor]:
    renamed = {rename(name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise InputError(f"{file}: {len(state) - len(renamed)} tensors share a name with another")
    return renamed


def _bare_names(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors without a prefix that all names of the backbone share."""
    for prefix in 3 * BEFORE:  # such as SupContrast's encoder.module.conv1.weight
        others = {name.partition(".")[0] for name in state if not name.startswith(prefix)}
        if others <= set(HEADS):
            state = _renamed(state, lambda name, prefix=prefix: name.removeprefix(prefix), file)
    return state


def without_heads(given: dict[str, Tensor], wanted: Iterable[str], file: Path) -> dict[str, Tensor]:
    """Return the tensors without those of heads, unless the network has them; `wanted` are its names."""
    on_it = {name for name in given if name not in wanted and name.partition(".")[0] in HEADS}
    heads = ", ".join(sorted({name.partition(".")[0] for name in on_it}))
    if len(on_it) == len(given):
        raise InputError(f"{file} holds only a classifier ({heads}): give the weights of its backbone")
    if on_it:
        log.info(
            "left out of %s: %s, a classifier or projection, which a retrieval does not need", file, heads
        )
    return {name: tensor for name, tensor in given.items() if name not in on_it}

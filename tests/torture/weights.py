"""Damaged, odd and hostile files of weights in; each loads, or is refused with a sentence.

    python -m tests.torture.weights --seed 0 --minutes 1

A case is a state dict, a checkpoint of fine_tuning.py, a safetensors or an ONNX file: with flipped bits, cut,
spliced, with changed values, holding itself, growing in memory, with hostile names, or calling a function.
It is loaded as in a run, which embeds a black image. A case fails if an error comes out, if the sentence is
not one printable line, if loading takes longer than SECONDS or more memory than MOST, or if a function was
called. One seed gives the same cases in the same order. Exits with 1 if one failed.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import timm
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save as as_safetensors

from retrieval.backbones import weights_file
from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.fine_tuned import JOINED, Recipe, load_fine_tuned
from retrieval.backbones.transform import Transform
from retrieval.errors import InputError, RunError
from tests.torture.campaign import run_generated

NAME, SIZE = "timm:test_efficientnet.r160_in1k", 32
MEMORY = 2**28  # bytes of the machine that is played: a file may take half of it
MOST = 2**29  # bytes by which this process may grow: the content, its copy and the networks
SECONDS = 60  # of one case: none of them takes three on an idle machine
HOSTILE = (
    "\x1b[2Jconv",
    "a\nerror: b",
    "\u202egpj",
    "\ud800",
    "",
    "." * 300,
    "module." * 50,
    "__class__",
    "items",
)
CALLS = (("os", "system"), ("posix", "system"), ("builtins", "exec"), ("builtins", "eval"),
         ("subprocess", "call"), ("torch", "load"), ("torch.hub", "load"), ("runpy", "_run_code"),
         ("numpy", "fromfile"), ("pathlib", "Path.touch"), ("shutil", "rmtree"),
         ("torch.storage", "_load_from_bytes"))  # fmt: skip


class Case(NamedTuple):
    """What is tried: a name for the log, the file's ending, and its content."""

    name: str
    suffix: str  # .onnx for a network, .tuned for a checkpoint of fine_tuning.py, .pth for any weights
    content: bytes


def campaign(seed: int, minutes: float, folder: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each case, at most `most`, until the time is over; files lie in `folder`."""
    end = time.monotonic() + 60 * minutes
    with patch.object(weights_file, "memory", lambda: MEMORY):
        for number, case in enumerate(cases(np.random.default_rng(seed), folder)):
            if time.monotonic() > end or number == most:
                return
            yield {"campaign": "weights", "seed": seed, "number": number, "case": case.name} | tried(
                case, folder
            )


def tried(case: Case, folder: Path) -> dict[str, Any]:
    """Return the outcome of a case: what came out, and whether that is a failure."""
    path, canary = folder / f"case{case.suffix}", folder / "canary"
    path.write_bytes(case.content)
    start, before = time.monotonic(), _peak_memory(anew=True)
    try:
        if case.suffix == ".tuned":
            load_fine_tuned(path, "cpu")
        else:
            find_backbone(NAME, "cpu", path, image_size=SIZE).load()
        right, outcome = True, "loaded"
    except (InputError, RunError) as error:
        outcome = str(error)
        right = outcome.isprintable()
    except Exception as error:
        right, outcome = False, f"{type(error).__name__}: {error}"
    seconds, grown = time.monotonic() - start, _peak_memory() - before
    right = right and seconds < SECONDS and grown < MOST and not canary.exists()
    canary.unlink(missing_ok=True)
    return {"outcome": outcome[:300], "seconds": round(seconds, 2), "grown": grown, "failed": not right}


def _peak_memory(anew: bool = False) -> int:
    """Return the highest bytes of memory that this process had; on Linux `anew` forgets what was before."""
    if sys.platform != "linux":
        return 0
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """Yield cases without end: a few of each kind in turn."""
    wholes = _wholes()
    kinds = [_whole(wholes), _damaged(rng, wholes), _damaged_inside(rng, wholes), _recipes(rng),
             _endless(rng), _bombs(rng), _named(rng), _calling(rng, folder / "canary")]  # fmt: skip
    for kind in cycle(kinds):
        for _ in range(2):
            yield next(kind)


# ---- kinds of cases -------------------------------------------------------------------------------


def _saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_efficientnet", num_classes=0).state_dict()


def _recipe(**changes: Any) -> dict[str, Any]:
    recipe = Recipe(word=NAME, prepare=asdict(Transform(SIZE, "bicubic")), mean=(0.5,) * 3, std=(0.5,) * 3,
                    folded=False, mapped=False, tuned_size=SIZE, embedding="tuned", weight=1.0, loss="ce",
                    settings={"seed": 0}, classes=["a", "b"], versions={},
                    metrics={"untuned": {"top_1": 0.4}, "tuned": {"top_1": 0.5}}, history=[],
                    hub_config=None)  # fmt: skip
    return asdict(recipe) | changes


def _tuned(**changes: Any) -> dict[str, Any]:
    return {"recipe": _recipe(**changes), "network": _state()}


def _wholes() -> list[Case]:
    state = _state()
    joined = _tuned(embedding=JOINED) | {"untuned": state}
    return [
        Case("a state dict", ".pth", _saved(state)),
        Case("an old state dict", ".pth", _old(state)),
        Case("safetensors", ".pth", as_safetensors(state)),
        Case("a checkpoint", ".tuned", _saved(_tuned())),
        Case("a joined checkpoint", ".tuned", _saved(joined)),
        Case("an ONNX network", ".onnx", _onnx()),
    ]


def _old(state: dict[str, torch.Tensor]) -> bytes:
    """Save a state dict as torch before 1.6 did, whose file holds an address: one storage, at address 7."""
    flat = torch.cat([tensor.flatten().float() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    saved = _saved(views, _use_new_zipfile_serialization=False)
    return re.sub(rb"X.\0\0\0\d{9,20}", b"X\x01\0\0\x007", saved)


def _onnx() -> bytes:
    """Return a network of a convolution and the means of its channels."""
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, SIZE, SIZE])
    vectors = helper.make_tensor_value_info("vectors", onnx.TensorProto.FLOAT, ["n", 16])
    kernel = np.random.default_rng(0).normal(size=(16, 3, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["images", "kernel"], ["maps"]),
             helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
             helper.make_node("Flatten", ["means"], ["vectors"])]  # fmt: skip
    weights = [numpy_helper.from_array(kernel, "kernel")]
    graph = helper.make_graph(nodes, "small", [images], [vectors], weights)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _whole(wholes: list[Case]) -> Iterator[Case]:
    yield from cycle(wholes)


def _damaged(rng: np.random.Generator, wholes: list[Case]) -> Iterator[Case]:
    """Flip bits of a file, cut it, or put a part of another file into it."""
    for case in cycle(wholes):
        how, content = _damage(rng, case.content, wholes[rng.integers(len(wholes))].content)
        yield Case(f"{case.name} {how}", case.suffix, content)


def _damage(rng: np.random.Generator, content: bytes, other: bytes) -> tuple[str, bytes]:
    kind = str(rng.choice(["flipped", "cut", "spliced"]))
    # Half of the places are near the start, or the end, where the headers are.
    near = int(rng.choice([len(content), min(2000, len(content))]))
    at = int(rng.integers(0, near)) if rng.random() < 0.5 else len(content) - 1 - int(rng.integers(0, near))
    if kind == "cut":
        return f"cut at {at}", content[:at]
    if kind == "spliced":
        start, length = int(rng.integers(0, len(other))), int(rng.integers(1, 5000))
        return f"with {length} other bytes at {at}", content[:at] + other[start : start + length] + content[
            at:
        ]
    changed = bytearray(content)
    for place in (at, *(int(place) for place in rng.integers(0, near, rng.integers(0, 4)))):
        changed[place] ^= 1 << int(rng.integers(8))
    return f"with bits flipped at {at}", bytes(changed)


def _damaged_inside(rng: np.random.Generator, wholes: list[Case]) -> Iterator[Case]:
    """Damage a member of a zip file of torch.save, and write the zip anew: its checksums are right."""
    for case in cycle([case for case in wholes if case.content.startswith(b"PK")]):
        with zipfile.ZipFile(io.BytesIO(case.content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in members if name.endswith("data.pkl"))
        name = pickled if rng.random() < 0.8 else str(rng.choice(sorted(members)))
        how, members[name] = _damage(rng, members[name] or b" ", members[pickled])
        yield Case(f"{case.name}, {name} {how}", case.suffix, _zipped(members))


def _zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def _recipes(rng: np.random.Generator) -> Iterator[Case]:
    """Put an odd value in a place of the recipe, or leave the place out."""
    odd = [None, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", "\x1b[2J\n", "timm:\x1b", "../../etc",
           [], {}, [[]], {"a": {"b": []}}, (1, 2), ["\x1b[31m"], torch.zeros(3), b"bytes", True,
           {"untuned": {}}]  # fmt: skip
    while True:
        recipe, value = _recipe(), odd[rng.integers(len(odd))]
        holder = recipe["prepare"] if rng.random() < 0.3 else recipe
        name = str(rng.choice(sorted(holder)))
        if rng.random() < 0.2:
            del holder[name]
        else:
            holder[name if rng.random() < 0.9 else HOSTILE[rng.integers(3)]] = value
        yield Case(f"a recipe whose {name} is {value!a:.60}", ".tuned", _saved(_tuned() | {"recipe": recipe}))


def _endless(rng: np.random.Generator) -> Iterator[Case]:
    """Dicts and lists that hold one another at random, and so themselves, or the same one many times."""
    while True:
        count = int(rng.integers(1, 40))
        holders = [{} if rng.random() < 0.5 else [] for _ in range(count)]
        for _ in range(int(rng.integers(1, 200))):
            outer, inner = (holders[number] for number in rng.integers(0, count, 2))
            outer.append(inner) if isinstance(outer, list) else outer.update({f"{len(outer)}.w": inner})
        kind = ".tuned" if rng.random() < 0.5 else ".pth"
        content = (
            _tuned(history=[{"a": holders}], settings={"a": holders[0]}) if kind == ".tuned" else _state()
        )
        yield Case(f"{count} that hold one another", kind, _saved(content | {"beside": holders}))
        nested: Any = 1.5
        for _ in range(int(rng.integers(10, 150))):
            nested = [nested] * int(rng.integers(1, 4))
        yield Case("a deep list", kind, _saved(content | {"beside": nested}))


def _bombs(rng: np.random.Generator) -> Iterator[Case]:
    """Small files that grow: zeros in a zip, and views of a number."""
    while True:
        size = int(10 ** rng.uniform(5, 8))
        with zipfile.ZipFile(io.BytesIO(_saved(_state() | {"head.w": torch.zeros(size)}))) as stored:
            members = {name: stored.read(name) for name in stored.namelist()}
        packed = _zipped(members, zipfile.ZIP_DEFLATED)
        yield Case(f"{size} packed zeros", ".pth", packed)
        lying = bytearray(packed)
        at = lying.rindex(b"PK\x01\x02")
        struct.pack_into("<I", lying, at + 24, int(rng.integers(2**32 - 1)))
        yield Case("a zip that lies about a size", ".pth", bytes(lying))
        side = int(2 ** rng.uniform(5, 31))
        view = torch.zeros(1).expand(side, side)
        yield Case(f"a view of {side} x {side}", ".pth", _saved(_state() | {"conv_stem.weight": view}))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _with_pickle(value: bytes) -> bytes:
    """Return a file of torch.save whose pickle is {"beside": value}."""
    with zipfile.ZipFile(io.BytesIO(_saved({}))) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    return _zipped(members | {pickled: b"\x80\x02}" + _text("beside") + value + b"s."})


def _named(rng: np.random.Generator) -> Iterator[Case]:
    """Tensors, holders, attributes and recipe fields of hostile names; tensors of odd kinds."""
    eye = torch.eye(3)
    odd = {"sparse": eye.to_sparse(), "csr": eye.to_sparse_csr(), "meta": torch.zeros(2, device="meta"),
           "quantized": torch.quantize_per_tensor(eye, 0.1, 0, torch.quint8), "nan": eye * torch.nan,
           "complex": eye.to(torch.complex64), "empty": torch.zeros(0), "bool": eye.bool(),
           "half": eye.half()}  # fmt: skip
    while True:
        name, kind = str(rng.choice(HOSTILE[:3] + HOSTILE[4:])), str(rng.choice(sorted(odd)))
        state, key = _state(), str(rng.choice(sorted(_state())))
        yield Case(f"a tensor called {name!a}", ".pth", _saved(state | {name: eye}))
        yield Case(f"a holder called {name!a}", ".pth", _saved({name: state, "epoch": name}))
        yield Case(
            f"{key} called {name!a}", ".pth", _saved({name if n == key else n: t for n, t in state.items()})
        )
        yield Case(f"{key} is {kind}", ".pth", _saved(state | {key: odd[kind]}))
        right = torch.full_like(state[key], torch.nan) if state[key].is_floating_point() else state[key]
        yield Case(f"{key} is not a number", ".tuned", _saved(_tuned() | {"network": state | {key: right}}))
        state[key].numel = state[key].shape_ = 5
        yield Case(f"{key} with attributes", ".pth", _saved(state))
        yield Case(f"a class called {name!a}", ".tuned", _saved(_tuned(classes=[name], loss=name)))


def _calling(rng: np.random.Generator, canary: Path) -> Iterator[Case]:
    """Pickles that call a function, with arguments that would write the canary."""
    command = f"open({str(canary)!r}, 'w')"
    while True:
        module, name = CALLS[rng.integers(len(CALLS))]
        for argument in (f"touch {canary}", command, str(canary)):
            for value in (f"c{module}\n{name}\n(".encode() + _text(argument) + b"tR",
                          _text(module) + _text(name) + b"\x93(" + _text(argument) + b"tR",
                          b"(" + _text(argument) + f"i{module}\n{name}\n".encode()):  # fmt: skip
                yield Case(f"calls {module}.{name}", ".pth", _with_pickle(value))


if __name__ == "__main__":
    sys.exit(run_generated("weights", campaign))

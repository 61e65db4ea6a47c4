"""Files of every kind: their content, without running anything in them, or a sentence that names the kind."""

import argparse
import collections
import datetime
import gzip
import io
import pathlib
import pickle
import tarfile
import types
import zipfile

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from retrieval.backbones import weights_file
from retrieval.backbones.weights_file import unpickle
from retrieval.backbones.zoo import PRETRAINED
from retrieval.errors import InputError

STATE = {"weight": torch.rand(3, 2), "bias": torch.rand(3)}


# ---- safetensors and torch.save


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_the_content_tells_the_kind_and_not_the_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert torch.equal(unpickle(tmp_path / name)["weight"], STATE["weight"])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(InputError, match="is only a part of a safetensors file: download it again"):
        unpickle(tmp_path / name)
    torch.save(STATE, tmp_path / name)
    assert torch.equal(unpickle(tmp_path / name)["bias"], STATE["bias"])


# ---- objects beside the weights


HARMLESS = {
    "numpy": [np.float64(1.5), np.int64(3), np.bool_(1), np.str_("a"), np.arange(3), np.array(["a"]),
              np.dtype("float32"), np.array([None, {}], dtype=object), np.random.get_state()],
    "paths": [pathlib.PurePath("a"), pathlib.Path("a"), pathlib.PureWindowsPath("C:/a")],
    "settings": [argparse.Namespace(lr=0.1, out=pathlib.Path("a")), types.SimpleNamespace(a=np.float32(1))],
    "times": [datetime.datetime.now(datetime.UTC), datetime.date.today(), datetime.timedelta(1)],
    "torch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.__version__],
    "dicts": [collections.OrderedDict(a=1), collections.Counter("a"), collections.defaultdict(list, a=[1])],
    "keys": [{np.int64(1): 2, pathlib.Path("a"): 3}],
    "builtins": [range(3), slice(1), frozenset([1]), {1}, 2 + 1j, b"bytes", float],
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_beside_the_weights_are_no_reason_to_refuse_it(tmp_path, kind, zipped):
    content = {"state_dict": STATE, "beside": HARMLESS[kind]}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(unpickle(tmp_path / "w.pth")["state_dict"]["weight"], STATE["weight"])


def saved(tmp_path, opcodes):
    """A file of torch.save whose pickle is a dict with the object that these opcodes make."""
    torch.save({"beside": "HERE"}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"X\x04\0\0\0HERE") == 1
                content = content.replace(b"X\x04\0\0\0HERE", opcodes)
            new.writestr(name, content)
    return tmp_path / "w.pth"


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


def call(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


NUMBER = call("numpy", "dtype", text(b"f8"), b"\x89", b"\x88")
ELSEWHERE = {
    "Windows": call("pathlib", "WindowsPath", text(b"C:")),
    "Python 3.13": call("pathlib._local", "PosixPath", text(b"/")),
    "numpy 1": call("numpy.core.multiarray", "scalar", NUMBER, text(b"x")),
    "numpy 2": call("numpy._core.multiarray", "scalar", NUMBER, text(b"x")),
    "Swin": b"cyacs.config\nCfgNode\n)\x81" + text(b"k") + b"K\x01s}" + text(b"__immutable__") + b"\x89sb",
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_objects_of_other_machines_and_packages_are_no_reason_either(tmp_path, kind):
    assert "beside" in unpickle(saved(tmp_path, ELSEWHERE[kind]))


# ---- nothing is run

RAN = []


def ran(*arguments):
    """What no file may call."""
    RAN.append(arguments)


class Hostile:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


HOSTILE = {
    "os.system": lambda file: call("os", "system", text(f"touch {file}".encode())),
    "posix.system": lambda file: call("posix", "system", text(f"touch {file}".encode())),
    "eval": lambda file: call("builtins", "eval", text(f"open({str(file)!r}, 'w')".encode())),
    "eval of Python 2": lambda file: call("__builtin__", "eval", text(f"open({str(file)!r}, 'w')".encode())),
    "exec": lambda file: call("builtins", "exec", text(f"open({str(file)!r}, 'w')".encode())),
    "getattr": lambda file: call("builtins", "getattr", b"cnumpy\nndarray\n", text(b"tofile")),
    "open": lambda file: call("io", "open", text(str(file).encode()), text(b"w")),
    "subprocess": lambda file: call(
        "subprocess", "Popen", b"(" + text(b"touch") + text(str(file).encode()) + b"t"
    ),
    "pathlib's method": lambda file: call(
        "pathlib", "Path.touch", call("pathlib", "Path", text(str(file).encode()))
    ),
    "np.load": lambda file: call("numpy", "load", text(str(file).encode())),
    "np.fromfile": lambda file: call("numpy", "fromfile", text(str(file).encode())),
    "np.memmap": lambda file: call("numpy", "memmap", text(str(file).encode()), text(b"u1"), text(b"w+")),
    "torch.load": lambda file: call("torch", "load", text(str(file).encode())),
    "torch.jit": lambda file: call("torch.jit", "load", text(str(file).encode())),
    "runpy": lambda file: call("runpy", "run_path", text(str(file).encode())),
    "a test's function": lambda file: call(__name__, "ran"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, attack):
    RAN.clear()
    with pytest.raises(InputError, match="which is not loaded, since that could run any code"):
        unpickle(saved(tmp_path, HOSTILE[attack](tmp_path / "touched")))
    assert not RAN
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_an_object_that_calls_a_function_is_refused(tmp_path, zipped):
    RAN.clear()
    content = {"w": STATE["weight"], "x": Hostile(ran, 1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"holds a Python object \(.*ran\)"):
        unpickle(tmp_path / "w.pth")
    assert not RAN


STAND_IN_CALLS = {  # known names with other arguments and states than their own
    "an array with a file for its buffer": call("numpy", "ndarray", text(b"/etc/passwd"), b"cnumpy\ndtype\n"),
    "a type for a subclass": call("numpy._core.multiarray", "_reconstruct", b"cargparse\nNamespace\n", b")"),
    "a state that hides a method": b"cargparse\nNamespace\n)\x81}"
    + text(b"__class__")
    + b"cnumpy\ndtype\nsb",
    "a state of slots": b"cpathlib\nPosixPath\n)\x81}}" + text(b"_drv") + b"K\x01s\x86b",
    "a factory that is called for each key": call("collections", "defaultdict", b"cbuiltins\nlist\n"),
}


@pytest.mark.parametrize("attack", STAND_IN_CALLS)
def test_a_known_name_with_hostile_arguments_makes_an_inert_stand_in(tmp_path, attack):
    beside = unpickle(saved(tmp_path, STAND_IN_CALLS[attack]))["beside"]
    assert type(beside).__name__ in ("UnreadObject", "dict")
    assert not getattr(beside, "__dict__", {})


def test_no_stand_in_is_known_to_torch_afterwards(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(STATE, tmp_path / "w.pth")
    unpickle(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before


# ---- other kinds of files


def zipped(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
    return content.getvalue()


def written(save, *arguments, **options):
    content = io.BytesIO()
    save(*arguments, content, **options)
    return content.getvalue()


def onnx_bytes(**producer):
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    return onnx.helper.make_model(graph, **producer).SerializeToString()


def tar_bytes():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("w.pth"))
    return content.getvalue()


OLD = written(torch.save, STATE, _use_new_zipfile_serialization=False)
PART = "is only a part of a file of torch.save: download it again"
KINDS = [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS: run `git lfs pull`"),
    (b"<!DOCTYPE html>\n<html>", "is a web page, such as a login or an error"),
    (b"\n<html lang=en>", "is a web page"),
    (b'{"error": "Repository not found"}', "is a JSON file"),
    (b"Not Found\n", "is a text file"),
    (written(torch.jit.save, torch.jit.script(nn.Linear(2, 3))), "TorchScript archive: save torch.jit.load"),
    (onnx_bytes(producer_name="pytorch"), r"looks like an ONNX network: give it a name that ends in \.onnx"),
    (onnx_bytes(), "looks like an ONNX network"),
    (b"\x89HDF\r\n\x1a\n\0", "is a file of Keras or TensorFlow"),
    (b"\x08\x01\x12\xff\x01", "is a file of Keras or TensorFlow"),
    (b"\x1c\0\0\0TFL3", "is a file of Keras or TensorFlow"),
    (zipped(**{"config.json": "{}", "model.weights.h5": ""}), "is a file of Keras or TensorFlow"),
    (written(lambda file: np.savez(file, a=np.ones(2))), "is a NumPy file"),
    (written(lambda file: np.save(file, np.ones(2))), "is a NumPy file"),
    (zipped(**{"w.pth": "x"}), "is an archive, not a file of weights: unpack it"),
    (gzip.compress(b"x", mtime=0), "is an archive"),
    (tar_bytes(), "is an archive"),
    (written(torch.save, STATE)[:-100], PART),
    (PRETRAINED["efficientnet_lite0"].weights.fetch().read_bytes()[:100_000], PART),
    (OLD[:-5], PART),
    (pickle.dumps({"a": [1.5]}), "is a pickle that torch.save did not write"),
    (written(torch.save, STATE, pickle_protocol=4), "cannot be read by torch.load.*without pickle_protocol"),
    (bytes(range(255, 0, -1)), "is not a file of weights, or only a part of one"),
]


@pytest.mark.parametrize(("content", "sentence"), KINDS)
def test_what_is_no_file_of_weights_is_named(tmp_path, content, sentence):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=rf"w\.pth .*{sentence}"):
        unpickle(tmp_path / "w.pth")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        unpickle(tmp_path / "gone.pth")


def test_an_old_file_of_torch_is_read_and_a_whole_network_in_one_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(OLD)
    assert torch.equal(unpickle(tmp_path / "w.pth")["weight"], STATE["weight"])
    torch.save(nn.Linear(2, 3), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"holds a Python object \(torch\.nn\.modules\.linear\.Linear\)"):
        unpickle(tmp_path / "w.pth")


# ---- no file fills the memory, or is read for ever


def itself():
    holder = {"w": STATE["weight"]}
    holder |= {"a": [holder], "b": (holder,), "c": holder}
    return holder


def doubled(times):
    value = [1.5]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("content", [itself(), {"w": STATE["weight"], "beside": doubled(60)}])
def test_what_holds_itself_or_doubles_without_end_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth holds a dict or list that holds itself, more than 100"):
        unpickle(tmp_path / "w.pth")


def zipped_zeros(path, numbers):
    torch.save({"w": torch.zeros(numbers)}, path)
    packed = path.read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(packed)) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in stored.namelist():
            out.writestr(name, stored.read(name))


def test_a_small_file_that_grows_is_bounded_by_the_memory(tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    monkeypatch.setattr(weights_file, "memory", lambda: 8_000_000)
    sentence = r"w\.pth, of 0\.0 MB, takes .* GB of memory .* may take 0\.0 GB on this machine"
    zipped_zeros(file, 900_000)  # of 4 bytes: less than half of the memory
    assert unpickle(file)["w"].shape == (900_000,)
    zipped_zeros(file, 1_100_000)
    with pytest.raises(InputError, match=sentence):
        unpickle(file)
    torch.save({"w": torch.zeros(1).expand(1000, 1100)}, file)  # a view: its copy would grow
    with pytest.raises(InputError, match=sentence):
        unpickle(file)


def test_attributes_and_odd_tensors_come_to_nothing(tmp_path):
    state = collections.OrderedDict(w=STATE["weight"].clone(), sparse=torch.eye(2).to_sparse())
    state.values = state["w"].numel = 5
    torch.save({"state": state, "meta": torch.zeros(2, device="meta")}, tmp_path / "w.pth")
    content = unpickle(tmp_path / "w.pth")
    assert torch.equal(content["state"]["w"], STATE["weight"])
    assert not vars(content["state"]["w"])
    assert len(content["state"].values()) == 2
    assert not torch.is_tensor(content["state"]["sparse"])
    assert not torch.is_tensor(content["meta"])


def test_names_are_made_printable(tmp_path):
    torch.save({"\x1b[2Jconv\n": STATE["weight"], "größe": STATE["bias"]}, tmp_path / "w.pth")
    assert list(unpickle(tmp_path / "w.pth")) == ["\\x1b[2Jconv\\n", "größe"]


def test_a_file_that_is_cut_anywhere_is_a_sentence(tmp_path):
    """A quarter of the places give zipfile's reader a wrong offset, which is an OSError."""
    torch.save(STATE, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for at in range(0, len(whole), 37):
        (tmp_path / "w.pth").write_bytes(whole[:at])
        with pytest.raises(InputError, match=r"w\.pth "):
            unpickle(tmp_path / "w.pth")

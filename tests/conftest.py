"""What several tests share: sample images, the default network, a server that misbehaves on demand."""

import gc
import io
import logging
import os
import runpy
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from get_images import ImageFile
from retrieval.datasets.layouts import lay_out_sample
from retrieval.forms import IN_ENVIRONMENT
from retrieval.records import Ranking
from retrieval.submission.submission_file import write_submission

ROOT = Path(__file__).parent.parent
THRESHOLD, THREADS = gc.get_threshold(), torch.get_num_threads()
if (
    torch.cuda.is_available()
):  # else hiding the GPU from the processes that tests start would confuse this one
    torch.cuda.init()
    torch.cuda.device_count()
fast = False  # whether the slow tests are left out
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each script that a test starts compiles all of them anew
GALLERY = [f"{number:032x}.jpg" for number in range(12)]
RANKING = {"q1.jpg": GALLERY[:11], "q2.jpg": GALLERY[::-1]}


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The handwritten digits, laid out."""
    out = tmp_path_factory.mktemp("sample") / "digits"
    lay_out_sample(out)
    return out


@pytest.fixture(scope="session")
def few(sample, tmp_path_factory):
    """The digits 0 to 3, 2 queries and 6 gallery images each: folders `query` and `gallery` with labels."""
    out = tmp_path_factory.mktemp("few")
    for part, count in (("query", 2), ("gallery", 6)):
        for label in "0123":
            (out / part / label).mkdir(parents=True)
            for path in sorted((sample / "test" / part / label).iterdir())[:count]:
                shutil.copy(path, out / part / label)
    return out


@pytest.fixture
def flat(few, tmp_path):
    """The same images without labels, in flat folders, as on the day."""
    for part in ("query", "gallery"):
        (tmp_path / part).mkdir()
        for path in (few / part).glob("*/*.png"):
            shutil.copy(path, tmp_path / part)
    return tmp_path


def image_files(names):
    return [ImageFile(name, Path(name)) for name in names]


def ranking_of(names, gallery=None):
    """A ranking with these names, {query: [gallery names]}; cosines fall by a tenth from 1."""
    gallery = gallery or sorted({name for best in names.values() for name in best})
    row_of = {name: row for row, name in enumerate(gallery)}
    k = min(len(best) for best in names.values())
    rows = np.array([[row_of[name] for name in best[:k]] for best in names.values()], dtype=np.int64)
    return Ranking(list(names), gallery, rows, np.tile(1 - np.arange(k) / 10, (len(rows), 1)))


@pytest.fixture
def saved(tmp_path):
    return write_submission(ranking_of(RANKING, GALLERY), "Team AAA", tmp_path)


@pytest.fixture(scope="session")
def backbone():
    from retrieval.backbones.backbone import load_backbone

    return load_backbone("efficientnet_lite0", "cpu")


# Files whose tests start a script, train, open a browser or take seconds; elsewhere a slow test has the mark.
SLOW = ("test_scripts", "test_fine_tuning_scripts", "test_face_scripts", "test_benchmarks", "test_readme",
        "test_distributed", "test_training", "test_start", "test_steps", "test_state", "test_checkpoints",
        "test_joint_batch", "test_report_page", "test_leaderboard_page", "test_serve", "test_zoo",
        "test_timm_zoo", "test_client", "test_library", "test_run_report", "test_weights", "test_filling",
        "test_face_crop", "test_tracking", "test_golden", "test_server_rules", "test_dlib_network",
        "test_runtime")  # fmt: skip
LONGEST = ("test_readme", "test_joint_batch")  # minutes each: they begin first
FAST_SECONDS = 10  # of the processor; the first test of a network also imports timm


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # else a process may end with one, alone
    for item in items:
        if item.path.stem in SLOW or {"browser", "exported_once"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    global fast
    fast = config.option.markexpr == "not slow"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail where a test that nobody has marked as slow makes `make check` slow."""
    before, result = sum(os.times()[:4]), (yield)
    spent = sum(os.times()[:4]) - before
    if fast and spent > FAST_SECONDS:
        pytest.fail(f"takes {spent:.0f} s of the processor: give it the mark `slow`")
    return result


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path_factory):
    """The environment, the .env and the GPU of whoever runs the tests must not reach them."""
    monkeypatch.setattr("retrieval.backbones.backbone.ACCELERATORS", ())  # --device auto is the CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also in the processes that a test starts
    for name in IN_ENVIRONMENT:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    rooms = logging.getLogger("retrieval")
    rooms.handlers.clear()  # what a script's start leaves behind
    rooms.setLevel(logging.NOTSET)
    torch.set_num_threads(THREADS)
    gc.set_threshold(*THRESHOLD)
    gc.unfreeze()


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory):
    """EfficientNet-Lite0 for ONNX Runtime, in the folder of a cache."""
    from retrieval.backbones.backbone import find_backbone
    from retrieval.embedding.runtime import ONNX, choose_runtime

    folder = tmp_path_factory.mktemp("exported")
    runtime = choose_runtime(find_backbone("efficientnet_lite0", "cpu"), ONNX, 1, 1, folder)
    runtime.settle()
    assert runtime.name == ONNX
    return folder


@pytest.fixture
def exported(exported_once):
    """The cache that a machine has after a first run, without an embedding: a script needs no torch then."""
    shutil.copytree(exported_once, os.environ["CACHE_DIR"], dirs_exist_ok=True, copy_function=os.link)


def run(*arguments, cwd, **environment):
    """Run a script of the project, or `-m module`, as a user does; its status, output and errors."""
    if fast:
        pytest.fail("starts a script: give it the mark `slow`")
    command = [str(ROOT / part) if part.endswith(".py") else part for part in map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def run_here(*arguments, cwd, **environment):
    """As `run`, but in this process, which has imported torch and timm already."""
    told, warned, status = io.StringIO(), io.StringIO(), 0
    script, *flags = map(str, arguments)
    start = partial(runpy.run_path, str(ROOT / script))
    if script == "-m":
        start = partial(runpy.run_module, flags.pop(0), alter_sys=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(warned):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(logging, "raiseExceptions", logging.raiseExceptions)  # which a script's start changes
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            start(run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(arguments, status, told.getvalue(), warned.getvalue())


class Server:
    """A real HTTP server on loopback: it answers each request with the next of its behaviours, then its last.

    A behaviour is a function of the request handler; `received` keeps (method, path, headers, body).
    """

    def __init__(self, *behaviours):
        self.received = []
        self.stopped = threading.Event()  # ends the behaviours that never end by themselves
        remaining = list(behaviours)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                body = handler.rfile.read(int(handler.headers["Content-Length"] or 0))
                self.received.append((handler.command, handler.path, dict(handler.headers), body))
                (remaining.pop(0) if len(remaining) > 1 else remaining[0])(handler)

            do_GET = do_HEAD = do_POST  # noqa: N815

            def log_message(handler, *_):  # noqa: N805
                pass

        Handler.server_stopped = self.stopped
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/retrieval/"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()


def answer(status=200, body=b'{"accuracy": 698.0}', kind="application/json", headers=()):
    """The behaviour of answering with this status and body."""

    def behave(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return behave


# ---- fine-tuning


@pytest.fixture(scope="session")
def tiny(few):
    """Four classes of six digits each."""
    return few / "gallery"


def by_torch(backbone, batch_size, key=b""):
    """The runtime by torch of a loaded backbone."""
    from retrieval.backbones.backbone import LazyBackbone
    from retrieval.embedding.runtime import choose_runtime

    lazy = LazyBackbone(backbone.model_name, backbone.transform, backbone.device, key, lambda: backbone)
    return choose_runtime(lazy, "torch", batch_size, batch_size, None)


SMALL = "timm:test_efficientnet.r160_in1k"  # a tenth of a million weights: it takes a tenth of Lite0's time


def small_weights(folder):
    """Return a file with the same random weights for SMALL each time."""
    import timm

    from retrieval.backbones.fine_tuned import write_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(SMALL.removeprefix("timm:"), pretrained=False)
    write_checkpoint(folder / "small.pth", network.state_dict())
    return folder / "small.pth"


def settings_of(folder, tmp_path, **given):
    """Return the settings of a training that takes a moment: of a small network, if no other is given."""
    import fine_tuning

    if "model" not in given:
        given = {"model": SMALL, "weights": small_weights(tmp_path)} | given
    small = {"image_size": 32, "batch_size": 8, "epochs": 2, "device": "cpu", "val_share": 0.34,
             "save_dir": tmp_path / "save"}  # fmt: skip
    return fine_tuning.Settings(train_dir=folder, **(small | given))


def begun(settings):
    """The training that fine_tuning.py would begin."""
    from supcon.batches import find_and_split
    from supcon.checkpoints import open_folder
    from supcon.start import load_start
    from supcon.state import begin
    from supcon.variants import choices_of

    choices, split = choices_of(settings), find_and_split(settings)
    with open_folder(settings, split) as saved:
        return begin(settings, choices, split, load_start(settings, split.train), saved)


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


# ---- pages


def vectors_of(rows):
    """Embeddings with these vectors, made unit: a name → its vector."""
    from retrieval.records import Embeddings

    vectors = np.array(list(rows.values()), dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(list(rows), vectors / np.where(lengths, lengths, 1))


@pytest.fixture(scope="session")
def digits(sample):
    """The results of 40 queries of ten classes, by a fine-tuned network that holds an untuned one."""
    from pages import found_of, tuned

    return tuned(found_of(sample / "test", 4, 12))


@pytest.fixture(scope="session")
def digits_page(digits, tmp_path_factory):
    """Their report, drawn once."""
    from pages import drawn

    folder = tmp_path_factory.mktemp("page")
    drawn(digits, folder)
    return folder / "report.html"


@pytest.fixture(scope="session")
def browser():
    from page_checks import CHROMIUM, DRIVER, Browser

    if not (CHROMIUM and DRIVER):
        end = pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip
        end("no chromium with its chromedriver: `apt-get install chromium chromium-driver`")
    browser = Browser()
    yield browser
    browser.driver.quit()


def embeddings_of(vectors, prefix):
    """Embeddings with these rows, made unit, and names such as q0, q1 …"""
    return vectors_of({f"{prefix}{row}": vector for row, vector in enumerate(vectors)})


# ---- the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Queries and gallery images of four people."""
    from hall import lay_out

    return lay_out(tmp_path_factory.mktemp("hall"))


@pytest.fixture
def serve(folder, tmp_path):
    """A server of these images, with rules of a test's own."""
    from hall import served

    return partial(served, folder, tmp_path / "c.sqlite")

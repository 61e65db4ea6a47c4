"""Hostile servers, and a sample of the campaign `python -m tests.torture.network`."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests
from conftest import Server, answer
from test_client import quiet, send

from tests.torture.network import BEHAVIOURS, KINDS, MOMENTS, attempt

SAMPLE = sorted(random.Random(0).sample(sorted(KINDS), 60))
FELL = ["answer: two lengths", "100 Continue for ever", "drip headers after the status line",
        "chunks that drip", "answer 307 to another port", "answer 308 to another host",
        "answer 307 to a password", "answer: a reason of control characters"]  # fmt: skip


def test_every_behaviour_meets_every_moment():
    assert len(KINDS) >= len(BEHAVIOURS) * len(MOMENTS) + 60 > 150


def test_no_broken_network_costs_a_submission_or_tells_a_lie():
    kinds = sorted({*SAMPLE, *FELL})
    with ThreadPoolExecutor(8) as pool:
        broken = dict(
            zip(kinds, pool.map(lambda kind: attempt(kind, random.Random(kind)), kinds), strict=True)
        )
    assert {kind: sentences for kind, sentences in broken.items() if sentences} == {}


@pytest.mark.parametrize("proxy", ["socks4", "socks5", "socks5h"])
def test_a_socks_proxy_without_its_package_is_a_sentence(proxy, saved, monkeypatch):
    def without_the_package(*_, **__):  # as requests does
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", without_the_package)
    monkeypatch.setenv("http_proxy", f"{proxy}://127.0.0.1:9")
    sentence = send(saved, "http://example.org/retrieval/").sentence
    assert sentence.startswith("a SOCKS proxy is set in the environment: `pip install pysocks socksio`")


def raw(start, line=b""):
    """The behaviour of sending these bytes, and then a line now and then, without end."""

    def behave(handler):
        handler.wfile.write(start)
        while line and not handler.server_stopped.wait(0.05):
            handler.wfile.write(line)
        handler.close_connection = True

    return behave


@pytest.mark.parametrize(("start", "line"), [
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x"),
    (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x08aaaaaa", b"x"),  # a name without end
])  # fmt: skip
def test_an_answer_has_one_deadline_whatever_drips(saved, start, line):
    with quiet(Server(raw(start, line))) as server:
        outcome = send(saved, server.url, timeouts=(1, 0.4))
    assert "in time" in outcome.sentence
    assert "the submission may have been counted" in outcome.sentence
    assert len(server.received) == 1


def test_a_proxy_that_never_ends_its_answer_meets_the_deadline_too(saved, monkeypatch):
    """HTTPS goes through a tunnel that the proxy opens first, before a byte of the submission leaves."""
    ended = threading.Event()

    def drip(connection):
        with suppress(OSError):
            while not ended.wait(0.05):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as proxy:
        accept = lambda: drip(proxy.accept()[0])  # noqa: E731
        thread = threading.Thread(target=accept)
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        began = time.monotonic()
        outcome = send(saved, "https://192.0.2.1/", timeouts=(1, 0.4), retries=0)
        assert time.monotonic() - began < 20  # without a deadline it never ends
        ended.set()
        thread.join()
    assert "did not take the submission in time: the submission was not sent" in outcome.sentence


@pytest.mark.parametrize("head", [b"200 OK\r\nContent-Length: 1\r\nContent-Length: 2", b"two OK", b"\xff"])
def test_an_answer_that_is_no_http_may_have_been_counted(saved, head):
    with quiet(Server(raw(b"HTTP/1.1 " + head + b"\r\n\r\n"))) as server:
        outcome = send(saved, server.url, retries=0)
    assert "the submission may have been counted" in outcome.sentence
    assert server.received[0][3] == saved.read_bytes()


def test_a_password_in_the_url_is_used_and_shown_nowhere(saved, caplog):
    with Server(answer(500, b"oops"), answer(422)) as server:
        outcome = send(saved, server.url.replace("://", "://team:%C3%BC@"), retries=1)
    assert [headers["Authorization"] for _, _, headers, _ in server.received] == ["Basic dGVhbTrDvA=="] * 2
    shown = outcome.sentence + caplog.text
    assert f"--server_url '{server.url.replace('://', '://***@')}'" in shown
    assert "team" not in shown.replace("Team AAA", "")
    assert "%C3" not in shown


def test_no_terminal_gets_a_servers_control_characters(saved, caplog):
    reasons = [f"HTTP/1.1 {status} \x1b[2J\x9b\r\nLocation: /\x07\r\n\r\n" for status in (503, 302)]
    with quiet(Server(*(raw(reason.encode("latin-1")) for reason in reasons))) as server:
        outcome = send(saved, server.url)
    assert "302 \\x1b[2J\\x9b, and points to /\\x07" in outcome.sentence
    assert all(c.isprintable() or c == "\n" for c in outcome.sentence + caplog.text)

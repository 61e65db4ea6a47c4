"""How a submission is sent: to real servers on loopback that answer, refuse, hang, reset and babble."""

import gzip
import json
import os
import signal
import socket
import struct
import threading
import time

import pytest
import requests
from conftest import RANKING, Server, answer, ranking_of

from retrieval.submission.client import send_submission
from retrieval.submission.submission_file import write_submission


def send(path, url, **options):
    return send_submission(path, url, **{"timeouts": (2, 1), "retries": 2, "backoff": 0.01} | options)


def test_every_byte_of_the_post(saved):
    with Server(answer(body=b'{"groupname": "Team AAA", "accuracy": 698.0}')) as server:
        outcome = send(saved, server.url)
    ((method, path, headers, body),) = server.received
    assert (method, path) == ("POST", "/retrieval/")
    assert headers["Content-Type"] == "application/json"
    assert body == saved.read_bytes()
    images = ", ".join(
        f'"{query}": [{", ".join(f"{chr(34)}{name}{chr(34)}" for name in names[:10])}]'
        for query, names in RANKING.items()
    )
    assert body.decode("ascii") == f'{{"groupname": "Team AAA", "images": {{{images}}}}}'
    assert (outcome.word, outcome.accuracy, outcome.status) == ("scored", 698.0, 200)
    assert outcome.sentence.startswith("the server's score: 698 of 1000")
    assert saved.with_name("reply.txt").read_bytes() == b'{"groupname": "Team AAA", "accuracy": 698.0}'


def test_letters_of_any_script_survive(tmp_path):
    path = write_submission(ranking_of({"ü.jpg": ["日本.jpg"]}), "Équipe β 1", tmp_path)
    with Server(answer()) as server:
        send(path, server.url)
    assert json.loads(server.received[0][3]) == {"groupname": "Équipe β 1", "images": {"ü.jpg": ["日本.jpg"]}}


def test_an_older_server_answers_results(saved):
    with Server(answer(body=b'{"results": [0.5, 0.6]}')) as server:
        outcome = send(saved, server.url)
    assert (outcome.word, outcome.accuracy, outcome.failed) == ("answered", None, False)
    assert "[0.5, 0.6]" in outcome.sentence


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        (answer(404, b"<html><style>p {}</style><h1>Not Found</h1></html>", "text/html"),
         "404 Not Found (check the URL, down to its last slash), 'Not Found': the submission was refused"),
        (answer(200, b"thank you", "text/plain"),
         "200 OK, but not with the JSON of a score, 'thank you': the submission may have been counted"),
        (answer(200, b"[1, 2]"), "not with the JSON of a score"),
        (answer(200, b""), "not with the JSON of a score"),
        (answer(200, b"\xff\xfe\x00"), "not with the JSON of a score"),
        (answer(200, b'{"error": "unknown group"}'), "200 OK without a score, "),
        (answer(200, b'{"accuracy": "high"}'), "without a score"),
        (answer(200, b'{"accuracy": NaN}'), "without a score"),
        (answer(200, b'{"accuracy": 1' + b"0" * 400 + b"}"), "without a score"),
        (answer(200, b"[" * 200_000), "not with the JSON of a score"),
        (answer(307, b"", headers=[("Location", "http://[")]),
         "points to http://[: the submission was refused"),
        (answer(307, b"", headers=[("Location", "ftp://a/")]),
         "another server, which was sent nothing: if you trust it, give --server_url ftp://a/: "),
        (answer(422, b'{"detail": "q9.jpg is unknown"}'), "422 Unprocessable"),
        (answer(301, b"", headers=[("Location", "/x/")]), "and points to /x/: the submission was refused"),
        (answer(302, b"", headers=[("Location", "/x/")]), "and points to /x/: the submission may have been"),
        (answer(303, b"", headers=[("Location", "/x/")]), "and points to /x/: the submission may have been"),
    ],
)  # fmt: skip
def test_replies_without_a_score_fail_with_a_sentence_and_are_sent_once(saved, behaviour, sentence):
    with Server(behaviour, answer(404)) as server:
        outcome = send(saved, server.url)
    assert outcome.failed
    assert sentence in outcome.sentence
    assert f"{saved} is saved; " in outcome.sentence
    assert f"python -m retrieval.submission {saved} --server_url http" in outcome.sentence
    assert len([request for request in server.received if request[0] == "POST"]) == 1


@pytest.mark.parametrize(("more", "share"), [
    ("", ""), (', "public_queries": 90', ", on its 90 public queries only"), (', "public_queries": null', ""),
    (', "public_queries": "<b>"', ""),
])  # fmt: skip
def test_a_score_of_a_public_share_says_so(saved, more, share):
    with Server(answer(200, f'{{"accuracy": 698.0{more}}}'.encode())) as server:
        outcome = send(saved, server.url)
    assert outcome.sentence == f"the server's score: 698 of 1000{share} (reply.txt holds its whole reply)"


@pytest.mark.parametrize("reply", [
    b'{"accuracy": "698.0"}', b'"{\\"accuracy\\": 698.0}"', b'\xef\xbb\xbf{"accuracy": 698.0}',
    '{"groupname": "Équipe", "accuracy": 698}'.encode("latin-1"),
])  # fmt: skip
def test_a_score_is_read_however_a_server_writes_it(saved, reply):
    with Server(answer(200, reply)) as server:
        assert send(saved, server.url).accuracy == 698.0


@pytest.mark.parametrize("asked", ["1", "0", "-3", "soon", "Fri, 27 Nov 2026 12:00:00 GMT"])
def test_a_server_that_asks_to_wait_is_waited_for(saved, caplog, asked):
    """429 is sent again after the seconds of Retry-After; without them it is a refusal."""
    busy = answer(429, b"too many", headers=[("Retry-After", asked)])
    with Server(busy, answer()) as server:
        outcome = send(saved, server.url)
    if asked == "1":
        assert outcome.word == "scored"
        assert "Sending it again in 1 s" in caplog.text
    else:
        assert "429 Too Many Requests" in outcome.sentence
        assert "the submission was refused" in outcome.sentence
        assert len(server.received) == 1


def test_a_server_in_trouble_says_when_to_ask_again(saved, caplog):
    with Server(answer(503, b"", headers=[("Retry-After", "1")]), answer()) as server:
        assert send(saved, server.url).word == "scored"
    assert "Sending it again in 1 s" in caplog.text


def test_a_permanent_redirect_is_followed_with_the_whole_post(saved):
    """What FastAPI and Flask answer to a missing or a surplus slash."""
    with Server(answer(307, b"", headers=[("Location", "/retrieval")]), answer()) as server:
        assert send(saved, server.url).word == "scored"
    assert [request[:2] for request in server.received] == [("POST", "/retrieval/"), ("POST", "/retrieval")]
    assert server.received[1][3] == saved.read_bytes()


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_in_trouble_is_asked_again_and_it_is_said(saved, caplog, status):
    with Server(answer(status, b"oops"), answer(status, b"oops"), answer()) as server:
        outcome = send(saved, server.url)
    assert outcome.word == "scored"
    assert len(server.received) == 3
    assert saved.with_name("reply.txt").read_bytes() == b'{"accuracy": 698.0}'
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2
    for line in said:
        assert line.startswith(f"the server answered {status}")
        assert "the submission may have been counted. Sending it again in 0.0" in line


def test_a_server_that_stays_in_trouble(saved):
    with Server(answer(500, b"no disk left")) as server:
        outcome = send(saved, server.url)
    assert (outcome.word, outcome.status) == ("failed", 500)
    assert "no disk left" in outcome.sentence
    assert len(server.received) == 3
    assert saved.with_name("reply.txt").read_bytes() == b"no disk left"


def reset(handler):
    """Break the connection off after the request has been read."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile.close = handler.rfile.close = lambda: None
    raise ConnectionError


def quiet(server):
    server.http.handle_error = lambda *_: None
    return server


def test_a_reset_is_tried_again_and_said(saved, caplog):
    with quiet(Server(reset, answer())) as server:
        outcome = send(saved, server.url)
    assert outcome.word == "scored"
    assert len(server.received) == 2
    assert "(connection reset by peer): the submission may have been counted. Sending it again" in caplog.text


def test_resets_without_end(saved):
    with quiet(Server(reset)) as server:
        outcome = send(saved, server.url)
    assert (
        "broke the connection off (connection reset by peer): the submission may have been counted"
        in outcome.sentence
    )
    assert len(server.received) == 3


def test_a_refused_connection_is_tried_again_and_was_not_sent(saved, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/retrieval/"
    outcome = send(saved, url)
    assert "(connection refused; check host and port): the submission was not sent." in outcome.sentence
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition("): ")[2] for line in said] == [
        "the submission was not sent. Sending it again in 0.01 s",
        "the submission was not sent. Sending it again in 0.02 s",
    ]


def test_what_was_perhaps_counted_once_stays_perhaps_counted(saved):
    """A reset first, a refused connection then: the last word must not be that nothing was sent."""

    def reset_and_close(handler):
        server.http.socket.close()
        reset(handler)

    with quiet(Server(reset_and_close)) as server:
        outcome = send(saved, server.url)
    assert outcome.sentence.partition(".\n")[0].endswith("the submission may have been counted")


def hang(handler):
    handler.server_stopped.wait(20)


def test_a_server_that_hangs_is_not_sent_a_second_one(saved):
    with Server(hang) as server:
        outcome = send(saved, server.url, timeouts=(1, 0.3))
    assert outcome.failed
    assert "did not answer in time: the submission may have been counted" in outcome.sentence
    assert len(server.received) == 1


def dripping(status):
    """The behaviour of answering with this status and a body that comes slowly and never ends."""

    def behave(handler):
        handler.send_response(status)
        handler.end_headers()
        while not handler.server_stopped.wait(0.05):
            handler.wfile.write(b"x")

    return behave


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server_stopped.is_set():
        handler.wfile.write(bytes(2**20))


def cut_off(body):
    """The behaviour of promising more than this body, and closing after it."""

    def behave(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(body)

    return behave


HALF = b'{"accuracy": 69'


@pytest.mark.parametrize(
    ("behaviour", "kept"), [(dripping(200), b"xx"), (flood, bytes(100)), (cut_off(HALF), HALF)]
)
def test_a_reply_that_never_ends_or_breaks_off_is_kept_as_far_as_it_came(saved, behaviour, kept):
    with quiet(Server(behaviour)) as server:
        outcome = send(saved, server.url, timeouts=(1, 0.6))
    assert outcome.failed
    assert "may have been counted" in outcome.sentence
    assert saved.with_name("reply.txt").read_bytes().startswith(kept)
    assert len(server.received) == 1


def test_ctrl_c_while_sending_leaves_an_outcome(saved):
    with Server(hang) as server:

        def interrupt():
            while not server.received:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        outcome = send(saved, server.url, timeouts=(1, 10))
    assert (outcome.word, outcome.failed) == ("interrupted", True)
    assert "stopped by Ctrl-C: the submission may have been counted" in outcome.sentence


def test_ctrl_c_between_two_attempts_knows_that_nothing_was_sent(saved, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval.submission.client.time.sleep", interrupt)
    assert "stopped by Ctrl-C: the submission was not sent" in send(saved, "http://127.0.0.1:9/").sentence


def test_trouble_that_drips_ends_too(saved):
    with quiet(Server(dripping(500))) as server:
        outcome = send(saved, server.url, timeouts=(1, 0.3), retries=1)
    assert outcome.failed
    assert saved.with_name("reply.txt").read_bytes().startswith(b"x")


def test_a_circle_of_redirects_ends(saved):
    with Server(answer(307, b"", headers=[("Location", "/retrieval/")])) as server:
        outcome = send(saved, server.url)
    assert "307 Temporary Redirect, and points to /retrieval/: the submission was refused" in outcome.sentence
    assert len(server.received) == 4


@pytest.mark.parametrize("status", [307, 308])
def test_no_redirect_takes_the_token_and_the_submission_to_another_server(saved, status):
    with Server(answer()) as other:
        away = answer(status, b"", headers=[("Location", other.url)])
        with Server(away) as server:
            outcome = send(saved, server.url, token="secret")
    assert (outcome.failed, other.received, len(server.received)) == (True, [], 1)
    advice = f"another server, which was sent nothing: if you trust it, give --server_url {other.url}"
    assert f"{advice}: the submission was refused" in outcome.sentence


def unended(handler):
    """A whole score on a connection that stays open, without a length."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"accuracy": 698.0}')
    handler.server_stopped.wait(20)


@pytest.mark.parametrize("behaviour", [unended, cut_off(b'{"accuracy": 698.0}')])
def test_a_score_in_a_reply_that_ends_badly_is_a_score(saved, behaviour):
    with quiet(Server(behaviour)) as server:
        assert send(saved, server.url, timeouts=(1, 0.5)).accuracy == 698.0


def test_the_replies_of_earlier_attempts_are_kept(saved):
    with Server(answer(500, b"first"), answer(502, b"second"), answer()) as server:
        send(saved, server.url)
    kept = [path.read_bytes() for path in sorted((saved.parent / "earlier").glob("*/reply.txt"))]
    assert sorted(kept) == [b"first", b"second"]


def test_a_compressed_reply_is_read(saved):
    body = gzip.compress(b'{"accuracy": 698.0}')
    with Server(answer(body=body, headers=[("Content-Encoding", "gzip")])) as server:
        assert send(saved, server.url).accuracy == 698.0


def test_a_server_without_tls_is_not_asked_again(saved):
    with Server(answer()) as server:
        outcome = send(saved, server.url.replace("http:", "https:"))
    assert "is it http:// there?): the submission was not sent" in outcome.sentence
    assert not server.received


def test_a_proxy_that_is_not_there_is_named(saved, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert "the proxy in http_proxy or https_proxy failed" in send(saved, "http://192.0.2.1/").sentence


def test_without_a_server_it_is_only_saved(saved):
    outcome = send(saved, "")
    assert (outcome.word, outcome.failed) == ("saved", False)
    assert "is not sent: set SERVER_URL or --server_url, or send it with\n    cd " in outcome.sentence


def test_a_reply_that_cannot_be_kept_hides_no_score(saved, caplog):
    saved.with_name("reply.txt").write_text("before")
    saved.with_name("earlier").touch()  # a file where the reply before should move to
    with Server(answer()) as server:
        assert send(saved, server.url).accuracy == 698.0
    assert "the server's reply cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("url", "warned"),
    [("http://127.0.0.1:9/", False), ("http://localhost:9/", False), ("http://[::1]:9/", False),
     ("http://192.0.2.1/", True), ("http://example.org/", True)],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_folders_in_names_are_warned_of_for_other_machines(
    tmp_path, caplog, monkeypatch, url, warned, nested
):
    def refuse(*_, **__):
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests.Session, "post", refuse)
    name = "class/a.jpg" if nested else "a.jpg"
    path = write_submission(ranking_of({"q.jpg": [name]}), "team", tmp_path)
    send(path, url)
    assert ("knows base names only" in caplog.text) is (warned and nested)

import json
import os
import signal
import socket
import struct
import threading
import time

import pytest
from conftest import Server, answer, run

from retrieval.settings import InputError
from retrieval.submission import (
    check_submission,
    make_submission,
    read_submission,
    save_submission,
    send_submission,
)

GALLERY = [f"{number:032x}.jpg" for number in range(12)]
RANKING = {"q1.jpg": GALLERY[:11], "q2.jpg": GALLERY[::-1]}


@pytest.fixture
def saved(tmp_path):
    return save_submission(make_submission(RANKING, GALLERY, "Team AAA"), tmp_path)


def send(path, url, **options):
    return send_submission(path, url, **{"timeouts": (2, 1), "retries": 2, "backoff": 0.01} | options)


# ---- make and check


def test_the_body_is_the_competitions(saved):
    body = json.loads(saved.read_bytes())
    assert body == {"groupname": "Team AAA", "images": {"q1.jpg": GALLERY[:10], "q2.jpg": GALLERY[:1:-1]}}


def test_a_small_gallery_is_warned_of_and_sent(caplog):
    submission = make_submission({"q.jpg": ["b.jpg", "a.jpg"]}, ["a.jpg", "b.jpg"], "team")
    assert submission["images"] == {"q.jpg": ["b.jpg", "a.jpg"]}
    assert "the gallery has 2 images, so each query gets 2 names instead of 10" in caplog.text


@pytest.mark.parametrize(
    "names",
    [GALLERY[:9], [*GALLERY[:9], GALLERY[0]], [*GALLERY[:9], "unknown.jpg"], []],
    ids=["short", "repeated", "unknown", "empty"],
)
def test_a_ranking_that_the_server_would_refuse_is_never_saved(names):
    with pytest.raises(InputError, match=r"q2\.jpg"):
        make_submission({"q1.jpg": GALLERY, "q2.jpg": names}, GALLERY, "team")


@pytest.mark.parametrize(
    "body",
    [
        [{"query": "q.jpg", "gallery": ["a.jpg"]}],  # what a team sent
        {"groupname": "team"},
        {"groupname": "team", "images": {}},
        {"groupname": "team", "images": [["q.jpg", ["a.jpg"]]]},
        {"groupname": 7, "images": {"q.jpg": ["a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": "a.jpg"}},
        {"groupname": "team", "images": {"q.jpg": [1]}},
        {"groupname": "team", "images": {"q.jpg": []}},
        {"groupname": "team", "images": {"q.jpg": ["a.jpg", "a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": ["a.jpg", "b.jpg"], "r.jpg": ["a.jpg"]}},
        {"groupname": "team", "images": {"q.jpg": [f"{number}.jpg" for number in range(11)]}},
    ],
)
def test_what_is_no_submission(body, tmp_path):
    with pytest.raises(InputError):
        check_submission(body)
    (tmp_path / "submission.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"submission\.json: "):
        read_submission(tmp_path / "submission.json")


def test_files_that_hold_no_submission(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_submission(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        read_submission(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_submission(tmp_path / "b.json")


def test_saving_keeps_an_earlier_submission_and_drops_no_reply_for_it(saved):
    saved.with_name("reply.txt").write_text("its reply")
    first = saved.read_bytes()
    save_submission(make_submission(RANKING, GALLERY, "Team AAA"), saved.parent)  # the same again
    (answered,) = (saved.parent / "earlier").iterdir()
    assert (answered / "submission.json").read_bytes() == first
    save_submission(make_submission(RANKING, GALLERY, "Team AAA"), saved.parent)  # and again, without a reply
    assert len(list((saved.parent / "earlier").iterdir())) == 1
    (answered / "submission.json").unlink()
    (answered / "reply.txt").rename(saved.with_name("reply.txt"))
    answered.rmdir()
    save_submission(make_submission(RANKING, GALLERY, "Team BBB"), saved.parent)
    (earlier,) = (saved.parent / "earlier").iterdir()
    assert (earlier / "submission.json").read_bytes() == first
    assert (earlier / "reply.txt").read_text() == "its reply"
    assert json.loads(saved.read_bytes())["groupname"] == "Team BBB"
    assert not saved.with_name("reply.txt").exists()


# ---- send


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
    path = save_submission(make_submission({"ü.jpg": ["日本.jpg"]}, ["日本.jpg"], "Équipe β 1"), tmp_path)
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
         "404 Not Found: check the URL, down to its last slash: 'Not Found'"),
        (answer(200, b"thank you", "text/plain"), "200 OK, but not with the JSON of a score: 'thank you'"),
        (answer(200, b"[1, 2]"), "not with the JSON of a score"),
        (answer(200, b""), "not with the JSON of a score"),
        (answer(200, b"\xff\xfe\x00"), "not with the JSON of a score"),
        (answer(200, b'{"error": "unknown group"}'), "200 OK without a score: "),
        (answer(200, b'{"accuracy": "high"}'), "without a score"),
        (answer(200, b'{"accuracy": NaN}'), "without a score"),
        (answer(422, b'{"detail": "q9.jpg is unknown"}'), "422 Unprocessable"),
        (answer(302, b"", headers=[("Location", "/elsewhere/")]), "the server moved to http://127.0.0.1"),
    ],
)  # fmt: skip
def test_replies_without_a_score_fail_with_a_sentence_and_are_sent_once(saved, behaviour, sentence):
    with Server(behaviour, answer(404)) as server:
        outcome = send(saved, server.url)
    assert outcome.failed
    assert sentence in outcome.sentence
    assert (
        f"to send it again:\n    python -m retrieval.submission {saved} --server_url {server.url}"
        in outcome.sentence
    )
    assert len([request for request in server.received if request[0] == "POST"]) == 1


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
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2
    assert all(f"the server answered {status}; the submission may have been counted" in line for line in said)


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
    assert "connection reset by peer); the submission may have been counted. Sending it again" in caplog.text


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
    assert "cannot be reached (connection refused): the submission was not sent" in outcome.sentence
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "no answer (connection refused); it was not sent. Sending it again in 0 s",
        "no answer (connection refused); it was not sent. Sending it again in 0.02 s",
    ]


def hang(handler):
    handler.server_stopped.wait(20)


def test_a_server_that_hangs_is_not_sent_a_second_one(saved):
    with Server(hang) as server:
        outcome = send(saved, server.url, timeouts=(1, 0.3))
    assert outcome.failed
    assert "did not finish its answer in time: it may have been counted" in outcome.sentence
    assert len(server.received) == 1


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server_stopped.wait(0.05):
        handler.wfile.write(b"x")


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server_stopped.is_set():
        handler.wfile.write(bytes(2**20))


def half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"accuracy": 69')


@pytest.mark.parametrize(
    ("behaviour", "kept"), [(drip, b"xx"), (flood, bytes(100)), (half, b'{"accuracy": 69')]
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
    assert "if the server took it" in outcome.sentence


def test_a_server_without_tls_is_not_asked_again(saved):
    with Server(answer()) as server:
        outcome = send(saved, server.url.replace("http:", "https:"))
    assert "does this server want http:// instead?" in outcome.sentence
    assert not server.received


def test_a_proxy_that_is_not_there_is_named(saved, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert (
        "the proxy in http_proxy or https_proxy cannot be reached"
        in send(saved, "http://192.0.2.1/").sentence
    )


def test_without_a_server_it_is_only_saved(saved):
    outcome = send(saved, "")
    assert (outcome.word, outcome.failed) == ("saved", False)
    assert "set SERVER_URL or run\n    python -m retrieval.submission" in outcome.sentence


def test_a_reply_that_cannot_be_kept_hides_no_score(saved, caplog):
    os.mkdir(saved.with_name("reply.txt"))
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
    import requests

    def refuse(*_, **__):
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests.Session, "post", refuse)
    name = "class/a.jpg" if nested else "a.jpg"
    path = save_submission(make_submission({"q.jpg": [name]}, [name], "team"), tmp_path)
    send(path, url)
    assert ("knows base names only" in caplog.text) is (warned and nested)


# ---- python -m retrieval.submission


def test_a_saved_submission_is_sent_again_from_the_command_line(saved):
    with Server(answer()) as server:
        ended = run("-m", "retrieval.submission", saved, "--server_url", f" {server.url}", cwd=saved.parent)
    assert ended.returncode == 0, ended.stderr
    assert "the server's score: 698 of 1000" in ended.stdout
    assert "removed the blanks around the server's URL" in ended.stderr
    assert server.received[0][3] == saved.read_bytes()
    (line,) = (saved.parent / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"]["accuracy"] == 698.0


def test_a_failure_on_the_command_line_is_a_sentence_a_status_and_a_line_in_the_ledger(saved):
    with Server(answer(404, b"<h1>gone</h1>")) as server:
        ended = run("-m", "retrieval.submission", saved, cwd=saved.parent, SERVER_URL=server.url)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 3)
    assert ended.stderr.startswith("error: the server answered 404 Not Found: check the URL")
    (line,) = (saved.parent / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"]["status"] == 404
    ended = run("-m", "retrieval.submission", saved, cwd=saved.parent)
    assert ended.returncode == 2
    assert "give --server_url, or set SERVER_URL in .env" in ended.stderr

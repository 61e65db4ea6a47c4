"""Broken networks: a client that submits to a server that fails, at any moment and in any way.

    python -m tests.torture.network --seed 0 --minutes 1

Whatever happens, the outcome comes in time, the saved submission stays as it is, no other server gets it, and
no sentence says "was not sent" once a byte of the submission has reached a server.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import socket
import struct
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from retrieval.submission.client import MAYBE_COUNTED, NOTHING_SENT, REFUSED, send_submission
from tests.torture.campaign import run

SCORE = b'{"accuracy": 698.0}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SCORE)
ANSWER = HEAD + SCORE
ANSWER_SECONDS, RETRIES = 0.4, 1
LONGEST = (1 + RETRIES) * (2 * ANSWER_SECONDS + 1) + 3  # seconds; the machine may be busy
SECRETS = ("secret-token", "secret-password")


# ---- the moments: how much of the request is read, and how much of the answer is sent, before the fault

MOMENTS = {
    "before the request": (0.0, b""),
    "in the head of the request": (0.1, b""),
    "after the head of the request": (0.2, b""),
    "in the submission": (0.6, b""),
    "after the submission": (1.0, b""),
    "in the status line": (1.0, ANSWER[:7]),
    "after the status line": (1.0, ANSWER[: ANSWER.index(b"\n") + 1]),
    "in a header": (1.0, ANSWER[: ANSWER.index(b"\n") + 9]),
    "after the head": (1.0, HEAD),
    "in the score": (1.0, ANSWER[:-5]),
    "after the answer": (1.0, ANSWER),
}  # fmt: skip


# ---- the behaviours: what the server then does


def close(connection, rng, stopped):
    connection.close()


def reset(connection, rng, stopped):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hang(connection, rng, stopped):
    stopped.wait()


def drip(connection, rng, stopped):
    while not stopped.wait(0.03):
        connection.sendall(rng.choice([b"a", b" ", b":", b"\r\n"]))


def drip_headers(connection, rng, stopped):
    while not stopped.wait(0.03):
        connection.sendall(b"X-%d: y\r\n" % rng.randrange(10**6))


def flood(connection, rng, stopped):
    while not stopped.is_set():
        connection.sendall(rng.choice([b"a", b"\n", b"\0"]) * 2**16)


def babble(connection, rng, stopped):
    connection.sendall(rng.randbytes(rng.randrange(1, 2000)))
    connection.close()


def halt_writing(connection, rng, stopped):
    connection.shutdown(socket.SHUT_WR)
    stopped.wait()


def halt_reading(connection, rng, stopped):
    connection.shutdown(socket.SHUT_RD)
    stopped.wait()


BEHAVIOURS = {
    "close": close, "reset": reset, "hang": hang, "drip": drip, "drip headers": drip_headers,
    "flood": flood, "babble": babble, "halt writing": halt_writing, "halt reading": halt_reading,
}  # fmt: skip


# ---- whole answers that are wrong

OK = b"HTTP/1.1 200 OK\r\n"
CONTROL = b"\x1b[2J\x07\x9b31m"
ANSWERS = {
    "two lengths": OK + b"Content-Length: 19\r\nContent-Length: 5\r\n\r\n" + SCORE,
    "a length that is no number": OK + b"Content-Length: many\r\n\r\n" + SCORE,
    "a negative length": OK + b"Content-Length: -5\r\n\r\n" + SCORE,
    "a length beyond the answer": OK + b"Content-Length: 1000\r\n\r\n" + SCORE,
    "a length before its end": OK + b"Content-Length: 7\r\n\r\n" + SCORE,
    "an immense length": OK + b"Content-Length: 99999999999999999999\r\n\r\n" + SCORE,
    "no length": OK + b"\r\n" + SCORE,
    "a length and chunks": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n" + SCORE,
    "chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n13\r\n" + SCORE + b"\r\n0\r\n\r\n",
    "a chunk's length is no number": OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + SCORE,
    "a chunk's length is negative": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n" + SCORE,
    "a chunk is cut off": OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n" + SCORE,
    "an endless chunk's length": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 2**17,
    "an unknown encoding": OK + b"Transfer-Encoding: rot13\r\n\r\n" + SCORE,
    "gzip that is none": OK + b"Content-Encoding: gzip\r\nContent-Length: 19\r\n\r\n" + SCORE,
    "gzip that is cut off": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(SCORE)[:-9],
    "a bomb of gzip": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(2**26)),
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n" + SCORE,
    "HTTP/0.9": SCORE,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + SCORE,
    "no status": b"HTTP/1.1\r\n\r\n" + SCORE,
    "a status of 99": b"HTTP/1.1 99 Odd\r\n\r\n" + SCORE,
    "a status of 1000": b"HTTP/1.1 1000 Odd\r\n\r\n" + SCORE,
    "a status that is no number": b"HTTP/1.1 two OK\r\n\r\n" + SCORE,
    "a line of 100 kB": b"HTTP/1.1 200 " + b"a" * 10**5 + b"\r\n\r\n",
    "a header of 100 kB": OK + b"X: " + b"a" * 10**5 + b"\r\n\r\n" + SCORE,
    "200 headers": OK + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n" + SCORE,
    "a header without a colon": OK + b"what\r\nContent-Length: 19\r\n\r\n" + SCORE,
    "folded headers": OK + b"X: a\r\n b\r\nContent-Length: 19\r\n\r\n" + SCORE,
    "a nul in the head": OK + b"X: \0\r\nContent-Length: 19\r\n\r\n" + SCORE,
    "a reason of control characters": b"HTTP/1.1 400 " + CONTROL + b"\r\nContent-Length: 0\r\n\r\n",
    "a Location of control characters": b"HTTP/1.1 302 Found\r\nLocation: /" + CONTROL + b"\r\n\r\n",
    "a body of control characters": b"HTTP/1.1 400 No\r\n\r\n" + CONTROL * 99,
    "a mail of TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "100 Continue, then the score": b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + ANSWER,
    "early hints, then the score": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ANSWER,
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "a login": b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Negotiate, Digest x\r\n\r\n",
    "a proxy's login": b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
    "JSON that is cut off": OK + b'Content-Length: 15\r\n\r\n{"accuracy": 69',
    "JSON of another shape": OK + b"Content-Length: 7\r\n\r\n[1,2,3]",
    "JSON that is deep": OK + b"\r\n" + b"[" * 10**5,
    "a score that is no number": OK + b'\r\n{"accuracy": NaN}',
    "a score beyond all numbers": OK + b'\r\n{"accuracy": 1' + b"0" * 5000 + b"}",
    "two answers": ANSWER + ANSWER,
}
STATUSES = (300, 301, 302, 303, 307, 308, 500, 502, 503, 504)
TARGETS = {
    "to another host": "http://localhost:{other}/", "to another port": "http://127.0.0.1:{other}/",
    "to https": "https://127.0.0.1:{here}/x/", "to itself": "", "to its own path": "/x/",
    "to another scheme": "ftp://127.0.0.1/", "to a file": "file:///etc/passwd", "to no host": "http://",
    "to a broken URL": "http://[", "to a port that is none": "http://127.0.0.1:99999/",
    "to a password": "http://a:secret-password@localhost:{other}/",
}  # fmt: skip


def continue_for_ever(connection, rng, stopped):
    while not stopped.wait(0.03):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def drip_chunks(connection, rng, stopped):
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n" + rng.choice([b"", b"5;"]))
    drip(connection, rng, stopped)


def drip_gzip(connection, rng, stopped):
    connection.sendall(OK + b"Content-Encoding: gzip\r\n\r\n")
    for byte in gzip.compress(rng.randbytes(1000)):
        if stopped.wait(0.03):
            break
        connection.sendall(bytes([byte]))


def say(answer, connection, rng, stopped):
    connection.sendall(answer)
    connection.close()


# ---- the kinds of faults: a name → how much of the request is read, what is sent, and what follows

KINDS = {
    f"{behaviour} {moment}": (share, start, act)
    for moment, (share, start) in MOMENTS.items()
    for behaviour, act in BEHAVIOURS.items()
}
KINDS |= {f"answer: {name}": (1.0, b"", partial(say, answer)) for name, answer in ANSWERS.items()}
KINDS |= {
    f"answer {status} {name}":
        (1.0, f"HTTP/1.1 {status} Away\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode(), close)
    for status in STATUSES if status < 400
    for name, target in TARGETS.items()
}  # fmt: skip
KINDS |= {
    f"answer {status}": (1.0, f"HTTP/1.1 {status} Trouble\r\nContent-Length: 0\r\n\r\n".encode(), close)
    for status in STATUSES if status >= 400
}  # fmt: skip
KINDS |= {
    "100 Continue for ever": (1.0, b"", continue_for_ever),
    "chunks that drip": (1.0, b"", drip_chunks),
    "gzip that drips": (1.0, b"", drip_gzip),
    "no listener": (0.0, b"", None),
}


class FaultServer:
    """A server on loopback that treats every connection in the same way; it counts what has reached it.

    `submitted` are the bytes of bodies that it read, `connections` the connections that it took.
    """

    def __init__(self, share, start, act, rng):
        self.share, self.start, self.act, self.rng = share, start, act, rng
        self.stopped, self.submitted, self.connections = threading.Event(), 0, 0
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port = self.listening.getsockname()[1]
        self.threads = []

    def __enter__(self):
        if self.act is None:
            self.listening.close()
        else:
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for thread in self.threads:
            thread.join(10)

    def _accept(self):
        with suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                self.connections += 1
                self.threads.append(threading.Thread(target=self._serve, args=[connection], daemon=True))
                self.threads[-1].start()

    def _serve(self, connection):
        with suppress(OSError), closing(connection):
            connection.settimeout(2 * LONGEST)
            self._read(connection)
            connection.sendall(self.start)
            self.act(connection, self.rng, self.stopped)

    def _read(self, connection):
        """Read this share of the request: up to 0.1 a part of its head, up to 0.2 that, else the body too."""
        if not self.share:
            return
        head = b""
        while not head.endswith(b"\r\n\r\n") and not (self.share < 0.2 and len(head) > 40):
            byte = connection.recv(1)
            if not byte:
                return
            head += byte
        if self.share <= 0.2:
            return
        length = next(line[15:] for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        wanted = int(int(length) * self.share)
        while wanted > 0:
            part = connection.recv(min(wanted, 2**16))
            if not part:
                return
            self.submitted += len(part)
            wanted -= len(part)


# ---- a case


def attempt(kind, rng):
    """Submit to a server of this kind; return a sentence for each promise that did not hold."""
    share, start, act = KINDS[kind]
    queries = {f"q{n}.jpg": [f"g{rng.randrange(10**6)}-{k}.jpg" for k in range(10)]
               for n in range(rng.choice([1, 30, 1500]))}  # fmt: skip
    body = json.dumps({"groupname": "team", "images": queries}).encode()
    heard, told = logging.getLogger("retrieval.sending"), io.StringIO()
    handler = logging.StreamHandler(told)
    with (
        tempfile.TemporaryDirectory() as folder,
        FaultServer(1.0, ANSWER, close, rng) as other,
        FaultServer(share, start, act, rng) as server,
    ):
        server.start = start.replace(b"{other}", b"%d" % other.port).replace(b"{here}", b"%d" % server.port)
        path = Path(folder) / "submission.json"
        path.write_bytes(body)
        heard.addHandler(handler)
        began = time.monotonic()
        try:
            outcome = send_submission(path, f"http://user:secret-password@127.0.0.1:{server.port}/retrieval/",
                                      "secret-token", (1, ANSWER_SECONDS), RETRIES, 0.01)  # fmt: skip
        except BaseException as error:
            return [f"{type(error).__name__} was raised: {error}"]
        finally:
            heard.removeHandler(handler)
        seconds = time.monotonic() - began
        kept = path.read_bytes() == body
    return _broken_promises(outcome, told.getvalue(), server, other, seconds, kept)


def _broken_promises(outcome, told, server, other, seconds, kept):
    said = outcome.sentence + told
    fates = [fate for fate in (NOTHING_SENT, MAYBE_COUNTED, REFUSED) if fate in outcome.sentence]
    whole = server.start + getattr(server.act, "args", (b"",))[0]
    promises = {
        f"the outcome took {seconds:.1f} s": seconds <= LONGEST,
        "the saved submission has changed": kept,
        f"a failure has not one fate: {outcome.sentence}": len(fates) == outcome.failed,
        f"{server.submitted} bytes came, and yet: {NOTHING_SENT}":
            not (server.submitted and NOTHING_SENT in outcome.sentence),
        f"no server refused it, and yet: {outcome.sentence}":
            REFUSED not in fates or b" 30" in whole or b" 4" in whole,
        "a score was made up": outcome.accuracy is None or SCORE in whole or b"gzip" in whole,
        "another server got a connection": not other.connections,
        "a secret is shown": not any(secret in said for secret in SECRETS),
        "a control character is shown": all(c.isprintable() or c == "\n" for c in said),
    }  # fmt: skip
    return [sentence for sentence, holds in promises.items() if not holds]


if __name__ == "__main__":
    logging.getLogger("retrieval").propagate = False
    sys.exit(run("network", list(KINDS), attempt))

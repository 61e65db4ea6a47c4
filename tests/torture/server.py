"""Hostile clients: the evaluation server gets bodies, heads and names that nobody should send.

    python -m tests.torture.server --seed 0 --minutes 1

Whatever comes, every body gets a sentence or a score, the health page answers meanwhile, a right submission
is scored as always, and lookalikes of a name are one group.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import sys
import tempfile
import threading
import time
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import requests

from retrieval.server import connections, endpoint
from retrieval.server.answer_key import AnswerKey
from retrieval.server.group_names import folded
from retrieval.server.rules import Rules
from retrieval.server.serve import local_server
from tests.torture.campaign import run

KEY = AnswerKey(
    {f"q{n}.jpg": f"person {n % 50}" for n in range(300)},
    {f"g{n}.jpg": f"person {n % 50}" for n in range(1000)},
)
RIGHT = {query: [f"g{(n % 50) + 50 * k}.jpg" for k in range(10)] for n, query in enumerate(KEY.queries)}
LONGEST_HEALTH = 3  # seconds; the machine may be busy
GROUP = "Équipe Nº 7"


def submission(group="honest", images=None, **more):
    """Return a body."""
    return json.dumps({"groupname": group, "images": RIGHT if images is None else images} | more).encode()


# ---- bodies: a function of a random generator → bytes


def flipped(rng):
    body = bytearray(submission("flipped"))
    for _ in range(rng.randrange(1, 20)):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def wrong_names(rng):
    images = dict(RIGHT)
    for query in rng.sample(sorted(images), 20):
        names = images.pop(query)
        changed = [rng.choice(names), "../" + names[0], "\x1b[2J", "", "\ud800", "g1\\2.jpg", "q1.jpg"]
        images[rng.choice([query, query + " ", query.upper(), "a/" + query])] = rng.sample(changed, 5)
    return submission("wrong names", images)


def values(rng):
    kinds = [None, True, 0, -1, 1e308, "x", [], {}, [[]], {"a": []}, [1], "\0", "\ud800", 10**400]
    return json.dumps({"groupname": rng.choice(kinds), "images": rng.choice([*kinds, RIGHT])}).encode()


def many(start, part, end):
    """The body of as many parts as the limit lets through."""
    return lambda rng: start + part * ((KEY.most_bytes - 200) // len(part)) + end


BODIES = {
    "random bytes": lambda rng: rng.randbytes(rng.randrange(2000)),
    "cut off": lambda rng: submission("cut off")[: rng.randrange(9000)],
    "bits flipped": flipped,
    "wrong names": wrong_names,
    "wrong values": values,
    "deep": lambda rng: rng.choice([b"[", b'{"a":']) * rng.randrange(1, 20_000),
    "empty objects": many(b"[", b"{},", b"{}]"),
    "empty names": many(b'{"groupname":"a","images":{"q0.jpg":[', b'"",', b'""]}}'),
    "numbers": many(b"[", b"1e99,", b"1]"),
    "long numbers": many(b"[", b"9" * 4000 + b",", b"1]"),
    "one number": many(b"", b"9", b""),
    "one name": many(b'{"groupname":"a","images":{"', b"q", b'":[]}}'),
    "escapes": many(b'{"groupname":"a","images":{"', b"\\ud83d", b'":[]}}'),
    "one key": many(b"{", b'"a":1,', b'"a":1}'),
    "unknown queries":
        lambda rng: submission("unknown", {f"{n}": ["g1.jpg"] for n in range(rng.randrange(1, 3000))}),
    "unknown gallery":
        lambda rng: submission("unknown", {query: [f"{rng.random()}" for _ in range(10)] for query in RIGHT}),
    "too large": lambda rng: b" " * (KEY.most_bytes + rng.randrange(1, 2**21)),
    "blanks": many(b"", b" ", b"{}"),
    "a long group": lambda rng: submission("x" * rng.randrange(101, 10**4)),
    "an invisible group": lambda rng: submission("".join(rng.choices("\u200b\u3164 \u115f\ufe0f", k=5))),
    "another encoding": lambda rng: submission().decode().encode(rng.choice(["utf-16", "utf-8-sig"])),
}  # fmt: skip


def post(url, body):
    """POST a body; it must get a sentence or a score."""
    reply = requests.post(url, data=body, timeout=60)
    refused = reply.status_code in (413, 422) and reply.text
    if refused or (reply.status_code == 200 and "accuracy" in reply.json()):
        return []
    return [f"{reply.status_code} {reply.text[:200]}"]


# ---- clients: a function of a random generator → the parts that a connection sends, now and then


def head(length, more=b""):
    return b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n" % (length, more)


def chunked(*ends):
    """A body in chunks that ends as one of these."""
    start = b"POST /retrieval/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return lambda rng: [start + rng.choice(ends)]


def dripping(data):
    return lambda rng: [bytes([byte]) for byte in data]


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
CLIENTS = {
    "a half head": lambda rng: [head(5)[: rng.randrange(1, 60)]],
    "a head that drips": dripping(head(5, b"X-A: b\r\n" * 30)),
    "a head without end": lambda rng: [GET, *[b"X: " + b"y" * 2**14] * 50],
    "a half body": lambda rng: [head(9000) + submission()[: rng.randrange(9000)]],
    "a body that drips": dripping(head(500) + b"{" * 100),
    "odd chunks": chunked(b"xyz\r\n", b"-1\r\n", b"ffffffffffffffff\r\n", b"5;" + b"x" * 10**5),
    "odd trailers": chunked(b"2\r\n{}\r\n0\r\nX: y", b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 10**4 + b"\r\n"),
    "two lengths": lambda rng: [head(5, b"Content-Length: 9\r\n") + b"{}   "],
    "a length and chunks": lambda rng: [head(5, b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n" + GET],
    "many at once": lambda rng: [(head(2) + b"{}") * rng.randrange(2, 100)],
    "no reading": lambda rng: [GET + b"\r\n"] * 50,
    "babble": lambda rng: [rng.randbytes(rng.randrange(1, 5000))],
    "TLS": lambda rng: [b"\x16\x03\x01\x02\x00\x01\x00" + rng.randbytes(500)],
    "waiting": lambda rng: [b""] * 10,
    "expecting": lambda rng: [head(5, b"Expect: 100-continue\r\n")],
    "upgrading": lambda rng: [GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"],
}


def connect(url, parts, rng):
    """Let some clients send these parts, and then close or reset; the server must not mind."""
    place = urlsplit(url)
    count = rng.choice([1, 30])
    held = [socket.create_connection((place.hostname, place.port), timeout=5) for _ in range(count)]
    for part in parts:
        for connection in held:
            with suppress(OSError):  # the server has closed it
                connection.sendall(part)
        time.sleep(rng.choice([0, 0.01]))
    broken = health(url)
    for connection in held:
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return broken


# ---- lookalikes


def disguised(name, rng):
    """Return a name that looks like this one."""
    wide = {**{c: chr(ord(c) + 0xFEE0) for c in map(chr, range(33, 127))}, " ": "\u3000"}
    letters = []
    for letter in unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), name):
        shown = rng.choice([letter, letter.upper(), letter.lower(), wide.get(letter, letter)])
        letters.append(
            shown + rng.choice(["", "", "\u200b", "\u200d", "\u2060", "\u00ad", "\ufe0f", "\u034f"])
        )
    return rng.choice(["", " ", "\u200e"]) + "".join(letters) + rng.choice(["", "\u3000", "\u115f"])


def lookalike(url, rng):
    reply = requests.post(url, data=submission(disguised(GROUP, rng), n=rng.random()), timeout=60)
    told = reply.json().get("groupname")
    return [] if told == GROUP else [f"{reply.status_code} {told!r} instead of {GROUP}"]


# ---- a case


KINDS = [*(f"body: {name}" for name in BODIES), *(f"client: {name}" for name in CLIENTS), "lookalike"]


def health(url):
    began = time.monotonic()
    try:
        reply = requests.get(urlsplit(url)._replace(path="/healthz").geturl(), timeout=30)
    except requests.RequestException as error:
        return [f"no health: {error}"]
    seconds = time.monotonic() - began
    return (
        [] if reply.ok and seconds < LONGEST_HEALTH else [f"health: {reply.status_code} in {seconds:.1f} s"]
    )


def attempt(url, kind, rng):
    """Be a hostile client of this kind; return a sentence for each promise that did not hold."""
    what, _, name = kind.partition(": ")
    honest, ended, ill = f"honest {rng.getrandbits(64):x}", threading.Event(), []

    def _watch() -> None:
        while not ended.wait(0.1):
            ill.extend(health(url))

    watcher = threading.Thread(target=_watch)
    watcher.start()
    try:
        if what == "body":
            broken = post(url, BODIES[name](rng))
        elif what == "client":
            broken = connect(url, CLIENTS[name](rng), rng)
        else:
            broken = lookalike(url, rng)
        right = requests.post(url, data=submission(honest), timeout=60).json()
        board = requests.get(urlsplit(url)._replace(path="/leaderboard.csv").geturl(), timeout=60).text
    except (requests.RequestException, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        ended.set()
        watcher.join()
    groups = [line.split(",")[1] for line in board.splitlines()[1:]]
    promises = {
        f"a right submission got {right}": right.get("accuracy") == 1000.0,
        f"{honest} was answered and is not on the leaderboard": honest in groups,
        f"the first group is gone from the leaderboard: {groups}": GROUP in groups,
        f"lookalikes on the leaderboard: {groups}": len(set(map(folded, groups))) == len(groups),
    }
    return broken + ill + [sentence for sentence, holds in promises.items() if not holds]


@contextmanager
def patient_server():
    """Run a server whose limits of time are a second, for as long as a `with` block lasts; yield its URL."""
    before = endpoint.SECONDS_FOR_A_BODY, connections.SECONDS_FOR_A_HEAD, endpoint.MOST_REFUSED
    endpoint.SECONDS_FOR_A_BODY, connections.SECONDS_FOR_A_HEAD, endpoint.MOST_REFUSED = 1, 1, 10**9
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            local_server(KEY, Path(folder) / "c.sqlite", Rules(per_minute=10**9)) as url,
        ):
            requests.post(url, data=submission(GROUP), timeout=60)
            yield url
    finally:
        endpoint.SECONDS_FOR_A_BODY, connections.SECONDS_FOR_A_HEAD, endpoint.MOST_REFUSED = before


def main():
    logging.getLogger("retrieval").propagate = False
    with patient_server() as url:
        return run("server", KINDS, lambda kind, rng: attempt(url, kind, rng))


if __name__ == "__main__":
    sys.exit(main())

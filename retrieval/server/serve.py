"""Labelled folders in; the evaluation server of a competition, with its leaderboard, out.

    python -m retrieval.server --query_dir data/test/query --gallery_dir data/test/gallery --port 3001

It answers as the competition's server does: POST /retrieval/ with {"groupname": …, "images": {query: names}}
gives the score. GET / is the leaderboard, /submissions/GROUP a group's history, /leaderboard.csv the table,
/healthz says that it runs, /docs describes all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrieval.errors import InputError, RunError
from retrieval.server.database import Database
from retrieval.server.scoring import AnswerKey, Rules, read_pairs

if TYPE_CHECKING:
    import uvicorn

LONGEST_START, LONGEST_END = 10, 10  # seconds

log = logging.getLogger("retrieval.server")


def public_queries(key: AnswerKey, share: float, seed: int) -> tuple[str, ...]:
    """A seeded share of the queries, one at least."""
    names = sorted(key.queries)
    count = max(1, round(share * len(names)))
    return tuple(names[row] for row in np.sort(np.random.default_rng(seed).permutation(len(names))[:count]))


def digest_of(key: AnswerKey, public: tuple[str, ...] | None) -> str:
    """One short word for the answers: scores to different ones do not belong on one leaderboard."""
    told = json.dumps([key.queries, key.gallery, public], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_tokens(table: Path) -> dict[str, str]:
    """The token of each group, from a CSV table of lines `group,token`. Raises InputError for another one."""
    tokens: dict[str, str] = {}
    for where, (group, token) in read_pairs(table, "group", "token"):
        if group in tokens:
            raise InputError(f"{where}: {group} has a token on an earlier line")
        if not token.isascii() or not token.isprintable():  # no header could hold it
            raise InputError(f"{where}: the token of {group} is not of ASCII letters, digits and signs")
        tokens[group] = token
    return tokens


# ---- serve ----------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises RunError where there is none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: of no name that a machine can have
        cause = (getattr(error, "strerror", None) or str(error)).lower()
        raise RunError(
            f"the server cannot listen on {host}:{port} ({cause}): give another --port, or --host"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a browser finds it: by this machine's name, if it listens at every address."""
    host, port = listening.getsockname()[:2]
    host = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/"


def make_server(key: AnswerKey, database: Database, rules: Rules) -> uvicorn.Server:
    """A server that is ready to run on a listening socket."""
    import uvicorn

    from retrieval.server.app import make_app

    config = uvicorn.Config(
        make_app(key, database, rules), log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=15, timeout_graceful_shutdown=LONGEST_END, backlog=2048,
    )  # fmt: skip
    return uvicorn.Server(config)


@contextmanager
def local_server(key: AnswerKey, database: Path, rules: Rules | None = None) -> Iterator[str]:
    """The same server on a free loopback port, in a thread, while a `with` lasts; its URL.

    Raises RunError where it does not start.
    """
    rules = rules or Rules()
    kept = Database(database, digest_of(key, rules.public))
    listening = listen("127.0.0.1", 0)
    server = make_server(key, kept, rules)
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + LONGEST_START
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RunError(
                    "the local server does not start: give the URL of another one, or --custom_dataset"
                )
            time.sleep(0.01)
        yield f"{url_of(listening)}retrieval/"
    finally:
        server.should_exit = True
        thread.join(LONGEST_END)
        kept.close()
        listening.close()

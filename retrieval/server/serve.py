"""An answer key, a database and the rules in; a running evaluation server, and its URL, out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.errors import RunError
from retrieval.server.answer_key import AnswerKey
from retrieval.server.database import Database
from retrieval.server.rules import Rules

if TYPE_CHECKING:
    import uvicorn

LONGEST_END = 10  # seconds


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free port. Raises RunError if none can be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: no machine can have this name
        cause = (getattr(error, "strerror", None) or str(error)).lower()
        raise RunError(
            f"the server cannot listen on {host}:{port} ({cause}): give another --port, or --host"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL for a browser: with this machine's name, if the socket listens at every address."""
    host, port = listening.getsockname()[:2]
    host = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/"


def make_server(key: AnswerKey, database: Database, rules: Rules) -> uvicorn.Server:
    """Return a server that is ready to run on a listening socket. It ends if the database loses its file."""
    import uvicorn

    from retrieval.server.app import make_app
    from retrieval.server.connections import TimedProtocol

    async def look_after_the_database() -> None:
        server.should_exit = server.should_exit or not database.in_place()

    config = uvicorn.Config(
        make_app(key, database, rules), http=TimedProtocol, log_config=None, access_log=False,
        server_header=False, proxy_headers=bool(rules.behind_proxy), forwarded_allow_ips=rules.behind_proxy,
        timeout_graceful_shutdown=LONGEST_END, backlog=2048,
        callback_notify=look_after_the_database, timeout_notify=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    return server


@contextmanager
def local_server(key: AnswerKey, database: Path, rules: Rules | None = None) -> Iterator[str]:
    """Run the server in a thread, on a free loopback port, for the length of a `with`; yield its URL.

    The socket listens already, so a submission that comes before the server has started waits for it.
    """
    rules = rules or Rules()
    stored = Database(database, key.digest(rules.public))
    listening = listen("127.0.0.1", 0)
    server = make_server(key, stored, rules)
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    try:
        yield f"{url_of(listening)}retrieval/"
    finally:
        server.should_exit = True
        thread.join(LONGEST_END)
        stored.close()
        listening.close()

"""Seconds in; an HTTP session out, none of whose connections lasts longer."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool


class Deadline:
    """A session whose connections are shut `seconds` after they were made, inside a `with` block.

    The timeout of requests starts anew with every byte, also while http.client reads the head of an answer,
    where no caller can look at the clock. A timer that shuts the socket ends any wait on it, in any layer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed = seconds, False
        self.timers: list[threading.Timer] = []

    def __enter__(self) -> Self:
        self.session = requests.Session()
        self.session.get_redirect_target = lambda response: None  # its caller judges where to go
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _TimedAdapter(self))
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self.timers:
            timer.cancel()
        self.session.close()

    def start(self, connected: socket.socket) -> None:
        """Shut this socket when the time is over."""
        timer = threading.Timer(self.seconds, self._shut, [connected])
        timer.daemon = True
        timer.start()
        self.timers.append(timer)

    def _shut(self, connected: socket.socket) -> None:
        self.passed = True
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # below TLS, which another thread may be in


class _TimedAdapter(HTTPAdapter):
    """Starts a deadline's timer for each connection that it makes."""

    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def get_connection_with_tls_context(self, *given: Any, **options: Any) -> HTTPConnectionPool:
        """Return the pool that requests would, whose connections are timed."""
        pool = super().get_connection_with_tls_context(*given, **options)
        deadline = self.deadline

        class Timed(pool.ConnectionCls):
            """A connection of the pool's kind, timed."""

            def _new_conn(self) -> socket.socket:
                """Connect as urllib3 does, and start the timer before a proxy or TLS is spoken to."""
                self.plain = super()._new_conn()
                deadline.start(self.plain)
                return self.plain

            def connect(self) -> None:
                """Connect as urllib3 does; time the socket of TLS, too, which replaces the first."""
                super().connect()
                if self.sock is not self.plain:
                    deadline.start(self.sock)

        pool.ConnectionCls = Timed
        return pool

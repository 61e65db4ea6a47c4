"""The limits of a connection that uvicorn lacks: its seconds, the bytes of a head, and their number."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SECONDS_FOR_A_HEAD = 15  # from the connection, or from the previous answer, to the end of a request's head
SECONDS_FOR_AN_ANSWER = 120  # from there to the last byte of the answer, however slowly it is read
MOST_BYTES_OF_A_HEAD = 2**16
MOST_CONNECTIONS = 500  # Linux gives a process 1024 open files
FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class TimedProtocol(HttpToolsProtocol):
    """A connection of uvicorn's that ends where its client takes too long, in every phase of a request.

    uvicorn has no option for it: it waits without end for the head of a request, which it keeps in memory,
    and for a client that does not read its answer.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.timer: asyncio.TimerHandle | None = None
        self.head: int | None = 0  # its bytes so far; None once it is complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Refuse the connection if there are too many; otherwise wait for a head."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(FULL)
            transport.close()
        self._end_after(SECONDS_FOR_A_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self.timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; end the connection if a head grows too long."""
        super().data_received(data)
        if self.head is not None:
            self.head += len(data)
            if self.head > MOST_BYTES_OF_A_HEAD:
                self._end()

    def on_headers_complete(self) -> None:
        """Begin to answer; end the connection if the request before has no answer yet, as from no browser."""
        if self.cycle and not self.cycle.response_complete:
            self._end()
            return
        self.head = None
        self._end_after(SECONDS_FOR_AN_ANSWER)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next head, and longer if the answer still has to be read."""
        super().on_response_complete()
        self.head = 0
        unread = self.transport.get_write_buffer_size()
        self._end_after(SECONDS_FOR_AN_ANSWER if unread else SECONDS_FOR_A_HEAD)

    def _end_after(self, seconds: float) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        if self.cycle:
            self.cycle.disconnected = True  # otherwise it would write to the connection that has ended
        self.transport.abort()

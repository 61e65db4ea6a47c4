"""A function that draws an answer in; the answer, drawn no more often than it must be, out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastapi import Response

SLOW = 0.3  # seconds
AGES = 10  # times as long as drawing takes, a slow answer stays


class Kept:
    """An answer that a hall full of browsers asks for: drawn once for each state, and by one thread only.

    If drawing takes more than SLOW seconds, the answer stays for AGES times as long, whatever the state is.
    """

    def __init__(self, draw: Callable[[], Response]) -> None:
        self.draw, self.lock = draw, threading.Lock()
        self.answer: Response | None = None
        self.state: object = None
        self.until = 0.0  # by the monotonic clock

    def at(self, state: object) -> Response:
        """Return the answer that was drawn for this state, or shortly before."""
        with self.lock:
            began = time.monotonic()
            if self.answer is None or (state != self.state and began >= self.until):
                self.answer, self.state = self.draw(), state
                took = time.monotonic() - began
                self.until = began + AGES * took if took > SLOW else began
            return self.answer

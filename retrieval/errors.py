"""The errors that end a command: each with a sentence for the user, and with an exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 3  # names in a sentence
SOCKS = (
    "a SOCKS proxy is set in the environment: `pip install pysocks socksio`, or unset ALL_PROXY, HTTPS_PROXY "
    "and HTTP_PROXY to go without it"
)


class InputError(ValueError):
    """The user's input cannot be used: the sentence says what, where and what to do. Exit status 2."""


class RunError(RuntimeError):
    """Something outside failed, such as the server: the sentence says what to do. Exit status 1."""


class NotDownloadedError(RunError):
    """A file of weights is not on this machine, and could not be downloaded. Exit status 1."""


class OthersEndedError(BaseException):
    """Another process of this run has ended, so this one ends too. Exit status 1.

    Like KeyboardInterrupt, it is no Exception, so that no `except Exception` catches it.
    """


class StopError(BaseException):
    """The command ends now, with this exit status; the reason has been logged."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def printable(text: str) -> str:
    """Escape what moves a terminal's cursor, reverses the writing, or is half a surrogate pair.

    Text of others passes through it before it stands in a sentence.

    >>> printable("No\\x1b[2J")
    'No\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(what: str, names: list[str]) -> str:
    """Return what these names are, how many there are, and the first few.

    >>> listed("unknown queries", ["a", "b", "c", "d"])
    'unknown queries: 4 (a, b, c, …)'
    """
    shown = ", ".join(printable(name if len(name) <= 60 else f"{name[:59]}…") for name in names[:SHOWN])
    return f"{what}: {len(names)} ({shown}{', …' * (len(names) > SHOWN)})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known name most like it, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

"""The errors that end a script with a sentence, and with which exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used: the sentence says what, where and what to do. Exit status 2."""


class RunError(RuntimeError):
    """Something outside failed, such as the server: the sentence says what to do. Exit status 1."""


class OthersEndedError(BaseException):
    """Another process of this run has ended, so this one does: no Exception, as Ctrl-C is none. Status 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that is like it, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

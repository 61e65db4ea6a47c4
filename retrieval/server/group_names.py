"""The name of a group in; the same text for every name that looks like it out."""

from __future__ import annotations

import re
import unicodedata

# Marks and letters that show nothing: the grapheme joiner, fillers, and selectors of a variant.
UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)


def folded(name: str) -> str:
    """Return what all lookalikes of a name share, however they write case, width, accents and blanks.

    Letters of different alphabets stay different: a Cyrillic а is no Latin a.

    >>> folded("Ｔeam\\u200b  A") == folded("team a") == "team a"
    True
    """
    text = name
    for _ in range(2):  # composing letters may bring out others that fold
        seen = "".join(c for c in UNSEEN.sub("", text) if unicodedata.category(c) != "Cf")
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    return " ".join(text.split())

"""The text of a setting in; the numbers and names that it is made of out.

Each function raises ValueError with what to write, where the text is something else.
"""

from __future__ import annotations

import re

NUMBER = r"\d+(?:\.\d+)?"


def expansion_of(text: str) -> tuple[int, float]:
    """Read N:ALPHA, neighbours and the exponent of their weights. Raises ValueError for anything else.

    >>> expansion_of("5:3")
    (5, 3.0)
    """
    found = re.fullmatch(rf"([1-9]\d*):({NUMBER})", text)
    if not found:
        raise ValueError("write N:ALPHA, such as 5:3: neighbours, and the exponent of their cosines")
    return int(found[1]), float(found[2])


def reciprocal_of(text: str) -> tuple[int, int, float]:
    """Read k-reciprocal:K1,K2,LAMBDA; K1, K2 and LAMBDA have defaults. Raises ValueError for anything else.

    >>> reciprocal_of("k-reciprocal")
    (20, 6, 0.3)
    """
    found = re.fullmatch(rf"k-reciprocal(?::([1-9]\d*),([1-9]\d*),({NUMBER}))?", text)
    if not found or float(found[3] or 0) > 1:
        raise ValueError(
            "write k-reciprocal, or k-reciprocal:20,6,0.3 with other numbers: neighbours, neighbours of the "
            "local expansion, and the weight of the cosine's distance, 0 to 1"
        )
    return (int(found[1]), int(found[2]), float(found[3])) if found[1] else (20, 6, 0.3)


def fused_of(text: str) -> tuple[str, str, float]:
    """Read MODEL=SHARE or MODEL@CROP=SHARE; the crop is auto by default. Raises ValueError for anything else.

    >>> fused_of("clip@loose=0.3")
    ('clip', 'loose', 0.3)
    """
    found = re.fullmatch(rf"([^@=\s]+)(?:@(\w+))?=({NUMBER})", text)
    if not found or not float(found[3]):
        raise ValueError("write MODEL=SHARE or MODEL@CROP=SHARE with a share above 0, such as clip@loose=0.3")
    return found[1], found[2] or "auto", float(found[3])


def shares_of(fuse: list[str]) -> list[float]:
    """Return the share of the run's own network, and those of the networks of --fuse; they add up to 1.

    Raises ValueError if nothing is left for the run's own network.

    >>> shares_of(["clip@loose=0.3", "facenet=0.2"])
    [0.5, 0.3, 0.2]
    """
    others = [fused_of(text)[2] for text in fuse]
    own = round(1 - sum(others), 9)
    if own <= 0:
        raise ValueError("the shares add up to 1 or more: leave a part for the run's own network")
    return [own, *others]

"""The results that the campaigns of tests/torture wrote in; the table of docs/guarantees.md, out.

make torture MINUTES=10 && python -m docs.guarantees

A campaign that has not come to its end keeps the row that it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "guarantees.md", ROOT / "results" / "torture"


class Promise(NamedTuple):
    """What a campaign tries to break, and what nobody promises."""

    text: str
    tried: str
    not_promised: str


PROMISES = {
    "images": Promise(
        "An image is read, or refused with one printable sentence, and changes no other image of its batch",
        "every format and mode that Pillow writes, cut at 64 places, with flipped bits, broken metadata, "
        "bombs, odd names, and files that vanish or change",
        "what a damaged image shows; vulnerabilities of the decoders' own C code",
    ),
    "weights": Promise(
        "A file of weights loads, or is refused with one printable sentence, in bounded time, and runs no "
        "code; its tensors fit into half of the memory",
        "state dicts, checkpoints, pickles, safetensors and ONNX files that are flipped, cut, spliced, hold "
        "themselves, unpack to more than the memory or carry hostile names",
        "that a stranger's network does what its name says; pickles that compute large values",
    ),
    "archives": Promise(
        "An archive of a data set is laid out whole, or refused with a sentence, and writes nothing outside "
        "its folder",
        "zip, tar, gzip and xz that are flipped, cut, full of links, climbing names, duplicates and bombs",
        "an archive of many gigabytes is unpacked once to be listed, which takes its time",
    ),
    "cache": Promise(
        "A damaged cache changes no bit of a vector",
        "wrong values in rows, flipped bits of the database and of exported networks, planted files",
        "a cache that somebody changed together with its checksums",
    ),
    "network": Promise(
        "A failed send leaves the submission on the disk and says rightly whether it may have been counted, "
        "in time; the token goes nowhere else",
        "servers that close, reset, hang, drip, redirect or babble at eleven moments of a request",
        "that a submission which may have been counted was",
    ),
    "server": Promise(
        "The server answers everybody else meanwhile, and loses no submission that it answered",
        "hostile bodies, heads and names, slow and broken clients, floods of connections, lookalike groups",
        "a flood from many machines: that is a proxy's work",
    ),
    "runs": Promise(
        "Killed, out of disk or run twice, a run leaves an old or a new submission, whole; the next one, "
        "also on other cores or batches, gives the same bytes, and a training resumes to the same weights",
        "SIGKILL at any moment of a run's or a training's processor time, small disks for results and cache "
        "(as root), two runs at once, weights that are no numbers, other batch sizes, threads, processes and "
        "states of the cache",
        "the same bits on another kind of processor or with another version of torch",
    ),
}


def row(name: str, result: str) -> str:
    """Return the row of a campaign with what its last run found."""
    text, tried, not_promised = PROMISES[name]
    return f"| {text} | `{name}`: {tried} | {result} | {not_promised} |"


def page(before: str, results: dict[str, str]) -> str:
    """Return the page with new results in the rows of the campaigns that have one."""
    rows = []
    for line in before.splitlines():
        name = next((name for name in PROMISES if f"| `{name}`: " in line), "")
        if name:
            line = row(name, results.get(name, line.split(" | ")[2]))
        rows.append(line)
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    files = {name: RESULTS / f"{name}.txt" for name in PROMISES}
    results = {name: file.read_text() for name, file in files.items() if file.exists()}
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")

"""The lines that the campaigns of tests/torture wrote in; the table of docs/guarantees.md, out.

make torture MINUTES=10 && python -m docs.guarantees

A campaign that has not run keeps the row that it has.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE, LINES = ROOT / "docs" / "guarantees.md", ROOT / "results" / "torture"


class Promise(NamedTuple):
    """What a campaign tries to break, and what nobody promises."""

    text: str
    tried: str
    not_promised: str


PROMISES = {
    "images": Promise(
        "An image is read, or refused with a sentence; none takes the machine's memory, starts a program or "
        "harms another image",
        "every format and mode that Pillow writes, cut at 64 places, with flipped bits, broken metadata, "
        "bombs, odd names, and files that vanish or change",
        "what a damaged image shows; holes in the decoders' own C code",
    ),
    "weights": Promise(
        "A file of weights loads, or is refused with a sentence, in bounded time and memory, and runs no "
        "code",
        "state dicts, checkpoints, pickles, safetensors and ONNX files that are flipped, cut, spliced, hold "
        "themselves, unpack to gigabytes or carry hostile names",
        "that a stranger's network does what its name says",
    ),
    "archives": Promise(
        "An archive of a data set is laid out whole, or refused with a sentence, and writes nothing outside "
        "its folder",
        "zip, tar, gzip and xz that are flipped, cut, full of links, climbing names, duplicates and bombs",
        "",
    ),
    "cache": Promise(
        "A damaged cache changes no bit of a vector",
        "wrong values in every column, flipped bits of the database and of exported networks, planted files",
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
        "SIGKILL at any moment of a run's or a training's processor time, small disks for results and cache, "
        "two runs at once, weights that are no numbers, other batch sizes, threads, processes and states of "
        "the cache",
        "the same bits on another kind of processor or with another version of torch",
    ),
}


def row(name: str, result: str) -> str:
    """Return the row of a campaign with what its last run found."""
    text, tried, not_promised = PROMISES[name]
    return f"| {text} | `{name}`: {tried} | {result} | {not_promised} |"


def result_of(lines: list[dict[str, object]], day: date) -> str:
    """Return the number of cases and of failures, with the seed and the day.

    >>> result_of([{"seed": 3, "failed": False}, {"seed": 3, "failed": True}], date(2026, 11, 27))
    '2 cases, 1 failed (seed 3, 2026-11-27)'
    """
    failed = sum(line["failed"] for line in lines)
    return f"{len(lines)} cases, {failed} failed (seed {lines[0]['seed']}, {day})"


def page(before: str, lines_of: dict[str, list[dict[str, object]]], day: date) -> str:
    """Return the page with new results in the rows of the campaigns that have lines."""
    rows = []
    for line in before.splitlines():
        name = next((name for name in PROMISES if f"| `{name}`: " in line), "")
        if name:
            old = line.split(" | ")[2]
            line = row(name, result_of(lines_of[name], day) if lines_of.get(name) else old)
        rows.append(line)
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    found = {
        name: [json.loads(line) for line in (LINES / f"{name}.jsonl").read_text().splitlines()]
        for name in PROMISES
        if (LINES / f"{name}.jsonl").exists()
    }
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found, date.today()), encoding="utf-8")

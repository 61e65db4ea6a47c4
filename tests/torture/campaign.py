"""Cases, and what tries them, in; a line for each case, and the failures, out."""

from __future__ import annotations

import argparse
import atexit
import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]  # "case" names what was tried, "failed" says whether a promise did not hold


def run(name: str, kinds: Sequence[str], attempt: Callable[[str, random.Random], list[str]]) -> int:
    """Try the kinds one after the other, again and again, for as long as the command line says.

    `attempt(kind, rng)` returns a sentence for each promise that did not hold. Every case has a generator of
    its own, made of the seed and the case's number: --seed S --first N --minutes 0 repeats the case N alone.
    Returns the exit status.
    """
    parser = _parser(name)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()

    def _outcomes() -> Iterator[Outcome]:
        end, number = time.monotonic() + 60 * given.minutes, given.first
        while number == given.first or time.monotonic() < end:
            kind, started = kinds[number % len(kinds)], time.monotonic()
            try:
                broken = attempt(kind, random.Random(f"{given.seed} {number}"))
            except Exception as error:
                broken = [f"{type(error).__name__}: {error}"]
            took = round(time.monotonic() - started, 2)
            yield {
                "number": number,
                "case": kind,
                "failed": bool(broken),
                "broken": broken,
                "seconds": took,
            }
            number += 1

    return _record(name, given, _outcomes())


def run_generated(name: str, campaign: Callable[[int, float, Path], Iterator[Outcome]]) -> int:
    """Run a campaign that yields outcomes from a seed, minutes and a folder; return the exit status."""
    given = _parser(name).parse_args()
    warnings.simplefilter("ignore")  # Pillow's, of broken metadata
    with tempfile.TemporaryDirectory() as folder:
        return _record(name, given, campaign(given.seed, given.minutes, Path(folder)))


def temporary() -> Path:
    """Make a folder that is deleted when the campaign ends."""
    folder = Path(tempfile.mkdtemp(prefix="torture_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m tests.torture.{name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/torture"), help="folder of the lines")
    return parser


def _record(name: str, given: argparse.Namespace, outcomes: Iterator[Outcome]) -> int:
    """Write a line for each outcome, and the result; print the failures, and return the exit status."""
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}.txt").unlink(missing_ok=True)
    count = failed = 0
    with open(given.out / f"{name}.jsonl", "w", encoding="utf-8") as lines:
        for outcome in outcomes:
            line = json.dumps({"seed": given.seed} | outcome)
            print(line, file=lines, flush=True)
            if outcome["failed"]:
                print(line, flush=True)
            count, failed = count + 1, failed + outcome["failed"]
    text = f"{count} cases, {failed} failed (seed {given.seed}, {date.today()})"
    (given.out / f"{name}.txt").write_text(text)  # so that a campaign that was cut off has no result
    print(f"{name}: {text}")
    return int(bool(failed))

"""Kinds of cases, and a function that tries one, in; a line for each case, and the failures, out."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 60


def run(name: str, kinds: Sequence[str], attempt: Callable[[str, random.Random], list[str]]) -> int:
    """Try the kinds one after the other, again and again, for as long as the command line says.

    `attempt(kind, rng)` returns a sentence for each promise that did not hold. Every case has a generator of
    its own, made of the seed and the case's number: --seed S --first N --minutes 0 repeats the case N alone.
    Prints each failure and the count of cases, writes a line a case to --out, and returns the exit status.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.torture.{name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, default=Path("results/torture"), help="folder of the lines")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end, number, failed = time.monotonic() + SECONDS * given.minutes, given.first, 0
    with open(given.out / f"{name}.jsonl", "w") as lines:
        while number == given.first or time.monotonic() < end:
            kind, started = kinds[number % len(kinds)], time.monotonic()
            broken = attempt(kind, random.Random(f"{given.seed} {number}"))
            case = {"case": number, "seed": given.seed, "kind": kind, "broken": broken}
            lines.write(json.dumps(case | {"seconds": round(time.monotonic() - started, 2)}) + "\n")
            lines.flush()
            if broken:
                failed += 1
                print(f"case {number}, {kind}: {'; '.join(broken)}")
            number += 1
    cases = number - given.first
    print(f"{name}: {cases} cases of {min(cases, len(kinds))} kinds, {failed} failed (seed {given.seed})")
    return 1 if failed else 0

"""A comparison with another program runs, with both in this environment, and both find the same."""

import re
import subprocess
import sys

from conftest import ROOT


def test_a_first_run_is_compared(few):
    flags = ["--peers", sys.executable, "--rows", "timm", "--pairs", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "first_run.py", few / "query", few / "gallery", *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.search(
        r"timm: theirs .* ratio [\d.]+; top-1 ([\d.]+) and \1, top-10 ([\d.]+) and \2,", ended.stdout
    )
    assert re.search(r"timm: n = 1: theirs / ours [\d.]+", ended.stdout)


def test_an_unknown_row_is_refused(few):
    flags = ["--peers", sys.executable, "--rows", "nobody"]
    command = [sys.executable, ROOT / "benchmarks" / "first_run.py", few / "query", few / "gallery", *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "there is no row nobody" in ended.stderr

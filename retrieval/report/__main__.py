"""Compare the runs in the ledgers of some folders.

python -m retrieval.report results results/earlier_day
"""

from __future__ import annotations

import logging

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from pydantic_settings import CliPositionalArg

from retrieval.forms import Form
from retrieval.settings import FileOrFolder

log = logging.getLogger("retrieval.report")


class Settings(Form):
    """Compare the runs in the ledgers of these folders."""

    folders: CliPositionalArg[list[FileOrFolder]]
    """folders that hold a runs.jsonl, at any depth, or such files"""


def main(form: Settings) -> None:
    from retrieval.report.comparison import compare_ledgers

    log.info("wrote %s", compare_ledgers(form.folders))


if __name__ == "__main__":
    run_script(main, Settings)

"""Compare the runs in the ledgers of some folders.

python -m retrieval.report results results/earlier_day
"""

from __future__ import annotations

import logging

from pydantic_settings import CliPositionalArg

from retrieval import settings
from retrieval.console import run_script
from retrieval.report.comparison import compare_ledgers

log = logging.getLogger("retrieval.report")


class Settings(settings.Form):
    """Compare the runs in the ledgers of these folders."""

    folders: CliPositionalArg[list[settings.FileOrFolder]]


def main(form: Settings) -> None:
    log.info("wrote %s", compare_ledgers(form.folders))


if __name__ == "__main__":
    run_script(main, Settings)

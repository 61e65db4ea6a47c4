"""Send a saved submission (again).

python -m retrieval.submission results/submission.json
"""

from __future__ import annotations

from pathlib import Path

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from pydantic_settings import CliPositionalArg

from retrieval.errors import InputError
from retrieval.forms import Form
from retrieval.run import append_line, log_outcome, set_aside, stop_if_failed
from retrieval.settings import LOCAL, GroupToken, ServerUrl
from retrieval.submission.client import send_submission
from retrieval.submission.submission_file import read_submission


class Settings(Form):
    """Send a saved submission (again)."""

    submission: CliPositionalArg[Path]
    """saved submission.json"""
    server_url: ServerUrl = ""
    """URL to submit to, such as http://10.0.0.7:3001/retrieval/"""
    group_token: GroupToken = GroupToken("")
    """token of your group, if the server asks for one"""


def main(settings: Settings) -> None:
    if not settings.server_url:
        raise InputError("there is no server to send it to: give --server_url, or set SERVER_URL in .env")
    if settings.server_url == LOCAL:
        raise InputError("a server of its own is started by the scripts that have the images: give a URL")
    submission = read_submission(settings.submission)  # raises InputError for one that no server can score
    set_aside(settings.submission.parent, ("reply.txt",))  # the last reply
    token = settings.group_token.get_secret_value()
    outcome = send_submission(settings.submission, settings.server_url, token)
    log_outcome(outcome)
    append_line(settings.submission.parent, settings, outcome, group_name=submission["groupname"])
    stop_if_failed(outcome)


if __name__ == "__main__":
    run_script(main, Settings)

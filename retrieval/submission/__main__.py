"""Send a saved submission (again), or check it.

python -m retrieval.submission results/submission.json --group_name "Team AAA"
python -m retrieval.submission --check results/submission.json --query_dir data/day/test/query \\
    --gallery_dir data/day/test/gallery
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from pydantic_settings import CliPositionalArg

from get_images import find_query_and_gallery
from retrieval.errors import InputError, StopError
from retrieval.forms import Form
from retrieval.run import log_outcome, set_aside, stop_if_failed
from retrieval.settings import LOCAL, GroupName, GroupToken, NewFolder, ServerUrl
from retrieval.submission.client import send_submission
from retrieval.submission.protocol import NAMES_PER_QUERY
from retrieval.submission.resending import record_outcome, rename_group
from retrieval.submission.submission_file import faults_of, read_json, read_submission

log = logging.getLogger("retrieval.submission")


class Settings(Form):
    """Send a saved submission (again), or check it."""

    flags_only: ClassVar[tuple[str, ...]] = ("group_name",)  # the file's own wins over that in .env

    submission: CliPositionalArg[Path]
    """saved submission.json"""
    server_url: ServerUrl = ""
    """URL to submit to, such as http://10.0.0.7:3001/retrieval/"""
    group_name: GroupName | None = None
    """name of your group, which replaces the one in the file (default: the one in the file)"""
    group_token: GroupToken = GroupToken("")
    """token of your group, if the server asks for one"""
    check: bool = False
    """send nothing, and say whether the file fits the images of --query_dir and --gallery_dir"""
    query_dir: NewFolder = Path("data/test/query")
    """folder of the query images, for --check"""
    gallery_dir: NewFolder = Path("data/test/gallery")
    """folder of the gallery images, for --check"""


def main(settings: Settings) -> None:
    if settings.check:
        check(settings.submission, settings.query_dir, settings.gallery_dir)
        return
    if not settings.server_url:
        raise InputError("there is no server to send it to: give --server_url, or set SERVER_URL in .env")
    if settings.server_url == LOCAL:
        raise InputError("a server of its own is started by the scripts that have the images: give a URL")
    path = settings.submission
    submission = read_submission(path)  # raises InputError for one that no server can score
    if settings.group_name:
        submission = rename_group(path, submission, settings.group_name)
    set_aside(path.parent, ("reply.txt",))  # the last reply
    outcome = send_submission(path, settings.server_url, settings.group_token.get_secret_value())
    log_outcome(outcome)
    record_outcome(path, submission, settings, outcome)
    stop_if_failed(outcome)


def check(path: Path, query_dir: Path, gallery_dir: Path) -> None:
    """Log that a file can be sent for the images of these folders, or else what is wrong with it.

    Raises StopError with status 1 for a fault, and what find_images raises.
    """
    queries, gallery = find_query_and_gallery(query_dir, gallery_dir)
    try:
        submission = read_json(path)
    except InputError as error:
        faults = [str(error)]
    else:
        found = faults_of(submission, *([image.name for image in side] for side in (queries, gallery)))
        faults = [f"{path}: {fault}" for fault in found]
    for fault in faults:
        log.error("%s", fault)
    if faults:
        raise StopError(1)
    log.info("%s is sound: each of the %d queries has %d different names of the %d gallery images, and the "
             "group name is %r. Nothing was sent", path, len(queries), min(NAMES_PER_QUERY, len(gallery)),
             len(gallery), submission["groupname"])  # fmt: skip


if __name__ == "__main__":
    run_script(main, Settings)

"""Host a competition on labelled folders.

    python -m retrieval.server --query_dir data/test/query --gallery_dir data/test/gallery --port 3001

It answers as the competition's server does: POST /retrieval/ with {"groupname": …, "images": {query: names}}
gives the score. GET / is the leaderboard, /submissions/GROUP a group's history, /leaderboard.csv the table,
/healthz says that it runs, /docs describes all of it.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import NoReturn

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from get_images import find_query_and_gallery
from retrieval.errors import RunError, StopError
from retrieval.forms import Form
from retrieval.server.answer_key import key_of_folders, key_of_table
from retrieval.server.database import Database
from retrieval.server.rules import Rules, read_tokens
from retrieval.server.serve import listen, make_server, url_of
from retrieval.settings import File, Folder, Moment, NewFile, Port, PositiveInt, PositiveShare

log = logging.getLogger("retrieval.server")


class Settings(Form):
    """Score submissions to labelled folders, and show the leaderboard."""

    query_dir: Folder = Path("data/test/query")
    """folder of the query images; only their names are read"""
    gallery_dir: Folder = Path("data/test/gallery")
    """folder of the gallery images"""
    answers: File | None = None
    """CSV table of lines name,identity (default: the class folders)"""
    port: Port = 3001
    """port to listen on"""
    host: str = "127.0.0.1"
    """address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 any network"""
    database: NewFile = Path("competition.sqlite")
    """SQLite file that stores the submissions"""
    closes_at: Moment | None = None
    """end of the competition, such as '2026-06-01 16:00', by this machine's clock"""
    public_share: PositiveShare | None = None
    """share of the queries that alone count until the competition closes (default: all)"""
    seed: int = 0
    """seed of the random choice of the public queries"""
    hide_scores: bool = False
    """answer with the accuracy only: the list of right identities would leak the answers"""
    tokens: File | None = None
    """CSV table of lines group,token: who may submit (default: anybody)"""
    per_minute: PositiveInt = 60
    """submissions per minute of a group"""
    per_address: PositiveInt | None = None
    """submissions per minute of a network address; a lecture hall may share an address (default: no limit)"""
    behind_proxy: str | None = None
    """address of a reverse proxy, such as 127.0.0.1, whose X-Forwarded-For is believed (default: nobody's)"""


def main(form: Settings) -> None:
    signal.signal(signal.SIGTERM, _end)  # as after Ctrl-C, waiting submissions are still written
    images = find_query_and_gallery(form.query_dir, form.gallery_dir)
    otherwise = "give --answers CSV, a table with a line name,identity for each image"
    key = key_of_table(form.answers, *images) if form.answers else key_of_folders(*images, otherwise)
    public = key.public_queries(form.public_share, form.seed) if form.public_share else None
    tokens = read_tokens(form.tokens) if form.tokens else None
    rules = Rules(form.closes_at, public, form.hide_scores, tokens, form.per_minute, form.per_address,
                  form.behind_proxy)  # fmt: skip
    listening = listen(form.host, form.port)
    database = Database(form.database, key.digest(public))
    wanted = set(key.queries.values())
    log.info("%d queries of %d identities, which %d of the %d gallery images show; %s holds %d submissions",
             len(key.queries), len(wanted), sum(identity in wanted for identity in key.gallery.values()),
             len(key.gallery), form.database, database.count())  # fmt: skip
    log.info("%s; scores are those of %s; %s",
             f"closes at {form.closes_at}" if form.closes_at else "open until Ctrl-C",
             f"a public share of {len(public)} queries" if public else "all queries",
             f"tokens are those of {form.tokens}" if tokens else "no tokens are asked for")  # fmt: skip
    url = url_of(listening)
    log.info("POST to %sretrieval/, and see %s in a browser; Ctrl-C ends", url, url)
    try:
        make_server(key, database, rules).run([listening])
        if not database.in_place():
            raise RunError(
                f"{form.database} was deleted or replaced while the server ran: all submissions that it "
                f"answered are in {database.rescue()}; start again with that as --database"
            )
    finally:
        database.close()


def _end(*_: object) -> NoReturn:
    raise StopError(0)


if __name__ == "__main__":
    run_script(main, Settings)

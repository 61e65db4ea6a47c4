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

from get_images import find_query_and_gallery
from retrieval import settings
from retrieval.console import run_script
from retrieval.server.answer_key import key_of_folders, key_of_table
from retrieval.server.database import Database
from retrieval.server.rules import Rules, read_tokens
from retrieval.server.serve import listen, make_server, url_of

log = logging.getLogger("retrieval.server")


class Settings(settings.Form):
    """Score submissions to labelled folders, and show the leaderboard."""

    query_dir: settings.Folder = Path("data/test/query")
    gallery_dir: settings.Folder = Path("data/test/gallery")
    answers: settings.File | None = None  # a table name,identity; None: the class folders
    port: settings.Port = 3001
    host: str = "127.0.0.1"  # "0.0.0.0": whoever reaches this machine
    database: settings.NewFile = Path("competition.sqlite")
    closes_at: settings.Moment | None = None  # such as "2026-06-01 16:00", by this machine's clock
    public_share: settings.PositiveShare | None = None  # of the queries, which alone count until it closes
    seed: int = 0  # of that share
    hide_scores: bool = False  # True: replies hold the accuracy only, and leak no answers
    tokens: settings.File | None = None  # a table group,token
    per_minute: settings.PositiveInt = 60  # submissions of a group
    per_address: settings.PositiveInt | None = None  # of an address; a lecture hall shares one


def main(form: Settings) -> None:
    signal.signal(signal.SIGTERM, _end)  # as Ctrl-C, with what waits written
    images = find_query_and_gallery(form.query_dir, form.gallery_dir)
    key = key_of_table(form.answers, *images) if form.answers else key_of_folders(*images)
    public = key.public_queries(form.public_share, form.seed) if form.public_share else None
    tokens = read_tokens(form.tokens) if form.tokens else None
    rules = Rules(form.closes_at, public, form.hide_scores, tokens, form.per_minute, form.per_address)
    listening = listen(form.host, form.port)
    database = Database(form.database, key.digest(public))
    log.info("%d queries in %d gallery images of %d identities; %s holds %d submissions", len(key.queries),
             len(key.gallery), len(set(key.queries.values())), form.database, database.count())  # fmt: skip
    url = url_of(listening)
    log.info("POST to %sretrieval/, and see %s in a browser; Ctrl-C ends", url, url)
    try:
        make_server(key, database, rules).run([listening])
    finally:
        database.close()


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    run_script(main, Settings)

"""A ranking in; a checked submission.json, sent by HTTP POST, and the server's outcome out.

    python -m retrieval.submission results/submission.json

As a script it sends a saved submission (again).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import shlex
import time
from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from pydantic_settings import CliPositionalArg
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError, SSLError
from urllib3.util import Retry

from retrieval import settings
from retrieval.ledger import Outcome, append_line, as_json, say, set_aside, stop_if_failed, write_whole
from retrieval.settings import InputError, ServerUrl

NAMES_PER_QUERY = 10  # gallery names a query, best first
REPLY_BYTES = 2**25  # a reply with more is not the server's

log = logging.getLogger("retrieval.submission")
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # _SaidRetry says it better

NOT_SENT = Outcome("saved", "scored by the folder labels (--custom_dataset): nothing was sent")


class Settings(settings.Form):
    """Send a saved submission (again)."""

    submission: CliPositionalArg[Path]
    server_url: ServerUrl = ""


def main(settings: Settings) -> None:
    if not settings.server_url:
        raise InputError("there is no server to send it to: give --server_url, or set SERVER_URL in .env")
    submission = read_submission(settings.submission)  # refuses what no server can score
    outcome = send_submission(settings.submission, settings.server_url)
    say(outcome)
    append_line(settings.submission.parent, settings, outcome, group_name=submission["groupname"])
    stop_if_failed(outcome)


# ---- make and check -------------------------------------------------------------------------------


def make_submission(
    ranking: dict[str, list[str]], gallery: Collection[str], group_name: str
) -> dict[str, Any]:
    """The body that the server wants: {"groupname": …, "images": {query name: its first ten gallery names}}.

    A gallery of fewer than ten images gives that many names, with a warning. Raises InputError as
    check_submission does.
    """
    if len(gallery) < NAMES_PER_QUERY:
        log.warning("the gallery has %d images, so each query gets %d names instead of %d",
                    len(gallery), len(gallery), NAMES_PER_QUERY)  # fmt: skip
    submission = {
        "groupname": group_name,
        "images": {query: names[:NAMES_PER_QUERY] for query, names in ranking.items()},
    }
    check_submission(submission)
    known = set(gallery)
    for query, names in submission["images"].items():
        if not known.issuperset(names) or len(names) != min(NAMES_PER_QUERY, len(known)):
            raise InputError(
                f"the ranking of {query} is not {min(NAMES_PER_QUERY, len(known))} names of the gallery"
            )
    return submission


def check_submission(submission: Any) -> None:
    """Raise InputError unless this is a body that the server can score, whatever its images are."""
    shape = '{"groupname": "…", "images": {"query.jpg": ["gallery.jpg", … ten names, best first]}}'
    if not isinstance(submission, dict) or set(submission) != {"groupname", "images"}:
        raise InputError(f"a submission looks like {shape}")
    images = submission["images"]
    if not isinstance(submission["groupname"], str) or not isinstance(images, dict) or not images:
        raise InputError(f"a submission looks like {shape}")
    length = None
    for query, names in images.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"the query {query} has no list of names: a submission looks like {shape}")
        length = len(names) if length is None else length
        if len(set(names)) < len(names) or not 1 <= len(names) <= NAMES_PER_QUERY or len(names) != length:
            raise InputError(
                f"the query {query} has {len(names)} names, {len(set(names))} of them different: each query "
                f"needs the same number of different names, at most {NAMES_PER_QUERY}"
            )


def read_submission(path: Path) -> dict[str, Any]:
    """A saved submission, checked. Raises FileNotFoundError, or InputError for anything that is none."""
    try:
        submission = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): give the submission.json that a run wrote") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the submission.json in it") from None
    try:
        check_submission(submission)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return submission


def _warn_of_folders(submission: dict[str, Any], url: str) -> None:
    """Warn of names with folders for a server on another machine: the competition knows base names only."""
    names = [*submission["images"], *chain(*submission["images"].values())]
    nested = [name for name in names if "/" in name]
    if nested and not _is_loopback(urlsplit(url).hostname):
        log.warning("names such as %s hold folders, and a competition's server knows base names only: "
                    "give it flat folders", nested[0])  # fmt: skip


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def save_submission(submission: dict[str, Any], folder: Path) -> Path:
    """Write submission.json, the exact body to send, and return its path.

    The files of an earlier run move to earlier/, unless they are of the same submission and hold no reply.
    """
    path, body = folder / "submission.json", as_json(submission)
    if (folder / "reply.txt").exists() or not path.exists() or path.read_bytes() != body:
        set_aside(folder)
    write_whole(path, body)
    return path


# ---- send -----------------------------------------------------------------------------------------


def send_submission(
    path: Path, url: str, timeouts: tuple[float, float] = (10, 120), retries: int = 4, backoff: float = 1
) -> Outcome:
    """POST a saved submission and keep the server's reply beside it, as received, in reply.txt.

    `timeouts` are the seconds to connect and to wait for the server. A refused or reset connection and an
    answer of 5xx are tried again, up to `retries` times, after 0, 2, 4, 8 … times `backoff` seconds, and it
    is said whenever the POST before may have been counted. Never raises for what the network or the server
    does: the outcome tells it.
    """
    if not url:
        example = _resend(path, "http://HOST:3001/retrieval/")
        return Outcome(
            "saved", f"{path} is saved and not sent; to send it, set SERVER_URL or run\n    {example}"
        )
    body = path.read_bytes()
    submission = json.loads(body)
    _warn_of_folders(submission, url)
    log.info("sending %d queries to %s as %r, and waiting up to %g s for the answer",
             len(submission["images"]), url, submission["groupname"], timeouts[1])  # fmt: skip
    reply = bytearray()
    try:
        response = _post(body, url, timeouts, retries, backoff, reply)
        word, sentence, accuracy = _read_reply(response, bytes(reply))
        outcome = Outcome(word, sentence, accuracy, response.status_code)
    except (requests.RequestException, HTTPError) as error:
        outcome = Outcome("failed", _network_sentence(error, url))
    except KeyboardInterrupt:
        outcome = Outcome(
            "interrupted", "stopped while sending: if the server took it, it may have been counted"
        )
    if reply:
        _keep_reply(path.with_name("reply.txt"), bytes(reply))
    if outcome.failed:
        again = f"{path} is saved; to send it again:\n    {_resend(path, url)}"
        return replace(outcome, sentence=f"{outcome.sentence}\n{again}")
    return outcome


def _resend(path: Path, url: str) -> str:
    return f"python -m retrieval.submission {shlex.quote(str(path))} --server_url {shlex.quote(url)}"


def _keep_reply(path: Path, reply: bytes) -> None:
    try:
        write_whole(path, reply)
    except OSError as error:  # the score in it must still be said
        log.warning("the server's reply cannot be kept in %s: %s", path, error.strerror)


def _post(
    body: bytes, url: str, timeouts: tuple[float, float], retries: int, backoff: float, reply: bytearray
) -> requests.Response:
    """The server's answer to the last POST; its content goes into `reply` as it comes, however slowly."""
    said = _SaidRetry(
        total=retries, backoff_factor=backoff, status_forcelist=range(500, 600), allowed_methods=None,
        raise_on_status=False, redirect=False, retry_after_max=60,
    )  # fmt: skip
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=said))
        headers = {"Content-Type": "application/json"}
        response = session.post(url, data=body, headers=headers, timeout=timeouts, stream=True)
        deadline = time.monotonic() + timeouts[1]
        while chunk := response.raw.read1(2**16, decode_content=True):
            reply += chunk
            if len(reply) > REPLY_BYTES or time.monotonic() > deadline:
                raise requests.ReadTimeout("the reply does not end")
        return response


class _SaidRetry(Retry):
    """urllib3's retries, each with a warning that says whether the POST before it may have been counted."""

    def increment(
        self, *request: Any, response: Any = None, error: Exception | None = None, **rest: Any
    ) -> Retry:
        if isinstance(error, ReadTimeoutError | SSLError):
            raise error  # the server has it and takes its time, or speaks no TLS: a second one would not help
        retry = super().increment(
            *request, response=response, error=error, **rest
        )  # raises when they are used up
        what = f"the server answered {response.status}" if response else f"no answer ({_root(error)})"
        counted = "it was not sent" if _never_sent(error) else "the submission may have been counted"
        wait = (response and retry.get_retry_after(response)) or retry.get_backoff_time()
        log.warning("%s; %s. Sending it again in %g s", what, counted, wait)
        return retry


def _never_sent(error: BaseException | None) -> bool:
    return isinstance(error, NewConnectionError | ConnectTimeoutError)


def _root(error: BaseException | None) -> str:
    """The words of the operating system in a chain of wrapped network errors."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        inner = [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)]
        error = error.__cause__ or error.__context__ or (inner[0] if inner else None)
    return error.strerror.lower() if error else "the connection failed"


def _network_sentence(error: requests.RequestException | HTTPError, url: str) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return (
            f"there is no secure connection to {url} ({_root(error)}): does this server want http:// instead?"
        )
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy in http_proxy or https_proxy cannot be reached ({_root(error)}): unset or mend it"
    if isinstance(error, requests.ConnectTimeout):
        return f"nothing answers at {url}: the submission was not sent; check host, port and network"
    if isinstance(error, requests.Timeout | ReadTimeoutError):
        return f"{url} took the submission and did not finish its answer in time: it may have been counted"
    wrapped = getattr(error.args[0] if error.args else None, "reason", None)
    if _never_sent(wrapped):
        return f"{url} cannot be reached ({_root(wrapped)}): the submission was not sent; check host and port"
    return f"{url} broke the connection off ({_root(error)}): the submission may have been counted"


def _read_reply(response: requests.Response, content: bytes) -> tuple[str, str, float | None]:
    """The outcome's word, its sentence, and the score if there is one."""
    try:
        reply = json.loads(content)
    except ValueError:
        reply = None
    told = f"the server answered {response.status_code} {response.reason or ''}".strip()
    if response.request.method != "POST":
        return "failed", f"the server moved to {response.url}: give that address as --server_url", None
    if not response.ok or not isinstance(reply, dict):
        hint = ": check the URL, down to its last slash" if response.status_code == 404 else ""
        kind = "" if not response.ok else ", but not with the JSON of a score"
        return "failed", f"{told}{kind}{hint}: {_excerpt(content)!r}", None
    accuracy = reply.get("accuracy")
    if isinstance(accuracy, int | float) and isfinite(accuracy):
        return (
            "scored",
            f"the server's score: {accuracy:g} of 1000 (reply.txt holds its whole reply)",
            float(accuracy),
        )
    if "results" in reply:  # what an older server answered
        return "answered", f"the server's results: {reply['results']}", None
    return "failed", f"{told} without a score: {_excerpt(content)!r}", None


def _excerpt(content: bytes, length: int = 200) -> str:
    """The beginning of a reply, without the tags of a page."""
    text = content[:20_000].decode("utf-8", "replace")
    text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.S).split())
    return text[:length] + "…" * (len(text) > length)


if __name__ == "__main__":
    settings.run_script(main, Settings)

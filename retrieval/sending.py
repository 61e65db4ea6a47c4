"""A saved submission in; its POST to the server, and the outcome, out."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import shlex
import time
from dataclasses import replace
from itertools import chain
from math import isfinite, nan
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, NewConnectionError, ReadTimeoutError

from retrieval.ledger import Outcome, write_whole

REPLY_BYTES = 2**25  # a reply with more is not the server's

NOT_SENT = Outcome("saved", "scored by the folder labels (--custom_dataset): nothing was sent")

# What became of a submission, as far as can be known from here.
NOTHING_SENT = "the submission was not sent"
MAYBE_COUNTED = "the submission may have been counted"
REFUSED = "the submission was refused"

log = logging.getLogger("retrieval.sending")


def send_submission(
    path: Path, url: str, timeouts: tuple[float, float] = (10, 120), retries: int = 4, backoff: float = 1
) -> Outcome:
    """POST a saved submission and keep the server's reply beside it, as received, in reply.txt.

    `timeouts` are the seconds to connect, and to wait for the answer and read it. A refused or reset
    connection and an answer of 5xx are tried again, up to `retries` times, after 1, 2, 4, 8 … times `backoff`
    seconds, and it is said whether a POST before may have been counted. Never raises for what the network or
    the server does, nor for Ctrl-C: the outcome tells it.
    """
    if not url:
        what = f"{path} is not sent: set SERVER_URL or --server_url, or send it with"
        return Outcome("saved", f"{what}\n    {_resend(path, 'http://HOST:3001/retrieval/')}")
    body = path.read_bytes()
    submission = json.loads(body)
    _warn_of_folders(submission, url)
    log.info("sending %d queries to %s as %r, and waiting up to %g s for the answer",
             len(submission["images"]), url, submission["groupname"], timeouts[1])  # fmt: skip
    fate, posting = NOTHING_SENT, False
    try:
        for attempt in range(retries + 1):
            posting = True
            outcome, fate_now, again = _post(path, body, url, timeouts)
            posting = False
            fate = MAYBE_COUNTED if fate == MAYBE_COUNTED else fate_now
            if not again or attempt == retries:
                break
            wait = backoff * 2**attempt
            log.warning("%s: %s. Sending it again in %g s", outcome.sentence, fate, wait)
            time.sleep(wait)
    except KeyboardInterrupt:
        fate = MAYBE_COUNTED if posting else fate
        outcome = Outcome("interrupted", "stopped by Ctrl-C")
    if outcome.failed:
        resend = f"{path} is saved; to send it again:\n    {_resend(path, url)}"
        outcome = replace(outcome, sentence=f"{outcome.sentence}: {fate}.\n{resend}")
    return outcome


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


def _resend(path: Path, url: str) -> str:
    return f"python -m retrieval.submission {shlex.quote(str(path))} --server_url {shlex.quote(url)}"


def _post(path: Path, body: bytes, url: str, timeouts: tuple[float, float]) -> tuple[Outcome, str, bool]:
    """POST once: the outcome, what became of the submission, and whether it makes sense to try again."""
    reply = bytearray()
    try:
        with requests.Session() as session:
            session.max_redirects = 3
            headers = {"Content-Type": "application/json"}
            response = session.post(url, data=body, headers=headers, timeout=timeouts, stream=True)
            _read_to_the_end(response, reply, timeouts[1])
        turned_away = response.request.method != "POST" or 400 <= response.status_code < 500
        fate = REFUSED if turned_away else MAYBE_COUNTED
        return _read_reply(response, bytes(reply)), fate, response.status_code >= 500
    except (requests.RequestException, HTTPError, ValueError) as error:  # ValueError: redirected nowhere
        sentence, fate, again = _network_failure(error, url)
        return Outcome("failed", sentence), fate, again
    finally:
        if reply:
            _keep_reply(path.with_name("reply.txt"), bytes(reply))


def _read_to_the_end(response: requests.Response, reply: bytearray, seconds: float) -> None:
    """Fill `reply` with what comes, however slowly. Raises ReadTimeout if it ends too late, or is huge."""
    deadline = time.monotonic() + seconds
    while chunk := response.raw.read1(2**16, decode_content=True):
        reply += chunk
        if len(reply) > REPLY_BYTES or time.monotonic() > deadline:
            raise requests.ReadTimeout("the reply does not end")


def _keep_reply(path: Path, reply: bytes) -> None:
    try:
        write_whole(path, reply)
    except OSError as error:  # the score in it must still be said
        log.warning("the server's reply cannot be kept in %s: %s", path, error.strerror)


def _network_failure(error: Exception, url: str) -> tuple[str, str, bool]:
    """What happened, what became of the submission, and whether to try again."""
    wrapped = getattr(error.args[0] if error.args else None, "reason", None)
    cause = _words_of_the_system(error)
    match error:
        case requests.Timeout() | ReadTimeoutError() if not isinstance(error, requests.ConnectTimeout):
            return f"{url} took the submission and did not finish its answer in time", MAYBE_COUNTED, False
        case requests.ConnectTimeout():
            return f"nothing answers at {url} (check host, port and network)", NOTHING_SENT, True
        case requests.exceptions.SSLError():
            fate = MAYBE_COUNTED if "EOF" in str(error) else NOTHING_SENT
            return f"there is no secure connection to {url} ({cause}; is it http:// there?)", fate, False
        case requests.exceptions.ProxyError():
            return f"the proxy in http_proxy or https_proxy cannot be reached ({cause})", NOTHING_SENT, True
        case requests.TooManyRedirects():
            return f"{url} sends the POST in a circle", REFUSED, False
        case requests.ConnectionError() if isinstance(wrapped, NewConnectionError):
            return f"{url} cannot be reached ({cause}; check host and port)", NOTHING_SENT, True
        case requests.ConnectionError():
            return f"{url} broke the connection off ({cause})", MAYBE_COUNTED, True
        case HTTPError() | requests.exceptions.ChunkedEncodingError():
            return f"{url} broke its answer off ({cause})", MAYBE_COUNTED, False
    return f"{url} cannot be opened ({error})", NOTHING_SENT, False


def _words_of_the_system(error: BaseException | None) -> str:
    """The operating system's words in a chain of wrapped network errors."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        inner = [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)]
        error = error.__cause__ or error.__context__ or (inner[0] if inner else None)
    return error.strerror.lower() if error else "the connection failed"


def _read_reply(response: requests.Response, content: bytes) -> Outcome:
    """The outcome that a reply tells: the score if there is one."""
    status, told = (
        response.status_code,
        f"the server answered {response.status_code} {response.reason or ''}".strip(),
    )
    if response.request.method != "POST":
        return Outcome(
            "failed", f"the server moved to {response.url} (give that as --server_url)", status=status
        )
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        reply = None
    if not response.ok or not isinstance(reply, dict):
        hint = " (check the URL, down to its last slash)" if status == 404 else ""
        kind = ", but not with the JSON of a score" if response.ok else ""
        return Outcome("failed", f"{told}{kind}{hint}, {_excerpt(content)!r}", status=status)
    try:
        accuracy = float(reply["accuracy"])
    except (KeyError, TypeError, ValueError, OverflowError):
        accuracy = nan
    if isfinite(accuracy):
        sentence = f"the server's score: {accuracy:g} of 1000 (reply.txt holds its whole reply)"
        return Outcome("scored", sentence, accuracy, status)
    if "results" in reply:  # what an older server answered
        return Outcome("answered", f"the server's results: {_excerpt(content)}", status=status)
    return Outcome("failed", f"{told} without a score, {_excerpt(content)!r}", status=status)


def _excerpt(content: bytes, length: int = 200) -> str:
    """The beginning of a reply, without the tags of a page."""
    text = content[:20_000].decode("utf-8", "replace")
    text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.S).split())
    return text[:length] + "…" * (len(text) > length)

"""A saved submission in; its POST to the server, and the outcome of it, out."""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import re
import shlex
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError, NewConnectionError, ReadTimeoutError

from retrieval.errors import SOCKS, printable
from retrieval.files import write_whole
from retrieval.run import Outcome, set_aside
from retrieval.settings import Url, masked
from retrieval.submission.deadline import Deadline
from retrieval.submission.protocol import TOKEN

LONGEST_WAIT = 120.0  # seconds that a server may ask the client to wait
REDIRECTS = 3
PROJECT = Path(__file__).resolve().parents[2]  # the folder that holds the package
MOST_REPLY = 16 * 2**20  # bytes; a reply to 1455 queries has some 0.1 MB
TOO_SLOW = "did not end its answer in time"

NOT_SENT = Outcome("saved", "scored by the folder labels (--custom_dataset): nothing was sent")

# The fate of a submission, as far as the client can know it.
NOTHING_SENT = "the submission was not sent"
MAYBE_COUNTED = "the submission may have been counted"
REFUSED = "the submission was refused"

log = logging.getLogger("retrieval.sending")


def send_submission(
    path: Path | str,
    url: str,
    token: str = "",
    timeouts: tuple[float, float] = (10, 120),
    retries: int = 4,
    backoff: float = 1,
) -> Outcome:
    """POST a saved submission and keep the server's reply beside it, as received, in reply.txt.

    `url` may hold a user name and a password, which no sentence shows. `token` is the group's, for a server
    that asks for one. `timeouts` are the seconds to connect, and the seconds from then until the answer has
    been read to its end. If the connection is refused or reset, or the server answers
    with 5xx, the POST is repeated up to `retries` times, after 1, 2, 4, 8 … times `backoff` seconds; the log
    says whether an earlier POST may have been counted. The returned outcome tells of every failure of the
    network or the server and of Ctrl-C: none of them raises.
    """
    path = Path(path)
    if not url:
        what = f"{path} is not sent: set SERVER_URL or --server_url, or send it with"
        return Outcome("saved", f"{what}\n    {command_to_send(path)}")
    url = Url(url)
    body = path.read_bytes()
    submission = json.loads(body)
    _warn_of_folders(submission, url)
    log.info("sending %d queries to %s as %r, and waiting up to %g s for the answer",
             len(submission["images"]), url, submission["groupname"], timeouts[1])  # fmt: skip
    fate, posting, url_is_wrong = NOTHING_SENT, False, False
    try:
        for attempt in range(retries + 1):
            posting = True
            outcome, fate_now, wait = _post(path, body, url, token, timeouts)
            posting = False
            outcome = replace(outcome, sentence=printable(outcome.sentence))  # it holds the server's words
            fate = MAYBE_COUNTED if fate == MAYBE_COUNTED else fate_now
            url_is_wrong = _is_wrong_url(outcome, fate_now, wait)
            if wait is None or attempt == retries:
                break
            wait = max(backoff * 2**attempt, wait)
            log.warning("%s: %s. Sending it again in %g s", outcome.sentence, fate, wait)
            time.sleep(wait)
    except KeyboardInterrupt:
        fate = MAYBE_COUNTED if posting else fate
        outcome = Outcome("interrupted", "stopped by Ctrl-C")
    if outcome.failed:
        again = _how_to_resend(path, url, outcome, url_is_wrong)
        outcome = replace(outcome, sentence=f"{outcome.sentence}: {fate}.\n{path} is saved; {again}")
    return outcome


def _warn_of_folders(submission: dict[str, Any], url: Url) -> None:
    """Warn if names hold folders and the server is another machine: a competition knows base names only."""
    names = [*submission["images"], *chain(*submission["images"].values())]
    nested = [name for name in names if "/" in name]
    if nested and not _is_loopback(urlsplit(url.full).hostname):
        log.warning("names such as %s hold folders, and a competition's server knows base names only: "
                    "give it flat folders", nested[0])  # fmt: skip


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxies_for(url: Url) -> dict[str, str] | None:
    """Return the proxies for `requests`: what the environment sets is not meant for this machine itself."""
    return {"no_proxy": "*"} if _is_loopback(urlsplit(url.full).hostname) else None


def command_to_send(path: Path, url: str = "http://HOST:3001/retrieval/") -> str:
    """Return the command that sends a saved submission, from any folder of this machine.

    It goes to the current folder first, whose .env may set the token.
    """
    here = Path.cwd()
    package = "" if here.resolve() == PROJECT else f"PYTHONPATH={shlex.quote(str(PROJECT))} "
    file = shlex.quote(str(path.absolute()))
    return (f"cd {shlex.quote(str(here))} && {package}python -m retrieval.submission {file} "
            f"--server_url {shlex.quote(url)}")  # fmt: skip


def _is_wrong_url(outcome: Outcome, fate: str, wait: float | None) -> bool:
    """Return whether a failure is the URL's: another address is meant, or no attempt can get through."""
    status = outcome.status or 0
    return status in (404, 405) or 300 <= status < 400 or (fate == NOTHING_SENT and wait is None)


def _how_to_resend(path: Path, url: Url, outcome: Outcome, url_is_wrong: bool) -> str:
    """Return a command, and what it is for; it never repeats the URL or the token that was just refused."""
    if outcome.status in (401, 403):
        command = f"{command_to_send(path, url)} --group_token TOKEN"
        return f"if the token was wrong, send it with the right one:\n    {command}"
    if outcome.status == 404 and not url.endswith("/"):
        return f"to send it to the same URL with a slash at its end:\n    {command_to_send(path, url + '/')}"
    if outcome.status == 422:
        command = command_to_send(path, url)
        return f"run the script again with the right folders; or, to send the same file again:\n    {command}"
    if url_is_wrong:
        return f"to send it to the right URL:\n    {command_to_send(path)}"
    return f"to send it again:\n    {command_to_send(path, url)}"


def _post(
    path: Path, content: bytes, url: Url, token: str, timeouts: tuple[float, float]
) -> tuple[Outcome, str, float | None]:
    """POST once; return the outcome, the submission's fate, and the least seconds until another try, or None.

    A redirect by 307 or 308 asks for the same POST elsewhere. It is followed on the same server only, because
    the token and the submission are meant for nobody else. After any other redirect the submission may have
    been counted, so the client stops there.
    """
    headers = {"Content-Type": "application/json"} | ({TOKEN: token} if token else {})
    options = {"headers": headers, "auth": _credentials(url), "proxies": proxies_for(url),
               "timeout": timeouts, "stream": True, "allow_redirects": False}  # fmt: skip
    sent = False  # whether the first byte of the body has left
    for _ in range(1 + REDIRECTS):
        body, reply = io.BytesIO(content), bytearray()
        with Deadline(timeouts[1]) as deadline:
            try:
                response = deadline.session.post(url.full, data=body, **options)
                broken = _read_to_the_end(response, reply)
            except (requests.RequestException, ValueError) as error:  # ValueError: a URL that leads nowhere
                sent = sent or body.tell() > 0  # the connection reads the body only to send it
                sentence, again = _network_failure(error, url, sent, deadline.passed)
                fate = MAYBE_COUNTED if sent else NOTHING_SENT
                return Outcome("failed", sentence), fate, 0 if again else None
            finally:
                _keep_reply(path.with_name("reply.txt"), bytes(reply))
        sent = True
        target = _target_on_same_server(response, url)
        if not target:
            break
        url = target
    turned_away = 400 <= response.status_code < 500 or response.status_code in (301, 307, 308)
    fate = REFUSED if turned_away else MAYBE_COUNTED
    broken = TOO_SLOW if deadline.passed else broken
    asked = _retry_after(response)
    again = response.status_code >= 500 or (response.status_code == 429 and asked > 0)
    return _read_reply(response, bytes(reply), broken), fate, asked if again else None


def _retry_after(response: requests.Response) -> float:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), at most LONGEST_WAIT; 0 if none."""
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), LONGEST_WAIT) if seconds.isascii() and seconds.isdigit() else 0


def _credentials(url: Url) -> tuple[bytes, bytes] | None:
    """Return the user name and the password in a URL, for HTTP's basic authentication."""
    parts = urlsplit(url.full)
    if parts.username is None:
        return None
    return unquote_to_bytes(parts.username), unquote_to_bytes(parts.password or "")


def _target_on_same_server(response: requests.Response, url: Url) -> Url | None:
    """Return where a redirect by 307 or 308 leads, if that is the same scheme, host and port."""
    location = response.headers.get("Location")
    if response.status_code not in (307, 308) or not location:
        return None
    try:
        target = Url(urljoin(url.full, location))
        return target if _origin(target) == _origin(url) else None
    except ValueError:  # the port is not a number, or a bracket is missing
        return None


def _advice(response: requests.Response) -> str:
    """Return what to do about a redirect by 307 or 308 to another server, or ''."""
    url = Url(response.url)
    if response.status_code not in (307, 308) or _target_on_same_server(response, url):
        return ""
    try:
        target = Url(urljoin(url.full, response.headers.get("Location", "")))
    except ValueError:
        return ""
    return f", another server, which was sent nothing: if you trust it, give --server_url {target[:200]}"


def _origin(url: Url) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url.full)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _read_to_the_end(response: requests.Response, reply: bytearray) -> str:
    """Read the body into `reply`, however slowly it comes; return why it stayed incomplete, or ''."""
    try:
        while chunk := response.raw.read1(2**16, decode_content=True):
            reply += chunk
            if len(reply) > MOST_REPLY:
                return f"sent more than {MOST_REPLY / 2**20:g} MB"
    except ReadTimeoutError:
        return TOO_SLOW
    except HTTPError as error:
        return f"broke its answer off ({_system_message(error)})"
    finally:
        response.close()
    return ""


def _keep_reply(path: Path, reply: bytes) -> None:
    if not reply:
        return
    try:
        set_aside(path.parent, (path.name,))  # the reply to the previous attempt
        write_whole(path, reply)
    except OSError as error:  # the score in it must still be said
        log.warning("the server's reply cannot be kept in %s: %s", path, error.strerror)


def _network_failure(error: Exception, url: Url, sent: bool, late: bool) -> tuple[str, bool]:
    """Return a sentence about the failure, and whether to try again.

    `sent` says whether a part of the submission has left, `late` whether the deadline has passed.
    """
    wrapped = getattr(error.args[0] if error.args else None, "reason", None)
    cause = _system_message(error)
    match error:
        case requests.ConnectTimeout():
            return f"nothing answers at {url} (check host, port and network)", True
        case _ if (late or isinstance(error, requests.Timeout)) and not sent:
            return f"{url} did not take the submission in time", True
        case _ if late or isinstance(error, requests.Timeout):
            return f"{url} took the submission and did not answer in time", False
        case requests.exceptions.SSLError():
            return f"there is no secure connection to {url} ({cause}; is it http:// there?)", False
        case requests.exceptions.InvalidSchema() if "SOCKS" in str(error):
            return SOCKS, False
        case requests.exceptions.ProxyError():
            return f"the proxy in http_proxy or https_proxy failed ({cause})", True
        case requests.ConnectionError() if isinstance(wrapped, NewConnectionError):
            return f"{url} cannot be reached ({cause}; check host and port)", True
        case requests.ConnectionError():
            return f"{url} broke the connection off ({cause})", True
    return f"{url} {'gave an answer that is not HTTP' if sent else 'cannot be opened'} ({error})", False


def _system_message(error: BaseException | None) -> str:
    """Return the operating system's message from a chain of wrapped network errors."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        inner = [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)]
        error = error.__cause__ or error.__context__ or (inner[0] if inner else None)
    return error.strerror.lower() if error else "the connection failed"


def _read_reply(response: requests.Response, content: bytes, broken: str) -> Outcome:
    """Return the outcome that a reply stands for, with the score if there is one."""
    status = response.status_code
    answered = f"the server answered {status} {(response.reason or '')[:100]}".strip()
    reply = _from_json(content)
    if 300 <= status < 400:
        target = masked(response.headers.get("Location", "nowhere")[:200])
        return Outcome("failed", f"{answered}, and points to {target}{_advice(response)}", status=status)
    if not response.ok or not isinstance(reply, dict):
        hint = " (check the URL, down to its last slash)" if status == 404 else ""
        kind = f" and {broken}" if broken else ", but not with the JSON of a score" if response.ok else ""
        return Outcome("failed", f"{answered}{kind}{hint}, {_excerpt(content)!r}", status=status)
    accuracy = _number(reply.get("accuracy"))
    if accuracy is not None:
        public = reply.get("public_queries")  # of our own server, until the competition closes
        share = f", on its {public} public queries only" if isinstance(public, int) else ""
        sentence = f"the server's score: {accuracy:g} of 1000{share} (reply.txt holds its whole reply)"
        return Outcome("scored", sentence, accuracy, status)
    if "results" in reply:  # what an older server answered
        return Outcome("answered", f"the server's results: {_excerpt(content)}", status=status)
    return Outcome("failed", f"{answered} without a score, {_excerpt(content)!r}", status=status)


def _from_json(content: bytes) -> Any:
    """Read JSON in UTF-8 or Latin-1, also if it stands as text inside a JSON string; None if it is none.

    >>> _from_json(b'"{\\\\"accuracy\\\\": 698}"')
    {'accuracy': 698}
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    try:
        reply = json.loads(text)
        return json.loads(reply) if isinstance(reply, str) else reply
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float | None:
    """Return a score that is a number, or the text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= 1e9 else None


def _excerpt(content: bytes, length: int = 200) -> str:
    """Return the beginning of a reply, without HTML tags."""
    text = content[:20_000].decode("utf-8", "replace")
    text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.S).split())
    return text[:length] + "…" * (len(text) > length)

"""This machine and the settings in; a line for each thing that the day needs, and what to do, out.

python -m retrieval.doctor dlib facenet     # the networks you mean to use; by default MODEL_TYPE's

It sends nothing: the server gets a HEAD request, which has no body. Exit status 1: a run could not succeed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
import requests
from pydantic_settings import CliPositionalArg

from retrieval.backbones.backbone import choose_device, find_pretrained
from retrieval.backbones.zoo import PRETRAINED, ModelType
from retrieval.errors import InputError, StopError, printable
from retrieval.forms import Form
from retrieval.machine import cores, memory, version_of
from retrieval.settings import CACHE_DIR, LOCAL, GroupName, GroupToken, NewFolder, ServerUrl, Url, masked
from retrieval.submission.client import proxies_for
from retrieval.submission.deadline import Deadline

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"  # a run cannot succeed with a problem
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
SHOWN = ("torch", "torchvision", "timm", "onnxruntime")  # packages whose versions are worth a line
SECONDS = 5  # to connect to the server, and to wait for a byte of its answer
LEAST_DISK, LEAST_MEMORY = 2, 4  # GB: with less a run may still succeed
DRIFT = 5.0  # seconds between two clocks that are worth a warning

log = logging.getLogger("retrieval.doctor")


class Settings(Form):
    """Say in about ten lines, in seconds, whether all is here for the day. Nothing is sent."""

    names: CliPositionalArg[list[ModelType]] = []  # noqa: RUF012 (pydantic copies it)
    """model names that you mean to use; by default MODEL_TYPE's"""
    model_type: ModelType = "efficientnet_lite0"
    """model name of your runs, as .env sets it"""
    server_url: ServerUrl = ""
    """URL that you will submit to, such as http://10.0.0.7:3001/retrieval/"""
    group_name: GroupName = "my-team"
    """name of your group on the server"""
    group_token: GroupToken = GroupToken("")
    """token of your group, if the server asks for one"""
    output_dir: NewFolder = Path("results")
    """folder for the files of a run"""
    cache_dir: NewFolder = CACHE_DIR
    """cache of embeddings, faces and exported networks"""


class Line(NamedTuple):
    """What was found out about one thing."""

    state: str  # OK, WARNING or PROBLEM
    text: str


def main(form: Settings) -> None:
    states = []
    for topic, line in examine(form):
        log.info("%-8s %-8s %s", line.state, topic, printable(line.text))
        states.append(line.state)
    if PROBLEM in states:
        raise StopError(1)


def examine(form: Settings) -> Iterator[tuple[str, Line]]:
    """Yield a line for each thing, with its topic; the server, which may take seconds, comes last."""
    yield "packages", check_packages(REQUIREMENTS)
    for name in form.names or [form.model_type]:
        yield "weights", check_weights(name)
    yield "weights", list_networks()
    yield "GPU", check_device()
    yield "machine", check_machine()
    yield "results", check_folder(form.output_dir, "output_dir", PROBLEM)
    yield "cache", check_folder(form.cache_dir, "cache_dir", WARNING)  # a run goes on without one
    yield "group", check_group(form.group_name, form.group_token.get_secret_value())
    line, reply, now = check_server(form.server_url)
    yield "server", line
    if reply is not None:
        yield "clock", check_clock(reply.headers.get("Date", ""), now)


# ---- this machine ---------------------------------------------------------------------------------


def check_packages(requirements: Path) -> Line:
    """Compare the installed packages with a file of lines NAME==VERSION, and import torch."""
    from packaging.requirements import Requirement

    text = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    wanted = [package for package in wanted if not package.marker or package.marker.evaluate()]
    missing = [package.name for package in wanted if not version_of(package.name)]
    others = [f"{package.name} {version_of(package.name)} instead of {package.specifier}"
              for package in wanted if version_of(package.name) not in package.specifier]  # fmt: skip
    install = f"run `pip install -r {requirements}`"
    if missing:
        return Line(PROBLEM, f"{', '.join(missing)} not installed: {install}")
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return Line(PROBLEM, f"torch cannot be imported ({error}): {install}")
    if others:
        return Line(WARNING, f"{', '.join(others)}: {install}")
    versions = ", ".join(f"{name} {version_of(name)}" for name in SHOWN)
    return Line(OK, f"Python {sys.version.split()[0]}, {versions}; {len(wanted)} as required")


def check_weights(name: str) -> Line:
    """Say whether the weights of a model name are here, with the first digits of their SHA-256."""
    try:
        source = find_pretrained(name).weights
    except InputError as error:
        return Line(PROBLEM, str(error))
    file, fetch = source.find(), f"run `python -m retrieval.backbones --fetch {name}`"
    if not file:
        return Line(PROBLEM, f"{name}: missing, {fetch}")
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not digest.startswith(getattr(source, "sha256", "")):  # only some publishers give digests
        return Line(PROBLEM, f"{name}: {file} is not its publisher's file: delete it, and {fetch}")
    return Line(OK, f"{name}: {file.stat().st_size / 1e6:.0f} MB, SHA-256 {digest[:8]}…")


def list_networks() -> Line:
    """List the model names whose weights are here, and say how to get the others."""
    here = [name for name, row in PRETRAINED.items() if row.weights.find()]
    more = "; `python -m retrieval.backbones` lists the others" if len(here) < len(PRETRAINED) else ""
    return Line(OK, f"here: {', '.join(here) or 'none'}{more}")


def check_device() -> Line:
    """Say which device the networks will run on, and how much of its memory is free."""
    try:
        device = choose_device("auto")
    except ImportError:
        return Line(WARNING, "not looked for, since torch cannot be imported")
    if device == "cpu":
        if shutil.which("nvidia-smi"):
            return Line(WARNING, "torch does not see it, and a run uses the CPU: compare the CUDA of "
                                 "`nvidia-smi` with torch.version.cuda")  # fmt: skip
        return Line(OK, "none: networks run on the CPU; clip and siglip2 have a :base for it")
    if device == "mps":
        return Line(OK, "of Apple (mps)")
    import torch

    try:
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return Line(
            PROBLEM, f"torch cannot use it ({reason}): see `nvidia-smi`, or give the runs --device cpu"
        )
    text = f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GB free"
    if free < total / 2:
        return Line(WARNING, f"{text}: end the programs that `nvidia-smi` lists")
    return Line(OK, text)


def check_machine() -> Line:
    """Say how many cores and how much memory this process may use."""
    size = memory() / 1e9
    text = f"{cores()} cores, {size:.1f} GB of memory"
    if size < LEAST_MEMORY:
        return Line(WARNING, f"{text}: little; end other programs, and take small networks")
    return Line(OK, text)


def check_folder(folder: Path, flag: str, otherwise: str) -> Line:
    """Write a file into a folder, or into the nearest above it that exists, and look how much room it has."""
    places = (folder.absolute(), *folder.absolute().parents)
    there = next(place for place in places if os.path.exists(place))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        why = "it is a file" if there.is_file() else (error.strerror or str(error)).lower()
        return Line(otherwise, f"{there} cannot be written ({why}): give another --{flag}")
    free = shutil.disk_usage(there).free / 1e9
    if free < LEAST_DISK:
        return Line(WARNING, f"{folder}: {free:.1f} GB free: make room, or give another --{flag}")
    return Line(OK, f"{folder} can be written, {free:.0f} GB free")


# ---- the server -----------------------------------------------------------------------------------


def check_group(name: str, token: str) -> Line:
    """Say under which name a submission would be sent, and whether a token is set, without showing it."""
    if name == Settings.model_fields["group_name"].default:
        return Line(WARNING, f"'{name}' is the default: set GROUP_NAME in .env, or give --group_name")
    return Line(OK, f"'{name}', {'with a' if token else 'without a'} token")


def check_server(url: Url) -> tuple[Line, requests.Response | None, datetime]:
    """Ask the server for nothing but a head; return what to say, the answer if there is one, and the time."""
    now = datetime.now(UTC)
    if not url:
        return Line(WARNING, "none: give --server_url, or set SERVER_URL in .env"), None, now
    if url == LOCAL:
        return Line(OK, "a run starts its own"), None, now
    try:
        with Deadline(SECONDS) as deadline:
            reply = deadline.session.head(url.full, timeout=SECONDS, proxies=proxies_for(url))
    except (requests.RequestException, ValueError) as error:  # ValueError: a host name that cannot be one
        return Line(PROBLEM, f"{url} does not answer ({_reason(error)}): check host, port and network; a run "
                             "would save its submission and not send it"), None, now  # fmt: skip
    return judge(url, reply.status_code, reply.headers.get("Location", "")), reply, datetime.now(UTC)


def judge(url: Url, status: int, location: str) -> Line:
    """Say what an answer to a HEAD request tells of the URL: little, since only a POST is taken there."""
    what = f"{url} answers a HEAD request with {status}"
    if 300 <= status < 400:
        return Line(WARNING, f"{what} and points to {masked(location)}: set that URL if you trust it")
    if status == 404:  # some servers answer so wherever they take nothing but a POST
        return Line(WARNING, f"{what}: compare it with the announced URL, down to its last slash")
    if status >= 500 and status != 501:  # 501: it knows no HEAD
        return Line(WARNING, f"{what}: try again, then tell the organisers")
    return Line(OK, what)


def check_clock(told: str, now: datetime) -> Line:
    """Compare the Date of the server's answer, which has whole seconds, with this machine's time."""
    try:
        ahead = (now - parsedate_to_datetime(told).astimezone(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return Line(WARNING, "the server tells no time: ask the organisers for theirs")
    if abs(ahead) > DRIFT:
        side = "ahead of" if ahead > 0 else "behind"
        return Line(
            WARNING, f"this machine's is {abs(ahead):.0f} s {side} the server's, which closes by its own"
        )
    return Line(OK, f"{time.strftime('%H:%M:%S')}, as the server's")


def _reason(error: BaseException) -> str:
    """Return the operating system's message from a chain of wrapped network errors."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return (getattr(error, "strerror", None) or str(error)).lower()


if __name__ == "__main__":
    run_script(main, Settings)

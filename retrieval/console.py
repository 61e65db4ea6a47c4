"""The `main` of a command and its form in; its run from the command line, with an exit status, out."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOPPED = "stopped by Ctrl-C; no file is half-written"
starting = True  # until a command has read its form


def _end_by_ctrl_c(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Print a sentence in the place of a traceback if Ctrl-C comes before run_command, in the imports."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {STOPPED}", file=sys.stderr)
    raise SystemExit(130)


def _on_ctrl_c(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but in the first imports, and in that of torch, end at once.

    Python's import may pass over the error, and torch's C++ code abort.
    """
    while frame:
        importing = frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        if importing and (starting or str(frame.f_locals.get("name")).startswith("torch")):
            print(f"error: {STOPPED}", file=sys.stderr, flush=True)
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


sys.excepthook = _end_by_ctrl_c
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
    signal.signal(signal.SIGINT, _on_ctrl_c)

import gc
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before the imports that need a package: in a fresh checkout a sentence takes the place of a traceback.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(f"error: Python 3.{sys.version_info[1]} is not supported: take 3.11 to 3.14")
if missing := [name for name in ("numpy", "PIL", "pydantic_settings", "dotenv", "requests", "tqdm")
               if find_spec(name) is None]:  # fmt: skip
    hint = "run `make demo` once and `source .venv/bin/activate`, or `pip install -r requirements.txt`"
    raise SystemExit(f"error: No module named {missing[0]!r}: {hint}")

from tqdm import tqdm

from retrieval.distributed import rank
from retrieval.errors import InputError, OthersEndedError, RunError, StopError, did_you_mean, printable
from retrieval.files import FULL
from retrieval.forms import Form, FormType, read_form
from retrieval.machine import program


def run_script(main: Callable[[FormType], None], form: type[FormType]) -> None:
    """Read the form from the command line and call `main` with it; end with a sentence and an exit status.

    Status 0: done. 1: something outside failed. 2: the input cannot be used. 130: Ctrl-C.
    """
    run_command({"": (form, main)})


def run_command(commands: dict[str, tuple[type[Form], Callable[[Any], None]]]) -> None:
    """Run the command {name: (form, main)} that the first argument names, as run_script does."""
    global starting
    _log_to_console()
    _set_a_home()
    gc.set_threshold(100_000)  # collect less often: importing torch and timm then takes about 10 % less time
    form = None
    try:
        command, arguments = _choose(commands, sys.argv[1:])
        kind, main = commands[command]
        form = read_form(kind, arguments, program=f"{program()} {command}".strip())
        starting = False
        main(form)
    except StopError as error:
        raise SystemExit(error.status) from None
    except (InputError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        _stop(error, 2)
    except MemoryError:
        _stop("the memory is full: end other programs, or take fewer or smaller images", 1)
    except OSError as error:
        _stop(f"{_sentence(error)}{_room(error, form)}", 1)
    except (RunError, OthersEndedError) as error:
        _stop(error, 1)
    except ModuleNotFoundError as error:
        _stop(f"{error}: run `pip install -r requirements.txt`", 1)
    except KeyboardInterrupt:
        _stop(STOPPED, 130)
    finally:
        gc.freeze()  # without it Python searches all of torch for garbage as it ends, for a second


def _choose(commands: dict[str, tuple], arguments: list[str]) -> tuple[str, list[str]]:
    if "" in commands:
        return "", arguments
    if arguments and arguments[0] in commands:
        return arguments[0], arguments[1:]
    known = "\n".join(f"    {name:12} {form.__doc__}" for name, (form, _) in commands.items())
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {program()} COMMAND [flags]\n\n{known}\n\nCOMMAND --help lists its flags")
        raise SystemExit(0)
    hint = did_you_mean(arguments[0], commands) if arguments else ""
    raise InputError(f"give one of these commands first{hint or ':'}\n{known}")


def _log_to_console() -> None:
    """Print what the package logs: information on standard output, warnings on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            stream.reconfigure(errors="backslashreplace")  # a file name in another script must not stop a run
    logging.raiseExceptions = False  # nor must a reader that closes the pipe, as `| head` does
    output, errors = _AboveBars(sys.stdout), _AboveBars(sys.stderr)
    output.addFilter(lambda record: record.levelno < logging.WARNING)
    output.setFormatter(_Printable("%(message)s"))
    errors.setLevel(logging.WARNING)
    errors.addFilter(lambda record: setattr(record, "kind", record.levelname.lower()) or True)
    errors.setFormatter(_Printable("%(kind)s: %(message)s"))
    package = logging.getLogger("retrieval")
    # Rank 0 logs for all processes; the others print errors only.
    package.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    package.handlers = [output, errors]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not that it cannot keep its list of fonts


def _set_a_home() -> None:
    """Give a user id without a home `/`, as Docker does: else `~` raises, or names a folder here."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"


class _AboveBars(logging.StreamHandler):
    """Prints above the progress bars, which are drawn again below, and not behind one in its line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class _Printable(logging.Formatter):
    """Escapes control characters: a name from a file, a folder or a server must not command the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, line by line."""
        return _in_lines(super().format(record))


def _in_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _sentence(error: OSError) -> str:
    return f"{error.filename or 'the system'}: {error.strerror.lower()}" if error.strerror else str(error)


def _room(error: OSError, form: Form | None) -> str:
    """Return the end of a sentence about a full disk, with the flag whose folder holds the file."""
    if error.errno not in FULL:
        return ""
    file = Path(error.filename or "").absolute()
    for name, value in form or ():
        if isinstance(value, Path) and file.is_relative_to(value.absolute()):
            return f": make room, or give another --{name}"
    return ": make room"


def _stop(error: BaseException | str, status: int) -> None:
    """Print the error as a sentence, and exit."""
    if isinstance(error, OSError):
        error = _sentence(error)
    by_torchrun = "LOCAL_RANK" in os.environ
    if by_torchrun:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now; print the error first
    sentence = _in_lines(f"error: {error}")
    print(f"process {rank() + 1}: {sentence}" if rank() else sentence, file=sys.stderr)
    if by_torchrun:
        time.sleep(1)  # time for the other processes to print their own errors
    raise SystemExit(status)

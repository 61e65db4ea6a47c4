"""A script's `main` in; its run from the command line, ended by a sentence and an exit status, out."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrieval.distributed import which_process
from retrieval.errors import InputError, OthersEndedError, RunError, did_you_mean
from retrieval.settings import Form, FormType, read_form


def run_script(main: Callable[[FormType], None], form: type[FormType]) -> None:
    """Read the form from the command line and call `main` with it; end with a sentence and an exit status.

    Status 0: done. 1: something outside failed. 2: the input cannot be used. 130: Ctrl-C.
    """
    run_command({"": (form, main)})


def run_command(commands: dict[str, tuple[type[Form], Callable[[Any], None]]]) -> None:
    """As run_script, for a script whose first argument chooses one of several commands."""
    _log_to_console()
    # Instead of every 700 to 2000 objects: torch and timm are imported in nine tenths of the time.
    gc.set_threshold(100_000)
    try:
        command, arguments = _choose(commands, sys.argv[1:])
        form, main = commands[command]
        main(read_form(form, arguments, program=f"{Path(sys.argv[0]).name} {command}".strip()))
    except (InputError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        _stop(error, 2)
    except (RunError, OthersEndedError, OSError) as error:
        _stop(error, 1)
    except ModuleNotFoundError as error:
        _stop(f"{error}: run `pip install -r requirements.txt`", 1)
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C; no file is half-written", 130)
    finally:
        gc.freeze()  # or Python looks through all of torch once more, for a second, as it ends


def _choose(commands: dict[str, tuple], arguments: list[str]) -> tuple[str, list[str]]:
    if "" in commands:
        return "", arguments
    if arguments and arguments[0] in commands:
        return arguments[0], arguments[1:]
    known = "\n".join(f"    {name:10} {form.__doc__}" for name, (form, _) in commands.items())
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {Path(sys.argv[0]).name} COMMAND [flags]\n\n{known}")
        raise SystemExit(0)
    hint = did_you_mean(arguments[0], commands) if arguments else ""
    raise InputError(f"give one of these commands first{hint or ':'}\n{known}")


def _log_to_console() -> None:
    """What our rooms log: information to standard output, warnings to standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")  # a file name in any script never stops a run
    logging.raiseExceptions = False  # nor does a reader that went away, as with `| head`
    told, warned = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    told.addFilter(lambda record: record.levelno < logging.WARNING)
    warned.setLevel(logging.WARNING)
    warned.addFilter(lambda record: setattr(record, "kind", record.levelname.lower()) or True)
    warned.setFormatter(logging.Formatter("%(kind)s: %(message)s"))
    rooms = logging.getLogger("retrieval")
    # Of several processes the first one speaks; the others end with a sentence, if with an error.
    rooms.setLevel(logging.INFO if which_process() == 0 else logging.ERROR)
    rooms.handlers = [told, warned]


def _stop(error: BaseException | str, status: int) -> None:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'the system'}: {error.strerror.lower()}"
    by_torchrun = "LOCAL_RANK" in os.environ
    if by_torchrun:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends a moment later anyway, with its own sentence
    number = which_process()
    print(f"process {number + 1}: error: {error}" if number else f"error: {error}", file=sys.stderr)
    if by_torchrun:
        time.sleep(1)  # or the others are ended before they have said theirs
    raise SystemExit(status)

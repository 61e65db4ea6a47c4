"""The `main` of a command and its form in; its run from the command line, with an exit status, out."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

# Before the imports that need a package: in a fresh checkout a sentence takes the place of a traceback.
if missing := [name for name in ("numpy", "PIL", "pydantic_settings", "dotenv", "requests", "tqdm")
               if find_spec(name) is None]:  # fmt: skip
    hint = "run `make demo` once and `source .venv/bin/activate`, or `pip install -r requirements.txt`"
    raise SystemExit(f"error: No module named {missing[0]!r}: {hint}")

from retrieval.distributed import rank
from retrieval.errors import InputError, OthersEndedError, RunError, StopError, did_you_mean
from retrieval.forms import Form, FormType, read_form
from retrieval.machine import program


def run_script(main: Callable[[FormType], None], form: type[FormType]) -> None:
    """Read the form from the command line and call `main` with it; end with a sentence and an exit status.

    Status 0: done. 1: something outside failed. 2: the input cannot be used. 130: Ctrl-C.
    """
    run_command({"": (form, main)})


def run_command(commands: dict[str, tuple[type[Form], Callable[[Any], None]]]) -> None:
    """Run the command {name: (form, main)} that the first argument names, as run_script does."""
    _log_to_console()
    gc.set_threshold(100_000)  # collect less often: importing torch and timm then takes about 10 % less time
    try:
        command, arguments = _choose(commands, sys.argv[1:])
        form, main = commands[command]
        main(read_form(form, arguments, program=f"{program()} {command}".strip()))
    except StopError as error:
        raise SystemExit(error.status) from None
    except (InputError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        _stop(error, 2)
    except (RunError, OthersEndedError, OSError) as error:
        _stop(error, 1)
    except ModuleNotFoundError as error:
        _stop(f"{error}: run `pip install -r requirements.txt`", 1)
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C; no file is half-written", 130)
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
    output, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    output.addFilter(lambda record: record.levelno < logging.WARNING)
    errors.setLevel(logging.WARNING)
    errors.addFilter(lambda record: setattr(record, "kind", record.levelname.lower()) or True)
    errors.setFormatter(logging.Formatter("%(kind)s: %(message)s"))
    package = logging.getLogger("retrieval")
    # Rank 0 logs for all processes; the others print errors only.
    package.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    package.handlers = [output, errors]


def _stop(error: BaseException | str, status: int) -> None:
    """Print the error as a sentence, and exit."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'the system'}: {error.strerror.lower()}"
    by_torchrun = "LOCAL_RANK" in os.environ
    if by_torchrun:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now; print the error first
    print(f"process {rank() + 1}: error: {error}" if rank() else f"error: {error}", file=sys.stderr)
    if by_torchrun:
        time.sleep(1)  # time for the other processes to print their own errors
    raise SystemExit(status)

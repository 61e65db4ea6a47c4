"""Command line, environment and `.env` in; one typed, checked form out, or one sentence and status 2.

The command line wins over the environment, that over `.env`, and that over the defaults in the script.
"""

from __future__ import annotations

import io
import logging
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict, SettingsError

from retrieval.errors import InputError, did_you_mean
from retrieval.words import WORDS

CACHE_DIR = Path("~/.cache/image-retrieval")
LOCAL = "local"  # the URL of the evaluation server that a run starts by itself

log = logging.getLogger("retrieval.settings")


# ---- the types of the settings --------------------------------------------------------------------


def _path(value: Any) -> Path:
    if not str(value):
        raise ValueError("it may not be empty")  # Path("") would be the current folder
    if "\0" in str(value):
        raise ValueError("it holds a character that no path can have")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("there is no such user; write the folder out") from None


def _existing_folder(path: Path) -> Path:
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise ValueError("it is a file; give the folder that holds the images")
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path.absolute()}; create it or name another one")
    return path


def _server_url(url: str) -> str:
    """A URL without the blanks around it, or LOCAL; '' means that nothing is sent."""
    stripped = url.strip()
    if stripped != url:
        log.warning("removed the blanks around the server's URL: %s", stripped)
    if stripped == LOCAL:
        return stripped
    try:
        parts = urlsplit(stripped)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number, or a bracket is missing
        valid = False
    if stripped and (not valid or re.search(r"\s", stripped)):
        raise ValueError("a server's URL looks like http://10.0.0.7:3001/retrieval/")
    if stripped and parts.hostname == "host":
        raise ValueError("HOST stands for the name or the address of your server")
    return stripped


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it may not be empty")
    return text


def _existing_file(path: Path) -> Path:
    if os.path.isdir(path):
        raise ValueError("it is a folder; give the file")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path.absolute()}")
    return path


def _existing(path: Path) -> Path:
    if not os.path.exists(path):
        raise ValueError(f"there is no file or folder {path.absolute()}")
    return path


def _no_folder(path: Path) -> Path:
    if os.path.isdir(path):
        raise ValueError("it is a folder; give a file")
    return path


def _with_zone(moment: datetime) -> datetime:
    """A moment without a zone is one of this machine's clock."""
    return moment if moment.tzinfo else moment.astimezone()


NewFolder = Annotated[Path, BeforeValidator(_path)]
Folder = Annotated[NewFolder, AfterValidator(_existing_folder)]
File = Annotated[Path, BeforeValidator(_path), AfterValidator(_existing_file)]
FileOrFolder = Annotated[Path, BeforeValidator(_path), AfterValidator(_existing)]
NewFile = Annotated[Path, BeforeValidator(_path), AfterValidator(_no_folder)]
Port = Annotated[int, Field(ge=0, le=65535)]
Moment = Annotated[datetime, AfterValidator(_with_zone)]
PositiveInt = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(ge=16)]  # pixels: networks halve it five times
Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveAmount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ServerUrl = Annotated[str, AfterValidator(_server_url)]
GroupName = Annotated[str, AfterValidator(_not_blank)]
GroupToken = SecretStr  # no file and no page shows it
EngineWord = Literal["auto", "torch", "onnx"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Crop = Literal["auto", "none", "face"]
Search = Literal["exact", "flat", "ivf", "hnsw"]
Freeze = Literal["bn", "stem", "all_but_last", "backbone"]
Augmentation = Literal["gentle", "plain", "strong"]
Tracker = Literal["none", "tensorboard", "wandb"]


# ---- the form -------------------------------------------------------------------------------------


class Form(BaseSettings):
    """A script's settings: subclass it with typed fields named in WORDS and their defaults."""

    refused: ClassVar[dict[str, str]] = {}  # flags of other scripts that this one cannot have, and why

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        cli_implicit_flags=True,  # a switch takes no value: --custom_dataset or --no-custom_dataset
        cli_avoid_json=True,
        cli_parse_none_str="unset",  # what --help calls None; not "none" or "null": a group may be called so
        case_sensitive=True,
        cli_exit_on_error=False,  # the sentence is ours
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, setting in cls.model_fields.items():
            if name.upper() not in WORDS and name not in WORDS:
                raise TypeError(f"the setting {name} needs a meaning: add it to WORDS in retrieval/words.py")
            setting.description = WORDS.get(name.upper()) or WORDS[name]

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **others) -> tuple:  # noqa: ANN001, ANN003
        """After the command line, which pydantic-settings asks first: arguments, environment, .env."""
        environment = InitSettingsSource(cls, _settings_in(cls, os.environ))
        return init_settings, environment, InitSettingsSource(cls, _settings_in(cls, _dotenv()))


def _settings_in(form: type[Form], names: dict[str, str | None]) -> dict[str, str]:
    """The form's own settings among the names of the environment or of .env; an empty value is none."""
    fields = [field for field in form.model_fields if field.upper() in WORDS]
    return {field: names[field.upper()] for field in fields if names.get(field.upper())}


def _dotenv() -> dict[str, str | None]:
    """The names in the .env of the current folder, if there is one. Raises InputError for a broken line."""
    path = Path(".env")
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path.absolute()} is not UTF-8 text: save it as UTF-8") from None
    for line in parse_stream(io.StringIO(text)):
        if line.error or (line.key and line.value is None):
            written = line.original.string.lstrip()
            number = line.original.line + line.original.string.removesuffix(written).count("\n")
            broken = written.partition("\n")[0]
            raise InputError(f"{path.absolute()}, line {number}: {broken!r} is not of the form NAME=value")
    return dotenv_values(stream=io.StringIO(text))


FormType = TypeVar("FormType", bound=Form)


def read_form(form: type[FormType], arguments: list[str], program: str | None = None) -> FormType:
    """Fill in a form from the command line's arguments, the environment, .env and the form's defaults.

    Warns of names in .env that no form knows. Raises InputError, with a sentence for each wrong setting.
    """
    known = [word for word in WORDS if word.isupper()]
    for name in _dotenv():
        if name not in known:
            hint = (
                f": it is a flag only, --{name.lower()}"
                if name.lower() in WORDS
                else did_you_mean(name.upper(), known)
            )
            log.warning(".env sets %s, which no script reads%s", name, hint)
    try:
        return form(_cli_parse_args=arguments, _cli_prog_name=program)
    except SettingsError as error:
        raise InputError(_flag_sentence(str(error), form)) from None
    except ValidationError as error:
        sentences = [_value_sentence(problem, arguments) for problem in error.errors()]
        raise InputError("\nerror: ".join(sentences)) from None


def _flag_sentence(problem: str, form: type[Form]) -> str:
    problem = problem.removeprefix("error parsing CLI: ")
    unknown = re.match(r"unrecognized arguments: ((--[^\s=]+)?.*)", problem)
    if not unknown:
        return f"{problem} (--help lists the flags)"
    refused = form.refused.get((unknown[2] or "").removeprefix("--"))
    if refused:
        return f"{unknown[2]} is not for this script: {refused}"
    if not unknown[2]:
        return f"{unknown[1]} is neither a flag nor a flag's value: quote what has blanks (see --help)"
    hint = did_you_mean(unknown[2].lower(), [f"--{name}" for name in form.model_fields])
    return f"there is no flag {unknown[2]}{hint} (--help lists the flags)"


def _value_sentence(problem: dict[str, Any], arguments: list[str]) -> str:
    """Where a wrong value stands, what it is, and what is wrong with it."""
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"give --{name}: {WORDS.get(name.upper()) or WORDS[name]}"
    what = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if any(argument.partition("=")[0] == f"--{name}" for argument in arguments):
        where = f"--{name}"
    elif name.upper() in WORDS and os.environ.get(name.upper()):
        where = f"{name.upper()} in the environment"
    elif name.upper() in WORDS and _dotenv().get(name.upper()):
        where = f"{name.upper()} in .env"
    elif str(problem["input"]) in arguments:
        where = "the argument"
    else:
        where = f"the script's default for --{name}"
    return f"{where} is '{problem['input']}': {what}"


# ---- running a script -----------------------------------------------------------------------------

"""Command line, recipe, environment and `.env` in; one typed, checked form out, or an InputError.

The precedence is: command line, recipe (retrieval/recipe.py), environment, `.env`, defaults in the script.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from inspect import get_annotations
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from retrieval.command_line import FormParser, choices_of, help_of
from retrieval.errors import InputError, did_you_mean
from retrieval.recipe import read_recipe

# The settings that the environment and .env may set, there in capitals, in the order of .env.example.
# All others are flags only, since systems set names like DEVICE for purposes of their own.
IN_ENVIRONMENT = (
    "model_type", "crop", "query_dir", "gallery_dir", "top_k", "custom_dataset", "server_url", "group_name",
    "group_token", "output_dir", "batch_size", "loss", "model", "train_dir", "save_dir", "epochs", "tracker",
    "cache_dir",
)  # fmt: skip

CONTROL = r"[\x00-\x1f]"  # characters that "C:\\new\\table" holds once Python has read it

log = logging.getLogger("retrieval.settings")


# ---- the form -------------------------------------------------------------------------------------


class _FormClass(type(BaseSettings)):
    """Records the mistakes in an edited form: read_form raises them, not the import of the script."""

    def __new__(metacls, name: str, bases: tuple, namespace: dict[str, Any], **options: Any) -> type[Form]:
        mistakes = []
        while True:
            try:
                form = super().__new__(metacls, name, bases, dict(namespace), **options)
            except PydanticUserError as error:
                if error.code not in ("model-field-overridden", "model-field-missing-annotation"):
                    raise
                field = re.search(r"[`'](\w+)", error.message)[1]  # the attribute that has no type
                mistakes.append(_untyped(field, namespace.pop(field), bases))
            else:
                form.mistakes = (*mistakes, *form.mistakes)
                return form


class Form(BaseSettings, metaclass=_FormClass):
    """The settings of a command: typed fields with their defaults, each with its help below it.

    The first paragraph of the help is what --help prints; docs/settings.md also holds the others. A script
    may repeat a field of a shared form with another default: the help stays that of the shared form.
    """

    refused: ClassVar[dict[str, str]] = {}  # flags of other scripts that this one cannot have, and why
    flags_only: ClassVar[tuple[str, ...]] = ()  # settings that it does not take from the environment
    mistakes: ClassVar[tuple[str, ...]] = ()  # error messages about wrong edits

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        cli_implicit_flags="toggle",  # a switch takes no value
        cli_avoid_json=True,
        cli_parse_none_str="unset",  # None on the command line; a group may be called "none" or "null"
        case_sensitive=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        for name, field in cls.model_fields.items():
            shared = shared_field(cls, name)
            field.description = field.description or (shared.description if shared else "")
            # Only a form that repeats shared fields can misspell one. Elsewhere a missing help is no mistake:
            # pydantic finds no attribute docstrings in a module that was run as a script before its import.
            if not field.description and any(base.model_fields for base in cls.__bases__):
                hint = did_you_mean(name.lower(), [known for known in cls.model_fields if known != name])
                cls.mistakes += (f"there is no setting {name}{hint} (a new one needs its help below it)",)

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **others) -> tuple:  # noqa: ANN001, ANN003
        """Return the sources after the command line: arguments (a recipe), the environment and .env."""
        outside = {name: value for name, (value, _) in _set_outside(cls, _dotenv()).items()}
        return init_settings, InitSettingsSource(cls, outside)


FormType = TypeVar("FormType", bound=Form)


def shared_field(form: type[Form], name: str) -> FieldInfo | None:
    """Return the field of this name in the shared form that declares it, or None for a form's own field."""
    parents = [parent for parent in form.__mro__[1:] if issubclass(parent, Form)]
    return next((parent.model_fields[name] for parent in parents if name in parent.model_fields), None)


def _untyped(field: str, value: Any, bases: tuple[type[Form], ...]) -> str:
    """Return how to write a field that lost its type, or which field a misspelt name may mean."""
    known = [name for base in bases for name in getattr(base, "model_fields", {})]
    if field not in known:
        return f"there is no setting {field}{did_you_mean(field.lower(), known)}"
    parents = [parent for base in bases for parent in base.__mro__]
    kinds = [get_annotations(parent).get(field) for parent in parents]
    kind = next((kind for kind in kinds if isinstance(kind, str)), "its type")
    return f"{field} needs its type again: write {field}: {kind} = {value!r}"


# ---- environment and .env -------------------------------------------------------------------------


def _set_outside(form: type[Form], dotenv: dict[str, str | None]) -> dict[str, tuple[str, str]]:
    """Return the value of each setting that .env or the environment sets, and where it stands.

    An empty value counts as unset.
    """
    return {
        field: (names[field.upper()], f"{field.upper()} in {place}")
        for place, names in ((".env", dotenv), ("the environment", os.environ))
        for field in form.model_fields
        if field in IN_ENVIRONMENT and field not in form.flags_only and names.get(field.upper())
    }


def _dotenv() -> dict[str, str | None]:
    """Read the .env of the current folder, if there is one. Raises InputError for a broken line."""
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
            raise InputError(  # without the line, which may hold a password
                f"{path.absolute()}, line {number} is not of the form NAME=value, or lacks a closing quote"
            )
    return dotenv_values(stream=io.StringIO(text))


def _warn_of_unknown_names(form: type[Form], dotenv: dict[str, str | None]) -> None:
    known = [name.upper() for name in IN_ENVIRONMENT]
    for name in dotenv:
        if name not in known:
            is_flag = name.lower() in form.model_fields and name.lower() not in IN_ENVIRONMENT
            hint = f": it is a flag only, --{name.lower()}" if is_flag else did_you_mean(name.upper(), known)
            log.warning(".env sets %s, which no script reads%s", name, hint)


# ---- recipe ---------------------------------------------------------------------------------------


def _set_by_recipe(form: type[Form], given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the value of each setting that the recipe sets, and where it stands; nothing without a recipe.

    `given` are the values of the flags. Raises as read_recipe.
    """
    if "recipe" not in form.model_fields:
        return {}
    path = os.path.expanduser(given.get("recipe", form.model_fields["recipe"].default) or "")
    if not os.path.isfile(path):  # where a recipe is asked for, the form's own check says so
        return {}
    settings = read_recipe(Path(path), form.model_fields, form.refused)
    return {name: (value, f"{name} in {path}") for name, value in settings.items()}


# ---- read a form ----------------------------------------------------------------------------------


def read_form(form: type[FormType], arguments: list[str], program: str | None = None) -> FormType:
    """Fill in a form from the command line's arguments, a recipe, the environment, .env and its defaults.

    Warns of names in .env that no form knows, and logs which edited defaults have no effect. Raises
    InputError, with a sentence for each mistake in the form and for each wrong setting.
    """
    if form.mistakes:
        script = Path(sys.modules[form.__module__].__file__).name
        raise InputError("\nerror: ".join(f"{script}: {mistake}" for mistake in form.mistakes))
    dotenv = _dotenv()
    _warn_of_unknown_names(form, dotenv)
    given = {argument.partition("=")[0] for argument in arguments}
    origins = {name: origin for name, (_, origin) in _set_outside(form, dotenv).items()}
    parser = FormParser(form, program)
    source = CliSettingsSource(form, root_parser=parser, add_argument_method=parser.add_flag)
    try:
        flags = source(args=arguments)
        recipe = _set_by_recipe(form, flags())
        origins |= {name: origin for name, (_, origin) in recipe.items()}
        origins |= {name: f"--{name}" for name in form.model_fields if {f"--{name}", f"--no-{name}"} & given}
        settings = form(_cli_settings_source=flags, **{name: value for name, (value, _) in recipe.items()})
    except SettingsError as error:
        raise InputError(_flag_sentence(str(error), form, arguments)) from None
    except ValidationError as error:
        sentences = [_value_sentence(problem, arguments, origins, form) for problem in error.errors()]
        raise InputError("\nerror: ".join(sentences)) from None
    _log_overridden(settings, origins)
    _warn_of_other_network(settings, recipe, origins)
    return settings


def _warn_of_other_network(
    settings: Form, recipe: dict[str, tuple[Any, str]], origins: dict[str, str]
) -> None:
    """Warn if a flag takes the place of the network for which the recipe's other settings were chosen."""
    for name in ("model_type", "weights"):
        if name in recipe and origins[name] == f"--{name}":
            (chosen, origin), given = recipe[name], getattr(settings, name)
            if str(given) != str(chosen):
                log.warning("--%s %s wins over %s (%s), for which the recipe was chosen: nothing shows that "
                            "its other settings help here", name, given, origin, chosen)  # fmt: skip


def _log_overridden(settings: Form, origins: dict[str, str]) -> None:
    """Log each default that was edited in the script and has no effect, because something else wins."""
    for name, field in type(settings).model_fields.items():
        shared, origin = shared_field(type(settings), name), origins.get(name)
        edited = shared is not None and field.default != shared.default
        if edited and origin and not origin.startswith("--"):
            value = getattr(settings, name)
            log.info("%s (%s) wins over the script's default for %s (%s)", origin, value, name, field.default)


def _flag_sentence(problem: str, form: type[Form], arguments: list[str]) -> str:
    problem = re.sub(r"ignored explicit argument .*", "a switch takes no value", problem)
    unknown = re.match(r"unrecognized arguments: ((--[^\s=]+)?.*)", problem)
    if not unknown:
        return f"{problem} (--help lists the flags)"
    flag = unknown[2]
    if not flag and (joined := _joined(unknown[1].split()[0], form, arguments)):
        return f"{unknown[1]} is neither a flag nor a flag's value: write {joined}, without a blank"
    if not flag:
        return (
            f"{unknown[1]} is neither a flag nor a flag's value: quote what has blanks, and give a switch no "
            "value (see --help)"
        )
    name = flag.removeprefix("--")
    if refused := form.refused.get(name.removeprefix("no-")):
        return f"{flag} is not for this script: {refused}"
    if f"no_{name}" in form.model_fields:
        return f"there is no flag {flag}: it is the default, and --no_{name} undoes it"
    switches = [name for name, field in form.model_fields.items() if field.default is False]
    known = [f"--{name}" for name in form.model_fields]
    known += [f"--no-{name}" for name in switches if not name.startswith("no_")]
    # What begins with "no" asks for the opposite: --no_flip means --no-flip, and --report not --no_report.
    alike = [name for name in known if name.startswith("--no") == flag.lower().startswith("--no")]
    return f"there is no flag {flag}{did_you_mean(flag.lower(), alike)} (--help lists the flags)"


def _joined(word: str, form: type[Form], arguments: list[str]) -> str:
    """Return the flag before a surplus word with its values joined by commas; "" if it takes no such list."""
    before = arguments[: arguments.index(word)] if word in arguments else []
    places = [place for place, argument in enumerate(before) if argument.startswith("--")]
    if not places:
        return ""
    first, *others = arguments[places[-1] :]
    flag, *values = first.split("=", 1)
    values += takewhile(lambda other: not other.startswith("--"), others)
    field = form.model_fields.get(flag.removeprefix("--"))
    takes_a_list = field and ("list[" in str(field.annotation) or any("," in c for c in choices_of(field)))
    return f"{flag} {','.join(values)}" if takes_a_list else ""


def _value_sentence(
    problem: dict[str, Any], arguments: list[str], origins: dict[str, str], form: type[Form]
) -> str:
    """Return a sentence that says where a wrong value stands, what it is, and what is wrong with it."""
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"give --{name}: {help_of(form.model_fields[name])}"
    what = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    value = problem["input"]
    value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    default = "the argument" if value in arguments else f"the script's default for --{name}"
    where = origins.get(name, default)
    shown = re.sub(r"://\S*@", "://***@", value)  # a URL may hold a password
    shown = repr(shown) if re.search(CONTROL, shown) else f"'{shown}'"
    return f"{where} is {shown}: {what}"

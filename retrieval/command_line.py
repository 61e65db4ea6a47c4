"""The fields of a form in; an argument parser whose --help lists them in groups, a flag a row, out."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, HelpFormatter
from collections.abc import Iterator
from inspect import get_annotations
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsError

PLACEHOLDERS = {Path: "PATH", int: "N", float: "X", SecretStr: "TOKEN"}


class Metavar(str):
    """The placeholder of a flag's value in --help, such as FOLDER: part of the metadata of a type."""


class FormParser(ArgumentParser):
    """Parses the flags of a form; --help lists the script's own first, then those of each shared form."""

    def __init__(self, form: type[BaseSettings], program: str | None) -> None:
        width = min(get_terminal_size().columns, 110)
        super().__init__(
            prog=program,
            usage="%(prog)s [flags]",
            description=form.__doc__,
            allow_abbrev=False,
            formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30, width=width),
        )
        self.form = form
        shared = [base for base in form.__bases__ if base.model_fields]
        self.groups = {base: self.add_argument_group(_title(base)) for base in shared}

    def add_flag(self, _: ArgumentParser, flag: str, **options: Any) -> None:
        """Add a flag as pydantic-settings asks for it, with our placeholder and help.

        `--no-NAME` undoes a switch; --help lists the switch only.
        """
        name = flag.removeprefix("--")
        field = self.form.model_fields[name]
        options["help"] = help_of(field).replace("%", "%%")
        place = self._place(name)
        if "metavar" in options:
            options["metavar"] = options["metavar"] if name == flag else placeholder(field)
        else:  # a switch
            off = {"dest": name, "action": "store_false", "default": SUPPRESS, "help": SUPPRESS}
            place.add_argument(f"--no-{name}", **off)
        place.add_argument(flag, **options)
        if name == flag:  # a positional argument
            several = {"*": "[{} ...]", "+": "{} [...]"}.get(options.get("nargs"), "{}")
            self.usage += f" {several.format(options['metavar'])}"

    def _place(self, name: str) -> Any:
        """Return the group of a field: the parser itself where the script's own form declares the field."""
        if name in get_annotations(self.form):
            return self
        return next(group for base, group in self.groups.items() if name in base.model_fields)

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError, where argparse would print its own sentence and exit."""
        raise SettingsError(message)


def _title(form: type[BaseSettings]) -> str:
    """Return the first line of a form's docstring as the title of its group."""
    return form.__doc__.splitlines()[0].removesuffix(".").lower()


def placeholder(field: FieldInfo) -> str:
    """Return the placeholder of a flag's value in --help, which depends on its type."""
    parts = list(_parts(field.annotation, field.metadata))
    metavars = [part for part in parts if isinstance(part, Metavar)]
    return metavars[0] if metavars else next((PLACEHOLDERS[p] for p in parts if p in PLACEHOLDERS), "NAME")


def _parts(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    """Yield the types and the metadata that a type such as Annotated[int, Metavar("N")] | None is made of."""
    yield from metadata
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _parts(part, [])


def choices_of(field: FieldInfo) -> list[str]:
    """Return the values that a setting may have; an empty list if it may have any value."""
    literals = [part for part in _parts(field.annotation, []) if get_origin(part) is Literal]
    return list(field.examples or (get_args(literals[0]) if literals else ()))


def help_of(field: FieldInfo) -> str:
    """Return the line of a setting in --help: its sentence and its default."""
    default = default_of(field)
    return f"{sentence_of(field)} (default {default})" if default else sentence_of(field)


def sentence_of(field: FieldInfo) -> str:
    """Return the first paragraph of a setting's help, with the choices that it does not name."""
    text = " ".join(field.description.partition("\n\n")[0].split())
    choices = [choice for choice in choices_of(field) if choice not in text]
    return f"{text}: {', '.join(choices[:-1])} or {choices[-1]}" if choices else text


def default_of(field: FieldInfo) -> str:
    """Return the default as one types it, or "" for a switch, for None and for an empty text."""
    if field.is_required() or field.default is None or field.default is False or field.default == []:
        return ""
    if isinstance(field.default, list):
        return ",".join(map(str, field.default))
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)

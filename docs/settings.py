"""The forms of the scripts in; docs/settings.md and .env.example, which describe every setting, out.

python -m docs.settings

A test compares both files with what this writes: run it after a change of a setting, a default or a loss.
"""

from __future__ import annotations

from inspect import get_annotations
from pathlib import Path

from pydantic.fields import FieldInfo

import choose
import fine_tuning
import model_not_tuned
from retrieval.command_line import default_of, sentence_of
from retrieval.forms import IN_ENVIRONMENT, Form
from supcon.variants import VARIANTS

ROOT = Path(__file__).parent.parent
RETRIEVAL, TRAINING, CHOOSING = model_not_tuned.Settings, fine_tuning.Settings, choose.Settings

PAGE = """# Settings

A flag wins over a [recipe](means.md#a-recipe), a recipe over the environment, the environment over `.env` in
the folder where you type, and `.env` over the form at the top of the script. In the environment and in `.env`
the names are in capitals. Settings marked *flag* are flags only, since systems set names like DEVICE for
purposes of their own. `unset` as the value of a flag means none, as in `--clip unset`.

`python -m docs.settings` writes this page and `.env.example` from the forms of the scripts.

## `model_not_tuned.py` and `model_fine_tuned.py`

{retrieval}

`model_fine_tuned.py` takes the checkpoint of `--weights`, by default `checkpoints/fine_tuned_model.pth`.
It refuses `--model_type`, `--crop`, `--image_size`, `--detector`, `--face_margin` and `--min_face_size`,
which the checkpoint knows.

## `fine_tuning.py`

{training}

## `choose.py`

{choosing}

[choosing.md](choosing.md) explains them.
"""

ENVIRONMENT = """\
# Copy this file to .env and take the # off the lines you need. A flag on the command line wins over a recipe
# (--recipe), a recipe over the environment, the environment over .env, and .env over the script's defaults.
# Whatever is not listed here, such as --device, is a flag only.
"""
EXAMPLES = {
    "server_url": "http://HOST:3001/retrieval/", "group_name": '"my-team"', "custom_dataset": "false",
    "train_dir": "data/train",
}  # fmt: skip
NOTES = {
    "batch_size": "; in fine_tuning.py, images in a training step",
    "group_name": "; quotes keep blanks and # as they are",
    "custom_dataset": ": true or false",
}


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    tables = {"retrieval": RETRIEVAL, "training": TRAINING, "choosing": CHOOSING}
    return PAGE.format(**{name: _table(form) for name, form in tables.items()})


def env_example() -> str:
    """Return the text of .env.example: the help and the default of each setting that .env may set."""
    blocks = [ENVIRONMENT]
    for name in IN_ENVIRONMENT:
        field = (RETRIEVAL if name in RETRIEVAL.model_fields else TRAINING).model_fields[name]
        text = sentence_of(field).partition("; --no-")[0] + NOTES.get(name, "")
        value = EXAMPLES.get(name, default_of(field))
        blocks.append(f"# {text[0].upper()}{text[1:]}.\n# {name.upper()}={value}\n")
    return "\n".join(blocks)


def _table(form: type[Form]) -> str:
    """Return a row for each setting, the script's own first."""
    shared = [name for base in form.__bases__ for name in base.model_fields]
    rows = ["| flag | default | what it means |", "|---|---|---|"]
    own = [name for name in get_annotations(form) if name in form.model_fields]
    names = dict.fromkeys([*own, *shared])
    return "\n".join(rows + [_row(name, form.model_fields[name]) for name in names])


def _row(name: str, field: FieldInfo) -> str:
    default = f"`{default_of(field)}`" if default_of(field) else _defaults_of_losses(name)
    default = "off" if field.default is False else default
    more = " ".join(field.description.partition("\n\n")[2].split())
    text = f"{sentence_of(field)}. {more}" if more else sentence_of(field)
    return f"| `--{name}` | {default} | {text}{'' if name in IN_ENVIRONMENT else ' (*flag*)'} |"


def _defaults_of_losses(name: str) -> str:
    """Return the defaults that the losses give a setting of theirs, each with its losses."""
    users: dict[str, list[str]] = {}
    for loss, variant in VARIANTS.items():
        if name in variant.choices:
            users.setdefault(f"{variant.choices[name]}", []).append(f"`{loss}`")
    return "; ".join(f"{value} ({', '.join(losses)})" for value, losses in users.items())


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page(), encoding="utf-8")
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")

"""A template and its values in; an HTML page as bytes out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SHARED = Path(__file__).with_name("templates")  # what every page extends or includes


def render(templates: Path, template: str, **values: Any) -> bytes:
    """Render a template of the folder `templates` as UTF-8.

    Values are escaped. What UTF-8 cannot encode, such as half a surrogate pair, becomes a question mark.
    """
    return _environment(templates).get_template(template).render(values).encode("utf-8", "replace")


@cache
def _environment(templates: Path) -> Environment:
    loader = FileSystemLoader([templates, SHARED])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

"""A template of retrieval/templates and its values in; an HTML page, one file that opens offline, out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> bytes:
    """The page as UTF-8. Text is escaped, and what UTF-8 cannot say, such as half a letter, becomes a ?."""
    return _templates().get_template(template).render(values).encode("utf-8", "replace")


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

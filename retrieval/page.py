"""A template of retrieval/templates and its values in; an HTML page, one file that opens offline, out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> bytes:
    """The page as UTF-8. Text is escaped, and what UTF-8 cannot say, such as half a letter, becomes a ?."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values).encode("utf-8", "replace")

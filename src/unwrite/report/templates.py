"""How does text that a stranger wrote get into HTML? Only through these templates, which escape all of it."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from unwrite.errors import plain


def render(name: str, **values: Any) -> Markup:
    """A template of the package, filled in; every text is escaped and printable, and a value that lacks is an error."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable, loader=jinja2.FunctionLoader(own)
    )
    return Markup(environment.get_template(name).render(values))  # noqa: S704 - escaped just now


def own(name: str) -> Markup:
    """A file of the package, which may hold markup, style or script."""
    return Markup(resources.files("unwrite.report").joinpath(name).read_text("utf-8"))  # noqa: S704 - the package's own


def embedded(values: object) -> Markup:
    """Plain values as JSON that can stand in a script's element: every text is printable, and none can end it.

    Raises ValueError for a number that JSON does not have.
    """
    return htmlsafe_json_dumps(_all_printable(values), separators=(",", ":"), allow_nan=False)


def _all_printable(value: object) -> object:
    if isinstance(value, dict):
        return {plain(name): _all_printable(part) for name, part in value.items()}
    return [_all_printable(part) for part in value] if isinstance(value, (list, tuple)) else _printable(value)


def _printable(value: object) -> object:
    """Whatever a template prints, without control characters and the like; markup is the package's own."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
